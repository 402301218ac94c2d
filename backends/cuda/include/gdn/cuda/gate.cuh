// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Gates on the device: decay and write strength from two small projections.

#include <gdn/cuda/conv1d.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr index_t gate_tile = 64;  // rows per partial sum

/// log(1 + e^x), and x itself above 20, as torch's softplus.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

template <class T>
__global__ void gates_forward_kernel(tensor_ref<const T, 2, device_memory> a, tensor_ref<const T, 2, device_memory> b,
                                     const float* A_log, const float* dt_bias, tensor_ref<float, 2, device_memory> g,
                                     tensor_ref<T, 2, device_memory> beta) {
  const index_t heads = g.extent(1);
  const index_t n = g.extent(0) * heads;
  for (index_t i = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    const index_t t = i / heads;
    const index_t h = i % heads;
    g(t, h) = -expf(A_log[h]) * softplus(static_cast<float>(a(t, h)) + dt_bias[h]);
    beta(t, h) = static_cast<T>(sigmoid(static_cast<float>(b(t, h))));
  }
}

/// A thread walks over a tile of one head: partial [tiles, 2, Hv] = sums of dg g and of da.
template <class T>
__global__ void gates_backward_kernel(tensor_ref<const float, 2, device_memory> dg,
                                      tensor_ref<const float, 2, device_memory> d_beta,
                                      tensor_ref<const T, 2, device_memory> a, tensor_ref<const T, 2, device_memory> b,
                                      const float* A_log, const float* dt_bias, tensor_ref<T, 2, device_memory> da,
                                      tensor_ref<T, 2, device_memory> db, float* partial) {
  const index_t heads = a.extent(1);
  const index_t h = blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x;
  if (h >= heads) return;
  const index_t begin = blockIdx.x * gate_tile;
  const index_t end = begin + gate_tile < a.extent(0) ? begin + gate_tile : a.extent(0);
  const float rate = -expf(A_log[h]);
  double d_log = 0;
  double d_bias = 0;
  for (index_t t = begin; t < end; ++t) {
    const float x = static_cast<float>(a(t, h)) + dt_bias[h];
    const float d = dg(t, h) * rate;
    const float slope_a = d * (x > 20.0f ? 1.0f : sigmoid(x));
    const float s = sigmoid(static_cast<float>(b(t, h)));
    da(t, h) = static_cast<T>(slope_a);
    db(t, h) = static_cast<T>(d_beta(t, h) * s * (1.0f - s));
    d_log += static_cast<double>(d) * static_cast<double>(softplus(x));
    d_bias += static_cast<double>(slope_a);
  }
  partial[(2 * blockIdx.x) * heads + h] = static_cast<float>(d_log);
  partial[(2 * blockIdx.x + 1) * heads + h] = static_cast<float>(d_bias);
}

/// Sums of the gates' partial sums, in the order of the tiles.
template <class A>
__global__ void add_gate_sums_kernel(const A* partial, index_t tiles, index_t heads, A* dA_log, A* d_dt_bias) {
  const index_t h = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x;
  if (h >= heads) return;
  double d_log = static_cast<double>(dA_log[h]);
  double d_bias = static_cast<double>(d_dt_bias[h]);
  for (index_t t = 0; t < tiles; ++t) {
    d_log += static_cast<double>(partial[(2 * t) * heads + h]);
    d_bias += static_cast<double>(partial[(2 * t + 1) * heads + h]);
  }
  dA_log[h] = static_cast<A>(d_log);
  d_dt_bias[h] = static_cast<A>(d_bias);
}

template <class T>
void gates_forward(in_ref<T, 2> a, in_ref<T, 2> b, in_ref<float, 1> A_log, in_ref<float, 1> dt_bias,
                   tensor_ref<float, 2, device_memory> g, out_ref<T, 2> beta, stream_ref s) {
  if (g.size() == 0) return;
  launch("gates_forward", gates_forward_kernel<T>, striding_grid(g.size(), 256), 256, 0, s, a, b, A_log.data(),
         dt_bias.data(), g, beta);
}

inline memory_requirement gate_scratch(index_t tokens, index_t heads) {
  return {static_cast<std::size_t>(2 * divide_up(tokens, gate_tile) * heads) * sizeof(float)};
}

template <class T>
void gates_backward(in_ref<float, 2> dg, in_ref<float, 2> d_beta, in_ref<T, 2> a, in_ref<T, 2> b, in_ref<float, 1> A_log,
                    in_ref<float, 1> dt_bias, out_ref<T, 2> da, other_ref<T, 2> db,
                    tensor_ref<float, 1, device_memory> dA_log, tensor_ref<float, 1, device_memory> d_dt_bias,
                    workspace<device_memory>& ws, stream_ref s) {
  if (da.size() == 0) return;
  const scoped_mark scope(ws);
  const index_t heads = da.extent(1);
  const index_t tiles = divide_up(da.extent(0), gate_tile);
  const auto partial = ws.take<float>(tiles, 2, heads);
  launch("gates_backward", gates_backward_kernel<T>, grid_of(tiles, divide_up(heads, 64)), 64, 0, s, dg, d_beta, a, b,
         A_log.data(), dt_bias.data(), da, db, partial.data());
  launch("add_gate_sums", add_gate_sums_kernel<float>, grid_of(divide_up(heads, 64)), 64, 0, s, partial.data(), tiles, heads,
         dA_log.data(), d_dt_bias.data());
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
