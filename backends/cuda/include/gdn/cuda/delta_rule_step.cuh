// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One token per sequence: the delta rule's step on states in place, each read and written once.

#include <cstdint>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/cuda/detail/launch.cuh>
#include <gdn/cuda/detail/vector.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int step_columns = 64;  // of V, per block
inline constexpr int step_threads = 128;

/// Where the threads of a block stand in its K x 64 part of a state whose last axis has unit stride: a thread owns 16
/// bytes of a row and R rows, `groups` apart, so that a warp reads neighbouring rows.
template <class S, int R>
struct step_tile {
  static constexpr int N = 16 / static_cast<int>(sizeof(S));
  static constexpr int lanes = step_columns / N;
  static constexpr int groups = step_threads / lanes;
  static constexpr int rows = R * groups;
};

/// A block does 64 columns of one state, all of it in flight at once. Both S^T k and S^T q are taken of the old state:
/// u = b (v - a S^T k), o = scale (a S^T q + u (k q)), S <- a S + k u^T.
template <class T, class S, int R>
__global__ void __launch_bounds__(step_threads)
    step_tile_kernel(float scale, delta_rule_inputs<T, device_memory> in, tensor_ref<S, 4, device_memory> states,
                     const std::int32_t* slots, tensor_ref<T, 3, device_memory> o) {
  using tile = step_tile<S, R>;
  constexpr int N = tile::N;
  constexpr int warps = step_threads / 32;
  __shared__ float k[tile::rows], q[tile::rows], kq[warps];
  __shared__ __align__(16) float sums[2][warps][step_columns];  // read in packs
  const index_t K = in.k.extent(2);
  const index_t row = blockIdx.x;
  const index_t head = blockIdx.y;
  const index_t key_head = quotient(head, quotient(in.v.extent(1), in.k.extent(1)));
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int column = static_cast<int>(threadIdx.x) % tile::lanes * N;
  const int group = static_cast<int>(threadIdx.x) / tile::lanes;
  const index_t v = blockIdx.z * static_cast<index_t>(step_columns) + column;
  const bool inside = v < in.v.extent(2);
  const std::int32_t slot = slots[row];
  if (slot < 0) {
    if (group == 0 && inside) store<T, N>(&o(row, head, v), {});
    return;
  }
  S* const at = &states(slot, head, group, v);
  const index_t stride = states.stride(2) * tile::groups;
  raw_pack<S, N> state[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    state[i] = raw_pack<S, N>{};
    if (inside && i * tile::groups + group < K) state[i] = load_raw<S, N>(at + i * stride);
  }
  const float alpha = expf(in.g(row, head));
  const float beta = static_cast<float>(in.beta(row, head));
  pack<float, N> u{};
  if (inside) u = load<T, N>(&in.v(row, head, v));
  float product = 0;
  for (int i = static_cast<int>(threadIdx.x); i < tile::rows; i += step_threads) {
    k[i] = i < K ? static_cast<float>(in.k(row, key_head, i)) : 0.0f;
    q[i] = i < K ? static_cast<float>(in.q(row, key_head, i)) : 0.0f;
    product += k[i] * q[i];
  }
  product = warp_sum(product);
  if (threadIdx.x % 32 == 0) kq[warp] = product;
  __syncthreads();

  pack<float, N> sk{}, sq{};
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const pack<float, N> s = widen(state[i]);
    const float ki = k[i * tile::groups + group];
    const float qi = q[i * tile::groups + group];
#pragma unroll
    for (int c = 0; c < N; ++c) {
      sk[c] += ki * s[c];
      sq[c] += qi * s[c];
    }
  }
#pragma unroll
  for (int c = 0; c < N; ++c) {
#pragma unroll
    for (int offset = tile::lanes; offset < 32; offset *= 2) {
      sk[c] += __shfl_xor_sync(0xffffffffu, sk[c], offset);
      sq[c] += __shfl_xor_sync(0xffffffffu, sq[c], offset);
    }
  }
  if (static_cast<int>(threadIdx.x) % 32 < tile::lanes) {
#pragma unroll
    for (int c = 0; c < N; ++c) {
      sums[0][warp][column + c] = sk[c];
      sums[1][warp][column + c] = sq[c];
    }
  }
  __syncthreads();
  sk = sq = {};
#pragma unroll
  for (int w = 0; w < warps; ++w) {
    const pack<float, N> more_k = load<float, N>(&sums[0][w][column]);
    const pack<float, N> more_q = load<float, N>(&sums[1][w][column]);
#pragma unroll
    for (int c = 0; c < N; ++c) {
      sk[c] += more_k[c];
      sq[c] += more_q[c];
    }
  }
  if (!inside) return;
#pragma unroll
  for (int c = 0; c < N; ++c) u[c] = beta * (u[c] - alpha * sk[c]);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i * tile::groups + group >= K) break;
    const float ki = k[i * tile::groups + group];
    pack<float, N> s = widen(state[i]);
#pragma unroll
    for (int c = 0; c < N; ++c) s[c] = alpha * s[c] + ki * u[c];
    store<S, N>(at + i * stride, s);
  }
  if (group == 0) {
    float dot = 0;
    for (int w = 0; w < warps; ++w) dot += kq[w];
#pragma unroll
    for (int c = 0; c < N; ++c) sq[c] = scale * (alpha * sq[c] + u[c] * dot);
    store<T, N>(&o(row, head, v), sq);
  }
}

inline constexpr int step_rows = 32;  // of the state, in the registers of one thread of the general kernel

/// The same for any strides: a thread holds step_rows rows of one column.
template <class T, class S>
__global__ void step_kernel(float scale, delta_rule_inputs<T, device_memory> in, tensor_ref<S, 4, device_memory> states,
                            const std::int32_t* slots, tensor_ref<T, 3, device_memory> o) {
  extern __shared__ float shared[];  // k [K], q [K], partial sums [2, groups, columns]
  const index_t K = in.k.extent(2);
  const index_t V = in.v.extent(2);
  const index_t row = blockIdx.x;
  const index_t head = blockIdx.y;
  const index_t key_head = head / (in.v.extent(1) / in.k.extent(1));
  const int column = static_cast<int>(threadIdx.x) % step_columns;
  const int group = static_cast<int>(threadIdx.x) / step_columns;
  const int groups = static_cast<int>(blockDim.x) / step_columns;
  const index_t v = blockIdx.z * static_cast<index_t>(step_columns) + column;
  const std::int32_t slot = slots[row];
  if (slot < 0) {
    if (group == 0 && v < V) o(row, head, v) = static_cast<T>(0.0f);
    return;
  }
  float* k = shared;
  float* q = k + K;
  float* sums = q + K;
  const index_t first = group * step_rows;
  float state[step_rows];
#pragma unroll
  for (int i = 0; i < step_rows; ++i) {
    state[i] = first + i < K && v < V ? static_cast<float>(states(slot, head, first + i, v)) : 0.0f;
  }
  for (index_t i = threadIdx.x; i < K; i += blockDim.x) {
    k[i] = static_cast<float>(in.k(row, key_head, i));
    q[i] = static_cast<float>(in.q(row, key_head, i));
  }
  __syncthreads();
  float sk = 0;
  float sq = 0;
#pragma unroll
  for (int i = 0; i < step_rows; ++i) {
    if (first + i < K) {
      sk += k[first + i] * state[i];
      sq += q[first + i] * state[i];
    }
  }
  sums[group * step_columns + column] = sk;
  sums[(groups + group) * step_columns + column] = sq;
  __syncthreads();
  sk = sq = 0;
  for (int i = 0; i < groups; ++i) {
    sk += sums[i * step_columns + column];
    sq += sums[(groups + i) * step_columns + column];
  }
  if (v >= V) return;
  const float alpha = expf(in.g(row, head));
  const float u = static_cast<float>(in.beta(row, head)) * (static_cast<float>(in.v(row, head, v)) - alpha * sk);
  if (group == 0) {
    float kq = 0;
    for (index_t i = 0; i < K; ++i) kq += k[i] * q[i];
    o(row, head, v) = static_cast<T>(scale * (alpha * sq + u * kq));
  }
#pragma unroll
  for (int i = 0; i < step_rows; ++i) {
    if (first + i < K) states(slot, head, first + i, v) = static_cast<S>(alpha * state[i] + k[first + i] * u);
  }
}

template <class T, class S>
void delta_rule_step(float scale, const delta_rule_inputs<T, device_memory>& in, tensor_ref<S, 4, device_memory> states,
                     tensor_ref<const std::int32_t, 1, device_memory> slots, tensor_ref<T, 3, device_memory> o,
                     stream_ref s) {
  const index_t K = in.k.extent(2);
  const dim3 grid = grid_of(slots.extent(0), in.v.extent(1), divide_up(in.v.extent(2), step_columns));
  constexpr int N = step_tile<S, 1>::N;
  if (K <= 256 && moves_in_packs(states, N) && moves_in_packs(in.v, N) && moves_in_packs(o, N)) {
    const auto run = [&](auto kernel) {
      launch("delta_rule_step", kernel, grid, step_threads, 0, s, scale, in, states, slots.data(), o);
    };
    constexpr int R = 128 / step_tile<S, 1>::groups;  // rows of a thread where K = 128
    if (K <= 64) return run(step_tile_kernel<T, S, R / 2>);
    if (K <= 128) return run(step_tile_kernel<T, S, R>);
    return run(step_tile_kernel<T, S, 2 * R>);
  }
  const index_t groups = divide_up(K, step_rows);
  expects<backend_error>(groups * step_columns <= 1024, "the decode step holds keys of up to 512 elements, not", K);
  launch("delta_rule_step", step_kernel<T, S>, grid, static_cast<int>(groups * step_columns),
         static_cast<std::size_t>(2 * K + 2 * groups * step_columns) * sizeof(float), s, scale, in, states,
         slots.data(), o);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
