// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Moving rows on the device: copies, packing by runs, sums in the order of the runs, transposition.

#include <cstdint>
#include <type_traits>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/cuda/detail/launch.cuh>
#include <gdn/plan/tables.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

template <class T, int R>
using in_ref = tensor_ref<const std::type_identity_t<T>, R, device_memory>;
template <class T, int R>
using out_ref = tensor_ref<T, R, device_memory>;
template <class T, int R>
using other_ref = tensor_ref<std::type_identity_t<T>, R, device_memory>;

/// Words of a row: as wide as alignment and width allow, so that rows of any type move at the speed of memory.
template <class T, class Word>
bool moves_as(const void* a, const void* b, index_t width, index_t stride_a, index_t stride_b) {
  constexpr auto n = static_cast<index_t>(sizeof(Word) / sizeof(T));
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % sizeof(Word) == 0; };
  return aligned(a) && aligned(b) && width % n == 0 && stride_a % n == 0 && stride_b % n == 0;
}

/// to[f(i)] = from[g(i)] for i < n, where `places(i)` is {g(i), f(i)}: threads stride over i, four loads in flight
/// each.
template <class Word, class Places>
__device__ void copy_words(index_t n, index_t first, index_t step, const Word* from, Word* to, Places&& places) {
  constexpr int ahead = 4;
  for (index_t i = first; i < n; i += ahead * step) {
    Word words[ahead];
    index_t targets[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (i + k * step >= n) continue;
      const auto [source, target] = places(i + k * step);
      words[k] = from[source];
      targets[k] = target;
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (i + k * step < n) to[targets[k]] = words[k];
    }
  }
}

struct word_places {
  index_t source, target;
};

/// Row i of `to` from row i of `from`.
template <class Word>
__global__ void copy_rows_kernel(const Word* from, index_t from_stride, Word* to, index_t to_stride, index_t rows,
                                 index_t width) {
  copy_words(rows * width, blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x,
             static_cast<index_t>(gridDim.x) * blockDim.x, from, to, [&](index_t i) {
               const index_t row = quotient(i, width);
               const index_t column = i - row * width;
               return word_places{row * from_stride + column, row * to_stride + column};
             });
}

/// One block per (run, stripe of it): rows of runs to or from their places in a message.
template <class Word, bool Gather>
__global__ void move_runs_kernel(const run* runs, const Word* from, index_t from_stride, Word* to, index_t to_stride,
                                 index_t width) {
  const run r = runs[blockIdx.x];
  const index_t source = Gather ? r.local : r.packed;
  const index_t target = Gather ? r.packed : r.local;
  copy_words(r.count * width, blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x,
             static_cast<index_t>(gridDim.y) * blockDim.x, from, to, [&](index_t i) {
               const index_t row = quotient(i, width);
               const index_t column = i - row * width;
               return word_places{(source + row) * from_stride + column, (target + row) * to_stride + column};
             });
}

/// A thread owns a column and walks over the runs in their order, since a row may stand in several of them.
template <class T>
__global__ void add_runs_kernel(const run* runs, index_t n_runs, const T* from, index_t from_stride, T* to,
                                index_t to_stride, index_t width) {
  using A = accumulate_t<T>;
  const index_t column = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x;
  if (column >= width) return;
  for (index_t k = 0; k < n_runs; ++k) {
    const run r = runs[k];
    for (index_t i = 0; i < r.count; ++i) {
      T& sum = to[(r.local + i) * to_stride + column];
      sum = static_cast<T>(static_cast<A>(sum) + static_cast<A>(from[(r.packed + i) * from_stride + column]));
    }
  }
}

template <class Word>
__global__ void fill_zero_kernel(Word* to, index_t stride, index_t rows, index_t width) {
  const index_t n = rows * width;
  for (index_t i = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    to[i / width * stride + i % width] = Word{};
  }
}

/// Tiles of 32 x 32 through shared memory, so that both sides are read and written along rows.
template <class T>
__global__ void swap_axes_kernel(tensor_ref<const T, 3, device_memory> from, tensor_ref<T, 3, device_memory> to) {
  __shared__ T tile[32][33];
  const index_t a = from.extent(1);
  const index_t b = from.extent(2);
  const flat_place block(divide_up(a, 32), divide_up(b, 32));
  const index_t a0 = block.x * 32;
  const index_t b0 = block.y * 32;
  const auto x = static_cast<index_t>(threadIdx.x % 32);
  for (index_t y = threadIdx.x / 32; y < 32; y += blockDim.x / 32) {
    if (a0 + y < a && b0 + x < b) tile[y][x] = from(block.z, a0 + y, b0 + x);
  }
  __syncthreads();
  for (index_t y = threadIdx.x / 32; y < 32; y += blockDim.x / 32) {
    if (b0 + y < b && a0 + x < a) to(block.z, b0 + y, a0 + x) = tile[x][y];
  }
}

/// Calls f.operator()<Word>() with the widest word that both sides allow.
template <class T, class F>
void with_word(const void* a, const void* b, index_t width, index_t stride_a, index_t stride_b, F&& f) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  using single = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
  if (moves_as<T, uint4>(a, b, width, stride_a, stride_b)) {
    f.template operator()<uint4>();
  } else {
    f.template operator()<single>();
  }
}

inline constexpr int row_threads = 256;

template <class T>
void copy_rows(in_ref<T, 2> src, out_ref<T, 2> dst, stream_ref s) {
  expects_copy_rows(src, dst);
  if (dst.size() == 0) return;
  with_word<T>(src.data(), dst.data(), dst.extent(1), src.stride(0), dst.stride(0), [&]<class Word>() {
    constexpr auto n = static_cast<index_t>(sizeof(Word) / sizeof(T));
    launch("copy_rows", copy_rows_kernel<Word>, striding_grid(dst.size() / n, row_threads), row_threads, 0, s,
           reinterpret_cast<const Word*>(src.data()), src.stride(0) / n, reinterpret_cast<Word*>(dst.data()),
           dst.stride(0) / n, dst.extent(0), dst.extent(1) / n);
  });
}

/// The rows that the runs name must exist; those that are written must not overlap.
template <class T, bool Gather>
void move_runs(in_ref<T, 2> src, tensor_ref<const run, 1, device_memory> runs, out_ref<T, 2> dst, stream_ref s) {
  if constexpr (Gather) {
    expects_moved_rows(runs, src, dst);
  } else {
    expects_moved_rows(runs, dst, src);
  }
  if (runs.size() == 0 || dst.extent(1) == 0) return;
  const index_t packed = Gather ? dst.extent(0) : src.extent(0);
  with_word<T>(src.data(), dst.data(), dst.extent(1), src.stride(0), dst.stride(0), [&]<class Word>() {
    constexpr auto n = static_cast<index_t>(sizeof(Word) / sizeof(T));
    const index_t words = divide_up(packed * dst.extent(1) / n, runs.size());
    const index_t stripes = divide_up(words, 4 * row_threads);
    launch(Gather ? "gather_rows" : "scatter_rows", move_runs_kernel<Word, Gather>,
           grid_of(runs.size(), stripes < 1      ? 1
                                : stripes < 1024 ? stripes
                                                 : 1024),
           row_threads, 0, s, runs.data(), reinterpret_cast<const Word*>(src.data()), src.stride(0) / n,
           reinterpret_cast<Word*>(dst.data()), dst.stride(0) / n, dst.extent(1) / n);
  });
}

/// The rows that the runs name must exist.
template <class T>
void scatter_add_rows(in_ref<T, 2> src, tensor_ref<const run, 1, device_memory> runs, out_ref<T, 2> dst, stream_ref s) {
  expects_moved_rows(runs, dst, src);
  if (runs.size() == 0 || dst.extent(1) == 0) return;
  launch("scatter_add_rows", add_runs_kernel<T>, grid_of(divide_up(dst.extent(1), 128)), 128, 0, s, runs.data(),
         runs.size(), src.data(), src.stride(0), dst.data(), dst.stride(0), dst.extent(1));
}

template <class T>
void fill_zero(out_ref<T, 2> t, stream_ref s) {
  expects_fill_zero(t);
  if (t.size() == 0) return;
  with_word<T>(t.data(), t.data(), t.extent(1), t.stride(0), t.stride(0), [&]<class Word>() {
    constexpr auto n = static_cast<index_t>(sizeof(Word) / sizeof(T));
    launch("fill_zero", fill_zero_kernel<Word>, striding_grid(t.size() / n, row_threads), row_threads, 0, s,
           reinterpret_cast<Word*>(t.data()), t.stride(0) / n, t.extent(0), t.extent(1) / n);
  });
}

template <class T>
void swap_axes(in_ref<T, 3> src, out_ref<T, 3> dst, stream_ref s) {
  expects_swap_axes(src, dst);
  if (dst.size() == 0) return;
  launch("swap_axes", swap_axes_kernel<T>,
         flat_grid(divide_up(src.extent(1), 32), divide_up(src.extent(2), 32), src.extent(0)), 256, 0, s, src, dst);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
