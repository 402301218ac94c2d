// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  cp_plan: everything one rank must know about one batch shape, as plain values.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gdn/plan/exchange.hpp>
#include <gdn/plan/halo.hpp>
#include <gdn/plan/layouts.hpp>
#include <gdn/plan/packing.hpp>
#include <gdn/plan/segments.hpp>
#include <gdn/plan/state_chain.hpp>

namespace gdn {
inline namespace v0 {

enum class strategy : std::uint8_t {
  reshard,  ///< undo the load balancing, run on contiguous pieces, redo: activations travel, one summary per rank
  in_place  ///< run on the pieces where they are: no activation travels, but a summary for each; many pieces may fall
            ///< back to reshard, see cp_plan::strategy
};

/// The sizes of the layer that a plan depends on.
struct plan_shape {
  index_t conv_width = 4;  ///< W
  summary_shape summary;   ///< Hv, K, V
  index_t chunk = 64;      ///< C, tokens per chunk of the delta rule
  index_t hidden = 0;      ///< hid: what moving a row costs
  constexpr bool operator==(const plan_shape&) const = default;
};

struct plan_options {
  gdn::strategy strategy = strategy::reshard;
  gdn::share share = share::all_gather;
  bool initial_state = false;  ///< recurrent and conv states come in for every document
  bool final_state = false;    ///< and go out
  constexpr bool operator==(const plan_options&) const = default;
};

/// Bytes that one rank receives from others.
struct traffic {
  index_t halo = 0;
  index_t state = 0;
  index_t activations = 0;
  constexpr index_t total() const noexcept { return halo + state + activations; }
  constexpr bool operator==(const traffic&) const = default;
};

/// Built once per batch shape on the host, shared by all layers of one shape, micro-batches, recomputations and
/// backends. All ranks build it from equal arguments (check_same_plan() proves it).
///
/// Two spaces of rows: the caller's (padding and all, in the caller's layout), and the compute rows: the valid
/// tokens of this rank in the order of the stream.
struct cp_plan {
  int rank = 0;
  int world = 1;
  plan_shape shape;
  plan_options options;    ///< as asked for
  gdn::strategy strategy;  ///< as done. In place falls back to reshard if a rank holds more than two pieces of some
                           ///< document and moving rows is predicted to move less
  index_t caller_rows = 0;   ///< of this rank, padding included
  index_t compute_rows = 0;  ///< L
  index_t tokens = 0;        ///< of all ranks
  std::vector<index_t> cu_seqlens;  ///< [N + 1] over the stream
  fragment_table table;             ///< of compute rows, over the stream

  exchange_plan undo;             ///< caller's rows -> compute rows; redo is its inverse
  exchange_plan redo;
  std::vector<run> padding;       ///< caller's rows that hold no token
  std::vector<segment> segments;  ///< tile the compute rows
  std::vector<index_t> entering;  ///< documents whose first token is here (or that are empty, and here), ascending
  std::vector<index_t> leaving;   ///< documents whose last token is here, ascending
  halo_plan halo;
  std::vector<conv_segment> conv_segments;
  std::vector<rule_segment> rule_segments;
  std::vector<run> empty_documents;  ///< `local` is its place in entering, `packed` in leaving
  index_t chunks = 0;
  index_t longest_segment = 0;
  index_t entering_states = 0;   ///< states [0, entering_states) of h0 are given, the others folded
  index_t leaving_states = 0;    ///< gradients [0, leaving_states) of dht are given, the others folded
  index_t h0_states = 0;
  index_t dht_states = 0;
  chain_plan chain;           ///< forward
  chain_plan reverse_chain;   ///< of gradients, right to left

  index_t documents() const noexcept { return static_cast<index_t>(cu_seqlens.size()) - 1; }
  int first_rank(index_t n) const noexcept { return gdn::first_rank(table, cu_seqlens, n); }
  int last_rank(index_t n) const noexcept { return gdn::last_rank(table, cu_seqlens, n); }
  bool undo_is_identity() const noexcept {
    return caller_rows == compute_rows && undo.is_identity(rank, compute_rows);
  }

  /// @param hidden hid, @param element bytes of the layer's type, @param accumulate bytes of accumulate_t
  traffic forward_traffic(index_t hidden, index_t element, index_t accumulate) const noexcept {
    return {halo.exchange.rows_received(rank) * (channels() * element),
            chain.elements_received(rank) * accumulate,
            (undo.rows_received(rank) + redo.rows_received(rank)) * hidden * element};
  }
  /// Gradients of the halo travel in the layer's type, like the halo.
  traffic backward_traffic(index_t hidden, index_t element, index_t accumulate) const noexcept {
    return {halo.exchange.inverse().rows_received(rank) * (channels() * element),
            reverse_chain.elements_received(rank) * accumulate,
            (undo.rows_received(rank) + redo.rows_received(rank)) * hidden * element};
  }
  /// Channels of a halo row, Dc.
  index_t channels() const noexcept { return conv_channels; }
  index_t conv_channels = 0;

  /// Equal on all ranks that may run together, and on no others (but for 64-bit collisions): the layout, the
  /// documents, the sizes and the options.
  std::uint64_t digest() const noexcept { return digest_; }
  std::uint64_t digest_ = 0;

  /// A few lines for logs.
  std::string describe() const;
};

namespace detail {

class hasher {  // FNV-1a over 64-bit words with a final mix
 public:
  template <class... V>
  void add(V... values) noexcept {
    ((hash_ = (hash_ ^ static_cast<std::uint64_t>(values)) * 0x100000001b3U, hash_ ^= hash_ >> 29U), ...);
  }
  std::uint64_t value() const noexcept { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325U;
};

/// The caller's table without padding, in tokens of the stream; `local` still counts the caller's rows.
inline fragment_table tokens_of(std::span<const fragment> rows, const packing& pack) {
  fragment_table out;
  for (std::size_t f = 0, r = 0; f < rows.size() && r < pack.runs.size();) {
    const token_run& t = pack.runs[r];
    const index_t lo = std::max(rows[f].begin, t.row);
    const index_t hi = std::min(rows[f].end(), t.row + t.count);
    if (lo < hi) out.push_back({t.token + lo - t.row, hi - lo, rows[f].rank, rows[f].local + lo - rows[f].begin});
    rows[f].end() < t.row + t.count ? ++f : ++r;
  }
  return out;
}

/// Tokens where they are, the rows of each rank renumbered in the order of the stream; neighbours merge.
inline fragment_table in_place_table(std::span<const fragment> tokens, int world) {
  std::vector<index_t> filled(static_cast<std::size_t>(world), 0);
  fragment_table out(tokens.begin(), tokens.end());
  for (fragment& f : out) {
    f.local = filled[static_cast<std::size_t>(f.rank)];
    filled[static_cast<std::size_t>(f.rank)] += f.count;
  }
  return merge_neighbours(out);
}

/// Each rank keeps its number of tokens, and holds them in the order of the ranks.
inline fragment_table contiguous_table(std::span<const fragment> tokens, int world) {
  std::vector<index_t> count(static_cast<std::size_t>(world), 0);
  for (const fragment& f : tokens) count[static_cast<std::size_t>(f.rank)] += f.count;
  fragment_table out;
  index_t begin = 0;
  for (int r = 0; r < world; ++r) {
    const index_t n = count[static_cast<std::size_t>(r)];
    if (n > 0) out.push_back({begin, n, r, 0});
    begin += n;
  }
  return out;
}

/// Calls f(ranks of its pieces) for every document. O(fragments + documents log fragments).
template <class F>
void for_each_chain(std::span<const fragment> table, std::span<const index_t> cu, F&& f) {
  std::vector<int> ranks;
  for (std::size_t n = 0; n + 1 < cu.size(); ++n) {
    if (cu[n] == cu[n + 1]) continue;
    ranks.clear();
    for (std::size_t i = fragment_of(table, cu[n]); i < table.size() && table[i].begin < cu[n + 1]; ++i) {
      ranks.push_back(table[i].rank);
    }
    f(std::span<const int>(ranks));
  }
}

/// Elements that states and history move between ranks, in all: rows of history are counted as whole ones.
/// In double, since a summary for each of very many tokens exceeds 64 bits.
inline double predicted_elements(std::span<const fragment> table, std::span<const index_t> cu, const plan_shape& shape,
                                 index_t conv_channels, share how, int world) {
  double sum = 0;
  chain_predictor chain(shape.summary, how, world);
  for_each_chain(table, cu, [&](std::span<const int> ranks) {
    const auto history = static_cast<double>((shape.conv_width - 1) * conv_channels);
    sum += chain.elements(ranks) + static_cast<double>(ranks.size() - 1) * history;
  });
  return sum;
}

/// Whether tokens that lie in `table` should rather move to `contiguous` and back. Never where each rank holds at
/// most two pieces of each document, as contiguous and zigzag layouts do. Elements are compared, not bytes, so the
/// answer does not depend on the layer's type.
inline bool moving_rows_is_cheaper(std::span<const fragment> table, std::span<const fragment> contiguous,
                                   std::span<const index_t> cu, const plan_shape& shape, index_t conv_channels,
                                   share how, int world) {
  bool many = false;
  std::vector<index_t> held(static_cast<std::size_t>(world), 0);
  for_each_chain(table, cu, [&](std::span<const int> ranks) {
    for (const int r : ranks) many = ++held[static_cast<std::size_t>(r)] > 2 || many;
    for (const int r : ranks) held[static_cast<std::size_t>(r)] = 0;
  });
  if (!many) return false;
  index_t rows = 0;
  for (std::size_t a = 0, b = 0; a < table.size() && b < contiguous.size();) {
    const index_t lo = std::max(table[a].begin, contiguous[b].begin);
    const index_t hi = std::min(table[a].end(), contiguous[b].end());
    if (lo < hi && table[a].rank != contiguous[b].rank) rows += hi - lo;
    table[a].end() < contiguous[b].end() ? ++a : ++b;
  }
  const auto elements = [&](std::span<const fragment> t) {
    return predicted_elements(t, cu, shape, conv_channels, how, world);
  };
  return 2.0 * static_cast<double>(rows) * static_cast<double>(shape.hidden) + elements(contiguous) < elements(table);
}

/// The chains of all documents that this rank shares with others.
inline std::vector<chain_document> chain_documents(const cp_plan& plan, bool reverse) {
  std::vector<chain_document> out;
  index_t document = -1;
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    const segment& s = plan.segments[i];
    if (s.pieces == 1) continue;
    if (s.document != document) {
      document = s.document;
      chain_document d;
      const std::size_t head = s.fragment - static_cast<std::size_t>(s.position);
      for (index_t p = 0; p < s.pieces; ++p) {
        d.ranks.push_back(plan.table[head + static_cast<std::size_t>(p)].rank);
      }
      if (reverse) std::reverse(d.ranks.begin(), d.ranks.end());
      out.push_back(std::move(d));
    }
    const rule_segment& r = plan.rule_segments[i];
    out.back().own.push_back({reverse ? s.pieces - 1 - s.position : s.position, static_cast<std::int32_t>(i),
                              reverse ? r.dht : r.h0});
  }
  if (reverse) {
    for (chain_document& d : out) std::reverse(d.own.begin(), d.own.end());
  }
  return out;
}

}  // namespace detail

/// Plans one rank's part of one batch.
///
/// @param rows          table over the B * S rows of the batch (batch_table() makes it of one layout for all rows)
/// @param pack          which of those rows are tokens of which document
/// @param conv_channels Dc
/// @throws metadata_error if the table is not valid, or does not cover the rows of the batch
inline cp_plan plan_context_parallel(std::span<const fragment> rows, const packing& pack, const plan_shape& shape,
                                     index_t conv_channels, const plan_options& options, int world, int rank) {
  raise(validate_packing(pack));
  raise(validate_fragments(rows, pack.rows(), world));
  expects<metadata_error>(0 <= rank && rank < world, "there is no rank", rank, "of", world);
  expects<metadata_error>(shape.conv_width >= 1 && shape.chunk >= 1, "conv width", shape.conv_width, "and chunk",
                          shape.chunk, "must be at least 1");

  cp_plan p;
  p.rank = rank;
  p.world = world;
  p.shape = shape;
  p.options = options;
  p.strategy = options.strategy;
  p.conv_channels = conv_channels;
  p.caller_rows = local_rows(rows, rank);
  p.tokens = pack.tokens();
  p.cu_seqlens = pack.cu_seqlens;

  // Where the tokens are, and where they are computed.
  const fragment_table tokens = detail::tokens_of(rows, pack);
  p.table = detail::in_place_table(tokens, world);
  fragment_table contiguous = detail::contiguous_table(tokens, world);
  if (p.strategy == strategy::in_place &&
      detail::moving_rows_is_cheaper(p.table, contiguous, p.cu_seqlens, shape, conv_channels, options.share, world)) {
    p.strategy = strategy::reshard;
  }
  if (p.strategy == strategy::reshard) p.table = std::move(contiguous);
  p.compute_rows = local_rows(p.table, rank);
  p.undo = plan_exchange(tokens, p.table, rank);
  p.redo = p.undo.inverse();
  std::vector<std::pair<index_t, index_t>> held;  // the caller's rows that hold tokens
  for (const fragment& f : tokens) {
    if (f.rank == rank) held.emplace_back(f.local, f.count);
  }
  std::sort(held.begin(), held.end());
  index_t next = 0;
  run_list padding;
  for (const auto& [local, count] : held) {
    padding.add(rank, next, local - next);
    next = local + count;
  }
  padding.add(rank, next, p.caller_rows - next);
  p.padding = std::move(padding).finish();

  // Segments, and the documents whose states pass through this rank.
  p.segments = cut(p.table, p.cu_seqlens, rank);
  const auto passes_here = [&](index_t n, bool first) {
    return rank == (first ? p.first_rank(n) : p.last_rank(n));
  };
  for (const segment& s : p.segments) {
    if (s.first()) p.entering.push_back(s.document);
    if (s.last()) p.leaving.push_back(s.document);
  }
  for (index_t n = 0; n < p.documents(); ++n) {
    const auto at = static_cast<std::size_t>(n);
    if (p.cu_seqlens[at] == p.cu_seqlens[at + 1] && passes_here(n, true)) {
      p.entering.push_back(n);
      p.leaving.push_back(n);
    }
  }
  std::sort(p.entering.begin(), p.entering.end());
  std::sort(p.leaving.begin(), p.leaving.end());
  const auto place = [](const std::vector<index_t>& list, index_t n) {
    return static_cast<std::int32_t>(std::lower_bound(list.begin(), list.end(), n) - list.begin());
  };
  for (const index_t n : p.entering) {
    const auto at = static_cast<std::size_t>(n);
    if (p.cu_seqlens[at] == p.cu_seqlens[at + 1]) {
      p.empty_documents.push_back({rank, place(p.entering, n), 1, place(p.leaving, n)});
    }
  }

  // History of the convolution.
  p.halo = plan_halo(p.table, p.cu_seqlens, p.segments, p.entering, p.leaving, shape.conv_width, rank,
                     options.initial_state, options.final_state);

  // States: given ones first, folded ones behind.
  p.entering_states = options.initial_state ? static_cast<index_t>(p.entering.size()) : 0;
  p.leaving_states = options.final_state ? static_cast<index_t>(p.leaving.size()) : 0;
  p.h0_states = p.entering_states;
  p.dht_states = p.leaving_states;
  for (std::size_t i = 0; i < p.segments.size(); ++i) {
    const segment& s = p.segments[i];
    p.conv_segments.push_back({s.begin, s.count, p.halo.halo_of[i]});
    rule_segment r{s.begin, s.count, p.chunks, -1, -1, -1, -1};
    if (!s.first()) {
      r.h0 = static_cast<std::int32_t>(p.h0_states++);
    } else if (options.initial_state) {
      r.h0 = r.dh0 = place(p.entering, s.document);
    }
    if (!s.last()) {
      r.dht = static_cast<std::int32_t>(p.dht_states++);
    } else if (options.final_state) {
      r.ht = r.dht = place(p.leaving, s.document);
    }
    p.chunks += (s.count + shape.chunk - 1) / shape.chunk;
    p.longest_segment = std::max(p.longest_segment, s.count);
    p.rule_segments.push_back(r);
  }

  // Summaries between ranks.
  p.chain = plan_chain(detail::chain_documents(p, false), shape.summary, options.share, rank);
  p.reverse_chain = plan_chain(detail::chain_documents(p, true), shape.summary, options.share, rank);
  for (published_summary& b : p.reverse_chain.published) {  // both publish M for the same segments
    if (b.transition < 0) continue;
    const auto& f = p.chain.published;  // by ascending segment
    b.own_transition = std::lower_bound(f.begin(), f.end(), b.segment, [](const published_summary& x, std::int32_t n) {
                         return x.segment < n;
                       })->transition;
  }

  detail::hasher h;
  h.add(world, shape.conv_width, shape.summary.heads, shape.summary.key_dim, shape.summary.value_dim, shape.chunk,
        shape.hidden, conv_channels, static_cast<int>(options.strategy), static_cast<int>(options.share),
        static_cast<int>(options.initial_state), static_cast<int>(options.final_state), pack.batch, pack.row_length);
  for (const fragment& f : rows) h.add(f.begin, f.count, f.rank, f.local);
  for (const token_run& r : pack.runs) h.add(r.row, r.token, r.count);
  for (const index_t c : pack.cu_seqlens) h.add(c);
  p.digest_ = h.value();
  return p;
}

/// The same for one layout that all rows of the batch share.
template <sequence_layout Layout>
cp_plan plan_context_parallel(const Layout& layout, const packing& pack, const plan_shape& shape,
                              index_t conv_channels, const plan_options& options, int rank) {
  expects<metadata_error>(layout.size() == pack.row_length, "the layout is for rows of", layout.size(),
                          "tokens, the batch has rows of", pack.row_length);
  const fragment_table rows = batch_table(layout.fragments(), layout.size(), layout.world_size(), pack.batch);
  return plan_context_parallel(rows, pack, shape, conv_channels, options, layout.world_size(), rank);
}

inline std::string cp_plan::describe() const {
  const auto share_name = [&] {
    switch (options.share) {
      case share::all_gather: return "all-gather";
      case share::prefix_scan: return "prefix-scan";
      case share::relay: return "relay";
    }
    return "?";
  };
  const auto strategy_name = [](gdn::strategy s) { return s == strategy::reshard ? "reshard" : "in-place"; };
  std::string out = say("rank", rank, "of", world, ":", compute_rows, "of", tokens, "tokens in",
                        static_cast<index_t>(segments.size()), "segments of", documents(), "documents\n");
  out += say("strategy", strategy_name(strategy));
  if (strategy != options.strategy) out += ", not in-place: summaries of so many pieces would be more than the rows";
  out += say(", share", share_name()) + "\n";
  out += say("receives", undo.rows_received(rank), "+", redo.rows_received(rank), "rows of activations,",
             halo.exchange.rows_received(rank), "rows of history,", chain.elements_received(rank), "+",
             reverse_chain.elements_received(rank), "elements of summaries in",
             static_cast<index_t>(chain.rounds.size()), "rounds\n");
  return out;
}

}  // namespace v0
}  // namespace gdn
