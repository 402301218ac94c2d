// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The state chain: who publishes a summary, how it travels, and who folds which.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <gdn/plan/exchange.hpp>
#include <gdn/plan/segments.hpp>
#include <gdn/plan/tables.hpp>

namespace gdn {
inline namespace v0 {

/// How summaries travel along a document's pieces 0 .. m - 1.
enum class share : std::uint8_t {
  all_gather,   ///< each publisher sends straight to every rank that folds it: one step, memory for what is folded
  prefix_scan,  ///< Hillis-Steele: log2 m steps, constant memory
  relay         ///< the state itself goes from piece to piece: m - 1 steps, fewest bytes
};

/// Elements of a summary: E is [Hv, K, V], M is [Hv, K, K].
struct summary_shape {
  index_t heads = 1;
  index_t key_dim = 1;
  index_t value_dim = 1;
  constexpr index_t bias() const noexcept { return heads * key_dim * value_dim; }
  constexpr index_t transition() const noexcept { return heads * key_dim * key_dim; }
  constexpr bool operator==(const summary_shape&) const = default;
};

/// Messages of one step, then what is composed from what arrived. Runs count elements.
struct chain_round {
  exchange_plan exchange;
  std::vector<compose_item> compose;
  bool operator==(const chain_round&) const = default;
};

/// Everything one rank does to give its segments the states that precede them (or, going left, the gradients that
/// follow them). Offsets are elements of one buffer of `elements`, in which the published summaries come first.
///
/// The algebra decides what exists: the first piece starts from a known state, so it publishes that state's successor
/// and no transition; the last piece publishes nothing; a document of one piece does neither.
struct chain_plan {
  std::vector<published_summary> published;
  std::vector<chain_round> rounds;
  std::vector<fold_item> folds;
  std::vector<fold_link> links;
  index_t published_elements = 0;
  index_t elements = 0;

  index_t elements_received(int self) const noexcept {
    index_t n = 0;
    for (const chain_round& r : rounds) n += r.exchange.rows_received(self);
    return n;
  }
  bool operator==(const chain_plan&) const = default;
};

/// One document in the order in which its chain runs: forward, or from the last piece to the first.
struct chain_document {
  std::vector<int> ranks;  ///< of each piece
  struct own_piece {
    index_t position = 0;
    std::int32_t segment = 0;
    std::int32_t state = -1;  ///< of the first piece: the one given, if any; of others: where the folded one goes
  };
  std::vector<own_piece> own;  ///< ascending positions
};

namespace detail {

class chain_planner {
 public:
  chain_planner(summary_shape shape, int rank) : shape_(shape), rank_(rank) {}

  chain_plan plan(std::span<const chain_document> documents, share how) {
    for (const chain_document& d : documents) publish(d);
    plan_.published_elements = plan_.elements;
    std::size_t first = 0;
    for (const chain_document& d : documents) {
      own_ = std::span(slots_).subspan(first, d.own.size());
      first += d.own.size();
      switch (how) {
        case share::all_gather: all_gather(d); break;
        case share::prefix_scan: prefix_scan(d); break;
        case share::relay: relay(d); break;
      }
    }
    for (std::size_t i = 0; i < sends_.size(); ++i) {
      plan_.rounds[i].exchange = {std::move(sends_[i]).finish(), std::move(recvs_[i]).finish()};
    }
    return std::move(plan_);
  }

 private:
  struct slot {
    index_t bias = -1;
    index_t transition = -1;
  };

  static index_t pieces(const chain_document& d) { return static_cast<index_t>(d.ranks.size()); }
  static int rank_at(const chain_document& d, index_t p) { return d.ranks[static_cast<std::size_t>(p)]; }
  static bool publishes(const chain_document& d, index_t p) { return p + 1 < pieces(d); }

  slot allocate(bool with_transition) {
    slot s{plan_.elements, -1};
    plan_.elements += shape_.bias();
    if (with_transition) {
      s.transition = plan_.elements;
      plan_.elements += shape_.transition();
    }
    return s;
  }
  index_t size(bool with_transition) const { return shape_.bias() + (with_transition ? shape_.transition() : 0); }

  void publish(const chain_document& d) {
    for (const auto& piece : d.own) {
      slot s;
      if (publishes(d, piece.position)) {
        s = allocate(piece.position > 0);
        plan_.published.push_back(
            {piece.segment, piece.position == 0 ? piece.state : -1, s.bias, s.transition, -1});
      }
      slots_.push_back(s);
    }
  }

  void reach(std::size_t round) {
    if (plan_.rounds.size() > round) return;
    plan_.rounds.resize(round + 1);
    sends_.resize(round + 1);
    recvs_.resize(round + 1);
  }
  void send(std::size_t round, int peer, slot s) {
    reach(round);
    sends_[round].add(peer, s.bias, size(s.transition >= 0));
  }
  slot receive(std::size_t round, int peer, bool with_transition) {
    const slot s = allocate(with_transition);
    receive_into(round, peer, s);
    return s;
  }
  void receive_into(std::size_t round, int peer, slot s) {
    reach(round);
    recvs_[round].add(peer, s.bias, size(s.transition >= 0));
  }

  void fold(std::int32_t target, std::span<const slot> chain) {
    plan_.folds.push_back({static_cast<index_t>(plan_.links.size()), static_cast<index_t>(chain.size()), target});
    for (const slot& s : chain) plan_.links.push_back({s.bias, s.transition});
  }

  // A summary goes once to every other rank that has a piece behind it.
  void all_gather(const chain_document& d) {
    const index_t m = pieces(d);
    std::vector<std::pair<int, index_t>> last;  // rank -> its last position
    for (index_t p = 0; p < m; ++p) last.emplace_back(rank_at(d, p), p);
    std::stable_sort(last.begin(), last.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<slot> chain;
    std::size_t mine = 0;
    for (index_t p = 0; p < m; ++p) {
      while (mine < d.own.size() && d.own[mine].position < p) ++mine;
      const bool here = mine < d.own.size() && d.own[mine].position == p;
      if (here && p > 0) fold(d.own[mine].state, chain);
      if (here && publishes(d, p)) {
        for (std::size_t i = 0; i < last.size(); ++i) {
          const bool end_of_rank = i + 1 == last.size() || last[i + 1].first != last[i].first;
          if (end_of_rank && last[i].second > p && last[i].first != rank_) send(0, last[i].first, own_[mine]);
        }
        chain.push_back(own_[mine]);
      } else if (!here && p < d.own.back().position) {
        chain.push_back(receive(0, rank_at(d, p), p > 0));
      }
    }
  }

  // X_p, the effect of pieces before p, doubles its reach in every round: first piece p - 1, then p - 1 .. p - 2, ...
  // It is a plain state, without a transition, once it reaches the first piece.
  void prefix_scan(const chain_document& d) {
    const index_t m = pieces(d);
    std::vector<slot> reach_of(d.own.size());   // X_p
    std::vector<slot> spare(d.own.size());      // the other one of two, so that composing never overlaps
    std::vector<slot> inbox(d.own.size());      // what arrives, free again once it is composed
    for (std::size_t i = 0; i < d.own.size(); ++i) {
      const index_t p = d.own[i].position;
      if (publishes(d, p)) send(0, rank_at(d, p + 1), own_[i]);
    }
    for (std::size_t i = 0; i < d.own.size(); ++i) {
      const index_t p = d.own[i].position;
      if (p == 0) continue;
      reach_of[i] = receive(0, rank_at(d, p - 1), p > 1);
      if (p > 1) spare[i] = allocate(true);
    }
    std::size_t round = 1;
    for (index_t reach = 1; reach < m - 1; reach *= 2, ++round) {
      for (std::size_t i = 0; i < d.own.size(); ++i) {  // X_p goes to p + reach
        const index_t p = d.own[i].position;
        if (p > 0 && p + reach < m) send(round, rank_at(d, p + reach), reach_of[i]);
      }
      for (std::size_t i = 0; i < d.own.size(); ++i) {
        const index_t p = d.own[i].position;
        if (p <= reach) continue;
        if (inbox[i].bias < 0) inbox[i] = allocate(p - reach > reach);  // later ones are no longer
        slot earlier = inbox[i];
        if (p - reach <= reach) earlier.transition = -1;
        receive_into(round, rank_at(d, p - reach), earlier);
        const bool complete = p <= 2 * reach;
        plan_.rounds[round].compose.push_back({reach_of[i].bias, reach_of[i].transition, earlier.bias,
                                               earlier.transition, spare[i].bias,
                                               complete ? index_t{-1} : spare[i].transition});
        std::swap(reach_of[i], spare[i]);
        if (complete) reach_of[i].transition = -1;
      }
    }
    for (std::size_t i = 0; i < d.own.size(); ++i) {
      if (d.own[i].position > 0) fold(d.own[i].state, std::span(&reach_of[i], 1));
    }
  }

  // Piece p receives its state in round p - 1, applies its summary, and passes the next state on in round p.
  void relay(const chain_document& d) {
    for (std::size_t i = 0; i < d.own.size(); ++i) {
      const index_t p = d.own[i].position;
      if (p == 0) {
        send(0, rank_at(d, 1), own_[i]);
        continue;
      }
      const auto round = static_cast<std::size_t>(p) - 1;
      const slot in = receive(round, rank_at(d, p - 1), false);
      fold(d.own[i].state, std::span(&in, 1));
      if (publishes(d, p)) {
        const slot out = allocate(false);
        plan_.rounds[round].compose.push_back({own_[i].bias, own_[i].transition, in.bias, -1, out.bias, -1});
        send(round + 1, rank_at(d, p + 1), out);
      }
    }
  }

  summary_shape shape_;
  int rank_;
  chain_plan plan_;
  std::vector<slot> slots_;  // of all own pieces, document after document
  std::span<const slot> own_;
  std::vector<run_list> sends_, recvs_;
};

/// Foretells how many elements all ranks together receive for one document, in time linear in its pieces. A scan's
/// messages from a rank to itself are counted, too.
class chain_predictor {
 public:
  chain_predictor(summary_shape shape, share how, int world)
      : shape_(shape), how_(how), seen_(static_cast<std::size_t>(world), false) {}

  /// @param ranks of each piece, in the order of the chain
  double elements(std::span<const int> ranks) {
    const auto m = static_cast<index_t>(ranks.size());
    index_t states = 0;
    index_t transitions = 0;
    switch (how_) {
      case share::relay: states = m - 1; break;
      case share::prefix_scan:
        states = m - 1;
        transitions = std::max<index_t>(0, m - 2);
        for (index_t reach = 1; reach < m - 1; reach *= 2) {
          states += m - 1 - reach;
          transitions += std::max<index_t>(0, m - 1 - 2 * reach);
        }
        break;
      case share::all_gather: {
        index_t behind = 0;  // ranks that hold a piece behind p
        for (index_t p = m - 1; p >= 0; --p) {
          const auto rank = static_cast<std::size_t>(ranks[static_cast<std::size_t>(p)]);
          const index_t readers = behind - (seen_[rank] ? 1 : 0);
          states += readers;
          transitions += p > 0 ? readers : 0;
          behind += seen_[rank] ? 0 : 1;
          seen_[rank] = true;
        }
        for (const int rank : ranks) seen_[static_cast<std::size_t>(rank)] = false;
        break;
      }
    }
    return static_cast<double>(states) * static_cast<double>(shape_.bias()) +
           static_cast<double>(transitions) * static_cast<double>(shape_.transition());
  }

 private:
  summary_shape shape_;
  share how_;
  std::vector<bool> seen_;
};

}  // namespace detail

/// @param documents those with several pieces, of which this rank holds some, in an order that all ranks agree on
inline chain_plan plan_chain(std::span<const chain_document> documents, summary_shape shape, share how, int rank) {
  return detail::chain_planner(shape, rank).plan(documents, how);
}

}  // namespace v0
}  // namespace gdn
