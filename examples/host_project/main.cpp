// SPDX-License-Identifier: Apache-2.0
// A host project: its own device buffers, one layer over two packed documents, in float and in bfloat16. The result is
// compared with the formulas of the layer, token by token in double.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <cuda_runtime_api.h>

#include "layer.hpp"

namespace {

using host_project::device;
using host_project::index_t;
using values = std::vector<double>;

constexpr gdn::layer_dims dims{.hidden = 64, .key_heads = 2, .value_heads = 4, .key_dim = 32, .value_dim = 48};
const std::vector<index_t> cu_seqlens = {0, 70, 100};
const index_t tokens = cu_seqlens.back();

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// w [rows, columns] x
values product(const values& w, const double* x, index_t columns) {
  values y(w.size() / static_cast<std::size_t>(columns));
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double* row = w.data() + static_cast<index_t>(i) * columns;
    for (index_t j = 0; j < columns; ++j) y[i] += row[j] * x[j];
  }
  return y;
}

/// What the layer is: projections, convolution and SiLU, the gated delta rule, gated norm, projection.
values by_formulas(std::map<std::string, values, std::less<>>& w, const values& x) {
  const index_t hid = dims.hidden, Hk = dims.key_heads, Hv = dims.value_heads, K = dims.key_dim, V = dims.value_dim;
  const index_t Dc = dims.channels(), W = dims.conv_width;
  const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
  values y;
  for (std::size_t n = 0; n + 1 < cu_seqlens.size(); ++n) {
    std::vector<values> history(at(W), values(at(Dc)));
    values S(at(Hv * K * V));
    for (index_t t = cu_seqlens[n]; t < cu_seqlens[n + 1]; ++t) {
      const double* row = x.data() + t * hid;
      history.erase(history.begin());
      history.push_back(product(w["in_proj_qkv"], row, hid));
      const values z = product(w["in_proj_z"], row, hid), b = product(w["in_proj_b"], row, hid);
      const values a = product(w["in_proj_a"], row, hid);
      values c(at(Dc));
      for (index_t i = 0; i < Dc; ++i) {
        for (index_t j = 0; j < W; ++j) c[at(i)] += w["conv1d"][at(i * W + j)] * history[at(j)][at(i)];
        c[at(i)] *= sigmoid(c[at(i)]);
      }
      values out(at(Hv * V));
      for (index_t h = 0; h < Hv; ++h) {
        const auto unit = [&](index_t from) {
          values u(c.begin() + from, c.begin() + from + K);
          double square = dims.l2_eps;
          for (const double v : u) square += v * v;
          for (double& v : u) v /= std::sqrt(square);
          return u;
        };
        const index_t group = h / (Hv / Hk);
        const values q = unit(group * K), k = unit((Hk + group) * K);
        const double decay =
            std::exp(-std::exp(w["A_log"][at(h)]) * std::log1p(std::exp(a[at(h)] + w["dt_bias"][at(h)])));
        double square = 0;
        for (index_t j = 0; j < V; ++j) {
          double* column = S.data() + h * K * V + j;
          double read = 0;
          for (index_t i = 0; i < K; ++i) read += decay * column[i * V] * k[at(i)];
          const double delta = sigmoid(b[at(h)]) * (c[at(2 * Hk * K + h * V + j)] - read);
          double o = 0;
          for (index_t i = 0; i < K; ++i) {
            column[i * V] = decay * column[i * V] + k[at(i)] * delta;
            o += q[at(i)] * column[i * V] / std::sqrt(static_cast<double>(K));
          }
          out[at(h * V + j)] = o;
          square += o * o;
        }
        for (index_t j = 0; j < V; ++j) {
          double& o = out[at(h * V + j)];
          const double gate = z[at(h * V + j)];
          o *= w["norm"][at(j)] / std::sqrt(square / static_cast<double>(V) + dims.norm_eps) * gate * sigmoid(gate);
        }
      }
      const values last = product(w["out_proj"], out.data(), Hv * V);
      y.insert(y.end(), last.begin(), last.end());
    }
  }
  return y;
}

/// rms(error) / rms(reference) of a layer of type T on the device.
template <class T>
double error_of_layer() {
  const gdn::cuda::stream s;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> value(-1, 1);

  // The project's own buffers: weights in one block, x and y in others.
  gdn::workspace<device> measure;
  gdn::parameter_storage<T, device>::carve(measure, dims);
  const gdn::cuda::device_block weight_block(measure.peak());
  auto ws = weight_block.workspace();
  const auto weights = gdn::parameter_storage<T, device>::carve(ws, dims);
  std::map<std::string, values, std::less<>> numbers;
  weights.for_each([&](std::string_view name, const auto& w) {
    using E = typename std::remove_cvref_t<decltype(w)>::value_type;
    std::vector<E> host(static_cast<std::size_t>(w.size()));
    for (E& e : host) e = static_cast<E>(0.4F * value(random));
    gdn::cuda::copy_to_device<E>(host, w, s);
    for (const E e : host) numbers[std::string(name.substr(0, name.find('.')))].push_back(static_cast<double>(e));
  });
  std::vector<T> rows(static_cast<std::size_t>(tokens * dims.hidden));
  for (T& v : rows) v = static_cast<T>(value(random));
  const gdn::cuda::device_block x_block({rows.size() * sizeof(T)}), y_block({rows.size() * sizeof(T)});
  const auto x = gdn::make_tensor<device>(static_cast<T*>(x_block.data()), tokens, dims.hidden);
  const auto y = gdn::make_tensor<device>(static_cast<T*>(y_block.data()), tokens, dims.hidden);
  gdn::cuda::copy_to_device<T>(rows, x, s);

  host_project::layer<T> layer(dims, cu_seqlens, s);
  layer.forward(weights, x, y, s);

  const std::vector<T> got = gdn::cuda::copy_to_host(y, s);
  const values want = by_formulas(numbers, values(rows.begin(), rows.end()));
  double error = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - want[i], 2);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("[  SKIPPED ] no CUDA device");
    return 0;
  }
  try {
    const double in_float = error_of_layer<float>();
    const double in_bfloat16 = error_of_layer<gdn::bfloat16>();
    std::printf("relative error in float %.1e, in bfloat16 %.1e\n", in_float, in_bfloat16);
    return in_float <= 1e-5 && in_bfloat16 <= 2e-2 ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 3;
  }
}
