// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The scalar vocabulary: indices, where memory lives, what sums are kept in.

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <gdn/config.hpp>

namespace gdn {
inline namespace v0 {

/// Counts of rows, elements and bytes; signed, so that differences are safe.
using index_t = std::int64_t;

/// Memory that the host may read and write.
struct host_memory {
  static constexpr bool host_accessible = true;
};
/// Memory of an accelerator: pointers are carried on the host, never followed there.
struct device_memory {
  static constexpr bool host_accessible = false;
};

template <class M>
concept memory_kind = requires {
  { M::host_accessible } -> std::convertible_to<bool>;
};

/// The type of everything that is summed or carried over a whole sequence: decays, states, summaries, statistics of
/// norms, `A_log`, `dt_bias`, the norm weight, and every parameter gradient. `double` in an f64 layer, `float` in
/// all others: a `float` state between ranks would break the equality of P ranks and one rank in f64.
template <class T>
using accumulate_t = std::conditional_t<std::same_as<T, double>, double, float>;

/// The type of what passes from one operation of a layer to the next. On the host, sums are `float` at least and so is
/// what they are stored in: a 16-bit layer rounds its weights, input and output, what stands in `delta_rule_inputs`,
/// and nothing between. On a device these tensors are most of the traffic, and stay as narrow as the layer.
template <class T, memory_kind Memory>
using between_t = std::conditional_t<Memory::host_accessible, accumulate_t<T>, T>;

static_assert(std::same_as<accumulate_t<double>, double> && std::same_as<accumulate_t<float>, float>);
static_assert(std::same_as<between_t<double, host_memory>, double>);

}  // namespace v0
}  // namespace gdn
