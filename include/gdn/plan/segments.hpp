// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Segments: the rows of one rank, cut where fragments and documents end.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <gdn/plan/fragment.hpp>

namespace gdn {
inline namespace v0 {

/// Rows [begin, begin + count) of this rank are tokens of `document`, `position`-th of the `pieces` pieces into which
/// fragments cut the document. Documents never leak: state and history cross only where a document has several
/// pieces.
struct segment {
  index_t begin = 0;
  index_t count = 0;
  index_t document = 0;
  index_t position = 0;
  index_t pieces = 1;
  std::size_t fragment = 0;  ///< in the table, of the segment's rows
  constexpr bool first() const noexcept { return position == 0; }
  constexpr bool last() const noexcept { return position + 1 == pieces; }
  constexpr bool operator==(const segment&) const = default;
};

/// The document that holds a token; empty documents hold none. O(log documents).
constexpr index_t document_of(std::span<const index_t> cu, index_t token) noexcept {
  return std::upper_bound(cu.begin(), cu.end(), token) - cu.begin() - 1;
}

/// All segments of `rank`, in local order. Local rows follow the order of the stream (as cp_plan arranges them).
/// O(fragments + own documents).
constexpr std::vector<segment> cut(std::span<const fragment> table, std::span<const index_t> cu, int rank) {
  std::vector<segment> out;
  for (std::size_t i = 0; i < table.size(); ++i) {
    const fragment& f = table[i];
    if (f.rank != rank) continue;
    for (index_t lo = f.begin; lo < f.end();) {
      const index_t d = document_of(cu, lo);
      const index_t start = cu[static_cast<std::size_t>(d)];
      const index_t stop = cu[static_cast<std::size_t>(d) + 1];
      const index_t hi = std::min(stop, f.end());
      const auto head = fragment_of(table, start);
      const auto tail = fragment_of(table, stop - 1);
      out.push_back({f.local + lo - f.begin, hi - lo, d, static_cast<index_t>(i - head),
                     static_cast<index_t>(tail - head) + 1, i});
      lo = hi;
    }
  }
  return out;
}

/// The rank where the state of document n enters (its first token), and where it leaves (its last). An empty document
/// enters and leaves where its next token would lie.
constexpr int rank_of_token(std::span<const fragment> table, index_t token) noexcept {
  if (table.empty()) return 0;
  const std::size_t i = fragment_of(table, token);
  return i < table.size() ? table[i].rank : table.back().rank;
}
constexpr int first_rank(std::span<const fragment> table, std::span<const index_t> cu, index_t n) noexcept {
  return rank_of_token(table, cu[static_cast<std::size_t>(n)]);
}
constexpr int last_rank(std::span<const fragment> table, std::span<const index_t> cu, index_t n) noexcept {
  const index_t lo = cu[static_cast<std::size_t>(n)];
  const index_t hi = cu[static_cast<std::size_t>(n) + 1];
  return rank_of_token(table, hi > lo ? hi - 1 : lo);
}

}  // namespace v0
}  // namespace gdn
