// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One token per sequence: the delta rule's step on states in place, each read and written once.

#include <cstdint>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/concepts/operands.hpp>
#include <gdn/cuda/detail/launch.cuh>
#include <gdn/cuda/detail/vector.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int step_threads = 128;

/// Where the threads of a block stand in its part of a state whose last axis has unit stride: 256 bytes of each row, 16
/// per thread (memory does not like shorter pieces), and R rows of a thread, `groups` apart.
template <class S, int R>
struct step_tile {
  static constexpr int N = 16 / static_cast<int>(sizeof(S));
  static constexpr int lanes = 16;
  static constexpr int columns = lanes * N;
  static constexpr int groups = step_threads / lanes;
  static constexpr int rows = R * groups;
  /// Blocks on a multiprocessor, so that the raw state fits into the registers, but hardly the same as floats.
  static constexpr int blocks = R > 16 ? 2 : 4;
};

/// A block does these columns of one state, all of it in flight at once. Both S^T k and S^T q are taken of the old
/// state: u = b (v - a S^T k), o = scale (a S^T q + u (k q)), S <- a S + k u^T. `ratio`: value heads per key head.
template <class T, class S, int R>
__global__ void __launch_bounds__(step_threads, step_tile<S, R>::blocks)
    step_tile_kernel(float scale, delta_rule_inputs<T, device_memory> in, tensor_ref<S, 4, device_memory> states,
                     const std::int32_t* slots, tensor_ref<T, 3, device_memory> o, unsigned ratio) {
  using tile = step_tile<S, R>;
  constexpr int N = tile::N;
  constexpr int warps = step_threads / 32;
  constexpr int keys = (tile::rows + step_threads - 1) / step_threads;  // of a thread
  __shared__ float2 kq[tile::rows];
  __shared__ float dots[warps];
  __shared__ __align__(16) float sums[warps][2 * tile::columns];  // of S^T k, then of S^T q; moved in packs
  __shared__ __align__(16) float totals[2 * tile::columns];
  const auto K = static_cast<int>(in.k.extent(2));
  const index_t row = blockIdx.x;
  const index_t head = blockIdx.y;
  const index_t key_head = blockIdx.y / ratio;
  const auto thread = static_cast<int>(threadIdx.x);
  const int column = thread % tile::lanes * N;
  const int group = thread / tile::lanes;
  index_t v = blockIdx.z * static_cast<index_t>(tile::columns) + column;
  const bool inside = v < in.v.extent(2);
  if (!inside) v = 0;  // loads are harmless
  // What does not depend on the slot is on its way before the slot is known.
  float2 mine[keys];
#pragma unroll
  for (int j = 0; j < keys; ++j) {
    const int i = j * step_threads + thread;
    mine[j] = {0, 0};
    if (i < K) mine[j] = {static_cast<float>(in.k(row, key_head, i)), static_cast<float>(in.q(row, key_head, i))};
  }
  const raw_pack<T, N> value = load_raw<T, N>(&in.v(row, head, v));
  const float g = in.g(row, head);
  const float beta = static_cast<float>(in.beta(row, head));
  const std::int32_t slot = slots[row];
  if (slot < 0) {
    if (group == 0 && inside) store<T, N>(&o(row, head, v), {});
    return;
  }
  const index_t stride = states.stride(2);
  S* to = &states(slot, head, 0, v) + group * stride;
  const S* from = group < K ? to : &states(slot, head, 0, v);
  raw_pack<S, N> state[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {  // behind the last row that one again, without weight
    state[i] = load_raw<S, N>(from);
    if ((i + 1) * tile::groups + group < K) from += tile::groups * stride;
  }
  float product = 0;
#pragma unroll
  for (int j = 0; j < keys; ++j) {
    const int i = j * step_threads + thread;
    if (tile::rows % step_threads == 0 || i < tile::rows) kq[i] = mine[j];
    product += mine[j].x * mine[j].y;
  }
  product = warp_sum(product);
  if (thread % 32 == 0) dots[thread / 32] = product;
  const float alpha = expf(g);
  __syncthreads();

  pack<float, N> sk{}, sq{};
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const pack<float, N> s = widen(state[i]);
    const float2 weights = kq[i * tile::groups + group];
#pragma unroll
    for (int c = 0; c < N; ++c) {
      sk[c] += weights.x * s[c];
      sq[c] += weights.y * s[c];
    }
  }
#pragma unroll
  for (int c = 0; c < N; ++c) {
    sk[c] += __shfl_xor_sync(0xffffffffu, sk[c], tile::lanes);
    sq[c] += __shfl_xor_sync(0xffffffffu, sq[c], tile::lanes);
  }
  if (thread % 32 < tile::lanes) {
    float* own = &sums[thread / 32][column];
#pragma unroll
    for (int c = 0; c < N; ++c) {
      own[c] = sk[c];
      own[tile::columns + c] = sq[c];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = thread; i < 2 * tile::columns; i += step_threads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += sums[w][i];
    totals[i] = sum;
  }
  __syncthreads();

  if (!inside) return;
  pack<float, N> u = widen(value);
  sk = load<float, N>(&totals[column]);
#pragma unroll
  for (int c = 0; c < N; ++c) u[c] = beta * (u[c] - alpha * sk[c]);
#pragma unroll
  for (int i = 0; i < R; ++i, to += tile::groups * stride) {
    const float key = kq[i * tile::groups + group].x;
    pack<float, N> s = widen_again(state[i]);
#pragma unroll
    for (int c = 0; c < N; ++c) s[c] = alpha * s[c] + key * u[c];
    if (i * tile::groups + group < K) store<S, N>(to, s);
  }
  if (group == 0) {
    float dot = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) dot += dots[w];
    sq = load<float, N>(&totals[tile::columns + column]);
#pragma unroll
    for (int c = 0; c < N; ++c) sq[c] = scale * (alpha * sq[c] + u[c] * dot);
    store<T, N>(&o(row, head, v), sq);
  }
}

inline constexpr int step_columns = 64;  // of V, per block of the general kernel
inline constexpr int step_rows = 32;     // of the state, in the registers of one of its threads
inline constexpr int step_most_threads = 256 / step_rows * step_columns;  // keys have 256 elements at most

/// The same for any strides: a thread holds step_rows rows of one column.
template <class T, class S>
__global__ void __launch_bounds__(step_most_threads)
    step_kernel(float scale, delta_rule_inputs<T, device_memory> in, tensor_ref<S, 4, device_memory> states,
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

/// @param slots [n] all different, each inside the pool, or -1 for a row without a sequence. They lie on the device and
///              are not looked at here: a slot outside is memory of others, and one that stands twice is a race.
template <class T, class S>
void delta_rule_step(float scale, const delta_rule_inputs<T, device_memory>& in, tensor_ref<S, 4, device_memory> states,
                     tensor_ref<const std::int32_t, 1, device_memory> slots, tensor_ref<T, 3, device_memory> o,
                     stream_ref s) {
  expects_delta_rule_step(in, states, slots, o);
  const index_t K = in.k.extent(2);
  const auto grid = [&](index_t columns) {
    return grid_of(slots.extent(0), in.v.extent(1), divide_up(in.v.extent(2), columns));
  };
  constexpr int N = step_tile<S, 1>::N;
  if (K <= 256 && moves_in_packs(states, N) && moves_in_packs(in.v, N) && moves_in_packs(o, N)) {
    const auto run = [&](auto kernel) {
      launch("delta_rule_step", kernel, grid(step_tile<S, 1>::columns), step_threads, 0, s, scale, in, states,
             slots.data(), o, static_cast<unsigned>(in.v.extent(1) / in.k.extent(1)));
    };
    if (K <= 64) return run(step_tile_kernel<T, S, 8>);
    if (K <= 128) return run(step_tile_kernel<T, S, 16>);
    return run(step_tile_kernel<T, S, 32>);
  }
  const index_t groups = divide_up(K, step_rows);
  expects<backend_error>(groups * step_columns <= step_most_threads,
                         "the decode step holds keys of up to 256 elements, not", K);
  launch("delta_rule_step", step_kernel<T, S>, grid(step_columns), static_cast<int>(groups * step_columns),
         static_cast<std::size_t>(2 * K + 2 * groups * step_columns) * sizeof(float), s, scale, in, states,
         slots.data(), o);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
