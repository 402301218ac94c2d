// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Conv halo and tail: the rows of history that a causal convolution of width W reads and leaves.

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include <gdn/plan/exchange.hpp>
#include <gdn/plan/segments.hpp>

namespace gdn {
inline namespace v0 {

/// Source rows are this rank's rows, then W rows of initial conv state for each document that enters here (if states
/// are given). Destination rows are W - 1 rows of history for each segment that has one, then W rows of final conv
/// state for each document that leaves here (if they are wanted). Rows before a document without a state are zero:
/// no run writes them.
struct halo_plan {
  exchange_plan exchange;
  std::vector<index_t> halo_of;  ///< for each segment: its first destination row, or -1
  index_t halo_rows = 0;         ///< destination rows of history
  index_t tail_rows = 0;         ///< destination rows of final states, behind them
  index_t state_rows = 0;        ///< source rows of initial states, behind this rank's own

  index_t rows() const noexcept { return halo_rows + tail_rows; }
  bool operator==(const halo_plan&) const = default;
};

namespace detail {

/// Walks over those who read history: the fragments that continue a document, and the documents' ends. Every rank
/// walks over the readers that concern it in the same order, so messages match without tags.
class halo_planner {
 public:
  halo_planner(std::span<const fragment> table, std::span<const index_t> cu, index_t width, int rank, bool initial)
      : table_(table), cu_(cu), width_(width), rank_(rank), initial_(initial) {}

  /// Tokens [lo, hi) of `document` go to row `at` of `reader`. Those before its start are state; without a state they
  /// stay zero.
  void read(index_t document, index_t lo, index_t hi, int reader, index_t at) {
    const index_t start = cu_[static_cast<std::size_t>(document)];
    if (lo < start) {
      const index_t n = std::min(hi, start) - lo;
      if (initial_) {
        const int owner = first_rank(table_, cu_, document);
        if (owner == rank_) sends_.add(reader, state_row(document) + width_ - (start - lo), n);
        if (reader == rank_) recvs_.add(owner, at, n);
      }
      at += n;
      lo += n;
    }
    for (std::size_t i = fragment_of(table_, lo); lo < hi; ++i) {
      const fragment& f = table_[i];
      const index_t n = std::min(hi, f.end()) - lo;
      if (f.rank == rank_) sends_.add(reader, f.local + lo - f.begin, n);
      if (reader == rank_) recvs_.add(f.rank, at, n);
      at += n;
      lo += n;
    }
  }

  void enters(index_t document, index_t row) { entering_.push_back({document, row}); }
  exchange_plan finish() && { return {std::move(sends_).finish(), std::move(recvs_).finish()}; }

 private:
  struct entry {
    index_t document, row;
  };
  index_t state_row(index_t document) const {
    const auto it = std::lower_bound(entering_.begin(), entering_.end(), document,
                                     [](const entry& e, index_t d) { return e.document < d; });
    return it->row;
  }

  std::span<const fragment> table_;
  std::span<const index_t> cu_;
  index_t width_;
  int rank_;
  bool initial_;
  std::vector<entry> entering_;  // ascending
  run_list sends_, recvs_;
};

}  // namespace detail

/// @param entering,leaving documents whose first (last) token is here, ascending
/// @param initial,final_   whether conv states come in and go out
/// O(own fragments * W + own documents) after the table is built.
inline halo_plan plan_halo(std::span<const fragment> table, std::span<const index_t> cu,
                           std::span<const segment> segments, std::span<const index_t> entering,
                           std::span<const index_t> leaving, index_t width, int rank, bool initial, bool final_) {
  halo_plan plan;
  const index_t own = local_rows(table, rank);
  const index_t history = width - 1;
  detail::halo_planner planner(table, cu, width, rank, initial);

  for (std::size_t i = 0; initial && i < entering.size(); ++i) {
    planner.enters(entering[i], own + static_cast<index_t>(i) * width);
  }
  plan.state_rows = initial ? static_cast<index_t>(entering.size()) * width : 0;

  // Where this rank's own readers put their rows.
  plan.halo_of.assign(segments.size(), -1);
  for (std::size_t i = 0; i < segments.size(); ++i) {
    if (history > 0 && (!segments[i].first() || initial)) {
      plan.halo_of[i] = plan.halo_rows;
      plan.halo_rows += history;
    }
  }
  plan.tail_rows = final_ ? static_cast<index_t>(leaving.size()) * width : 0;

  // Readers that concern this rank: its own segments and documents, and those of others that reach back into its
  // rows: fragments that begin less than W rows behind one of its own, and documents that end there.
  struct reader {
    std::size_t fragment;  // or table.size() for the end of a document
    index_t document;
    index_t at;  // destination row, for readers of this rank
  };
  std::vector<reader> readers;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    if (plan.halo_of[i] >= 0) readers.push_back({segments[i].fragment, segments[i].document, plan.halo_of[i]});
  }
  for (std::size_t i = 0; final_ && i < leaving.size(); ++i) {
    readers.push_back({table.size(), leaving[i], plan.halo_rows + static_cast<index_t>(i) * width});
  }
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (table[i].rank != rank) continue;
    const index_t document = document_of(cu, table[i].end() - 1);  // the only one that goes on behind this fragment
    const index_t stop = cu[static_cast<std::size_t>(document) + 1];
    if (stop <= table[i].end()) continue;
    for (std::size_t j = i + 1; j < table.size() && table[j].begin < std::min(stop, table[i].end() + history); ++j) {
      if (table[j].rank != rank && history > 0) readers.push_back({j, document, -1});
    }
    if (final_ && stop < table[i].end() + width && last_rank(table, cu, document) != rank) {
      readers.push_back({table.size(), document, -1});
    }
  }
  const auto key = [](const reader& r) { return std::pair{r.fragment, r.document}; };
  std::sort(readers.begin(), readers.end(), [&](const reader& a, const reader& b) { return key(a) < key(b); });
  readers.erase(std::unique(readers.begin(), readers.end(),
                            [&](const reader& a, const reader& b) { return key(a) == key(b); }),
                readers.end());

  for (const reader& r : readers) {
    const index_t start = cu[static_cast<std::size_t>(r.document)];
    const index_t stop = cu[static_cast<std::size_t>(r.document) + 1];
    const bool tail = r.fragment == table.size();
    const index_t hi = tail ? stop : std::max(table[r.fragment].begin, start);
    const index_t lo = hi - (tail ? width : history);
    const int owner = tail ? last_rank(table, cu, r.document) : table[r.fragment].rank;
    planner.read(r.document, lo, hi, owner, r.at);
  }
  plan.exchange = std::move(planner).finish();
  return plan;
}

}  // namespace v0
}  // namespace gdn
