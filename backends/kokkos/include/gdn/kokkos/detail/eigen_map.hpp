// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Eigen's view of a tensor, and matrix products whose bits and threads do not depend on where they run.

#include <concepts>
#include <type_traits>

#include <Eigen/Core>

#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

template <class T>
using row_major_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// [rows, columns] with any row stride and unit column stride.
template <class T>
using matrix_map = Eigen::Map<
    std::conditional_t<std::is_const_v<T>, const row_major_matrix<std::remove_const_t<T>>, row_major_matrix<T>>,
    Eigen::Unaligned, Eigen::OuterStride<>>;

template <class T>
matrix_map<T> eigen_map(T* data, index_t rows, index_t columns, index_t row_stride) {
  return matrix_map<T>(data, rows, columns, Eigen::OuterStride<>(row_stride));
}
template <class T>
matrix_map<T> eigen_map(const tensor_ref<T, 2>& t) {
  return eigen_map(t.data(), t.extent(0), t.extent(1), t.stride(0));
}

/// Sizes of the blocks that are copied next to each other before they are multiplied. Eigen would choose them from the
/// caches it finds; fixed sizes give the same order of sums on every machine of one instruction set. The buffers
/// of `wide_blocks` take 224 KiB of the stack, those of `narrow_blocks` 128 KiB.
struct wide_blocks {
  static constexpr int rows = 256, columns = 192;
  template <class A>
  static constexpr int depth = 512 / sizeof(A);
};
struct narrow_blocks {
  static constexpr int rows = 64, columns = 192;
  template <class A>
  static constexpr int depth = 512 / sizeof(A);
};

/// res [rows, columns] += lhs [rows, depth] rhs [depth, columns], all stored by rows with the given strides, or
/// by columns where `LhsOrder` or `RhsOrder` says so.
///
/// Never opens a parallel region and never allocates. `a * b` would do both: Eigen starts OpenMP threads for large
/// products unless omp_get_num_threads() > 1, which is false in Kokkos::Serial and in a pool of one thread, and
/// splits the product by the number of threads, which changes bits. A macro against that would leak into the host
/// program, and a thread limit would be global. The function below is what Eigen calls per thread.
template <int LhsOrder, int RhsOrder, class Blocks, class A>
void add_product(index_t rows, index_t columns, index_t depth, const A* lhs, index_t lhs_stride, const A* rhs,
                 index_t rhs_stride, A* res, index_t res_stride) {
  static_assert(std::floating_point<A>);
  constexpr auto transposed = [](int order) { return order == Eigen::RowMajor ? Eigen::ColMajor : Eigen::RowMajor; };
  // Eigen's kernel writes columns; rows of res are the columns of its transpose, res^T = rhs^T lhs^T.
  using kernel = Eigen::internal::general_matrix_matrix_product<Eigen::Index, A, transposed(RhsOrder), false, A,
                                                                transposed(LhsOrder), false, Eigen::ColMajor, 1>;
  if (rows <= 0 || columns <= 0 || depth <= 0) return;
  Eigen::internal::gemm_blocking_space<Eigen::ColMajor, A, A, Blocks::columns, Blocks::rows, Blocks::template depth<A>,
                                       1, true>
      blocking(columns, rows, depth, 1, false);
  kernel::run(columns, rows, depth, rhs, rhs_stride, lhs, lhs_stride, res, 1, res_stride, A(1), blocking, nullptr);
}

/// res += lhs * rhs for matrices with direct access (maps, blocks of maps and transposes of those); see above.
template <class Blocks = narrow_blocks, class Lhs, class Rhs, class Res>
void add_product(const Lhs& lhs, const Rhs& rhs, Res&& res) {
  using result = std::remove_cvref_t<Res>;
  static_assert(result::IsRowMajor && result::InnerStrideAtCompileTime == 1, "the result is stored by rows");
  static_assert(Lhs::InnerStrideAtCompileTime == 1 && Rhs::InnerStrideAtCompileTime == 1);
  eigen_assert(lhs.rows() == res.rows() && rhs.cols() == res.cols() && lhs.cols() == rhs.rows());
  constexpr int lhs_order = Lhs::IsRowMajor ? Eigen::RowMajor : Eigen::ColMajor;
  constexpr int rhs_order = Rhs::IsRowMajor ? Eigen::RowMajor : Eigen::ColMajor;
  add_product<lhs_order, rhs_order, Blocks>(res.rows(), res.cols(), lhs.cols(), lhs.data(), lhs.outerStride(),
                                            rhs.data(), rhs.outerStride(), res.data(), res.outerStride());
}

/// Rows that Eigen's kernel multiplies at once; fewer go a different way that sums in another order.
template <class A>
inline constexpr int rows_at_once = Eigen::internal::gebp_traits<A, A>::nr;

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
