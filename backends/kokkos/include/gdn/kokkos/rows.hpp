// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Moving rows of any trivially copyable elements: copies, runs of an exchange, transposes.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>
#include <gdn/kokkos/detail/parallel.hpp>
#include <gdn/plan/exchange.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// Elements that a thread moves at once; large enough that a single memcpy runs at full speed.
inline constexpr index_t elements_per_item = 1 << 15;

/// In what type elements are added. Integers stay what they are.
template <class T>
struct sum_of {
  using type = accumulate_t<T>;
};
template <std::integral T>
struct sum_of<T> {
  using type = T;
};

/// Copies `count` rows of `width` elements; in one piece if neither side has gaps.
template <class T>
void move_rows(const T* src, index_t src_stride, T* dst, index_t dst_stride, index_t count, index_t width) {
  if (count <= 0 || width <= 0) return;
  if (src_stride == width && dst_stride == width) {
    std::memcpy(dst, src, static_cast<std::size_t>(count * width) * sizeof(T));
    return;
  }
  for (index_t i = 0; i < count; ++i) {
    std::memcpy(dst + i * dst_stride, src + i * src_stride, static_cast<std::size_t>(width) * sizeof(T));
  }
}

/// How many pieces rows are cut into: a piece has about `elements_per_item`, and there are few enough of them that
/// lists of many short runs stay cheap.
constexpr index_t pieces_for(index_t rows, index_t width) noexcept {
  constexpr index_t most = 64;
  return std::clamp<index_t>(blocks_of(rows * std::max<index_t>(width, 1), elements_per_item), 1,
                             std::clamp<index_t>(rows, 1, most));
}

inline index_t longest_run(const tensor_ref<const run, 1>& runs) noexcept {
  index_t n = 0;
  for (index_t i = 0; i < runs.extent(0); ++i) n = std::max(n, runs(i).count);
  return n;
}

/// Also, the runs of both sides must lie inside the tensors.
template <class T, class U>
void expects_runs(const tensor_ref<const run, 1>& runs, const tensor_ref<T, 2>& local, const tensor_ref<U, 2>& packed) {
  expects_moved_rows(runs, local, packed);
  for (index_t i = 0; i < runs.extent(0); ++i) {
    const run& r = runs(i);
    expects<shape_error>(r.local >= 0 && r.count >= 0 && r.local + r.count <= local.extent(0), "run", i, "of", r.count,
                         "rows from", r.local, "leaves a tensor of", local.extent(0), "rows");
    expects<shape_error>(r.packed >= 0 && r.packed + r.count <= packed.extent(0), "run", i, "of", r.count,
                         "packed rows from", r.packed, "leaves a tensor of", packed.extent(0), "rows");
  }
}

/// Elements of another type are converted, each rounded once.
template <class S, class T, class Exec>
void copy_rows(const Exec& exec, tensor_ref<const S, 2> src, tensor_ref<T, 2> dst) {
  static_assert(std::is_trivially_copyable_v<T>);
  const index_t rows = dst.extent(0), width = dst.extent(1);
  expects_copy_rows(src, dst);
  const index_t pieces = pieces_for(rows, width);
  for_each_item(exec, pieces, [=](index_t item) {
    const range r = piece_at(item, pieces, rows);
    if constexpr (std::same_as<S, T>) {
      move_rows(src.data() + r.begin * src.stride(0), src.stride(0), dst.data() + r.begin * dst.stride(0),
                dst.stride(0), r.count, width);
    } else {
      for (index_t i = r.begin; i < r.end(); ++i) {
        for (index_t j = 0; j < width; ++j) dst(i, j) = static_cast<T>(src(i, j));
      }
    }
  });
}

/// Rows of dst that no run names stay as they are. Runs must not overlap in dst.
template <class T, class Exec>
void gather_rows(const Exec& exec, in_ref<T, 2> src, tensor_ref<const run, 1> runs, tensor_ref<T, 2> dst) {
  static_assert(std::is_trivially_copyable_v<T>);
  expects_runs(runs, src, dst);
  const index_t width = dst.extent(1), pieces = pieces_for(longest_run(runs), width);
  for_each_item(exec, runs.extent(0) * pieces, [=](index_t item) {
    const run& from = runs(item / pieces);
    const range r = piece_at(item % pieces, pieces, from.count);
    move_rows(src.data() + (from.local + r.begin) * src.stride(0), src.stride(0),
              dst.data() + (from.packed + r.begin) * dst.stride(0), dst.stride(0), r.count, width);
  });
}

/// Rows of dst that no run names stay as they are. Runs must not overlap in dst.
template <class T, class Exec>
void scatter_rows(const Exec& exec, in_ref<T, 2> src, tensor_ref<const run, 1> runs, tensor_ref<T, 2> dst) {
  static_assert(std::is_trivially_copyable_v<T>);
  expects_runs(runs, dst, src);
  const index_t width = dst.extent(1), pieces = pieces_for(longest_run(runs), width);
  for_each_item(exec, runs.extent(0) * pieces, [=](index_t item) {
    const run& to = runs(item / pieces);
    const range r = piece_at(item % pieces, pieces, to.count);
    move_rows(src.data() + (to.packed + r.begin) * src.stride(0), src.stride(0),
              dst.data() + (to.local + r.begin) * dst.stride(0), dst.stride(0), r.count, width);
  });
}

/// Runs may overlap in dst: an item owns rows of dst and adds to them what each run in turn has for them.
template <class T, class Exec>
void scatter_add_rows(const Exec& exec, in_ref<T, 2> src, tensor_ref<const run, 1> runs, tensor_ref<T, 2> dst) {
  using A = typename sum_of<T>::type;
  expects_runs(runs, dst, src);
  const index_t rows = dst.extent(0), width = dst.extent(1), pieces = pieces_for(rows, width);
  for_each_item(exec, pieces, [=](index_t item) {
    const range own = piece_at(item, pieces, rows);
    for (index_t i = 0; i < runs.extent(0); ++i) {
      const run& to = runs(i);
      const index_t begin = std::max(own.begin, to.local), end = std::min(own.end(), to.local + to.count);
      for (index_t row = begin; row < end; ++row) {
        const T* from = src.data() + (to.packed + row - to.local) * src.stride(0);
        T* target = dst.data() + row * dst.stride(0);
        for (index_t j = 0; j < width; ++j) {
          target[j] = static_cast<T>(static_cast<A>(target[j]) + static_cast<A>(from[j]));
        }
      }
    }
  });
}

template <class T, class Exec>
void fill_zero(const Exec& exec, tensor_ref<T, 2> t) {
  const index_t rows = t.extent(0), width = t.extent(1), pieces = pieces_for(rows, width);
  expects_fill_zero(t);
  for_each_item(exec, pieces, [=](index_t item) {
    const range r = piece_at(item, pieces, rows);
    if (t.stride(0) == width) {
      std::fill_n(t.data() + r.begin * width, r.count * width, T{});
    } else {
      for (index_t i = 0; i < r.count; ++i) std::fill_n(t.data() + (r.begin + i) * t.stride(0), width, T{});
    }
  });
}

/// dst [n, b, a] = src [n, a, b] with its last two axes swapped; elements of another type are converted.
template <class S, class T, class Exec>
void swap_axes(const Exec& exec, tensor_ref<const S, 3> src, tensor_ref<T, 3> dst) {
  static_assert(std::is_trivially_copyable_v<T>);
  constexpr index_t tile = 32;  // both sides of a tile stay in the first cache
  const index_t n = src.extent(0), a = src.extent(1), b = src.extent(2);
  expects_swap_axes(src, dst);
  const index_t a_tiles = blocks_of(a, tile);
  for_each_item(exec, n * a_tiles, [=](index_t item) {
    const index_t m = item / a_tiles;
    const range r = block_at(item % a_tiles, tile, a);
    for (index_t b0 = 0; b0 < b; b0 += tile) {
      const index_t b1 = std::min(b0 + tile, b);
      for (index_t j = b0; j < b1; ++j) {
        for (index_t i = r.begin; i < r.end(); ++i) dst(m, j, i) = static_cast<T>(src(m, i, j));
      }
    }
  });
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
