// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  States of sequences between the slots of a pool, with any strides and types, and dense buffers.

#include <concepts>
#include <cstdint>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/cuda/detail/launch.cuh>
#include <gdn/cuda/detail/vector.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int state_threads = 256;
/// Of a row, which a thread has under way together.
inline constexpr int state_packs = 4;

template <class To, class From>
__device__ inline To converted(From v) {
  if constexpr (std::same_as<To, From>) {
    return v;
  } else {
    return static_cast<To>(static_cast<float>(v));
  }
}

/// Tiles of 32 x 32, read along the unit axis of the source and written along that of the target. A block does one
/// tile of one head of one sequence; without data to load from, or to store, it writes zeros.
template <bool Load, class From, class To>
__global__ void move_states_kernel(tensor_ref<const From, 4, device_memory> from, tensor_ref<To, 4, device_memory> to,
                                   const std::int32_t* slots, bool keys_unit) {
  __shared__ To tile[32][33];
  const index_t K = to.extent(2);
  const index_t V = to.extent(3);
  const index_t row = blockIdx.x;
  const index_t head = blockIdx.y;
  const index_t tiles = (V + 31) / 32;
  const index_t k0 = static_cast<index_t>(blockIdx.z) / tiles * 32;
  const index_t v0 = static_cast<index_t>(blockIdx.z) % tiles * 32;
  const std::int32_t slot = slots[row];
  if (!Load && slot < 0) return;
  const bool zeros = Load ? slot < 0 : from.data() == nullptr;
  const auto x = static_cast<index_t>(threadIdx.x % 32);
  const bool turn_in = Load && keys_unit;  // x runs over K where the pool's unit axis is K
  const bool turn_out = !Load && keys_unit;
  for (index_t y = threadIdx.x / 32; y < 32; y += blockDim.x / 32) {
    const index_t k = k0 + (turn_in ? x : y);
    const index_t v = v0 + (turn_in ? y : x);
    if (k >= K || v >= V) continue;
    tile[k - k0][v - v0] = zeros ? static_cast<To>(0.0f) : converted<To>(from(Load ? slot : row, head, k, v));
  }
  __syncthreads();
  for (index_t y = threadIdx.x / 32; y < 32; y += blockDim.x / 32) {
    const index_t k = k0 + (turn_out ? x : y);
    const index_t v = v0 + (turn_out ? y : x);
    if (k < K && v < V) to(Load ? row : slot, head, k, v) = tile[k - k0][v - v0];
  }
}

/// The same where both have rows along V that can be moved in packs of N elements: no tile is turned.
template <bool Load, class From, class To, int N>
__global__ void __launch_bounds__(state_threads)
    move_state_rows_kernel(tensor_ref<const From, 4, device_memory> from, tensor_ref<To, 4, device_memory> to,
                           const std::int32_t* slots) {
  const auto packs = static_cast<unsigned>(to.extent(3)) / N;  // of a row
  const auto n = static_cast<unsigned>(to.extent(2)) * packs;
  const index_t row = blockIdx.x;
  const index_t head = blockIdx.y;
  const std::int32_t slot = slots[row];
  if (!Load && slot < 0) return;
  const bool zeros = Load ? slot < 0 : from.data() == nullptr;
  const unsigned first = blockIdx.z * (state_packs * state_threads) + threadIdx.x;
  raw_pack<From, N> values[state_packs];
#pragma unroll
  for (int k = 0; k < state_packs; ++k) {
    const unsigned i = first + k * state_threads;
    values[k] = raw_pack<From, N>{};
    if (i < n && !zeros) values[k] = load_raw<From, N>(&from(Load ? slot : row, head, i / packs, i % packs * N));
  }
#pragma unroll
  for (int k = 0; k < state_packs; ++k) {
    const unsigned i = first + k * state_threads;
    if (i >= n) continue;
    To* at = &to(Load ? row : slot, head, i / packs, i % packs * N);
    if constexpr (std::same_as<To, From>) {
      *reinterpret_cast<raw_pack<To, N>*>(at) = values[k];
    } else {
      store<To, N>(at, widen(values[k]));
    }
  }
}

/// Whether it is the pool's K that has unit stride, rather than V.
template <class T>
bool keys_unit(const tensor_ref<T, 4, device_memory>& pool) {
  return pool.stride(3) != 1 && pool.extent(3) > 1;
}

template <bool Load, class From, class To>
void move_states(tensor_ref<const From, 4, device_memory> from, tensor_ref<To, 4, device_memory> to,
                 tensor_ref<const std::int32_t, 1, device_memory> slots, bool keys_unit, stream_ref s) {
  constexpr int N = 4;
  if (!keys_unit && moves_in_packs(to, N) && (from.data() == nullptr || moves_in_packs(from, N))) {
    const index_t parts = divide_up(to.extent(2) * to.extent(3), N * state_packs * state_threads);
    return launch(Load ? "load_states" : "store_states", move_state_rows_kernel<Load, From, To, N>,
                  grid_of(slots.extent(0), to.extent(1), parts), state_threads, 0, s, from, to, slots.data());
  }
  const index_t tiles = divide_up(to.extent(2), 32) * divide_up(to.extent(3), 32);
  launch(Load ? "load_states" : "store_states", move_states_kernel<Load, From, To>,
         grid_of(slots.extent(0), to.extent(1), tiles), state_threads, 0, s, from, to, slots.data(), keys_unit);
}

/// @param slots [n] each inside the pool or -1; they lie on the device and are not looked at here
template <class S, class A>
void load_states(tensor_ref<const S, 4, device_memory> pool, tensor_ref<const std::int32_t, 1, device_memory> slots,
                 tensor_ref<A, 4, device_memory> out, stream_ref s) {
  expects_moved_states(pool, slots, out);
  move_states<true>(pool, out, slots, keys_unit(pool), s);
}

/// @param slots [n] as in load_states(), and none twice
template <class A, class S>
void store_states(tensor_ref<const A, 4, device_memory> in, tensor_ref<const std::int32_t, 1, device_memory> slots,
                  tensor_ref<S, 4, device_memory> pool, stream_ref s) {
  expects_moved_states(pool, slots, in, in.data() == nullptr);
  move_states<false>(in, pool, slots, keys_unit(pool), s);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
