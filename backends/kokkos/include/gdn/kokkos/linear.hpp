// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Matrix products of activations and weights, in tiles that the sizes alone determine.

#include <algorithm>
#include <concepts>
#include <cstddef>

#include <Eigen/Core>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>
#include <gdn/kokkos/detail/eigen_map.hpp>
#include <gdn/kokkos/detail/parallel.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// y tile [rows, columns] = or += x [rows, depth] B [depth, columns] for at most `Rows` rows, through copies: of x and
/// B in accumulate_t, and of y, which is rounded once at the end. Missing rows up to a full group are zeros.
template <int BOrder, int Rows, class X, class B, class Y>
void copied_tile(index_t rows, index_t columns, index_t depth, const X* x, index_t x_stride, const B* b,
                 index_t b_stride, bool add, Y* y, index_t y_stride) {
  using A = accumulate_t<Y>;
  using blocks = narrow_blocks;  // as deep and as many columns as the wide ones
  constexpr int block_depth = blocks::depth<A>;
  constexpr int group = rows_at_once<A>;
  constexpr bool convert = !std::same_as<B, A>;
  static_assert(Rows % group == 0 && Rows <= blocks::rows);
  static_assert(blocks::columns == wide_blocks::columns && block_depth == wide_blocks::depth<A>);
  alignas(64) A xs[Rows * block_depth];
  alignas(64) A ys[Rows * blocks::columns];
  alignas(64) A bs[convert ? blocks::columns * block_depth : 1];
  const index_t padded = blocks_of(rows, group) * group;

  for (index_t i = 0; i < padded; ++i) {
    for (index_t j = 0; j < columns; ++j) {
      ys[i * columns + j] = add && i < rows ? static_cast<A>(y[i * y_stride + j]) : A(0);
    }
  }
  for (index_t k0 = 0; k0 < depth; k0 += block_depth) {
    const index_t kn = std::min<index_t>(block_depth, depth - k0);
    for (index_t i = 0; i < padded; ++i) {
      for (index_t k = 0; k < kn; ++k) xs[i * kn + k] = i < rows ? static_cast<A>(x[i * x_stride + k0 + k]) : A(0);
    }
    if constexpr (convert) {
      if constexpr (BOrder == Eigen::RowMajor) {
        for (index_t k = 0; k < kn; ++k) {
          for (index_t j = 0; j < columns; ++j) bs[k * columns + j] = static_cast<A>(b[(k0 + k) * b_stride + j]);
        }
        add_product<Eigen::RowMajor, Eigen::RowMajor, blocks>(padded, columns, kn, xs, kn, bs, columns, ys, columns);
      } else {
        for (index_t j = 0; j < columns; ++j) {
          for (index_t k = 0; k < kn; ++k) bs[j * kn + k] = static_cast<A>(b[j * b_stride + k0 + k]);
        }
        add_product<Eigen::RowMajor, Eigen::ColMajor, blocks>(padded, columns, kn, xs, kn, bs, kn, ys, columns);
      }
    } else {
      const B* block = BOrder == Eigen::RowMajor ? b + k0 * b_stride : b + k0;
      add_product<Eigen::RowMajor, BOrder, blocks>(padded, columns, kn, xs, kn, block, b_stride, ys, columns);
    }
  }
  for (index_t i = 0; i < rows; ++i) {
    for (index_t j = 0; j < columns; ++j) y[i * y_stride + j] = static_cast<Y>(ys[i * columns + j]);
  }
}

/// y [L, columns] = or += x [L, depth] B, where B(k, j) is b[k * b_stride + j] or, by columns, b[j * b_stride + k].
///
/// An element is the sum of block sums over `depth`, each in the order of k, whatever row of a tile it stands in: rows
/// that do not fill one of the kernel's groups are completed with zeros, since the kernel sums smaller groups
/// in another order. So a row has the same bits alone, in a batch, and on any rank.
template <int BOrder, class X, class B, class Y, class Exec>
void product_of_rows(const Exec& exec, index_t length, index_t columns, index_t depth, const X* x, index_t x_stride,
                     const B* b, index_t b_stride, bool add, Y* y, index_t y_stride) {
  using A = accumulate_t<Y>;
  static_assert(std::same_as<accumulate_t<X>, A> && std::same_as<accumulate_t<B>, A>);
  constexpr bool wide = std::same_as<X, A> && std::same_as<B, A> && std::same_as<Y, A>;
  using blocks = wide_blocks;
  constexpr int group = rows_at_once<A>;
  // Column tiles outside: threads that work at the same time share a part of the weight.
  const index_t row_tiles = blocks_of(length, blocks::rows);
  const index_t column_tiles = blocks_of(columns, blocks::columns);
  for_each_item(exec, row_tiles * column_tiles, [=](index_t item) {
    const range r = block_at(item % row_tiles, blocks::rows, length);
    const range c = block_at(item / row_tiles, blocks::columns, columns);
    const B* b_tile = BOrder == Eigen::RowMajor ? b + c.begin : b + c.begin * b_stride;
    const X* x_tile = x + r.begin * x_stride;
    Y* y_tile = y + r.begin * y_stride + c.begin;
    if constexpr (wide) {
      const index_t full = r.count / group * group;
      if (!add) {
        for (index_t i = 0; i < full; ++i) std::fill_n(y_tile + i * y_stride, c.count, A(0));
      }
      add_product<Eigen::RowMajor, BOrder, blocks>(full, c.count, depth, x_tile, x_stride, b_tile, b_stride, y_tile,
                                                   y_stride);
      if (full < r.count) {
        copied_tile<BOrder, group>(r.count - full, c.count, depth, x_tile + full * x_stride, x_stride, b_tile, b_stride,
                                   add, y_tile + full * y_stride, y_stride);
      }
    } else {
      constexpr int copied = 32 / group * group;
      for (index_t i = 0; i < r.count; i += copied) {
        copied_tile<BOrder, copied>(std::min<index_t>(copied, r.count - i), c.count, depth, x_tile + i * x_stride,
                                    x_stride, b_tile, b_stride, add, y_tile + i * y_stride, y_stride);
      }
    }
  });
}

// x, w, y and their gradients may be of different types with one accumulate_t.

template <class X, class W, class Y, class Exec>
void linear_forward(const Exec& exec, tensor_ref<const X, 2> x, tensor_ref<const W, 2> w, tensor_ref<Y, 2> y) {
  const index_t length = x.extent(0), in = x.extent(1), out = w.extent(0);
  expects_linear_forward(x, w, y);
  product_of_rows<Eigen::ColMajor>(exec, length, out, in, x.data(), x.stride(0), w.data(), w.stride(0), false, y.data(),
                                   y.stride(0));
}

template <class DY, class W, class DX, class Exec>
void linear_backward_input(const Exec& exec, tensor_ref<const DY, 2> dy, tensor_ref<const W, 2> w, tensor_ref<DX, 2> dx,
                           bool add) {
  const index_t length = dy.extent(0), out = dy.extent(1), in = w.extent(1);
  expects_linear_backward_input(dy, w, dx);
  product_of_rows<Eigen::RowMajor>(exec, length, in, out, dy.data(), dy.stride(0), w.data(), w.stride(0), add,
                                   dx.data(), dx.stride(0));
}

/// dw [out, in] += dy^T x. Blocks of 256 rows are summed in accumulate_t, and those sums in double.
template <class DY, class X, class A, class Exec>
void linear_backward_weight(const Exec& exec, tensor_ref<const DY, 2> dy, tensor_ref<const X, 2> x,
                            tensor_ref<A, 2> dw) {
  static_assert(std::same_as<accumulate_t<DY>, A> && std::same_as<accumulate_t<X>, A>);
  using blocks = narrow_blocks;
  constexpr int block_rows = 256;
  constexpr int step = 64;  // rows that are copied next to each other; they lie pages apart
  const index_t length = dy.extent(0), out = dy.extent(1), in = x.extent(1);
  expects_linear_backward_weight(dy, x, dw);

  const index_t in_tiles = blocks_of(in, blocks::columns);
  for_each_item(exec, in_tiles * blocks_of(out, blocks::rows), [=](index_t item) {
    const range o = block_at(item / in_tiles, blocks::rows, out);
    const range c = block_at(item % in_tiles, blocks::columns, in);
    constexpr int size = blocks::rows * blocks::columns;  // all of it, so that compilers see the number of turns
    alignas(64) double sum[size] = {};
    alignas(64) A block[size];
    for (index_t t0 = 0; t0 < length; t0 += block_rows) {
      std::fill_n(block, size, A(0));
      const index_t end = std::min<index_t>(t0 + block_rows, length);
      for (index_t t = t0; t < end; t += step) {
        const index_t n = std::min<index_t>(step, end - t);
        const DY* dy_block = dy.data() + t * dy.stride(0) + o.begin;
        const X* x_block = x.data() + t * x.stride(0) + c.begin;
        alignas(64) A dys[step * blocks::rows];
        alignas(64) A xs[step * blocks::columns];
        for (index_t i = 0; i < n; ++i) {
          for (index_t j = 0; j < o.count; ++j) dys[i * o.count + j] = static_cast<A>(dy_block[i * dy.stride(0) + j]);
          for (index_t j = 0; j < c.count; ++j) xs[i * c.count + j] = static_cast<A>(x_block[i * x.stride(0) + j]);
        }
        add_product<Eigen::ColMajor, Eigen::RowMajor, blocks>(o.count, c.count, n, dys, o.count, xs, c.count, block,
                                                              c.count);
      }
      for (int i = 0; i < size; ++i) sum[i] += static_cast<double>(block[i]);
    }
    for (index_t i = 0; i < o.count; ++i) {
      for (index_t j = 0; j < c.count; ++j) {
        A& target = dw(o.begin + i, c.begin + j);
        target = static_cast<A>(static_cast<double>(target) + sum[i * c.count + j]);
      }
    }
  });
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
