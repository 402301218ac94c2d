// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The fragment table: which rank holds which rows of a sequence, and where. Every layout is one.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include <gdn/core/error.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {

/// Global rows [begin, begin + count) lie on `rank`, from its row `local` on.
struct fragment {
  index_t begin = 0;
  index_t count = 0;
  int rank = 0;
  index_t local = 0;
  constexpr index_t end() const noexcept { return begin + count; }
  constexpr bool operator==(const fragment&) const = default;
};

/// Sorted by `begin`, dense (every global row exactly once), no empty fragment; the rows of each rank are dense, too.
/// All ranks hold equal tables.
using fragment_table = std::vector<fragment>;

/// 1. `fragments()` is a valid fragment_table over rows [0, size()) and ranks [0, world_size()).
/// 2. Equal layouts have equal tables; nothing else is consulted.
template <class L>
concept sequence_layout = std::regular<L> && requires(const L& l) {
  { l.world_size() } -> std::same_as<int>;
  { l.size() } -> std::same_as<index_t>;
  { l.fragments() } -> std::same_as<fragment_table>;
};

/// Rows that `rank` holds.
constexpr index_t local_rows(std::span<const fragment> table, int rank) noexcept {
  index_t n = 0;
  for (const fragment& f : table) n += f.rank == rank ? f.count : 0;
  return n;
}

/// The index of the fragment that holds `row`; `table.size()` if there is none. O(log fragments).
constexpr std::size_t fragment_of(std::span<const fragment> table, index_t row) noexcept {
  const auto it = std::upper_bound(table.begin(), table.end(), row,
                                   [](index_t r, const fragment& f) { return r < f.begin; });
  if (it == table.begin()) return table.size();
  const auto at = static_cast<std::size_t>(it - table.begin()) - 1;
  return row < table[at].end() ? at : table.size();
}

/// The first rule that a table breaks, if any.
inline std::optional<diagnostic> validate_fragments(std::span<const fragment> table, index_t total, int world) {
  if (world < 1) return diagnostic{say("a layout needs at least one rank, has", world)};
  if (total < 0) return diagnostic{say("a layout cannot have", total, "rows")};
  index_t at = 0;
  std::vector<std::vector<std::size_t>> of_rank(static_cast<std::size_t>(world));
  for (std::size_t i = 0; i < table.size(); ++i) {
    const fragment& f = table[i];
    if (f.count <= 0) return diagnostic{say("fragment", i, "holds", f.count, "rows; at least 1 is needed")};
    if (f.rank < 0 || f.rank >= world) {
      return diagnostic{say("fragment", i, "is on rank", f.rank, "of", world, "ranks")};
    }
    if (f.begin < 0) return diagnostic{say("fragment", i, "begins at row", f.begin, "; rows begin at 0")};
    if (f.begin > at) return diagnostic{say("no fragment covers row", at, "(fragment", i, "begins at", f.begin, ")")};
    if (f.begin < at) return diagnostic{say("row", f.begin, "is covered twice, by fragment", i, "and one before it")};
    if (f.count > total - at) {
      return diagnostic{say("fragment", i, "holds", f.count, "rows from row", f.begin, "on, the sequence has", total)};
    }
    if (f.local < 0) return diagnostic{say("fragment", i, "lies at local row", f.local)};
    at = f.end();
    of_rank[static_cast<std::size_t>(f.rank)].push_back(i);
  }
  if (at != total) return diagnostic{say("the fragments cover", at, "rows, the sequence has", total)};
  for (std::size_t r = 0; r < of_rank.size(); ++r) {
    std::vector<std::size_t>& mine = of_rank[r];
    std::sort(mine.begin(), mine.end(), [&](std::size_t a, std::size_t b) { return table[a].local < table[b].local; });
    index_t next = 0;
    for (const std::size_t i : mine) {
      if (table[i].local != next) {
        return diagnostic{say("rank", r, "has", table[i].local < next ? "two fragments at" : "no fragment at",
                              "local row", std::min(next, table[i].local))};
      }
      next += table[i].count;
    }
  }
  return std::nullopt;
}

/// Joins neighbours that lie on one rank and follow each other there, too.
constexpr fragment_table merge_neighbours(std::span<const fragment> table) {
  fragment_table out;
  for (const fragment& f : table) {
    if (!out.empty() && out.back().rank == f.rank && out.back().end() == f.begin &&
        out.back().local + out.back().count == f.local) {
      out.back().count += f.count;
    } else {
      out.push_back(f);
    }
  }
  return out;
}

}  // namespace v0
}  // namespace gdn
