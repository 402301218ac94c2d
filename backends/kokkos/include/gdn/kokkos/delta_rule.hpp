// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gated delta rule token by token: the oracle, written as the recurrence is.

#include <algorithm>
#include <cmath>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/kokkos/detail/workers.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// One (segment, value head) of a problem, in accumulate_t.
template <class T>
struct rule_item {
  using A = accumulate_t<T>;
  const delta_rule_problem<T, host_memory>& problem;
  const delta_rule_inputs<T, host_memory>& in;
  const rule_segment& segment;
  index_t head;

  index_t K() const { return problem.key_dim; }
  index_t V() const { return problem.value_dim; }
  index_t key_head() const { return head / (problem.value_heads / problem.key_heads); }
  const T* q(index_t t) const { return &in.q(segment.begin + t, key_head(), 0); }
  const T* k(index_t t) const { return &in.k(segment.begin + t, key_head(), 0); }
  const T* v(index_t t) const { return &in.v(segment.begin + t, head, 0); }
  A g(index_t t) const { return in.g(segment.begin + t, head); }
  A beta(index_t t) const { return static_cast<A>(in.beta(segment.begin + t, head)); }
};

/// S <- e^g S + k (beta (v - e^g S^T k))^T for S [K, n]; v may be null for zeros. `delta` [n] is left in place.
template <class T, class A>
void advance(const T* k, const T* v, A g, A beta, index_t K, index_t n, A* S, A* delta) {
  const A alpha = std::exp(g);
  std::fill(delta, delta + n, A{0});
  for (index_t i = 0; i < K; ++i) {
    const A ki = static_cast<A>(k[i]);
    A* row = S + i * n;
    for (index_t j = 0; j < n; ++j) {
      row[j] *= alpha;
      delta[j] += ki * row[j];
    }
  }
  for (index_t j = 0; j < n; ++j) delta[j] = beta * ((v ? static_cast<A>(v[j]) : A{0}) - delta[j]);
  for (index_t i = 0; i < K; ++i) {
    const A ki = static_cast<A>(k[i]);
    A* row = S + i * n;
    for (index_t j = 0; j < n; ++j) row[j] += ki * delta[j];
  }
}

template <class A>
void load_state(const A* from, index_t n, A* S) {
  if (from) {
    std::copy(from, from + n, S);
  } else {
    std::fill(S, S + n, A{0});
  }
}

/// The state buffer's entry for (place, head), or null where the place or the buffer is none.
template <class A>
A* state_at(const tensor_ref<A, 4, host_memory>& states, std::int32_t place, index_t head) {
  return place < 0 || states.data() == nullptr ? nullptr : &states(place, head, 0, 0);
}

/// The recurrent rule's backward keeps the states before each token of a block, and one state per block.
inline constexpr index_t recurrent_block = 64;

struct recurrent_rule {
  template <class T>
  static index_t prepared(const delta_rule_problem<T, host_memory>&) {
    return 0;
  }
  /// Elements of accumulate_t per worker.
  template <class T>
  static index_t scratch(const delta_rule_problem<T, host_memory>& p) {
    const index_t state = p.key_dim * p.value_dim;
    const index_t blocks = (p.longest + recurrent_block - 1) / recurrent_block;
    const index_t forward = p.key_dim * std::max(p.key_dim, p.value_dim) + std::max(p.key_dim, p.value_dim);
    const index_t backward = state * (blocks + recurrent_block + 2) + 2 * p.longest * p.key_dim + 3 * p.value_dim;
    return std::max(forward, backward);
  }
  template <class T, class Exec>
  static void prepare(const Exec&, const delta_rule_problem<T, host_memory>&, const delta_rule_inputs<T, host_memory>&,
                      summaries_ref<T, host_memory>) {}

  /// Value heads [first, first + heads).
  template <class T>
  static void forward(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                      const rule_segment& segment, index_t first, index_t heads, const accumulate_t<T>*,
                      const_states_ref<T, host_memory> h0, tensor_ref<T, 3, host_memory> o,
                      states_ref<T, host_memory> ht, accumulate_t<T>* scratch) {
    for (index_t head = first; head < first + heads; ++head) {
      forward<T>({p, in, segment, head}, state_at(h0, segment.h0, head), o, state_at(ht, segment.ht, head), scratch);
    }
  }
  template <class T>
  static void forward(const rule_item<T>& x, const accumulate_t<T>* h0, tensor_ref<T, 3, host_memory> o,
                      accumulate_t<T>* ht, accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    const index_t K = x.K();
    const index_t V = x.V();
    A* S = scratch;
    A* row = S + K * V;  // [V]
    load_state(h0, K * V, S);
    for (index_t t = 0; t < x.segment.count; ++t) {
      advance(x.k(t), x.v(t), x.g(t), x.beta(t), K, V, S, row);
      std::fill(row, row + V, A{0});
      for (index_t i = 0; i < K; ++i) {
        const A qi = static_cast<A>(x.q(t)[i]) * x.problem.scale;
        for (index_t j = 0; j < V; ++j) row[j] += qi * S[i * V + j];
      }
      for (index_t j = 0; j < V; ++j) o(x.segment.begin + t, x.head, j) = static_cast<T>(row[j]);
    }
    if (ht) std::copy(S, S + K * V, ht);
  }

  /// E [K, V] of a segment, from its h0.
  template <class T>
  static void bias(const rule_item<T>& x, const accumulate_t<T>*, const accumulate_t<T>* h0, accumulate_t<T>* out,
                   accumulate_t<T>* scratch) {
    load_state(h0, x.K() * x.V(), out);
    for (index_t t = 0; t < x.segment.count; ++t) {
      advance(x.k(t), x.v(t), x.g(t), x.beta(t), x.K(), x.V(), out, scratch);
    }
  }

  /// M [K, K]: what the run makes of the identity when all v are zero.
  template <class T>
  static void transition(const rule_item<T>& x, const accumulate_t<T>*, accumulate_t<T>* out,
                         accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    const index_t K = x.K();
    std::fill(out, out + K * K, A{0});
    for (index_t i = 0; i < K; ++i) out[i * K + i] = A{1};
    for (index_t t = 0; t < x.segment.count; ++t) {
      advance(x.k(t), static_cast<const T*>(nullptr), x.g(t), x.beta(t), K, K, out, scratch);
    }
  }

  /// F [K, V]: the gradient before the segment, from dht and the segment's own d_o; needs no state.
  template <class T>
  static void gradient_bias(const rule_item<T>& x, const accumulate_t<T>*, tensor_ref<const T, 3, host_memory> d_o,
                            const accumulate_t<T>* dht, accumulate_t<T>* out, accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    const index_t K = x.K();
    const index_t V = x.V();
    load_state(dht, K * V, out);
    for (index_t t = x.segment.count - 1; t >= 0; --t) {
      const T* q = x.q(t);
      const T* k = x.k(t);
      const T* grad = &d_o(x.segment.begin + t, x.head, 0);
      A* d_delta = scratch;  // [V]
      std::fill(d_delta, d_delta + V, A{0});
      for (index_t i = 0; i < K; ++i) {
        const A qi = static_cast<A>(q[i]) * x.problem.scale;
        const A ki = static_cast<A>(k[i]);
        for (index_t j = 0; j < V; ++j) {
          out[i * V + j] += qi * static_cast<A>(grad[j]);
          d_delta[j] += ki * out[i * V + j];
        }
      }
      const A alpha = std::exp(x.g(t));
      for (index_t i = 0; i < K; ++i) {
        const A kb = static_cast<A>(k[i]) * x.beta(t);
        for (index_t j = 0; j < V; ++j) out[i * V + j] = alpha * (out[i * V + j] - kb * d_delta[j]);
      }
    }
  }

  /// All gradients of one (segment, key head): the value heads that share it add to dq and dk in turn.
  ///
  /// With G = dl/dS_t:  G += scale q do^T;  dq = scale S do;  dd = G^T k;  dv = b dd;  db = dd (v - S~^T k);
  /// dk = G delta - b S~ dd;  dS~ = G - b k dd^T;  dg = <dS~, S~>;  dl/dS_{t-1} = a dS~, where S~ = a S_{t-1}.
  template <class T>
  static void backward(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                       const rule_segment& segment, index_t key_head, const accumulate_t<T>*,
                       const_states_ref<T, host_memory> h0, tensor_ref<const T, 3, host_memory> d_o,
                       const_states_ref<T, host_memory> dht, const delta_rule_gradients<T, host_memory>& out,
                       states_ref<T, host_memory> dh0, accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    const index_t K = p.key_dim;
    const index_t V = p.value_dim;
    const index_t n = segment.count;
    const index_t state = K * V;
    const index_t blocks = (n + recurrent_block - 1) / recurrent_block;
    A* S = scratch;                               // [K, V]
    A* G = S + state;                             // [K, V]
    A* starts = G + state;                        // [blocks, K, V] before each block
    A* before = starts + blocks * state;          // [block, K, V] before each token of one block
    A* dq = before + recurrent_block * state;     // [n, K]
    A* dk = dq + n * K;                           // [n, K]
    A* delta = dk + n * K;                        // [V]
    A* u = delta + V;                             // [V]
    A* d_delta = u + V;                           // [V]
    std::fill(dq, dq + 2 * n * K, A{0});

    const index_t ratio = p.value_heads / p.key_heads;
    for (index_t head = key_head * ratio; head < (key_head + 1) * ratio; ++head) {
      const rule_item<T> x{p, in, segment, head};
      load_state(state_at(h0, segment.h0, head), state, S);
      for (index_t t = 0; t < n; ++t) {
        if (t % recurrent_block == 0) std::copy(S, S + state, starts + t / recurrent_block * state);
        advance(x.k(t), x.v(t), x.g(t), x.beta(t), K, V, S, delta);
      }
      load_state(state_at(dht, segment.dht, head), state, G);
      for (index_t block = blocks - 1; block >= 0; --block) {
        const index_t lo = block * recurrent_block;
        const index_t hi = std::min(n, lo + recurrent_block);
        std::copy(starts + block * state, starts + (block + 1) * state, S);
        for (index_t t = lo; t < hi; ++t) {
          std::copy(S, S + state, before + (t - lo) * state);
          advance(x.k(t), x.v(t), x.g(t), x.beta(t), K, V, S, delta);
        }
        for (index_t t = hi - 1; t >= lo; --t) {
          A* St = before + (t - lo) * state;
          const T* k = x.k(t);
          const T* q = x.q(t);
          const T* v = x.v(t);
          const T* grad = &d_o(segment.begin + t, head, 0);
          const A alpha = std::exp(x.g(t));
          const A beta = x.beta(t);
          std::fill(u, u + V, A{0});
          std::fill(d_delta, d_delta + V, A{0});
          for (index_t i = 0; i < K; ++i) {
            const A ki = static_cast<A>(k[i]);
            const A qi = static_cast<A>(q[i]) * p.scale;
            A* Si = St + i * V;
            A* Gi = G + i * V;
            for (index_t j = 0; j < V; ++j) {
              Si[j] *= alpha;  // S~
              u[j] += ki * Si[j];
              Gi[j] += qi * static_cast<A>(grad[j]);
              d_delta[j] += ki * Gi[j];
            }
          }
          // Sums over all of a state cancel: in double, whatever the layer's type.
          double d_beta = 0;
          for (index_t j = 0; j < V; ++j) {
            const A error = static_cast<A>(v[j]) - u[j];
            delta[j] = beta * error;
            d_beta += static_cast<double>(d_delta[j]) * static_cast<double>(error);
            out.v(segment.begin + t, head, j) = static_cast<T>(beta * d_delta[j]);
          }
          double d_g = 0;
          for (index_t i = 0; i < K; ++i) {
            const A ki = static_cast<A>(k[i]);
            A dqi{0};
            A dki{0};
            A* Si = St + i * V;
            A* Gi = G + i * V;
            for (index_t j = 0; j < V; ++j) {
              dqi += (Si[j] + ki * delta[j]) * static_cast<A>(grad[j]);
              dki += Gi[j] * delta[j] - beta * Si[j] * d_delta[j];
              const A dS = Gi[j] - beta * ki * d_delta[j];
              d_g += static_cast<double>(dS) * static_cast<double>(Si[j]);
              Gi[j] = alpha * dS;
            }
            dq[t * K + i] += p.scale * dqi;
            dk[t * K + i] += dki;
          }
          out.g(segment.begin + t, head) = static_cast<A>(d_g);
          out.beta(segment.begin + t, head) = static_cast<A>(d_beta);
        }
      }
      if (A* to = state_at(dh0, segment.dh0, head)) std::copy(G, G + state, to);
    }
    for (index_t t = 0; t < n; ++t) {
      for (index_t i = 0; i < K; ++i) {
        out.q(segment.begin + t, key_head, i) = static_cast<T>(dq[t * K + i]);
        out.k(segment.begin + t, key_head, i) = static_cast<T>(dk[t * K + i]);
      }
    }
  }
};

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
