// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Exact arithmetic for simulated layers: small matrices modulo a prime, whose products do not commute.

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include <gdn/core/types.hpp>

namespace gdn_test {

using gdn::index_t;

/// A number modulo a prime. One that nothing was written to throws when it is read.
class number {
 public:
  constexpr number() = default;
  constexpr explicit number(std::uint64_t v) : value_(v % prime) {}

  constexpr std::uint64_t value() const {
    if (value_ == unwritten) throw std::logic_error("a value is read that nothing was written to");
    return value_;
  }
  constexpr bool written() const { return value_ != unwritten; }
  friend constexpr number operator+(number a, number b) { return number(a.value() + b.value()); }
  friend constexpr number operator*(number a, number b) { return number(a.value() * b.value()); }
  constexpr bool operator==(const number&) const = default;

 private:
  static constexpr std::uint64_t prime = 998244353;
  static constexpr std::uint64_t unwritten = ~std::uint64_t{0};
  std::uint64_t value_ = unwritten;
};

/// A number that depends on all of its arguments; equal arguments give equal numbers on every rank.
template <class... V>
number mixed(V... values) {
  std::uint64_t h = 0x9e3779b97f4a7c15U;
  ((h = (h ^ static_cast<std::uint64_t>(values)) * 0xbf58476d1ce4e5b9U, h ^= h >> 31U), ...);
  return number(h);
}

using numbers = std::vector<number>;

}  // namespace gdn_test
