// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  sigmoid and silu, and their slopes.

#include <cmath>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// 1 / (1 + e^-x): 0 and 1 at the ends, never NaN for a number.
template <class A>
A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

template <class A>
A silu(A x) {
  return x * sigmoid(x);
}

/// d silu(x) / dx
template <class A>
A silu_slope(A x) {
  const A s = sigmoid(x);
  return s * (A(1) + x * (A(1) - s));
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
