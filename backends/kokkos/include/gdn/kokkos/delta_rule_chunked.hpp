// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gated delta rule chunk by chunk (WY form): matrix products instead of a token loop.

#include <algorithm>
#include <cmath>

#include <Eigen/Core>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/kokkos/delta_rule.hpp>
#include <gdn/kokkos/detail/panel.hpp>
#include <gdn/kokkos/detail/sums.hpp>
#include <gdn/kokkos/detail/workers.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

inline constexpr index_t max_chunk = 256;

template <class A>
using array_map = Eigen::Map<Eigen::Array<A, Eigen::Dynamic, 1>>;
template <class A>
using const_array_map = Eigen::Map<const Eigen::Array<A, Eigen::Dynamic, 1>>;

/// Row `i` of a panel as an array.
template <class A>
array_map<A> row_of(const panel<A>& p, index_t i) {
  return array_map<A>(p.row(i), p.columns);
}

/// sum of a_i b_i in double, in an order that n alone determines
template <class A>
double dot(const A* a, const A* b, index_t n) {
  return lane_sum<double>(n, [=](index_t i) { return static_cast<double>(a[i]) * static_cast<double>(b[i]); });
}

/// Elements between T and A.
template <class From, class To>
void convert(const From* from, index_t n, To* to) {
  for (index_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

/// Rows of one head lie pages apart, where no hardware prefetcher follows: they are asked for some rows ahead.
inline constexpr index_t rows_ahead = 16;
template <int Write, class T>
void prefetch(T* at, index_t n) {
  constexpr index_t line = 64 / static_cast<index_t>(sizeof(T));
  for (index_t i = 0; i < n; i += line) __builtin_prefetch(at + i, Write);
}
/// Rows [begin, begin + to.rows) of a head into a panel, and back.
template <class T, class A>
void load_rows(const tensor_ref<const T, 3, host_memory>& from, index_t begin, index_t head, const panel<A>& to) {
  for (index_t s = 0; s < to.rows; ++s) {
    if (s + rows_ahead < to.rows) prefetch<0>(&from(begin + s + rows_ahead, head, 0), to.columns);
    convert(&from(begin + s, head, 0), to.columns, to.row(s));
  }
}
template <class A, class T>
void store_rows(const panel<A>& from, const tensor_ref<T, 3, host_memory>& to, index_t begin, index_t head) {
  for (index_t s = 0; s < from.rows; ++s) {
    if (s + rows_ahead < from.rows) prefetch<1>(&to(begin + s + rows_ahead, head, 0), from.columns);
    convert(from.row(s), from.columns, &to(begin + s, head, 0));
  }
}

/// A state [K, V] of a buffer, or zero where there is none, to and from a panel.
template <class A>
void load_state(const A* from, const panel<A>& S) {
  for (index_t i = 0; i < S.rows; ++i) {
    if (from) {
      std::copy_n(from + i * S.columns, S.columns, S.row(i));
    } else {
      std::fill_n(S.row(i), S.columns, A{0});
    }
  }
}
template <class A>
void store_state(const panel<A>& S, A* to) {
  for (index_t i = 0; i < S.rows && to; ++i) std::copy_n(S.row(i), S.columns, to + i * S.columns);
}

/// One chunk of c <= C tokens in the gate-factored form. With L = stril(diag(b) K K^T) and G_st = e^(c_s - c_t) for
/// s >= t (c: cumulative g inside the chunk), all decays are at most 1, and the inverse X = (I + L)^-1 does not depend
/// on the gates:
///   U = K S;  W = V - diag(e^c) U;  D = T W with T = (G o X) diag(b);
///   O = scale diag(e^c) Q S + P D with P = scale (Q K^T) o G;   S' = e^(c_C) S + K^T diag(e^(c_C - c)) D.
/// K, Q and Q K^T belong to a key head, the gates and what is made with them to a value head.
template <class T>
class chunk {
 public:
  using A = accumulate_t<T>;

  index_t c = 0;            ///< tokens
  panel<A> K, Q;            ///< [c, K]
  panel<A> KT;              ///< [K, c]
  panel<A> QK;              ///< [c, c] lower: q_s k_t
  panel<A> G, Tm, P;        ///< [c, c] lower, zero above
  A *decay, *rest, *beta;   ///< [c] e^c, e^(c_C - c), b
  const A* X = nullptr;     ///< [c, c] in rows of C

  chunk(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
        const rule_segment& segment, const A* prepared, scratch_space<A>& memory)
      : K(memory.take(p.chunk, p.key_dim)),
        Q(memory.take(p.chunk, p.key_dim)),
        KT(memory.take(p.key_dim, p.chunk)),
        QK(memory.take(p.chunk, p.chunk)),
        G(memory.take(p.chunk, p.chunk)),
        Tm(memory.take(p.chunk, p.chunk)),
        P(memory.take(p.chunk, p.chunk)),
        decay(memory.take(p.chunk)),
        rest(memory.take(p.chunk)),
        beta(memory.take(p.chunk)),
        p_(p),
        in_(in),
        segment_(segment),
        prepared_(prepared) {}

  /// Chunk `index` of the segment: its keys.
  void load_keys(index_t index, index_t key_head) {
    index_ = index;
    begin_ = segment_.begin + index * p_.chunk;
    c = std::min(p_.chunk, segment_.count - index * p_.chunk);
    K.rows = Q.rows = KT.columns = c;
    for (panel<A>* square : {&QK, &G, &Tm, &P}) square->rows = square->columns = c;
    load_rows(in_.k, begin_, key_head, K);
  }
  /// Its queries, and their products with the keys.
  void load_queries(index_t key_head) {
    load_rows(in_.q, begin_, key_head, Q);
    transpose(K, KT);
    product<false>(plain(Q), KT, QK, part::all, part::lower);
  }
  /// The gates of a value head, G and T, and P if the queries are there.
  void load_gates(index_t value_head, bool with_queries) {
    X = prepared_ + ((segment_.chunk_begin + index_) * p_.value_heads + value_head) * p_.chunk * p_.chunk;
    // Sums of g in double: a difference of two large sums loses what the decay of few tokens needs.
    double sum = 0;
    double cumulative[max_chunk];
    for (index_t s = 0; s < c; ++s) {
      sum += static_cast<double>(in_.g(token(s), value_head));
      cumulative[s] = sum;
      beta[s] = static_cast<A>(in_.beta(token(s), value_head));
    }
    for (index_t s = 0; s < c; ++s) {
      decay[s] = static_cast<A>(cumulative[s]);
      rest[s] = static_cast<A>(sum - cumulative[s]);
    }
    array_map<A>(decay, c) = array_map<A>(decay, c).exp();
    array_map<A>(rest, c) = array_map<A>(rest, c).exp();
    for (index_t s = 0; s < c; ++s) {
      const index_t n = s + 1;
      // Only up to the diagonal: above it a difference may overflow.
      for (index_t t = 0; t < n; ++t) G(s, t) = static_cast<A>(cumulative[s] - cumulative[t]);
      array_map<A> g(G.row(s), n);
      g = g.exp();
      array_map<A>(Tm.row(s), n) = g * const_array_map<A>(X + s * p_.chunk, n) * array_map<A>(beta, n);
      if (with_queries) array_map<A>(P.row(s), n) = p_.scale * g * array_map<A>(QK.row(s), n);
      for (const panel<A>* lower : {&G, &Tm, &P}) std::fill(lower->row(s) + n, lower->row(s) + c, A{0});
    }
  }
  void load_values(index_t value_head, const panel<A>& to) const { load_rows(in_.v, begin_, value_head, to); }

  /// U = K S, W = W - diag(e^c) U and D = T W, for W that holds V (or zeros).
  void solve(const panel<A>& S, const panel<A>& U, const panel<A>& W, const panel<A>& D) const {
    product<false>(plain(K), S, U);
    for (index_t s = 0; s < c; ++s) row_of(W, s) -= decay[s] * row_of(U, s);
    product<false>(plain(Tm), W, D, part::lower);
  }
  /// S <- e^(c_C) S + K^T diag(e^(c_C - c)) D. Spoils D.
  void advance(const panel<A>& S, const panel<A>& D) const {
    for (index_t s = 0; s < c; ++s) row_of(D, s) *= rest[s];
    for (index_t i = 0; i < S.rows; ++i) row_of(S, i) *= decay[c - 1];
    product<true>(transposed(K), D, S);
  }

  index_t token(index_t s) const { return begin_ + s; }
  factor<A> inverse_transposed() const { return {X, c, c, 1, p_.chunk}; }

 private:
  const delta_rule_problem<T, host_memory>& p_;
  const delta_rule_inputs<T, host_memory>& in_;
  const rule_segment& segment_;
  const A* prepared_;
  index_t index_ = 0;
  index_t begin_ = 0;
};

/// X = (I + stril(diag(b) K K^T))^-1 of one chunk, for all value heads of a key head, which share K K^T.
///
/// Block substitution: rows of blocks of 16 are multiplied by what is already known of X, and substituted within. Powers
/// of L grow like binomials for correlated keys; substitution stays bounded, since every partial product of factors
/// I - b k k^T has norm at most 1.
template <class T>
class chunk_inverse {
 public:
  using A = accumulate_t<T>;

  chunk_inverse(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in)
      : p_(p), in_(in) {}

  /// @param first row of the chunk
  /// @param out   [heads, C, C] of the first value head
  void operator()(index_t first, index_t c, index_t key_head, A* out) {
    const index_t K = p_.key_dim;
    const index_t depth = std::min<index_t>(columns, key_elements / whole_vectors<A>(c));  // of K, at once
    const panel<A> KK{products_, block, c, whole_vectors<A>(c)};
    for (index_t i0 = 0; i0 < c; i0 += block) {
      const index_t n = std::min(block, c - i0);
      for (index_t k0 = 0; k0 < K; k0 += depth) {
        const index_t kn = std::min(depth, K - k0);
        const panel<A> KT{keys_, kn, c, whole_vectors<A>(c)};
        if (i0 == 0 || K > depth) {
          for (index_t s = 0; s < c; ++s) {
            const T* k = &in_.k(first + s, key_head, k0);
            for (index_t i = 0; i < kn; ++i) KT(i, s) = static_cast<A>(k[i]);
          }
        }
        const factor<A> rows{KT.data + i0, n, kn, 1, KT.stride};
        const panel<A> sum = KK.top(n, std::min(c, i0 + n));
        if (k0 == 0) {
          product<false>(rows, KT, sum);
        } else {
          product<true>(rows, KT, sum);
        }
      }
      const index_t ratio = p_.value_heads / p_.key_heads;
      for (index_t h = 0; h < ratio; ++h) {
        substitute(first, i0, n, c, key_head * ratio + h, KK, out + h * p_.chunk * p_.chunk);
      }
    }
  }

 private:
  static constexpr index_t block = 16;  // a whole number of vectors
  static constexpr index_t columns = 256;
  static constexpr index_t key_elements = 16384;

  /// Rows [i0, i0 + n) of X.
  void substitute(index_t first, index_t i0, index_t n, index_t c, index_t head, const panel<A>& KK, A* X) {
    const index_t C = p_.chunk;
    A beta[block];
    for (index_t s = 0; s < n; ++s) beta[s] = static_cast<A>(in_.beta(first + i0 + s, head));
    const panel<A> R{known_, n, i0, max_chunk};
    if (i0 > 0) product<false>(factor<A>{KK.data, n, i0, KK.stride, 1}, panel<A>{X, i0, i0, C}, R);
    for (index_t s = 0; s < n; ++s) {
      A* row = X + (i0 + s) * C;
      for (index_t j = 0; j < i0; ++j) row[j] = -beta[s] * R(s, j);
      std::fill(row + i0, row + c, A{0});
      row[i0 + s] = A{1};
      for (index_t t = 0; t < s; ++t) {
        const A l = beta[s] * KK(s, i0 + t);
        const A* earlier = X + (i0 + t) * C;
        for (index_t j = 0; j <= i0 + t; ++j) row[j] -= l * earlier[j];
      }
    }
  }

  const delta_rule_problem<T, host_memory>& p_;
  const delta_rule_inputs<T, host_memory>& in_;
  alignas(64) A keys_[key_elements];
  alignas(64) A products_[block * max_chunk];
  alignas(64) A known_[block * max_chunk];
};

struct chunked_rule {
  template <class T>
  static index_t chunks_of(const delta_rule_problem<T, host_memory>& p, const rule_segment& s) {
    return (s.count + p.chunk - 1) / p.chunk;
  }

  template <class T>
  static index_t prepared(const delta_rule_problem<T, host_memory>& p) {
    return p.chunks * p.value_heads * p.chunk * p.chunk;
  }

  /// Elements of accumulate_t per worker.
  template <class T>
  static index_t scratch(const delta_rule_problem<T, host_memory>& p) {
    using A = accumulate_t<T>;
    const delta_rule_inputs<T, host_memory> none{};
    const rule_segment longest{.count = p.longest};
    scratch_space<A> forward, scan, backward;
    forward_memory<T>(p, none, longest, nullptr, p.value_heads / p.key_heads, forward);
    scan_memory<T>(p, none, longest, nullptr, std::max(p.key_dim, p.value_dim), scan);
    backward_memory<T>(p, none, longest, nullptr, backward);
    return std::max({forward.used(), scan.used(), backward.used()});
  }

  /// X of every chunk and value head, [chunks, Hv, C, C].
  template <class T, class Exec>
  static void prepare(const Exec& exec, const delta_rule_problem<T, host_memory>& p,
                      const delta_rule_inputs<T, host_memory>& in, summaries_ref<T, host_memory> out) {
    const index_t C = p.chunk;
    const index_t ratio = p.value_heads / p.key_heads;
    for_each_item_with_scratch(exec, p.chunks * p.key_heads, [&, C, ratio](index_t item, index_t) {
      const index_t at = item / p.key_heads;
      const index_t key_head = item % p.key_heads;
      index_t lo = 0;
      for (index_t hi = p.segments.extent(0); hi - lo > 1;) {
        const index_t mid = (lo + hi) / 2;
        (p.segments(mid).chunk_begin <= at ? lo : hi) = mid;
      }
      const rule_segment& segment = p.segments(lo);
      const index_t begin = (at - segment.chunk_begin) * C;
      chunk_inverse<T> inverse(p, in);
      inverse(segment.begin + begin, std::min(C, segment.count - begin), key_head,
              &out((at * p.value_heads + key_head * ratio) * C * C));
    });
  }

  /// Value heads [first, first + heads) of one key head, which share what a chunk computes of keys and queries.
  template <class T>
  static void forward(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                      const rule_segment& segment, index_t first, index_t heads, const accumulate_t<T>* prepared,
                      const_states_ref<T, host_memory> h0, tensor_ref<T, 3, host_memory> o,
                      states_ref<T, host_memory> ht, accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    scratch_space<A> memory(scratch);
    forward_memory<T> m(p, in, segment, prepared, heads, memory);
    const index_t key_head = first / (p.value_heads / p.key_heads);
    for (index_t h = 0; h < heads; ++h) load_state<A>(state_at(h0, segment.h0, first + h), m.state(h));
    for (index_t i = 0; i < chunks_of(p, segment); ++i) {
      chunk<T>& now = m.now;
      now.load_keys(i, key_head);
      now.load_queries(key_head);
      for (index_t h = 0; h < heads; ++h) {
        const index_t head = first + h;
        const panel<A> S = m.state(h);
        const panel<A> U = m.U.top(now.c, p.value_dim), W = m.W.top(now.c, p.value_dim);
        const panel<A> D = m.D.top(now.c, p.value_dim);
        now.load_gates(head, true);
        now.load_values(head, W);
        now.solve(S, U, W, D);
        const panel<A>& O = U;
        product<false>(plain(now.Q), S, O);
        for (index_t s = 0; s < now.c; ++s) row_of(O, s) *= p.scale * now.decay[s];
        product<true>(plain(now.P), D, O, part::lower);
        store_rows(O, o, now.token(0), head);
        now.advance(S, D);
      }
    }
    for (index_t h = 0; h < heads; ++h) store_state<A>(m.state(h), state_at(ht, segment.ht, first + h));
  }

  template <class T>
  static void bias(const rule_item<T>& x, const accumulate_t<T>* prepared, const accumulate_t<T>* h0,
                   accumulate_t<T>* out, accumulate_t<T>* scratch) {
    scratch_space<accumulate_t<T>> memory(scratch);
    scan_memory<T> m(x.problem, x.in, x.segment, prepared, x.V(), memory);
    load_state(h0, m.S);
    for (index_t i = 0; i < chunks_of(x.problem, x.segment); ++i) m.scan(x, i, true);
    store_state(m.S, out);
  }

  template <class T>
  static void transition(const rule_item<T>& x, const accumulate_t<T>* prepared, accumulate_t<T>* out,
                         accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    scratch_space<A> memory(scratch);
    scan_memory<T> m(x.problem, x.in, x.segment, prepared, x.K(), memory);
    load_state<A>(nullptr, m.S);
    for (index_t i = 0; i < x.K(); ++i) m.S(i, i) = A{1};
    for (index_t i = 0; i < chunks_of(x.problem, x.segment); ++i) m.scan(x, i, false);
    store_state(m.S, out);
  }

  /// dS = e^(c_C) dS' + K^T dU + Q^T diag(scale e^c) dO with dD = diag(e^(c_C - c)) K dS' + P^T dO, dW = T^T dD and
  /// dU = -diag(e^c) dW, from the last chunk to the first.
  template <class T>
  static void gradient_bias(const rule_item<T>& x, const accumulate_t<T>* prepared,
                            tensor_ref<const T, 3, host_memory> d_o, const accumulate_t<T>* dht, accumulate_t<T>* out,
                            accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    scratch_space<A> memory(scratch);
    scan_memory<T> m(x.problem, x.in, x.segment, prepared, x.V(), memory);
    load_state(dht, m.S);
    for (index_t i = chunks_of(x.problem, x.segment) - 1; i >= 0; --i) {
      m.now.load_keys(i, x.key_head());
      m.now.load_queries(x.key_head());
      m.now.load_gates(x.head, true);
      const panel<A> dO = m.U.top(m.now.c, x.V()), dD = m.W.top(m.now.c, x.V()), dW = m.D.top(m.now.c, x.V());
      load_rows(d_o, m.now.token(0), x.head, dO);
      back_to_values(m.now, m.S, dO, dD, dW);
      back_to_state(m.now, x.problem.scale, dO, dW, m.S);
    }
    store_state(m.S, out);
  }

  /// All gradients of one (segment, key head): the value heads that share it add to dq and dk in turn.
  template <class T>
  static void backward(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                       const rule_segment& segment, index_t key_head, const accumulate_t<T>* prepared,
                       const_states_ref<T, host_memory> h0, tensor_ref<const T, 3, host_memory> d_o,
                       const_states_ref<T, host_memory> dht, const delta_rule_gradients<T, host_memory>& out,
                       states_ref<T, host_memory> dh0, accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    scratch_space<A> memory(scratch);
    backward_memory<T> m(p, in, segment, prepared, memory);
    const index_t n = segment.count;
    const index_t chunks = chunks_of(p, segment);
    const index_t ratio = p.value_heads / p.key_heads;
    std::fill_n(m.dq.data, n * m.dq.stride, A{0});
    std::fill_n(m.dk.data, n * m.dk.stride, A{0});
    for (index_t head = key_head * ratio; head < (key_head + 1) * ratio; ++head) {
      const rule_item<T> x{p, in, segment, head};
      load_state<A>(state_at(h0, segment.h0, head), m.start(0));
      for (index_t i = 0; i + 1 < chunks; ++i) {
        const panel<A> next = m.start(i + 1);
        std::copy_n(m.start(i).data, next.rows * next.stride, next.data);
        m.scan(x, i, next);
      }
      load_state<A>(state_at(dht, segment.dht, head), m.dS);
      for (index_t i = chunks - 1; i >= 0; --i) chunk_gradients(x, i, d_o, m, out);
      store_state<A>(m.dS, state_at(dh0, segment.dh0, head));
    }
    store_rows(m.dq.top(n, p.key_dim), out.q, segment.begin, key_head);
    store_rows(m.dk.top(n, p.key_dim), out.k, segment.begin, key_head);
  }

 private:
  template <class T>
  struct forward_memory {
    using A = accumulate_t<T>;
    chunk<T> now;
    panel<A> U, W, D;  // [C, V]
    panel<A> states;   // [heads K, V]

    forward_memory(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                   const rule_segment& segment, const A* prepared, index_t heads, scratch_space<A>& memory)
        : now(p, in, segment, prepared, memory),
          U(memory.take(p.chunk, p.value_dim)),
          W(memory.take(p.chunk, p.value_dim)),
          D(memory.take(p.chunk, p.value_dim)),
          states(memory.take(heads * p.key_dim, p.value_dim)),
          K_(p.key_dim) {}
    panel<A> state(index_t h) const { return {states.row(h * K_), K_, states.columns, states.stride}; }

   private:
    index_t K_;
  };

  /// A state of `columns` columns that runs over a segment.
  template <class T>
  struct scan_memory {
    using A = accumulate_t<T>;
    chunk<T> now;
    panel<A> U, W, D;  // [C, columns]
    panel<A> S;        // [K, columns]

    scan_memory(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                const rule_segment& segment, const A* prepared, index_t columns, scratch_space<A>& memory)
        : now(p, in, segment, prepared, memory),
          U(memory.take(p.chunk, columns)),
          W(memory.take(p.chunk, columns)),
          D(memory.take(p.chunk, columns)),
          S(memory.take(p.key_dim, columns)) {}

    void scan(const rule_item<T>& x, index_t i, bool values) { run(now, x, i, values, U, W, D, S); }
    static void run(chunk<T>& now, const rule_item<T>& x, index_t i, bool values, panel<A> U, panel<A> W, panel<A> D,
                    panel<A> S) {
      now.load_keys(i, x.key_head());
      now.load_gates(x.head, false);
      U.rows = W.rows = D.rows = now.c;
      if (values) {
        now.load_values(x.head, W);
      } else {
        for (index_t s = 0; s < now.c; ++s) row_of(W, s).setZero();
      }
      now.solve(S, U, W, D);
      now.advance(S, D);
    }
  };

  template <class T>
  struct backward_memory {
    using A = accumulate_t<T>;
    chunk<T> now;
    panel<A> U, W, D, dO, dD, dW;  // [C, V]
    panel<A> WT, DT;               // [V, C]
    panel<A> dT, dP, dL, Y, XT;    // [C, C]
    panel<A> dK1, dQ1, LK;         // [C, K]
    panel<A> dS;                   // [K, V]
    panel<A> ST, dST;              // [V, K]
    panel<A> dq, dk;               // [n, K]

    backward_memory(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                    const rule_segment& segment, const A* prepared, scratch_space<A>& memory)
        : now(p, in, segment, prepared, memory), dS(memory.take(p.key_dim, p.value_dim)) {
      for (panel<A>* x : {&U, &W, &D, &dO, &dD, &dW}) *x = memory.take(p.chunk, p.value_dim);
      for (panel<A>* x : {&WT, &DT}) *x = memory.take(p.value_dim, p.chunk);
      for (panel<A>* x : {&dT, &dP, &dL, &Y, &XT}) *x = memory.take(p.chunk, p.chunk);
      for (panel<A>* x : {&dK1, &dQ1, &LK}) *x = memory.take(p.chunk, p.key_dim);
      for (panel<A>* x : {&ST, &dST}) *x = memory.take(p.value_dim, p.key_dim);
      for (panel<A>* x : {&dq, &dk}) *x = memory.take(segment.count, p.key_dim);
      starts_ = memory.take(chunks_of(p, segment) * p.key_dim, p.value_dim);
    }
    /// The state before chunk i.
    panel<A> start(index_t i) const { return {starts_.row(i * dS.rows), dS.rows, dS.columns, dS.stride}; }
    void scan(const rule_item<T>& x, index_t i, const panel<A>& S) {
      scan_memory<T>::run(now, x, i, true, U, W, D, S);
    }
    void set_chunk() {
      const index_t c = now.c;
      for (panel<A>* x : {&U, &W, &D, &dO, &dD, &dW, &dK1, &dQ1, &LK}) x->rows = c;
      for (panel<A>* x : {&WT, &DT}) x->columns = c;
      for (panel<A>* x : {&dT, &dP, &dL, &Y, &XT}) x->rows = x->columns = c;
    }

   private:
    panel<A> starts_;
  };

  /// dD = diag(e^(c_C - c)) K dS' + P^T dO;  dW = T^T dD.
  template <class T, class A>
  static void back_to_values(const chunk<T>& now, const panel<A>& dS, const panel<A>& dO, const panel<A>& dD,
                             const panel<A>& dW) {
    product<false>(plain(now.K), dS, dD);
    for (index_t s = 0; s < now.c; ++s) row_of(dD, s) *= now.rest[s];
    product<true>(transposed(now.P), dO, dD, part::upper);
    product<false>(transposed(now.Tm), dD, dW, part::upper);
  }

  /// dS <- e^(c_C) dS + K^T dU + Q^T diag(scale e^c) dO. Leaves dU in dW, and the decayed dO in dO.
  template <class T, class A>
  static void back_to_state(const chunk<T>& now, A scale, const panel<A>& dO, const panel<A>& dW, const panel<A>& dS) {
    for (index_t s = 0; s < now.c; ++s) {
      row_of(dW, s) *= -now.decay[s];
      row_of(dO, s) *= scale * now.decay[s];
    }
    for (index_t i = 0; i < dS.rows; ++i) row_of(dS, i) *= now.decay[now.c - 1];
    product<true>(transposed(now.K), dW, dS);
    product<true>(transposed(now.Q), dO, dS);
  }

  /// The gradients of one chunk, and dS' -> dS in place. With dT = dD W^T and dP^ = dO D^T: dX = (G o dT) diag(b),
  /// dL = -stril(X^T dX X^T), E = diag(b) dL, dP = scale G o dP^,
  /// dQ = scale diag(e^c) dO S^T + dP K,  dK = diag(e^(c_C - c)) D dS'^T + dU S^T + dP^T Q + (E + E^T) K.
  template <class T>
  static void chunk_gradients(const rule_item<T>& x, index_t index, tensor_ref<const T, 3, host_memory> d_o,
                              backward_memory<T>& m, const delta_rule_gradients<T, host_memory>& out) {
    using A = accumulate_t<T>;
    const index_t K = x.K();
    const index_t V = x.V();
    const A scale = x.problem.scale;
    const panel<A> S = m.start(index);
    chunk<T>& now = m.now;
    now.load_keys(index, x.key_head());
    now.load_queries(x.key_head());
    now.load_gates(x.head, true);
    m.set_chunk();
    const index_t c = now.c;
    now.load_values(x.head, m.W);
    now.solve(S, m.U, m.W, m.D);
    load_rows(d_o, now.token(0), x.head, m.dO);
    back_to_values(now, m.dS, m.dO, m.dD, m.dW);
    store_rows(m.dW, out.v, now.token(0), x.head);

    // What the pairs (s, t) of the chunk receive: dT and dP^, before they are gated in place.
    transpose(m.W, m.WT);
    transpose(m.D, m.DT);
    product<false>(plain(m.dD), m.WT, m.dT, part::all, part::lower);
    product<false>(plain(m.dO), m.DT, m.dP, part::all, part::lower);
    double d_beta[max_chunk] = {};
    double pairs[max_chunk] = {};  // sum over s >= t > j of Z_sj, Z = dP^ o P + dT o T: the decays within the chunk
    for (index_t s = 0; s < c; ++s) {
      A *dT = m.dT.row(s), *dP = m.dP.row(s);
      const A *P = now.P.row(s), *Tm = now.Tm.row(s), *G = now.G.row(s), *X = now.X + s * x.problem.chunk;
      double before = 0;
      for (index_t t = 0; t <= s; ++t) {
        pairs[t] += before;
        before += static_cast<double>(dP[t] * P[t] + dT[t] * Tm[t]);
      }
      for (index_t t = 0; t <= s; ++t) {
        dT[t] *= G[t];
        d_beta[t] += static_cast<double>(dT[t]) * static_cast<double>(X[t]);
        dT[t] *= now.beta[t];  // dX
        dP[t] *= scale * G[t];
      }
      std::fill(dT + s + 1, dT + c, A{0});
      std::fill(dP + s + 1, dP + c, A{0});
    }

    // dk: the part that leaves with the state, before dS' is overwritten; dS' and the rest after it.
    double carried = 0;
    for (index_t i = 0; i < K; ++i) carried += dot(m.dS.row(i), S.row(i), V);
    carried *= static_cast<double>(now.decay[c - 1]);
    transpose(m.dS, m.dST);
    product<false>(plain(m.D), m.dST, m.dK1);
    for (index_t s = 0; s < c; ++s) row_of(m.dK1, s) *= now.rest[s];
    back_to_state(now, scale, m.dO, m.dW, m.dS);  // dW is dU, dO is diag(scale e^c) dO from here on
    transpose(S, m.ST);
    product<false>(plain(m.dO), m.ST, m.dQ1);

    // dg_t = carried + sum_{s>=t} (q_s dq1_s + du_s u_s) + sum_{j<t} k_j dk1_j + sum_{s>=t, j<t} Z_sj. Summed as it
    // stands: the usual difference of row and column sums cancels, and dA_log inherits the error.
    double later[max_chunk];
    for (index_t s = c - 1; s >= 0; --s) {
      later[s] = dot(now.Q.row(s), m.dQ1.row(s), K) + dot(m.dW.row(s), m.U.row(s), V) + (s + 1 < c ? later[s + 1] : 0);
    }
    double earlier = carried;
    for (index_t t = 0; t < c; ++t) {
      out.g(now.token(t), x.head) = static_cast<A>(earlier + later[t] + pairs[t]);
      earlier += dot(now.K.row(t), m.dK1.row(t), K);
    }

    // Through the inverse. (dL K)_s k_s is what d_beta_s receives from L = stril(diag(b) K K^T).
    transpose(panel<A>{const_cast<A*>(now.X), c, c, x.problem.chunk}, m.XT);
    product<false>(now.inverse_transposed(), m.dT, m.Y, part::upper);
    product<false>(plain(m.Y), m.XT, m.dL, part::all, part::lower);
    for (index_t s = 0; s < c; ++s) {
      array_map<A>(m.dL.row(s), s) *= A{-1};
      std::fill(m.dL.row(s) + s, m.dL.row(s) + c, A{0});
    }
    product<false>(plain(m.dL), now.K, m.LK, part::lower);
    const panel<A> dQ{m.dq.row(index * x.problem.chunk), c, K, m.dq.stride};
    const panel<A> dK{m.dk.row(index * x.problem.chunk), c, K, m.dk.stride};
    for (index_t s = 0; s < c; ++s) {
      out.beta(now.token(s), x.head) = static_cast<A>(d_beta[s] + dot(m.LK.row(s), now.K.row(s), K));
      row_of(dQ, s) += row_of(m.dQ1, s);
      row_of(dK, s) += row_of(m.dK1, s) + now.beta[s] * row_of(m.LK, s);
      array_map<A>(m.dL.row(s), s) *= now.beta[s];  // E
    }
    product<true>(plain(m.dP), now.K, dQ, part::lower);
    product<true>(plain(m.dW), m.ST, dK);
    product<true>(transposed(m.dP), now.Q, dK, part::upper);
    product<true>(transposed(m.dL), now.K, dK, part::upper);
  }
};

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
