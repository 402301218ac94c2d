// SPDX-License-Identifier: Apache-2.0
/// @file  The operations around the delta rule on the CPU: products, convolution, norms.

#include <vector>

#include <gdn/core/storage.hpp>
#include <gdn/kokkos/backend.hpp>

#include "support.hpp"

namespace {

using gdn::accumulate_t;
using gdn::index_t;
using gdn::make_tensor;
using gdn_bench::random_values;

constexpr gdn::host_stream stream{};

/// Arguments: rows, in, out.
template <class T>
void linear_forward(benchmark::State& state) {
  const index_t L = state.range(0), in = state.range(1), out = state.range(2);
  const auto x = random_values<T>(L * in), w = random_values<T>(out * in, 0.02);
  std::vector<T> y(static_cast<std::size_t>(L * out));
  const gdn::kokkos::backend be;
  gdn::workspace<gdn::host_memory> none;
  for (auto _ : state) {
    be.linear_forward(make_tensor(x.data(), L, in), make_tensor(w.data(), out, in), make_tensor(y.data(), L, out), none,
                      stream);
  }
  gdn_bench::count(state, 2.0 * static_cast<double>(L * in * out),
                   static_cast<double>(sizeof(T)) * static_cast<double>(L * in + in * out + L * out));
}
template <class T>
void linear_backward_weight(benchmark::State& state) {
  const index_t L = state.range(0), in = state.range(1), out = state.range(2);
  const auto x = random_values<T>(L * in), dy = random_values<T>(L * out);
  std::vector<accumulate_t<T>> dw(static_cast<std::size_t>(in * out));
  const gdn::kokkos::backend be;
  gdn::workspace<gdn::host_memory> none;
  for (auto _ : state) {
    be.linear_backward_weight(make_tensor(dy.data(), L, out), make_tensor(x.data(), L, in),
                              make_tensor(dw.data(), out, in), none, stream);
  }
  gdn_bench::count(state, 2.0 * static_cast<double>(L * in * out), 0);
}

/// What the bandwidth of others is compared with: rows that fit in no cache. Arguments: rows, width.
template <class T>
void copy_rows(benchmark::State& state) {
  const index_t L = state.range(0), D = state.range(1);
  const auto x = random_values<T>(L * D);
  std::vector<T> y(x.size());
  const gdn::kokkos::backend be;
  for (auto _ : state) {
    be.copy_rows(make_tensor(x.data(), L, D), make_tensor(y.data(), L, D), stream);
    benchmark::ClobberMemory();
  }
  gdn_bench::count(state, 0, 2.0 * sizeof(T) * static_cast<double>(L * D));
}

/// Arguments: rows, channels, width.
template <class T>
void causal_conv1d(benchmark::State& state) {
  const index_t L = state.range(0), D = state.range(1), W = state.range(2);
  const auto x = random_values<T>(L * D), w = random_values<T>(D * W);
  std::vector<T> y(x.size());
  const gdn::conv_segment all{0, L, -1};
  const gdn::kokkos::backend be;
  for (auto _ : state) {
    be.causal_conv1d_forward(make_tensor(&all, 1), make_tensor(x.data(), L, D), gdn::tensor_ref<const T, 2>{},
                             make_tensor(w.data(), D, W), gdn::activation::silu, make_tensor(y.data(), L, D), stream);
  }
  gdn_bench::count(state, 0, 2.0 * sizeof(T) * static_cast<double>(L * D));
}

/// Arguments: rows, heads, dim.
template <class T>
void gated_norm(benchmark::State& state) {
  const index_t L = state.range(0), H = state.range(1), V = state.range(2);
  const auto o = random_values<T>(L * H * V), z = random_values<T>(L * H * V);
  const auto w = random_values<accumulate_t<T>>(V);
  std::vector<T> y(o.size());
  std::vector<accumulate_t<T>> rstd(static_cast<std::size_t>(L * H));
  const gdn::kokkos::backend be;
  for (auto _ : state) {
    be.gated_norm_forward(make_tensor(o.data(), L, H, V), make_tensor(z.data(), L, H, V), make_tensor(w.data(), V),
                          1e-6, make_tensor(y.data(), L, H, V), make_tensor(rstd.data(), L, H), stream);
  }
  gdn_bench::count(state, 0, 3.0 * sizeof(T) * static_cast<double>(L * H * V));
}

template <class F>
void add(const char* name, F f, std::vector<std::int64_t> sizes) {
  benchmark::RegisterBenchmark(name, f)->Args(sizes)->Unit(benchmark::kMillisecond)->UseRealTime();
}

}  // namespace

int main(int argc, char** argv) {
  gdn_bench::add_yardstick();
  add("copy_rows/f32", copy_rows<float>, {4096, 8192});
  add("linear_forward/f32", linear_forward<float>, {1024, 2048, 2048});
  add("linear_forward/bf16", linear_forward<gdn::bfloat16>, {1024, 2048, 2048});
  add("linear_backward_weight/f32", linear_backward_weight<float>, {1024, 2048, 2048});
  add("linear_backward_weight/bf16", linear_backward_weight<gdn::bfloat16>, {1024, 2048, 2048});
  add("causal_conv1d/f32", causal_conv1d<float>, {4096, 8192, 4});
  add("causal_conv1d/bf16", causal_conv1d<gdn::bfloat16>, {4096, 8192, 4});
  add("gated_norm/f32", gated_norm<float>, {4096, 32, 128});
  add("gated_norm/bf16", gated_norm<gdn::bfloat16>, {4096, 32, 128});
  return gdn_bench::run(argc, argv);
}
