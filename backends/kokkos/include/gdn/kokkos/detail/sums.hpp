// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Sums in an order that the number of terms alone determines.

#include <algorithm>

#include <gdn/core/types.hpp>
#include <gdn/kokkos/detail/parallel.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// term(0) + ... + term(n - 1) in sixteen interleaved sums, which a compiler may keep in vector registers, then a tree.
template <class A, class Term>
A lane_sum(index_t n, const Term& term) {
  constexpr index_t lanes = 16;
  A part[lanes] = {};
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (index_t l = 0; l < lanes; ++l) part[l] += term(i + l);
  }
  for (index_t l = 0; i < n; ++i, ++l) part[l] += term(i);
  for (index_t step = lanes / 2; step > 0; step /= 2) {
    for (index_t l = 0; l < step; ++l) part[l] += part[l + step];
  }
  return part[0];
}

/// Sums over rows that go into a parameter's gradient: in double, in the order of the rows within each of 64 groups
/// of rows, then in the order of the groups. The memory lies in the frame of the caller, which waits.
template <int Width>
class row_group_sums {
 public:
  static constexpr index_t groups = 64;

  void clear() { std::fill_n(value_, groups * Width, 0.0); }
  static constexpr range rows_of(index_t group, index_t rows) noexcept { return piece_at(group, groups, rows); }
  double* of(index_t group) noexcept { return value_ + group * Width; }

  /// target[i] += the sum over all groups of their element first + i
  template <class A>
  void add_to(index_t first, index_t count, A* target) const {
    for (index_t i = 0; i < count; ++i) {
      double sum = 0;
      for (index_t group = 0; group < groups; ++group) sum += value_[group * Width + first + i];
      target[i] = static_cast<A>(static_cast<double>(target[i]) + sum);
    }
  }

 private:
  double value_[groups * Width];
};

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
