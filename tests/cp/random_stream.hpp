// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Random streams over ranks, as the suites of the operators take them.

#include <cp/host_ranks.hpp>
#include <plan/random_case.hpp>

namespace gdn_test {

/// Sums of few numbers may cancel.
template <class T>
inline constexpr double of_few_numbers = sizeof(T) == 2 ? 4 : 10;

/// The rows of a case, with any strategy, way to share and states.
inline stream_spread random_spread(const plan_case& c, random_source& random) {
  stream_spread s;
  s.world = c.world;
  s.rows = c.rows;
  s.pack = c.pack;
  s.options = {strategies[random.between(0, 1)], shares[random.between(0, 2)], random.coin(), random.coin()};
  return s;
}

}  // namespace gdn_test
