// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Which rows go where when a sequence changes its layout: undo and redo of load balancing.

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include <gdn/plan/fragment.hpp>
#include <gdn/plan/tables.hpp>

namespace gdn {
inline namespace v0 {

/// Rows that leave and enter one rank, sorted by peer. A message is the rows of one peer's runs, in order; sender and
/// receiver list the same rows in the same order, though they may cut them into runs differently. Runs of the rank
/// itself are copies.
struct exchange_plan {
  std::vector<run> sends;
  std::vector<run> recvs;

  /// What undoes the exchange. Where it is a permutation of rows, the inverse is also its adjoint.
  constexpr exchange_plan inverse() const { return {recvs, sends}; }
  constexpr bool empty() const noexcept { return sends.empty() && recvs.empty(); }
  constexpr bool operator==(const exchange_plan&) const = default;

  constexpr index_t rows_received(int self) const noexcept {
    index_t n = 0;
    for (const run& r : recvs) n += r.peer == self ? 0 : r.count;
    return n;
  }
  /// True if all `rows` rows stay exactly where they are.
  constexpr bool is_identity(int self, index_t rows) const noexcept {
    if (rows == 0) return sends.empty() && recvs.empty();
    return sends.size() == 1 && recvs.size() == 1 && sends[0] == run{self, 0, rows, 0} && recvs[0] == sends[0];
  }
};

/// Collects runs in message order and turns them into a plan's list: by peer, neighbours joined, `packed` filled in.
class run_list {
 public:
  constexpr void add(int peer, index_t local, index_t count) {
    if (count > 0) runs_.push_back({peer, local, count, static_cast<index_t>(runs_.size())});
  }
  constexpr std::vector<run> finish() && {
    // `packed` holds the place in the list so far: std::sort is constexpr, std::stable_sort is not.
    std::sort(runs_.begin(), runs_.end(),
              [](const run& a, const run& b) { return a.peer != b.peer ? a.peer < b.peer : a.packed < b.packed; });
    std::vector<run> out;
    for (const run& r : runs_) {
      const bool same = !out.empty() && out.back().peer == r.peer;
      if (same && out.back().local + out.back().count == r.local) {
        out.back().count += r.count;
      } else {
        out.push_back({r.peer, r.local, r.count, same ? out.back().packed + out.back().count : 0});
      }
    }
    return out;
  }

 private:
  std::vector<run> runs_;
};

/// The part of `runs` that belongs to each peer, in turn.
template <class F>
constexpr void for_each_peer(std::span<const run> runs, F&& f) {
  for (std::size_t i = 0; i < runs.size();) {
    std::size_t j = i;
    while (j < runs.size() && runs[j].peer == runs[i].peer) ++j;
    f(runs[i].peer, i, j - i, runs[j - 1].packed + runs[j - 1].count);
    i = j;
  }
}

/// Merges two tables over the same rows: what `rank` must send and receive to get from layout `from` to layout `to`.
/// O(|from| + |to|), no work per row.
constexpr exchange_plan plan_exchange(std::span<const fragment> from, std::span<const fragment> to, int rank) {
  run_list sends;
  run_list recvs;
  for (std::size_t a = 0, b = 0; a < from.size() && b < to.size();) {
    const index_t lo = std::max(from[a].begin, to[b].begin);
    const index_t hi = std::min(from[a].end(), to[b].end());
    if (lo < hi) {
      if (from[a].rank == rank) sends.add(to[b].rank, from[a].local + lo - from[a].begin, hi - lo);
      if (to[b].rank == rank) recvs.add(from[a].rank, to[b].local + lo - to[b].begin, hi - lo);
    }
    from[a].end() < to[b].end() ? ++a : ++b;
  }
  return {std::move(sends).finish(), std::move(recvs).finish()};
}

/// From a load-balanced layout to one in which the rows of each rank follow each other and the ranks: the plan behind
/// NeMo's `_undo_attention_load_balancing`, with neighbour messages instead of two gathers of everything.
/// Each rank keeps its number of rows.
template <sequence_layout Layout>
constexpr exchange_plan undo_load_balancing(const Layout& layout, int rank) {
  const fragment_table from = layout.fragments();
  fragment_table to;
  index_t begin = 0;
  for (int r = 0; r < layout.world_size(); ++r) {
    const index_t n = local_rows(from, r);
    if (n > 0) to.push_back({begin, n, r, 0});
    begin += n;
  }
  return plan_exchange(from, to, rank);
}

/// The way back: the inverse of undo, and its adjoint (a permutation is orthogonal).
template <sequence_layout Layout>
constexpr exchange_plan redo_load_balancing(const Layout& layout, int rank) {
  return undo_load_balancing(layout, rank).inverse();
}

}  // namespace v0
}  // namespace gdn
