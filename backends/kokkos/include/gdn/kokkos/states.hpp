// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  States of sequences between the slots of a pool, with any strides and types, and dense buffers.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>
#include <gdn/kokkos/detail/parallel.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// A matrix with a stride for each axis.
template <class T>
struct strided_matrix {
  T* data;
  index_t row, column;
};

/// to = from, element by element, for `rows` x `columns`.
template <class From, class To>
void move_matrix(strided_matrix<const From> from, strided_matrix<To> to, index_t rows, index_t columns) {
  if (from.column == 1 && to.column == 1) {
    for (index_t i = 0; i < rows; ++i) {
      const From* source = from.data + i * from.row;
      To* target = to.data + i * to.row;
      if constexpr (std::same_as<From, To>) {
        std::memcpy(target, source, static_cast<std::size_t>(columns) * sizeof(To));
      } else {
        for (index_t j = 0; j < columns; ++j) target[j] = static_cast<To>(source[j]);
      }
    }
    return;
  }
  constexpr index_t tile = 32;  // both sides of a tile stay in the first cache
  for (index_t i0 = 0; i0 < rows; i0 += tile) {
    for (index_t j0 = 0; j0 < columns; j0 += tile) {
      for (index_t i = i0; i < std::min(i0 + tile, rows); ++i) {
        for (index_t j = j0; j < std::min(j0 + tile, columns); ++j) {
          to.data[i * to.row + j * to.column] = static_cast<To>(from.data[i * from.row + j * from.column]);
        }
      }
    }
  }
}

inline void expects_slots(const tensor_ref<const std::int32_t, 1>& slots, index_t count) {
  for (index_t i = 0; i < slots.extent(0); ++i) {
    expects<shape_error>(slots(i) >= -1 && slots(i) < count, "slot", slots(i), "of sequence", i, "must lie in -1 to",
                         count - 1);
  }
}

template <class S, class A, class Exec>
void load_states(const Exec& exec, tensor_ref<const S, 4> pool, tensor_ref<const std::int32_t, 1> slots,
                 tensor_ref<A, 4> out) {
  const index_t H = out.extent(1), K = out.extent(2), V = out.extent(3);
  expects_moved_states(pool, slots, out);
  expects_slots(slots, pool.extent(0));
  for_each_item(exec, slots.extent(0) * H, [=](index_t item) {
    const index_t i = item / H, h = item % H;
    A* const to = out.data() + item * K * V;
    if (slots(i) < 0) {
      std::fill_n(to, K * V, static_cast<A>(0.0F));
    } else {
      move_matrix<S, A>({&pool(slots(i), h, 0, 0), pool.stride(2), pool.stride(3)}, {to, V, 1}, K, V);
    }
  });
}

/// A slot may stand in `slots` once.
template <class A, class S, class Exec>
void store_states(const Exec& exec, tensor_ref<const A, 4> in, tensor_ref<const std::int32_t, 1> slots,
                  tensor_ref<S, 4> pool) {
  const index_t H = pool.extent(1), K = pool.extent(2), V = pool.extent(3);
  const bool zeros = in.data() == nullptr;
  expects_moved_states(pool, slots, in, zeros);
  expects_slots(slots, pool.extent(0));
  for_each_item(exec, slots.extent(0) * H, [=](index_t item) {
    const index_t i = item / H, h = item % H;
    if (slots(i) < 0) return;
    S* const to = &pool(slots(i), h, 0, 0);
    if (zeros) {
      for (index_t k = 0; k < K; ++k) {
        for (index_t v = 0; v < V; ++v) to[k * pool.stride(2) + v * pool.stride(3)] = static_cast<S>(0.0F);
      }
    } else {
      move_matrix<A, S>({in.data() + item * K * V, V, 1}, {to, pool.stride(2), pool.stride(3)}, K, V);
    }
  });
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
