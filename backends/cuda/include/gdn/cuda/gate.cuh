// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Gates on the device: decay and write strength from two small projections.

#include <gdn/concepts/operands.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/cuda/detail/activation.cuh>
#include <gdn/cuda/detail/partial_sums.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int gate_warps = 8;
inline constexpr int gate_rows = 4;  // of a warp
inline constexpr index_t gate_tile = gate_warps * gate_rows;

/// log(1 + e^x), and x itself above 20, as torch's softplus.
__device__ inline float softplus(float x) {
  return x > 20.0f ? x : log1pf(expf(x));
}

template <class T>
__global__ void gates_forward_kernel(tensor_ref<const T, 2, device_memory> a, tensor_ref<const T, 2, device_memory> b,
                                     const float* A_log, const float* dt_bias, tensor_ref<float, 2, device_memory> g,
                                     tensor_ref<T, 2, device_memory> beta) {
  const index_t heads = g.extent(1);
  const index_t n = g.extent(0) * heads;
  for (index_t i = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    const index_t t = quotient(i, heads);
    const index_t h = i - t * heads;
    g(t, h) = -expf(A_log[h]) * softplus(static_cast<float>(a(t, h)) + dt_bias[h]);
    beta(t, h) = static_cast<T>(sigmoid(static_cast<float>(b(t, h))));
  }
}

/// A block does a tile of 32 heads: a warp's lanes are the heads, its rows every 8th of the tile. partial [2, tiles,
/// Hv] = sums of dg g and of da, the warps added in their order.
template <class T>
__global__ void __launch_bounds__(32 * gate_warps)
    gates_backward_kernel(tensor_ref<const float, 2, device_memory> dg,
                          tensor_ref<const float, 2, device_memory> d_beta, tensor_ref<const T, 2, device_memory> a,
                          tensor_ref<const T, 2, device_memory> b, const float* A_log, const float* dt_bias,
                          tensor_ref<T, 2, device_memory> da, tensor_ref<T, 2, device_memory> db, float* partial) {
  __shared__ double sums[2][gate_warps][32];
  const index_t heads = a.extent(1);
  const auto lane = static_cast<index_t>(threadIdx.x % 32);
  const auto warp = static_cast<index_t>(threadIdx.x / 32);
  const index_t h = blockIdx.y * index_t{32} + lane;
  const index_t begin = blockIdx.x * gate_tile;
  const index_t end = begin + gate_tile < a.extent(0) ? begin + gate_tile : a.extent(0);
  double d_log = 0;
  double d_bias = 0;
  if (h < heads) {
    struct {
      float a, b, dg, d_beta;
    } in[gate_rows];  // all of them under way before the first store, which loads would not overtake
#pragma unroll
    for (int i = 0; i < gate_rows; ++i) {
      const index_t t = begin + warp + i * gate_warps;
      if (t < end) in[i] = {static_cast<float>(a(t, h)), static_cast<float>(b(t, h)), dg(t, h), d_beta(t, h)};
    }
    const float rate = -expf(A_log[h]);
    const float bias = dt_bias[h];
#pragma unroll
    for (int i = 0; i < gate_rows; ++i) {
      const index_t t = begin + warp + i * gate_warps;
      if (t >= end) break;
      const float x = in[i].a + bias;
      const float d = in[i].dg * rate;
      const float slope_a = d * (x > 20.0f ? 1.0f : sigmoid(x));
      const float s = sigmoid(in[i].b);
      da(t, h) = static_cast<T>(slope_a);
      db(t, h) = static_cast<T>(in[i].d_beta * s * (1.0f - s));
      d_log += static_cast<double>(d) * static_cast<double>(softplus(x));
      d_bias += static_cast<double>(slope_a);
    }
  }
  sums[0][warp][lane] = d_log;
  sums[1][warp][lane] = d_bias;
  __syncthreads();
  if (warp >= 2 || h >= heads) return;
  double sum = 0;
  for (int k = 0; k < gate_warps; ++k) sum += sums[warp][k][lane];
  partial[(warp * gridDim.x + blockIdx.x) * heads + h] = static_cast<float>(sum);
}

template <class T>
void gates_forward(in_ref<T, 2> a, in_ref<T, 2> b, in_ref<float, 1> A_log, in_ref<float, 1> dt_bias,
                   tensor_ref<float, 2, device_memory> g, out_ref<T, 2> beta, stream_ref s) {
  expects_gates_forward(a, b, A_log, dt_bias, g, beta);
  if (g.size() == 0) return;
  launch("gates_forward", gates_forward_kernel<T>, striding_grid(g.size(), 256), 256, 0, s, a, b, A_log.data(),
         dt_bias.data(), g, beta);
}

inline memory_requirement gate_scratch(index_t tokens, index_t heads) {
  return {static_cast<std::size_t>(2 * divide_up(tokens, gate_tile) * heads) * sizeof(float)};
}

template <class T>
void gates_backward(in_ref<float, 2> dg, in_ref<float, 2> d_beta, in_ref<T, 2> a, in_ref<T, 2> b,
                    in_ref<float, 1> A_log, in_ref<float, 1> dt_bias, out_ref<T, 2> da, other_ref<T, 2> db,
                    tensor_ref<float, 1, device_memory> dA_log, tensor_ref<float, 1, device_memory> d_dt_bias,
                    workspace<device_memory>& ws, stream_ref s) {
  expects_gates_backward(dg, d_beta, a, b, A_log, dt_bias, da, db, dA_log, d_dt_bias);
  if (da.size() == 0) return;
  const scoped_mark scope(ws);
  const index_t heads = da.extent(1);
  const index_t tiles = divide_up(da.extent(0), gate_tile);
  const auto partial = ws.take<float>(2, tiles, heads);
  launch("gates_backward", gates_backward_kernel<T>, grid_of(tiles, divide_up(heads, 32)), 32 * gate_warps, 0, s, dg,
         d_beta, a, b, A_log.data(), dt_bias.data(), da, db, partial.data());
  add_partial_sums(partial.data(), tiles, dA_log, d_dt_bias, s);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
