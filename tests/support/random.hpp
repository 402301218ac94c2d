// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Random test data from one seed: printed on failure, and given again by the variable GDN_SEED.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include <gdn/core/types.hpp>

namespace gdn_test {

using gdn::index_t;

inline std::uint64_t seed() {
  static const std::uint64_t value = [] {
    const char* text = std::getenv("GDN_SEED");
    return text != nullptr ? std::strtoull(text, nullptr, 0) : std::uint64_t{20260917};
  }();
  return value;
}

/// Case `n` of a test has a generator of its own, so one case runs again without those before it.
class random_source {
 public:
  explicit random_source(std::uint64_t n) : engine_(seed() * 0x9e3779b97f4a7c15U + n) {}

  index_t between(index_t lo, index_t hi) { return std::uniform_int_distribution<index_t>(lo, hi)(engine_); }
  bool coin(int of = 2) { return between(0, of - 1) == 0; }

  /// `parts` lengths, possibly 0, that add up to `total`.
  std::vector<index_t> lengths(index_t total, index_t parts) {
    std::vector<index_t> cuts = {0, total};
    for (index_t i = 1; i < parts; ++i) cuts.push_back(between(0, total));
    std::sort(cuts.begin(), cuts.end());
    std::vector<index_t> out;
    for (std::size_t i = 1; i < cuts.size(); ++i) out.push_back(cuts[i] - cuts[i - 1]);
    return out;
  }
  std::vector<index_t> permutation(index_t n) {
    std::vector<index_t> out(static_cast<std::size_t>(n));
    std::iota(out.begin(), out.end(), index_t{0});
    std::shuffle(out.begin(), out.end(), engine_);
    return out;
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

}  // namespace gdn_test
