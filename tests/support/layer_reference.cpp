// SPDX-License-Identifier: Apache-2.0
#include <support/layer_reference.hpp>

#include <algorithm>
#include <cmath>

namespace gdn_test {

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

/// w [out, in] times x [in].
values product(const values& w, const values& x) {
  values y(w.size() / x.size(), 0);
  for (std::size_t i = 0; i < w.size(); ++i) y[i / x.size()] += w[i] * x[i % x.size()];
  return y;
}

/// [head * dim, (head + 1) * dim) of p.
values head_of(const values& p, index_t head, index_t dim) {
  const auto begin = p.begin() + static_cast<std::ptrdiff_t>(head * dim);
  return {begin, begin + static_cast<std::ptrdiff_t>(dim)};
}

values unit(values v, double eps) {
  double sum = eps;
  for (const double x : v) sum += x * x;
  for (double& x : v) x /= std::sqrt(sum);
  return v;
}

}  // namespace

layer_result layer_by_formulas(const layer_batch& b, bool initial, const std::function<double(double)>& kept) {
  const gdn::layer_dims& d = b.dims;
  const auto at = [](auto i) { return static_cast<std::size_t>(i); };
  const auto hid = d.hidden, Hv = d.value_heads, K = d.key_dim, V = d.value_dim, W = d.conv_width, Dc = d.channels();
  layer_result out;
  out.y.assign(b.x.size(), 0);
  const auto N = b.documents();
  out.final_ = initial ? b.initial : values(at(N * b.state_size()), 0);
  out.final_conv = initial ? b.initial_conv : values(at(N * b.conv_size()), 0);
  const std::vector<index_t> rows = b.pack.indices();

  for (index_t n = 0; n < N; ++n) {
    double* state = out.final_.data() + n * b.state_size();     // [Hv, K, V]
    double* window = out.final_conv.data() + n * b.conv_size(); // [Dc, W]
    for (index_t t = b.pack.cu_seqlens[at(n)]; t < b.pack.cu_seqlens[at(n + 1)]; ++t) {
      const double* row = b.x.data() + rows[at(t)] * hid;
      const values x(row, row + hid);
      const values qkv = product(b.parameters[in_proj_qkv], x), z = product(b.parameters[in_proj_z], x),
                   beta = product(b.parameters[in_proj_b], x), a = product(b.parameters[in_proj_a], x);
      values p(at(Dc));
      for (index_t c = 0; c < Dc; ++c) {
        double* w = window + c * W;
        for (index_t j = 0; j + 1 < W; ++j) w[j] = w[j + 1];
        w[W - 1] = qkv[at(c)];
        double sum = 0;
        for (index_t j = 0; j < W; ++j) sum += b.parameters[conv1d][at(c * W + j)] * w[j];
        p[at(c)] = silu(sum);
      }
      values normed(at(Hv * V));
      for (index_t h = 0; h < Hv; ++h) {
        const index_t group = h / (Hv / d.key_heads);
        values q = unit(head_of(p, group, K), d.l2_eps), k = unit(head_of(p, d.key_heads + group, K), d.l2_eps);
        for (values* v : {&q, &k}) std::transform(v->begin(), v->end(), v->begin(), kept);
        const double write = kept(sigmoid(beta[at(h)]));
        double* S = state + h * K * V;
        const double alpha = std::exp(-std::exp(b.parameters[A_log][at(h)]) * softplus(a[at(h)] + b.parameters[dt_bias][at(h)]));
        values o(at(V), 0);
        for (index_t j = 0; j < V; ++j) {
          double read = 0;
          for (index_t i = 0; i < K; ++i) read += alpha * S[i * V + j] * k[at(i)];
          const double delta = write * (p[at(2 * d.keys() + h * V + j)] - read);
          for (index_t i = 0; i < K; ++i) {
            S[i * V + j] = alpha * S[i * V + j] + k[at(i)] * delta;
            o[at(j)] += S[i * V + j] * q[at(i)] / std::sqrt(static_cast<double>(K));
          }
        }
        double square = 0;
        for (const double v : o) square += v * v;
        for (index_t j = 0; j < V; ++j) {
          normed[at(h * V + j)] = kept(b.parameters[norm][at(j)] * o[at(j)] /
                                       std::sqrt(square / static_cast<double>(V) + d.norm_eps) *
                                       silu(z[at(h * V + j)]));
        }
      }
      const values y = product(b.parameters[out_proj], normed);
      std::copy(y.begin(), y.end(), out.y.begin() + rows[at(t)] * hid);
    }
  }
  return out;
}

double loss_of(const layer_batch& b, const layer_result& r) {
  double sum = 0;
  for (const index_t row : b.pack.indices()) {
    for (index_t i = row * b.dims.hidden; i < (row + 1) * b.dims.hidden; ++i) {
      sum += r.y[static_cast<std::size_t>(i)] * b.dy[static_cast<std::size_t>(i)];
    }
  }
  for (std::size_t i = 0; i < r.final_.size(); ++i) sum += r.final_[i] * b.d_final[i];
  for (std::size_t i = 0; i < r.final_conv.size(); ++i) sum += r.final_conv[i] * b.d_final_conv[i];
  return sum;
}

}  // namespace gdn_test
