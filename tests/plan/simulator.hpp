// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Runs the plans of all ranks in one thread on a small layer, by what the tables say and nothing else.
///
/// The layer is a causal convolution of the tokens and an affine recurrence that it drives, with heads of K x K
/// transitions modulo a prime:
///   c_t = sum_j w_j x_{t-W+1+j},   S_t = A(c_t) S_{t-1} + B(c_t),   y_t = sum of S_t
/// and its mirror image going left, with an upstream gradient e_t:
///   D_{t-1} = A(c_t)^T (D_t + e_t),   p_t = sum of (D_t + e_t),   dx_t = sum_j w_j p_{t+W-1-j}
/// The same layer on the whole stream, with no plan, is in sequential().

#include <algorithm>
#include <cstddef>
#include <map>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include <gdn/plan/cp_plan.hpp>
#include <plan/algebra.hpp>

namespace gdn_test {

using gdn::cp_plan;

/// Rows of one number each.
inline number& at(numbers& v, index_t i) {
  return v.at(static_cast<std::size_t>(i));
}
inline const number& at(const numbers& v, index_t i) {
  return v.at(static_cast<std::size_t>(i));
}

inline void require(bool condition, const char* law) {
  if (!condition) throw std::logic_error(law);
}

/// All messages of one exchange, by (sender, receiver).
using mail = std::map<std::pair<int, int>, numbers>;

inline void post(mail& box, int rank, const gdn::exchange_plan& plan, const numbers& source) {
  int last = -1;
  gdn::for_each_peer(plan.sends, [&](int peer, std::size_t first, std::size_t runs, index_t rows) {
    require(peer > last, "sends are not sorted by peer");
    last = peer;
    numbers& message = box[{rank, peer}];
    for (std::size_t i = first; i < first + runs; ++i) {
      const gdn::run& r = plan.sends[i];
      require(r.count > 0 && r.packed == static_cast<index_t>(message.size()), "the runs of a message have gaps");
      for (index_t k = 0; k < r.count; ++k) message.push_back(at(source, r.local + k));
    }
    require(static_cast<index_t>(message.size()) == rows, "a message has another length than its runs");
  });
}

inline void take(mail& box, int rank, const gdn::exchange_plan& plan, numbers& target, bool add) {
  int last = -1;
  gdn::for_each_peer(plan.recvs, [&](int peer, std::size_t first, std::size_t runs, index_t rows) {
    require(peer > last, "receives are not sorted by peer");
    last = peer;
    const auto found = box.find({peer, rank});
    require(found != box.end(), "a rank waits for a message that nobody sends");
    require(static_cast<index_t>(found->second.size()) == rows, "sender and receiver disagree on a message's rows");
    for (std::size_t i = first; i < first + runs; ++i) {
      const gdn::run& r = plan.recvs[i];
      for (index_t k = 0; k < r.count; ++k) {
        number& to = at(target, r.local + k);
        const number from = at(found->second, r.packed + k);
        to = add ? to + from : from;
      }
    }
    box.erase(found);
  });
}

/// One exchange of all ranks. `plan_of(rank)` is null where a rank has nothing to do.
template <class PlanOf>
void exchange(int world, PlanOf&& plan_of, const std::vector<numbers>& sources, std::vector<numbers>& targets,
              bool add = false) {
  mail box;
  for (int r = 0; r < world; ++r) {
    if (const gdn::exchange_plan* p = plan_of(r)) post(box, r, *p, sources[static_cast<std::size_t>(r)]);
  }
  for (int r = 0; r < world; ++r) {
    if (const gdn::exchange_plan* p = plan_of(r)) take(box, r, *p, targets[static_cast<std::size_t>(r)], add);
  }
  require(box.empty(), "a message is sent that nobody receives");
}

inline numbers zeros(index_t n) {
  return numbers(static_cast<std::size_t>(n), number(0));
}

/// target <- M target + add, head by head; with M transposed where `transpose` says so.
inline void apply(const gdn::summary_shape& shape, const numbers& m, const numbers& add, numbers& target,
                  bool transpose) {
  const index_t k = shape.key_dim, v = shape.value_dim;
  numbers out = add;
  for (index_t h = 0; h < shape.heads; ++h) {
    for (index_t i = 0; i < k; ++i) {
      for (index_t l = 0; l < k; ++l) {
        const number a = at(m, (h * k + (transpose ? l : i)) * k + (transpose ? i : l));
        for (index_t j = 0; j < v; ++j) {
          number& to = at(out, (h * k + i) * v + j);
          to = to + a * at(target, (h * k + l) * v + j);
        }
      }
    }
  }
  target = out;
}
/// The same for a product of transitions.
inline void multiply(const gdn::summary_shape& shape, const numbers& m, numbers& target, bool transpose) {
  apply({shape.heads, shape.key_dim, shape.key_dim}, m, zeros(shape.transition()), target, transpose);
}

/// What goes into the layer, by token and document of the stream.
struct layer_inputs {
  gdn::summary_shape shape;
  index_t width = 1;
  bool initial = false, final_ = false;
  numbers x, e;                        // [tokens]
  std::vector<numbers> h0, conv0;      // [documents], of shape.bias() and W numbers
  std::vector<numbers> dht, d_conv_t;  // the gradients that come in for the final states

  number weight(index_t j) const { return mixed(17, j); }
  numbers transition(number c) const {  // [H, K, K]
    numbers out;
    for (index_t i = 0; i < shape.transition(); ++i) out.push_back(c * mixed(1, i) + mixed(2, i));
    return out;
  }
  numbers input(number c) const {  // [H, K, V]
    numbers out;
    for (index_t i = 0; i < shape.bias(); ++i) out.push_back(c * mixed(3, i) + mixed(4, i));
    return out;
  }
  numbers zero_state() const { return zeros(shape.bias()); }
};

inline number total(const numbers& v) {
  number sum(0);
  for (const number n : v) sum = sum + n;
  return sum;
}

/// What comes out, in the same order.
struct layer_outputs {
  numbers y, dx;                                  // [tokens]
  std::vector<numbers> ht, conv_t, dh0, d_conv0;  // [documents]
  bool operator==(const layer_outputs&) const = default;
};

inline layer_inputs inputs_for(const cp_plan& plan, std::uint64_t salt) {
  layer_inputs in;
  in.shape = plan.shape.summary;
  in.width = plan.shape.conv_width;
  in.initial = plan.options.initial_state;
  in.final_ = plan.options.final_state;
  for (index_t t = 0; t < plan.tokens; ++t) {
    in.x.push_back(mixed(salt, 5, t));
    in.e.push_back(mixed(salt, 6, t));
  }
  const auto states = [&](int kind, index_t size, bool given) {
    std::vector<numbers> out;
    for (index_t n = 0; n < plan.documents(); ++n) {
      out.emplace_back();
      for (index_t i = 0; i < size; ++i) out.back().push_back(given ? mixed(salt, kind, n, i) : number(0));
    }
    return out;
  };
  in.h0 = states(7, in.shape.bias(), in.initial);
  in.conv0 = states(8, in.width, in.initial);
  in.dht = states(9, in.shape.bias(), in.final_);
  in.d_conv_t = states(10, in.width, in.final_);
  return in;
}

/// The whole stream at once, document by document.
inline layer_outputs sequential(const layer_inputs& in, std::span<const index_t> cu) {
  layer_outputs out;
  const index_t w = in.width;
  const auto tokens = static_cast<index_t>(in.x.size());
  out.y.resize(in.x.size());
  out.dx.assign(in.x.size(), number(0));
  numbers c(in.x.size()), p(in.x.size());
  for (std::size_t n = 0; n + 1 < cu.size(); ++n) {
    const index_t lo = cu[n], hi = cu[n + 1];
    require(0 <= lo && lo <= hi && hi <= tokens, "documents leave the stream");
    // The document with its W rows of conv state in front.
    numbers x = in.conv0[n];
    for (index_t t = lo; t < hi; ++t) x.push_back(at(in.x, t));
    numbers dx(x.size(), number(0));
    numbers state = in.h0[n];
    for (index_t t = lo; t < hi; ++t) {
      number sum(0);
      for (index_t j = 0; j < w; ++j) sum = sum + in.weight(j) * at(x, t - lo + 1 + j);
      at(c, t) = sum;
      apply(in.shape, in.transition(sum), in.input(sum), state, false);
      at(out.y, t) = total(state);
    }
    out.ht.push_back(state);
    out.conv_t.emplace_back(x.end() - w, x.end());

    numbers d = in.dht[n];
    for (index_t t = hi - 1; t >= lo; --t) {
      for (number& v : d) v = v + at(in.e, t);
      at(p, t) = total(d);
      apply(in.shape, in.transition(at(c, t)), in.zero_state(), d, true);
      for (index_t j = 0; j < w; ++j) at(dx, t - lo + 1 + j) = at(dx, t - lo + 1 + j) + in.weight(j) * at(p, t);
    }
    out.dh0.push_back(d);
    for (index_t i = 0; i < w; ++i) {
      number& last = at(dx, static_cast<index_t>(dx.size()) - w + i);
      last = last + at(in.d_conv_t[n], i);
    }
    out.d_conv0.emplace_back(dx.begin(), dx.begin() + w);
    for (index_t t = lo; t < hi; ++t) at(out.dx, t) = at(dx, w + t - lo);
  }
  return out;
}

/// All ranks together.
class simulator {
 public:
  simulator(std::span<const cp_plan> plans, const gdn::packing& pack, const layer_inputs& in)
      : plans_(plans), pack_(pack), in_(in), ranks_(plans.size()) {}

  layer_outputs run(std::span<const gdn::fragment> caller) {
    caller_ = caller;
    tokens_of_rows();
    forward();
    backward();
    return collect();
  }

 private:
  struct rank_data {
    std::vector<index_t> token_of_row;  // of the caller's rows, -1 is padding
    numbers x, history;                 // [compute rows + state rows], [halo rows + tail rows]
    numbers c, y, p, e;                 // [compute rows]
    numbers h0, dht;                    // [states, bias]
    numbers ht, dh0;                    // [leaving, bias], [entering, bias]
    numbers dx, d_history;
    numbers caller_y, caller_dx;
    numbers forward_summaries;
  };
  using chain_of = gdn::chain_plan cp_plan::*;

  int world() const { return static_cast<int>(plans_.size()); }
  const cp_plan& plan(int r) const { return plans_[static_cast<std::size_t>(r)]; }
  rank_data& data(int r) { return ranks_[static_cast<std::size_t>(r)]; }
  template <class Member>
  std::vector<numbers> gather(Member member) const {
    std::vector<numbers> out;
    for (const rank_data& d : ranks_) out.push_back(d.*member);
    return out;
  }
  template <class Member>
  void spread(Member member, std::vector<numbers> values) {
    for (std::size_t r = 0; r < ranks_.size(); ++r) ranks_[r].*member = std::move(values[r]);
  }
  static numbers unwritten(index_t n) { return numbers(static_cast<std::size_t>(n)); }
  static numbers slice(const numbers& v, index_t begin, index_t count) {
    require(begin >= 0 && begin + count <= static_cast<index_t>(v.size()), "a table leaves its buffer");
    return {v.begin() + begin, v.begin() + begin + count};
  }
  static void place(numbers& v, index_t begin, const numbers& from) {
    require(begin >= 0 && begin + static_cast<index_t>(from.size()) <= static_cast<index_t>(v.size()),
            "a table leaves its buffer");
    std::copy(from.begin(), from.end(), v.begin() + begin);
  }

  /// Which token of the stream each of the caller's rows is.
  void tokens_of_rows() {
    const auto rows = pack_.indices();
    std::vector<index_t> token(static_cast<std::size_t>(pack_.rows()), -1);
    for (std::size_t t = 0; t < rows.size(); ++t) token[static_cast<std::size_t>(rows[t])] = static_cast<index_t>(t);
    for (int r = 0; r < world(); ++r) data(r).token_of_row.assign(static_cast<std::size_t>(plan(r).caller_rows), -1);
    for (const gdn::fragment& f : caller_) {
      for (index_t i = 0; i < f.count; ++i) {
        data(f.rank).token_of_row.at(static_cast<std::size_t>(f.local + i)) =
            token[static_cast<std::size_t>(f.begin + i)];
      }
    }
  }

  /// The caller's rows of a stream; those of padding must never be read.
  std::vector<numbers> callers(const numbers& stream) {
    std::vector<numbers> out;
    for (const rank_data& d : ranks_) {
      numbers rows;
      for (const index_t t : d.token_of_row) rows.push_back(t < 0 ? number() : at(stream, t));
      out.push_back(rows);
    }
    return out;
  }
  std::vector<numbers> undo(const std::vector<numbers>& from) {
    std::vector<numbers> to;
    for (const cp_plan& p : plans_) to.push_back(unwritten(p.compute_rows));
    exchange(
        world(), [&](int r) { return &plan(r).undo; }, from, to);
    return to;
  }
  std::vector<numbers> redo(const std::vector<numbers>& from) {
    std::vector<numbers> to;
    for (const cp_plan& p : plans_) to.push_back(unwritten(p.caller_rows));
    exchange(
        world(), [&](int r) { return &plan(r).redo; }, from, to);
    for (int r = 0; r < world(); ++r) {
      for (const gdn::run& pad : plan(r).padding) {
        for (index_t i = 0; i < pad.count; ++i) {
          number& row = at(to[static_cast<std::size_t>(r)], pad.local + i);
          require(!row.written(), "a row is both a token and padding");
          row = number(0);
        }
      }
    }
    return to;
  }

  void forward() {
    spread(&rank_data::x, undo(callers(in_.x)));
    // Conv states come behind the rank's own rows; history that nothing writes is zero.
    for (int r = 0; r < world(); ++r) {
      const cp_plan& p = plan(r);
      rank_data& d = data(r);
      if (in_.initial) {
        for (const index_t n : p.entering) {
          const numbers& state = in_.conv0[static_cast<std::size_t>(n)];
          d.x.insert(d.x.end(), state.begin(), state.end());
        }
      }
      require(static_cast<index_t>(d.x.size()) == p.compute_rows + p.halo.state_rows, "state rows are miscounted");
      d.history = zeros(p.halo.rows());
      written_once(p.halo.exchange.recvs, p.halo.rows());
    }
    auto history = gather(&rank_data::history);
    exchange(
        world(), [&](int r) { return &plan(r).halo.exchange; }, gather(&rank_data::x), history);
    spread(&rank_data::history, history);

    for (int r = 0; r < world(); ++r) {
      const cp_plan& p = plan(r);
      rank_data& d = data(r);
      d.c = unwritten(p.compute_rows);
      for (const gdn::conv_segment& s : p.conv_segments) {
        for (index_t i = 0; i < s.count; ++i) {
          number sum(0);
          for (index_t j = 0; j < in_.width; ++j) {
            const index_t source = i - in_.width + 1 + j;
            if (source >= 0) {
              sum = sum + in_.weight(j) * at(d.x, s.begin + source);
            } else if (s.halo >= 0) {
              sum = sum + in_.weight(j) * at(d.history, s.halo + in_.width - 1 + source);
            }
          }
          require(!at(d.c, s.begin + i).written(), "a row is in two segments");
          at(d.c, s.begin + i) = sum;
        }
      }
      d.h0 = unwritten(p.h0_states * in_.shape.bias());
      for (index_t i = 0; i < p.entering_states; ++i) {
        place(d.h0, i * in_.shape.bias(), in_.h0[static_cast<std::size_t>(p.entering[static_cast<std::size_t>(i)])]);
      }
    }
    run_chain(&cp_plan::chain, &rank_data::h0, false);
    for (int r = 0; r < world(); ++r) {
      const cp_plan& p = plan(r);
      rank_data& d = data(r);
      d.y = unwritten(p.compute_rows);
      d.ht = unwritten(p.leaving_states * in_.shape.bias());
      for (const gdn::rule_segment& s : p.rule_segments) {
        numbers state = state_at(d.h0, s.h0);
        for (index_t i = s.begin; i < s.begin + s.count; ++i) {
          apply(in_.shape, in_.transition(at(d.c, i)), in_.input(at(d.c, i)), state, false);
          at(d.y, i) = total(state);
        }
        if (s.ht >= 0) put_once(d.ht, s.ht, state);
      }
      for (const gdn::run& empty : p.empty_documents) {
        if (in_.final_) put_once(d.ht, empty.packed, in_.initial ? state_at(d.h0, empty.local) : in_.zero_state());
      }
    }
    spread(&rank_data::caller_y, redo(gather(&rank_data::y)));
  }

  void backward() {
    spread(&rank_data::e, undo(callers(in_.e)));
    for (int r = 0; r < world(); ++r) {
      const cp_plan& p = plan(r);
      rank_data& d = data(r);
      d.dht = unwritten(p.dht_states * in_.shape.bias());
      for (index_t i = 0; i < p.leaving_states; ++i) {
        place(d.dht, i * in_.shape.bias(), in_.dht[static_cast<std::size_t>(p.leaving[static_cast<std::size_t>(i)])]);
      }
    }
    run_chain(&cp_plan::reverse_chain, &rank_data::dht, true);
    for (int r = 0; r < world(); ++r) {
      const cp_plan& p = plan(r);
      rank_data& d = data(r);
      d.p = unwritten(p.compute_rows);
      d.dh0 = unwritten(p.entering_states * in_.shape.bias());
      d.dx = zeros(p.compute_rows + p.halo.state_rows);
      d.d_history = zeros(p.halo.rows());
      for (std::size_t i = 0; in_.final_ && i < p.leaving.size(); ++i) {
        place(d.d_history, p.halo.halo_rows + static_cast<index_t>(i) * in_.width,
              in_.d_conv_t[static_cast<std::size_t>(p.leaving[i])]);
      }
      for (std::size_t n = 0; n < p.rule_segments.size(); ++n) {
        const gdn::rule_segment& s = p.rule_segments[n];
        numbers g = state_at(d.dht, s.dht);
        for (index_t i = s.begin + s.count - 1; i >= s.begin; --i) {
          for (number& v : g) v = v + at(d.e, i);
          at(d.p, i) = total(g);
          apply(in_.shape, in_.transition(at(d.c, i)), in_.zero_state(), g, true);
        }
        if (s.dh0 >= 0) put_once(d.dh0, s.dh0, g);
        const gdn::conv_segment& conv = p.conv_segments[n];
        for (index_t i = 0; i < conv.count; ++i) {
          for (index_t j = 0; j < in_.width; ++j) {
            const index_t source = i - in_.width + 1 + j;
            if (source < 0 && conv.halo < 0) continue;
            number& to =
                source >= 0 ? at(d.dx, conv.begin + source) : at(d.d_history, conv.halo + in_.width - 1 + source);
            to = to + in_.weight(j) * at(d.p, conv.begin + i);
          }
        }
      }
      for (const gdn::run& empty : p.empty_documents) {
        if (in_.initial) put_once(d.dh0, empty.local, in_.final_ ? state_at(d.dht, empty.packed) : in_.zero_state());
      }
    }
    auto dx = gather(&rank_data::dx);
    std::vector<gdn::exchange_plan> adjoint;
    for (const cp_plan& p : plans_) adjoint.push_back(p.halo.exchange.inverse());
    exchange(
        world(), [&](int r) { return &adjoint[static_cast<std::size_t>(r)]; }, gather(&rank_data::d_history), dx, true);
    spread(&rank_data::dx, dx);
    for (int r = 0; r < world(); ++r)
      dx[static_cast<std::size_t>(r)].resize(static_cast<std::size_t>(plan(r).compute_rows));
    spread(&rank_data::caller_dx, redo(dx));
  }

  numbers state_at(const numbers& states, index_t i) const {
    return i < 0 ? in_.zero_state() : slice(states, i * in_.shape.bias(), in_.shape.bias());
  }
  void put_once(numbers& states, index_t i, const numbers& state) const {
    require(!at(states, i * in_.shape.bias()).written(), "a state is written twice");
    place(states, i * in_.shape.bias(), state);
  }
  static void written_once(std::span<const gdn::run> runs, index_t rows) {
    std::vector<bool> seen(static_cast<std::size_t>(rows));
    for (const gdn::run& r : runs) {
      for (index_t i = r.local; i < r.local + r.count; ++i) {
        require(!seen.at(static_cast<std::size_t>(i)), "an exchange writes a row twice");
        seen[static_cast<std::size_t>(i)] = true;
      }
    }
  }

  /// (M, E) of a segment, E from `start`; of its mirror image if `reverse`.
  std::pair<numbers, numbers> summary(int r, const gdn::rule_segment& s, numbers start, bool reverse) {
    numbers m = zeros(in_.shape.transition());
    for (index_t h = 0, k = in_.shape.key_dim; h < in_.shape.heads; ++h) {
      for (index_t i = 0; i < k; ++i) at(m, (h * k + i) * k + i) = number(1);
    }
    for (index_t n = 0; n < s.count; ++n) {
      const index_t i = reverse ? s.begin + s.count - 1 - n : s.begin + n;
      const numbers a = in_.transition(at(data(r).c, i));
      if (reverse) {
        for (number& v : start) v = v + at(data(r).e, i);
        apply(in_.shape, a, in_.zero_state(), start, true);
      } else {
        apply(in_.shape, a, in_.input(at(data(r).c, i)), start, false);
      }
      multiply(in_.shape, a, m, reverse);
    }
    return {m, start};
  }

  template <class States>
  void run_chain(chain_of which, States states, bool reverse) {
    const gdn::summary_shape& shape = in_.shape;
    std::vector<numbers> buffers;
    std::size_t rounds = 0;
    for (int r = 0; r < world(); ++r) {
      const gdn::chain_plan& chain = plan(r).*which;
      buffers.push_back(unwritten(chain.elements));
      rounds = std::max(rounds, chain.rounds.size());
      for (const gdn::published_summary& p : chain.published) {
        const gdn::rule_segment& s = plan(r).rule_segments.at(static_cast<std::size_t>(p.segment));
        const bool starts = p.transition < 0;  // only the first of a chain; it starts from a given state, if any
        require(p.start == (starts ? (reverse ? s.dht : s.h0) : -1), "a summary starts from another state");
        const auto [m, e] = summary(r, s, state_at(data(r).*states, p.start), reverse);
        require(p.bias + shape.bias() <= chain.published_elements, "a summary is published behind its part");
        write_once(buffers.back(), p.bias, e);
        if (starts) continue;
        require(p.transition == p.bias + shape.bias(), "a summary is not one run of elements");
        require(p.transition + shape.transition() <= chain.published_elements,
                "a summary is published behind its part");
        write_once(buffers.back(), p.transition, m);
        if (reverse) {  // forward left the same M, transposed
          const numbers own = slice(data(r).forward_summaries, p.own_transition, shape.transition());
          for (index_t h = 0, k = shape.key_dim; h < shape.heads; ++h) {
            for (index_t i = 0; i < k * k; ++i) {
              require(at(own, h * k * k + i) == at(m, h * k * k + i % k * k + i / k), "own_transition is another M");
            }
          }
        }
      }
      if (!reverse) data(r).forward_summaries = buffers.back();
    }
    for (std::size_t round = 0; round < rounds; ++round) {
      const auto of = [&](int r) -> const gdn::chain_round* {
        const gdn::chain_plan& chain = plan(r).*which;
        return round < chain.rounds.size() ? &chain.rounds[round] : nullptr;
      };
      const std::vector<numbers> before = buffers;
      exchange(
          world(), [&](int r) { return of(r) != nullptr ? &of(r)->exchange : nullptr; }, before, buffers);
      for (int r = 0; r < world(); ++r) {
        if (of(r) == nullptr) continue;
        for (const gdn::compose_item& c : of(r)->compose) compose(buffers[static_cast<std::size_t>(r)], c);
      }
    }
    for (int r = 0; r < world(); ++r) {
      const gdn::chain_plan& chain = plan(r).*which;
      const numbers& buffer = buffers[static_cast<std::size_t>(r)];
      for (const gdn::fold_item& f : chain.folds) {
        require(f.count > 0, "a fold has no links");
        numbers state;
        for (index_t i = f.begin; i < f.begin + f.count; ++i) {
          const gdn::fold_link& link = chain.links.at(static_cast<std::size_t>(i));
          const numbers bias = slice(buffer, link.bias, shape.bias());
          require((link.transition < 0) == (i == f.begin), "all links of a fold but its first have a transition");
          if (link.transition < 0) {
            state = bias;
          } else {
            apply(in_.shape, slice(buffer, link.transition, shape.transition()), bias, state, false);
          }
        }
        put_once(data(r).*states, f.target, state);
      }
    }
  }

  static void write_once(numbers& buffer, index_t begin, const numbers& values) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      number& to = at(buffer, begin + static_cast<index_t>(i));
      require(!to.written(), "two published summaries overlap");
      to = values[i];
    }
  }

  void compose(numbers& buffer, const gdn::compose_item& c) const {
    const gdn::summary_shape& shape = in_.shape;
    const auto apart = [](index_t a, index_t n, index_t b, index_t m) { return a + n <= b || b + m <= a; };
    for (const auto& [out, n] : {std::pair{c.bias, shape.bias()}, {c.transition, shape.transition()}}) {
      for (const auto& [input, m] : {std::pair{c.later_bias, shape.bias()},
                                     {c.later_transition, shape.transition()},
                                     {c.earlier_bias, shape.bias()},
                                     {c.earlier_transition, shape.transition()}}) {
        require(out < 0 || input < 0 || apart(out, n, input, m), "an output of compose overlaps an input");
      }
    }
    const numbers later = slice(buffer, c.later_transition, shape.transition());
    numbers e = slice(buffer, c.earlier_bias, shape.bias());
    apply(in_.shape, later, slice(buffer, c.later_bias, shape.bias()), e, false);
    place(buffer, c.bias, e);
    if (c.transition < 0) return;
    require(c.earlier_transition >= 0, "compose wants a transition that the earlier run does not have");
    numbers m = slice(buffer, c.earlier_transition, shape.transition());
    multiply(shape, later, m, false);
    place(buffer, c.transition, m);
  }

  layer_outputs collect() {
    layer_outputs out;
    out.y = unwritten(pack_.tokens());
    out.dx = unwritten(pack_.tokens());
    const auto n = static_cast<std::size_t>(pack_.documents());
    for (auto* states : {&out.ht, &out.conv_t, &out.dh0, &out.d_conv0}) states->resize(n);
    for (int r = 0; r < world(); ++r) {
      const cp_plan& p = plan(r);
      rank_data& d = data(r);
      for (std::size_t i = 0; i < d.token_of_row.size(); ++i) {
        const index_t t = d.token_of_row[i];
        if (t < 0) {
          require(d.caller_y[i] == number(0), "padding is not zeroed");
        } else {
          at(out.y, t) = d.caller_y[i];
          at(out.dx, t) = d.caller_dx[i];
        }
      }
      for (std::size_t i = 0; in_.final_ && i < p.leaving.size(); ++i) {
        const auto document = static_cast<std::size_t>(p.leaving[i]);
        require(out.ht[document].empty(), "a document leaves on two ranks");
        out.ht[document] = state_at(d.ht, static_cast<index_t>(i));
        out.conv_t[document] = slice(d.history, p.halo.halo_rows + static_cast<index_t>(i) * in_.width, in_.width);
      }
      for (std::size_t i = 0; in_.initial && i < p.entering.size(); ++i) {
        const auto document = static_cast<std::size_t>(p.entering[i]);
        require(out.dh0[document].empty(), "a document enters on two ranks");
        out.dh0[document] = state_at(d.dh0, static_cast<index_t>(i));
        out.d_conv0[document] = slice(d.dx, p.compute_rows + static_cast<index_t>(i) * in_.width, in_.width);
      }
    }
    return out;
  }

  std::span<const cp_plan> plans_;
  const gdn::packing& pack_;
  const layer_inputs& in_;
  std::span<const gdn::fragment> caller_;
  std::vector<rank_data> ranks_;
};

}  // namespace gdn_test
