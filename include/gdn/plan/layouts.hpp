// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The layouts in use, each as the fragment table it stands for.

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <gdn/plan/fragment.hpp>

namespace gdn {
inline namespace v0 {

/// Rank r holds the r-th piece; where `world` does not divide `rows`, the first `rows mod world` ranks hold one more.
struct contiguous_layout {
  index_t rows = 0;
  int world = 1;
  constexpr int world_size() const noexcept { return world; }
  constexpr index_t size() const noexcept { return rows; }
  constexpr fragment_table fragments() const {
    fragment_table t;
    index_t begin = 0;
    for (int r = 0; r < world; ++r) {
      const index_t n = rows / world + (r < rows % world ? 1 : 0);
      if (n > 0) t.push_back({begin, n, r, 0});
      begin += n;
    }
    return t;
  }
  constexpr bool operator==(const contiguous_layout&) const = default;
};

/// DualChunkSwap: of 2 * world equal chunks rank r holds chunk r and then chunk 2 * world - 1 - r, so that causal
/// attention costs every rank the same. `rows` must be a multiple of 2 * world.
struct zigzag_layout {
  index_t rows = 0;
  int world = 1;
  constexpr int world_size() const noexcept { return world; }
  constexpr index_t size() const noexcept { return rows; }
  constexpr fragment_table fragments() const {
    expects<metadata_error>(world >= 1 && rows % (2 * world) == 0, "zigzag needs a multiple of 2 P =", 2 * world,
                            "rows, has", rows);
    fragment_table t;
    const index_t c = rows / (2 * world);
    for (int n = 0; n < 2 * world && c > 0; ++n) {
      const bool head = n < world;
      t.push_back({n * c, c, head ? n : 2 * world - 1 - n, head ? 0 : c});
    }
    return t;
  }
  constexpr bool operator==(const zigzag_layout&) const = default;
};

/// Token t lies on rank t mod world.
struct interleaved_layout {
  index_t rows = 0;
  int world = 1;
  constexpr int world_size() const noexcept { return world; }
  constexpr index_t size() const noexcept { return rows; }
  constexpr fragment_table fragments() const {
    expects<metadata_error>(world >= 1 && rows >= 0, "a layout cannot have", rows, "rows on", world, "ranks");
    fragment_table t;
    t.reserve(static_cast<std::size_t>(rows));
    for (index_t i = 0; i < rows; ++i) t.push_back({i, 1, static_cast<int>(i % world), i / world});
    return t;
  }
  constexpr bool operator==(const interleaved_layout&) const = default;
};

/// Any table, checked once.
struct explicit_layout {
  fragment_table table;
  index_t rows = 0;
  int world = 1;
  constexpr int world_size() const noexcept { return world; }
  constexpr index_t size() const noexcept { return rows; }
  constexpr fragment_table fragments() const { return table; }
  constexpr bool operator==(const explicit_layout&) const = default;
};

/// Per-document zigzag (THD of Transformer Engine and Megatron): each document is split into 2 * world chunks, and
/// rank r holds, document after document, its chunks r and 2 * world - 1 - r. Rows of no document (padding) are
/// dealt out in contiguous pieces behind the rows of the documents.
///
/// @param documents [begin, end) of each document, ascending; lengths must be multiples of 2 * world
/// @throws metadata_error naming the first document whose length is none
inline explicit_layout per_document_zigzag(std::span<const std::pair<index_t, index_t>> documents, index_t rows,
                                           int world) {
  expects<metadata_error>(world >= 1, "a layout needs at least one rank, has", world);
  explicit_layout out{{}, rows, world};
  std::vector<index_t> filled(static_cast<std::size_t>(world), 0);
  const auto add = [&](index_t begin, index_t count, int rank) {
    index_t& at = filled[static_cast<std::size_t>(rank)];
    if (count > 0) out.table.push_back({begin, count, rank, at});
    at += count;
  };
  std::vector<std::pair<index_t, index_t>> gaps;
  index_t at = 0;
  for (std::size_t d = 0; d < documents.size(); ++d) {
    const auto [begin, end] = documents[d];
    expects<metadata_error>(begin >= at && end >= begin && end <= rows, "document", d, "covers rows", begin, "to", end,
                            "which do not follow the document before or leave the", rows, "rows");
    const index_t c = (end - begin) / (2 * world);
    expects<metadata_error>(c * 2 * world == end - begin, "document", d, "has", end - begin,
                            "rows; zigzag per document needs a multiple of 2 P =", 2 * world);
    if (begin > at) gaps.emplace_back(at, begin);
    at = end;
    for (int n = 0; n < 2 * world; ++n) {  // the chunk of the second half lies behind the one of the first half
      const int rank = n < world ? n : 2 * world - 1 - n;
      if (c > 0) {
        out.table.push_back({begin + n * c, c, rank, filled[static_cast<std::size_t>(rank)] + (n < world ? 0 : c)});
      }
    }
    for (index_t& f : filled) f += 2 * c;
  }
  if (at < rows) gaps.emplace_back(at, rows);
  for (const auto& [begin, end] : gaps) {
    for (const fragment& f : contiguous_layout{end - begin, world}.fragments()) add(begin + f.begin, f.count, f.rank);
  }
  std::sort(out.table.begin(), out.table.end(), [](const fragment& a, const fragment& b) { return a.begin < b.begin; });
  return out;
}

/// What is wrong with the positions that the ranks hold: they must be a permutation of 0 .. n - 1.
inline std::optional<diagnostic> validate_positions(std::span<const std::vector<index_t>> of_rank) {
  index_t total = 0;
  for (const auto& p : of_rank) total += static_cast<index_t>(p.size());
  std::vector<int> seen(static_cast<std::size_t>(total), -1);
  for (std::size_t r = 0; r < of_rank.size(); ++r) {
    for (std::size_t i = 0; i < of_rank[r].size(); ++i) {
      const index_t p = of_rank[r][i];
      if (p < 0 || p >= total) {
        return diagnostic{say("rank", r, "holds position", p, "at local row", i,
                              "; positions must cover 0 to", total - 1, "densely")};
      }
      int& s = seen[static_cast<std::size_t>(p)];
      if (s >= 0) return diagnostic{say("position", p, "is held twice, by ranks", s, "and", r)};
      s = static_cast<int>(r);
    }
  }
  return std::nullopt;  // n positions in [0, n), none twice: all are covered
}

/// The layout in which rank r holds the rows `of_rank[r]`, in that order.
/// @throws metadata_error unless they are a permutation of 0 .. n - 1, naming the first bad position
inline explicit_layout from_positions(std::span<const std::vector<index_t>> of_rank) {
  raise(validate_positions(of_rank));
  explicit_layout out;
  out.world = static_cast<int>(of_rank.size());
  for (std::size_t r = 0; r < of_rank.size(); ++r) {
    const auto& p = of_rank[r];
    for (std::size_t i = 0; i < p.size();) {  // run-length encoded
      std::size_t j = i + 1;
      while (j < p.size() && p[j] == p[j - 1] + 1) ++j;
      out.table.push_back({p[i], static_cast<index_t>(j - i), static_cast<int>(r), static_cast<index_t>(i)});
      i = j;
    }
    out.rows += static_cast<index_t>(p.size());
  }
  std::sort(out.table.begin(), out.table.end(), [](const fragment& a, const fragment& b) { return a.begin < b.begin; });
  return out;
}

/// The layout in which rank r holds the ranges [first, second) of `of_rank[r]`, one after the other.
/// @throws metadata_error naming a row that is covered twice or never
inline explicit_layout from_ranges(std::span<const std::vector<std::pair<index_t, index_t>>> of_rank) {
  explicit_layout out;
  out.world = static_cast<int>(of_rank.size());
  for (std::size_t r = 0; r < of_rank.size(); ++r) {
    index_t local = 0;
    for (const auto& [begin, end] : of_rank[r]) {
      expects<metadata_error>(begin >= 0 && end > begin, "rank", r, "has the range", begin, "to", end,
                              "; ranges hold at least one row");
      out.table.push_back({begin, end - begin, static_cast<int>(r), local});
      local += end - begin;
    }
    out.rows += local;
  }
  std::sort(out.table.begin(), out.table.end(), [](const fragment& a, const fragment& b) { return a.begin < b.begin; });
  raise(validate_fragments(out.table, out.rows, out.world));
  return out;
}

/// The global positions of the rows of `rank`, in local order.
template <sequence_layout Layout>
std::vector<index_t> positions(const Layout& layout, int rank) {
  const fragment_table table = layout.fragments();
  std::vector<index_t> out(static_cast<std::size_t>(local_rows(table, rank)));
  for (const fragment& f : table) {
    for (index_t i = 0; f.rank == rank && i < f.count; ++i) out[static_cast<std::size_t>(f.local + i)] = f.begin + i;
  }
  return out;
}

/// The zigzag positions of one rank from its local length, as NeMo's `_build_dual_chunk_local_positions`.
/// @throws metadata_error for an odd length
inline std::vector<index_t> zigzag_local_positions(index_t local_length, int world, int rank) {
  expects<metadata_error>(local_length >= 0 && local_length % 2 == 0, "zigzag needs an even local length, has",
                          local_length);
  expects<metadata_error>(0 <= rank && rank < world, "there is no rank", rank, "of", world);
  return positions(zigzag_layout{local_length * world, world}, rank);
}

/// One layout for every row of a batch: row b of a rank lies behind its row b - 1. O(batch * fragments).
inline fragment_table batch_table(std::span<const fragment> table, index_t rows, int world, index_t batch) {
  fragment_table out;
  out.reserve(table.size() * static_cast<std::size_t>(batch));
  std::vector<index_t> length(static_cast<std::size_t>(world), 0);
  for (const fragment& f : table) length[static_cast<std::size_t>(f.rank)] += f.count;
  for (index_t b = 0; b < batch; ++b) {
    for (const fragment& f : table) {
      out.push_back({b * rows + f.begin, f.count, f.rank, b * length[static_cast<std::size_t>(f.rank)] + f.local});
    }
  }
  return out;
}

static_assert(sequence_layout<contiguous_layout> && sequence_layout<zigzag_layout>);
static_assert(sequence_layout<interleaved_layout> && sequence_layout<explicit_layout>);

}  // namespace v0
}  // namespace gdn
