// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Small matrices in a worker's scratch, and their products: all of one chunk stays in the first two caches.

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include <Eigen/Core>

#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// Elements of A in one vector register of the instruction set that is compiled for.
template <class A>
inline constexpr int lanes = Eigen::internal::packet_traits<A>::size;

/// The number of columns of storage for n columns: whole vectors.
template <class A>
constexpr index_t whole_vectors(index_t n) noexcept {
  return (n + lanes<A> - 1) / lanes<A> * lanes<A>;
}

/// [rows, columns] by rows, each of which starts a whole number of vectors after the one before. What stands between
/// `columns` and `stride` is anybody's: products write it, and nothing that counts is computed from it.
template <class A>
struct panel {
  A* data;
  index_t rows, columns, stride;

  A& operator()(index_t i, index_t j) const noexcept { return data[i * stride + j]; }
  A* row(index_t i) const noexcept { return data + i * stride; }
  /// The first rows and columns.
  panel top(index_t n, index_t m) const noexcept { return {data, n, m, stride}; }
};

/// Hands out a worker's scratch; without memory it only counts.
template <class A>
class scratch_space {
 public:
  explicit scratch_space(A* begin = nullptr) : begin_(begin) {}
  A* take(index_t n) noexcept {
    A* const at = begin_ == nullptr ? nullptr : begin_ + used_;
    used_ += (n + line - 1) / line * line;
    return at;
  }
  panel<A> take(index_t rows, index_t columns) noexcept {
    const index_t stride = whole_vectors<A>(columns);
    return {take(rows * stride), rows, columns, stride};
  }
  index_t used() const noexcept { return used_; }

 private:
  static constexpr index_t line = 16;
  A* begin_;
  index_t used_ = 0;
};

/// The left factor of a product: any strides.
template <class A>
struct factor {
  const A* data;
  index_t rows, depth, row_stride, depth_stride;
};
template <class A>
factor<A> plain(const panel<A>& p) noexcept {
  return {p.data, p.rows, p.columns, p.stride, 1};
}
template <class A>
factor<A> transposed(const panel<A>& p) noexcept {
  return {p.data, p.columns, p.rows, 1, p.stride};
}

/// Which elements of a matrix count. Those of the other triangle are zero where a product reads them and unspecified
/// where it writes.
enum class part { all, lower, upper };

/// Runs f(0) ... f(N - 1) with constants, unrolled.
template <int N, class F>
[[gnu::always_inline]] inline void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

/// One tile of a product: `Rows` rows by `Vectors` vectors of columns, kept in registers over the whole depth.
template <bool Add, int Rows, int Vectors, class A>
void product_tile(index_t begin, index_t end, const A* a, index_t row_stride, index_t depth_stride, const A* b,
                  index_t b_stride, A* c, index_t c_stride) {
  using vector = Eigen::Array<A, lanes<A>, 1>;
  using in = Eigen::Map<const vector>;
  using out = Eigen::Map<vector>;
  std::array<std::array<vector, Vectors>, Rows> sum;
  unrolled<Rows>([&](auto i) {
    unrolled<Vectors>([&](auto j) {
      if constexpr (Add) {
        sum[i][j] = in(c + i * c_stride + j * lanes<A>);
      } else {
        sum[i][j].setZero();
      }
    });
  });
  for (index_t k = begin; k < end; ++k) {
    std::array<vector, Vectors> bk;
    unrolled<Vectors>([&](auto j) { bk[j] = in(b + k * b_stride + j * lanes<A>); });
    unrolled<Rows>([&](auto i) {
      const A ak = a[i * row_stride + k * depth_stride];
      unrolled<Vectors>([&](auto j) { sum[i][j] += ak * bk[j]; });
    });
  }
  unrolled<Rows>([&](auto i) {
    unrolled<Vectors>([&](auto j) { out(c + i * c_stride + j * lanes<A>) = sum[i][j]; });
  });
}

/// c = a b, or c += a b if `Add`. `shape` is that of a, whose zeros are skipped; `wanted` is the part of c to compute.
///
/// Each element is summed in the order of the depth, whatever the sizes. Never allocates, never starts a thread.
template <bool Add, class A>
void product(const factor<A>& a, const panel<A>& b, const panel<A>& c, part shape = part::all,
             part wanted = part::all) {
  constexpr int registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;
  constexpr int vectors = 2;
  constexpr int rows = registers >= 32 ? 8 : 4;
  constexpr index_t width = vectors * lanes<A>;
  const index_t columns = whole_vectors<A>(c.columns);
  const auto run = [&]<int Rows>(index_t i, index_t j) {
    if (wanted == part::lower && j >= i + Rows) return;
    const index_t begin = shape == part::upper ? std::min(i, a.depth) : 0;
    const index_t end = shape == part::lower ? std::min(i + Rows, a.depth) : a.depth;
    const A* at = a.data + i * a.row_stride;
    if (j + width <= columns) {
      product_tile<Add, Rows, vectors>(begin, end, at, a.row_stride, a.depth_stride, b.data + j, b.stride,
                                       c.row(i) + j, c.stride);
    } else {
      product_tile<Add, Rows, 1>(begin, end, at, a.row_stride, a.depth_stride, b.data + j, b.stride, c.row(i) + j,
                                 c.stride);
    }
  };
  for (index_t j = 0; j < columns; j += width) {  // the columns of b stay in the first cache
    index_t i = 0;
    for (; i + rows <= c.rows; i += rows) run.template operator()<rows>(i, j);
    for (; i + rows / 2 <= c.rows; i += rows / 2) run.template operator()<rows / 2>(i, j);
    for (; i < c.rows; ++i) run.template operator()<1>(i, j);
  }
}

/// to [columns, rows] = from [rows, columns] transposed: whole blocks in registers, what is left over one by one.
template <class A>
void transpose(const panel<A>& from, const panel<A>& to) {
  using packet = typename Eigen::internal::packet_traits<A>::type;
  constexpr index_t n = lanes<A>;
  const index_t rows = from.rows / n * n;
  const index_t columns = from.columns / n * n;
  for (index_t i0 = 0; i0 < rows; i0 += n) {
    for (index_t j0 = 0; j0 < columns; j0 += n) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // that packets are aligned does not matter here
      Eigen::internal::PacketBlock<packet, static_cast<int>(n)> block;
#pragma GCC diagnostic pop
      for (index_t i = 0; i < n; ++i) block.packet[i] = Eigen::internal::ploadu<packet>(from.row(i0 + i) + j0);
      Eigen::internal::ptranspose(block);
      for (index_t j = 0; j < n; ++j) Eigen::internal::pstoreu(to.row(j0 + j) + i0, block.packet[j]);
    }
  }
  for (index_t i = 0; i < from.rows; ++i) {
    for (index_t j = i < rows ? columns : 0; j < from.columns; ++j) to(j, i) = from(i, j);
  }
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
