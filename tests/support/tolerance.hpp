// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  How far a result may be from its reference: one formula per type.

#include <algorithm>
#include <cmath>
#include <limits>

#include <gdn/core/storage.hpp>
#include <gdn/core/types.hpp>

namespace gdn_test {

/// Distance from 1 to the next number of a type that is stored.
template <class T>
inline constexpr double epsilon = std::numeric_limits<T>::epsilon();
template <>
inline constexpr double epsilon<gdn::bfloat16> = 0x1p-7;
template <>
inline constexpr double epsilon<gdn::float16> = 0x1p-10;

/// Error, as a fraction of the largest value of the reference, after `terms` additions or roundings.
template <class T>
double tolerance(gdn::index_t terms = 1) {
  return 10 * epsilon<T> * std::sqrt(static_cast<double>(std::max<gdn::index_t>(terms, 1)));
}

/// Of a central difference with this step, for functions with values and third derivatives of about 1.
inline constexpr double difference_step = 1e-5;
inline constexpr double difference_tolerance = 1e-7;

}  // namespace gdn_test
