// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gated delta rule chunk by chunk (WY form): matrix products instead of a token loop.

#include <algorithm>
#include <cmath>

#include <Eigen/Core>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/kokkos/delta_rule.hpp>
#include <gdn/kokkos/detail/eigen_map.hpp>
#include <gdn/kokkos/detail/workers.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

template <class A>
using matrix = Eigen::Map<Eigen::Matrix<A, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
template <class A>
using const_matrix = Eigen::Map<const Eigen::Matrix<A, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

/// res = lhs rhs, with the same bits wherever it runs.
template <class Lhs, class Rhs, class Res>
void multiply(const Lhs& lhs, const Rhs& rhs, Res&& res) {
  res.setZero();
  add_product(lhs, rhs, res);
}

/// One chunk of c <= C tokens in the gate-factored form. With L = stril(diag(b) K K^T) and G_st = e^(c_s - c_t) for
/// s >= t (c: cumulative g inside the chunk), all decays are at most 1, and the inverse X = (I + L)^-1 does not depend
/// on the gates:
///   U = K S;  W = V - diag(e^c) U;  D = T W with T = (G o X) diag(b);
///   O = scale diag(e^c) Q S + P D with P = scale (Q K^T) o G;   S' = e^(c_C) S + K^T diag(e^(c_C - c)) D.
/// Memory: [K | Q | G | T | P | D | W | U ...] of one worker.
template <class T>
class chunk {
 public:
  using A = accumulate_t<T>;

  /// Elements for the forward of a chunk; states have up to `n` columns.
  static index_t forward_elements(const delta_rule_problem<T, host_memory>& p, index_t n) {
    const index_t C = p.chunk;
    return 2 * C * p.key_dim + 4 * C * C + 4 * C * n + 4 * C;
  }

  chunk(const rule_item<T>& item, const A* prepared, index_t index, A* scratch)
      : x_(item),
        begin_(index * item.problem.chunk),
        c(std::min(item.problem.chunk, item.segment.count - begin_)),
        K(carve(scratch, c, item.K())),
        Q(carve(scratch, c, item.K())),
        G(carve(scratch, c, c)),
        Tm(carve(scratch, c, c)),
        P(carve(scratch, c, c)),
        KK(carve(scratch, c, c)),
        decay(scratch),
        rest(scratch + c),
        beta(scratch + 2 * c),
        free_(scratch + 4 * item.problem.chunk),
        X(prepared + ((item.segment.chunk_begin + index) * item.problem.value_heads + item.head) *
                         item.problem.chunk * item.problem.chunk,
          c, c, Eigen::OuterStride<>(item.problem.chunk)) {
    // Sums of g in double: a difference of two large sums loses what the decay of few tokens needs.
    double sum = 0;
    double cumulative[max_chunk];
    for (index_t s = 0; s < c; ++s) {
      sum += static_cast<double>(x_.g(begin_ + s));
      cumulative[s] = sum;
      beta[s] = x_.beta(begin_ + s);
      load(x_.k(begin_ + s), K.row(s).data(), x_.K());
    }
    for (index_t s = 0; s < c; ++s) {
      decay[s] = static_cast<A>(cumulative[s]);
      rest[s] = static_cast<A>(sum - cumulative[s]);
      for (index_t t = 0; t < c; ++t) G(s, t) = t <= s ? static_cast<A>(cumulative[s] - cumulative[t]) : A{0};
    }
    Eigen::Map<Eigen::Array<A, Eigen::Dynamic, 1>> all(decay, 2 * c);
    all = all.exp();
    // Masked by selection: above the diagonal a difference may overflow.
    G.array() = G.array().exp();
    G.template triangularView<Eigen::StrictlyUpper>().setZero();
    Tm = G.cwiseProduct(X);
    for (index_t t = 0; t < c; ++t) Tm.col(t) *= beta[t];
  }

  /// W = V - diag(e^c) K S and D = T W, for S [K, n]; without values, V = 0.
  void solve(const_matrix<A> S, bool values, A* U_at, A* W_at, A* D_at) const {
    const index_t n = S.cols();
    matrix<A> U(U_at, c, n);
    matrix<A> W(W_at, c, n);
    matrix<A> D(D_at, c, n);
    multiply(K, S, U);
    for (index_t s = 0; s < c; ++s) {
      if (values) {
        load(x_.v(begin_ + s), W.row(s).data(), n);
        W.row(s) -= decay[s] * U.row(s);
      } else {
        W.row(s) = -decay[s] * U.row(s);
      }
    }
    multiply(Tm, W, D);
  }

  /// S <- e^(c_C) S + K^T diag(e^(c_C - c)) D. Spoils D.
  void advance(matrix<A> S, A* D_at) const {
    matrix<A> D(D_at, c, S.cols());
    for (index_t s = 0; s < c; ++s) D.row(s) *= rest[s];
    S *= decay[c - 1];
    add_product(K.transpose(), D, S);
  }

  /// One chunk of a state-only scan.
  void scan(matrix<A> S, bool values) const {
    const index_t n = c * S.cols();
    solve(const_matrix<A>(S.data(), S.rows(), S.cols()), values, free_, free_ + n, free_ + 2 * n);
    advance(S, free_ + 2 * n);
  }

  void load_queries() {
    for (index_t s = 0; s < c; ++s) load(x_.q(begin_ + s), Q.row(s).data(), x_.K());
    multiply(Q, K.transpose(), P);
    P.array() *= x_.problem.scale * G.array();
  }

  index_t token(index_t s) const { return x_.segment.begin + begin_ + s; }
  A* free() const { return free_; }

  static constexpr index_t max_chunk = 256;

  static void load(const T* from, A* to, index_t n) {
    for (index_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
  }

 private:
  static matrix<A> carve(A*& at, index_t rows, index_t cols) {
    matrix<A> m(at, rows, cols);
    at += rows * cols;
    return m;
  }
  const rule_item<T>& x_;
  index_t begin_;

 public:
  index_t c;                // tokens
  matrix<A> K, Q;           // [c, K]
  matrix<A> G, Tm, P, KK;   // [c, c], lower triangular; KK is backward's
  A* decay;                 // [c] e^c
  A* rest;                  // [c] e^(c_C - c)
  A* beta;                  // [c]

 private:
  A* free_;

 public:
  Eigen::Map<const Eigen::Matrix<A, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, 0, Eigen::OuterStride<>> X;
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
    const index_t C = p.chunk;
    const index_t n = std::max(p.key_dim, p.value_dim);
    const index_t chunks = (p.longest + C - 1) / C;
    const index_t state = p.key_dim * p.value_dim;
    const index_t backward = state * (chunks + 3) + 2 * p.longest * p.key_dim + 6 * C * p.value_dim +
                             5 * C * p.key_dim + 4 * C * C;
    return chunk<T>::forward_elements(p, n) + state + backward;
  }

  /// X = (I + stril(diag(b) K K^T))^-1 of every chunk and value head, by forward substitution, [chunks, Hv, C, C].
  /// Powers of L grow like binomials for correlated keys; substitution stays bounded, since every partial product of
  /// factors I - b k k^T has norm at most 1.
  template <class T, class Exec>
  static void prepare(const Exec& exec, const delta_rule_problem<T, host_memory>& p,
                      const delta_rule_inputs<T, host_memory>& in, summaries_ref<T, host_memory> out) {
    using A = accumulate_t<T>;
    const index_t C = p.chunk;
    const index_t segments = p.segments.extent(0);
    for_each_item_with_scratch(exec, p.chunks * p.value_heads, [&, C, segments](index_t item, index_t) {
      const index_t at = item / p.value_heads;
      const index_t head = item % p.value_heads;
      index_t lo = 0;
      for (index_t hi = segments; hi - lo > 1;) {
        const index_t mid = (lo + hi) / 2;
        (p.segments(mid).chunk_begin <= at ? lo : hi) = mid;
      }
      const rule_segment& segment = p.segments(lo);
      const rule_item<T> x{p, in, segment, head};
      const index_t begin = (at - segment.chunk_begin) * C;
      const index_t c = std::min(C, segment.count - begin);
      A* X = &out(item * C * C);
      for (index_t s = 0; s < c; ++s) {
        A* row = X + s * C;
        std::fill(row, row + c, A{0});
        row[s] = A{1};
        const A beta = x.beta(begin + s);
        for (index_t t = 0; t < s; ++t) {
          A kk{0};
          for (index_t i = 0; i < p.key_dim; ++i) {
            kk += static_cast<A>(x.k(begin + s)[i]) * static_cast<A>(x.k(begin + t)[i]);
          }
          const A l = beta * kk;
          const A* earlier = X + t * C;
          for (index_t j = 0; j <= t; ++j) row[j] -= l * earlier[j];
        }
      }
    });
  }

  template <class T>
  static void forward(const rule_item<T>& x, const accumulate_t<T>* prepared, const accumulate_t<T>* h0,
                      tensor_ref<T, 3, host_memory> o, accumulate_t<T>* ht, accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    const index_t V = x.V();
    matrix<A> S(scratch, x.K(), V);
    load_state(h0, S.size(), S.data());
    for (index_t i = 0; i < chunks_of(x.problem, x.segment); ++i) {
      chunk<T> now(x, prepared, i, scratch + S.size());
      now.load_queries();
      A* U = now.free();
      A* W = U + now.c * V;
      A* D = W + now.c * V;
      now.solve(const_matrix<A>(S.data(), x.K(), V), true, U, W, D);
      matrix<A> O(D + now.c * V, now.c, V);
      multiply(now.Q, S, O);
      for (index_t s = 0; s < now.c; ++s) O.row(s) *= x.problem.scale * now.decay[s];
      add_product(now.P, matrix<A>(D, now.c, V), O);
      for (index_t s = 0; s < now.c; ++s) {
        for (index_t j = 0; j < V; ++j) o(now.token(s), x.head, j) = static_cast<T>(O(s, j));
      }
      now.advance(S, D);
    }
    if (ht) std::copy(S.data(), S.data() + S.size(), ht);
  }

  template <class T>
  static void bias(const rule_item<T>& x, const accumulate_t<T>* prepared, const accumulate_t<T>* h0,
                   accumulate_t<T>* out, accumulate_t<T>* scratch) {
    matrix<accumulate_t<T>> S(out, x.K(), x.V());
    load_state(h0, S.size(), out);
    for (index_t i = 0; i < chunks_of(x.problem, x.segment); ++i) chunk<T>(x, prepared, i, scratch).scan(S, true);
  }

  template <class T>
  static void transition(const rule_item<T>& x, const accumulate_t<T>* prepared, accumulate_t<T>* out,
                         accumulate_t<T>* scratch) {
    matrix<accumulate_t<T>> M(out, x.K(), x.K());
    M.setIdentity();
    for (index_t i = 0; i < chunks_of(x.problem, x.segment); ++i) chunk<T>(x, prepared, i, scratch).scan(M, false);
  }

  /// dS = e^(c_C) dS' + K^T dU + Q^T diag(scale e^c) dO with dD = diag(e^(c_C - c)) K dS' + P^T dO, dW = T^T dD and
  /// dU = -diag(e^c) dW, from the last chunk to the first.
  template <class T>
  static void gradient_bias(const rule_item<T>& x, const accumulate_t<T>* prepared,
                            tensor_ref<const T, 3, host_memory> d_o, const accumulate_t<T>* dht, accumulate_t<T>* out,
                            accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    const index_t V = x.V();
    matrix<A> dS(out, x.K(), V);
    load_state(dht, dS.size(), out);
    for (index_t i = chunks_of(x.problem, x.segment) - 1; i >= 0; --i) {
      chunk<T> now(x, prepared, i, scratch);
      now.load_queries();
      matrix<A> dO(now.free(), now.c, V);
      matrix<A> dD(dO.data() + dO.size(), now.c, V);
      matrix<A> dW(dD.data() + dD.size(), now.c, V);
      load_gradient(now, d_o, x.head, dO);
      back_to_values(now, dS, dO, dD, dW);
      back_to_state(now, x.problem.scale, dO, dW, dS);
    }
  }

  template <class T>
  static void backward(const delta_rule_problem<T, host_memory>& p, const delta_rule_inputs<T, host_memory>& in,
                       const rule_segment& segment, index_t key_head, const accumulate_t<T>* prepared,
                       const_states_ref<T, host_memory> h0, tensor_ref<const T, 3, host_memory> d_o,
                       const_states_ref<T, host_memory> dht, const delta_rule_gradients<T, host_memory>& out,
                       states_ref<T, host_memory> dh0, accumulate_t<T>* scratch) {
    using A = accumulate_t<T>;
    const index_t K = p.key_dim;
    const index_t V = p.value_dim;
    const index_t n = segment.count;
    const index_t state = K * V;
    const index_t chunks = chunks_of(p, segment);
    A* starts = scratch;                // [chunks, K, V] before each chunk
    A* S = starts + chunks * state;     // [K, V]
    A* dS_at = S + state;               // [K, V]
    A* dq = dS_at + state;              // [n, K]
    A* dk = dq + n * K;                 // [n, K]
    A* rest = dk + n * K;
    std::fill(dq, dq + 2 * n * K, A{0});

    const index_t ratio = p.value_heads / p.key_heads;
    for (index_t head = key_head * ratio; head < (key_head + 1) * ratio; ++head) {
      const rule_item<T> x{p, in, segment, head};
      load_state(state_at(h0, segment.h0, head), state, S);
      for (index_t i = 0; i < chunks; ++i) {
        std::copy(S, S + state, starts + i * state);
        if (i + 1 < chunks) chunk<T>(x, prepared, i, rest).scan(matrix<A>(S, K, V), true);
      }
      matrix<A> dS(dS_at, K, V);
      load_state(state_at(dht, segment.dht, head), state, dS_at);
      for (index_t i = chunks - 1; i >= 0; --i) {
        chunk<T> now(x, prepared, i, rest);
        chunk_gradients(x, now, const_matrix<A>(starts + i * state, K, V), d_o, dS, dq + i * p.chunk * K,
                        dk + i * p.chunk * K, out);
      }
      if (A* to = state_at(dh0, segment.dh0, head)) std::copy(dS_at, dS_at + state, to);
    }
    for (index_t t = 0; t < n; ++t) {
      for (index_t i = 0; i < K; ++i) {
        out.q(segment.begin + t, key_head, i) = static_cast<T>(dq[t * K + i]);
        out.k(segment.begin + t, key_head, i) = static_cast<T>(dk[t * K + i]);
      }
    }
  }

 private:
  template <class T, class A>
  static void load_gradient(const chunk<T>& now, tensor_ref<const T, 3, host_memory> d_o, index_t head,
                            matrix<A>& dO) {
    for (index_t s = 0; s < now.c; ++s) chunk<T>::load(&d_o(now.token(s), head, 0), dO.row(s).data(), dO.cols());
  }

  /// dD = diag(e^(c_C - c)) K dS' + P^T dO;  dW = T^T dD.
  template <class T, class A>
  static void back_to_values(const chunk<T>& now, const matrix<A>& dS, const matrix<A>& dO, matrix<A>& dD,
                             matrix<A>& dW) {
    multiply(now.K, dS, dD);
    for (index_t s = 0; s < now.c; ++s) dD.row(s) *= now.rest[s];
    add_product(now.P.transpose(), dO, dD);
    multiply(now.Tm.transpose(), dD, dW);
  }

  /// dS <- e^(c_C) dS + K^T dU + Q^T diag(scale e^c) dO. Leaves dU in dW, and the decayed dO in dO.
  template <class T, class A>
  static void back_to_state(const chunk<T>& now, A scale, matrix<A>& dO, matrix<A>& dW, matrix<A>& dS) {
    for (index_t s = 0; s < now.c; ++s) {
      dW.row(s) *= -now.decay[s];
      dO.row(s) *= scale * now.decay[s];
    }
    dS *= now.decay[now.c - 1];
    add_product(now.K.transpose(), dW, dS);
    add_product(now.Q.transpose(), dO, dS);
  }

  /// The gradients of one chunk (kernels: dT = dD W^T, dP^ = dO D^T, dX = (G o dT) diag(b),
  /// dL = -stril(X^T dX X^T)), and dS' -> dS in place.
  template <class T>
  static void chunk_gradients(const rule_item<T>& x, chunk<T>& now, const_matrix<accumulate_t<T>> S,
                              tensor_ref<const T, 3, host_memory> d_o, matrix<accumulate_t<T>>& dS,
                              accumulate_t<T>* dq_at, accumulate_t<T>* dk_at,
                              const delta_rule_gradients<T, host_memory>& out) {
    using A = accumulate_t<T>;
    const index_t c = now.c;
    const index_t K = x.K();
    const index_t V = x.V();
    A* at = now.free();
    const auto take = [&](index_t rows, index_t cols) {
      matrix<A> m(at, rows, cols);
      at += rows * cols;
      return m;
    };
    now.load_queries();
    multiply(now.K, now.K.transpose(), now.KK);
    matrix<A> U = take(c, V), W = take(c, V), D = take(c, V), dO = take(c, V), dD = take(c, V), dW = take(c, V);
    now.solve(S, true, U.data(), W.data(), D.data());
    load_gradient(now, d_o, x.head, dO);
    back_to_values(now, dS, dO, dD, dW);

    // Values, and what the pairs (s, t) of the chunk receive.
    for (index_t s = 0; s < c; ++s) {
      for (index_t j = 0; j < V; ++j) out.v(now.token(s), x.head, j) = static_cast<T>(dW(s, j));
    }
    matrix<A> dT = take(c, c), dP = take(c, c), dL = take(c, c), tmp = take(c, c);
    multiply(dD, W.transpose(), dT);
    multiply(dO, D.transpose(), dP);
    dT.template triangularView<Eigen::StrictlyUpper>().setZero();
    dP.template triangularView<Eigen::StrictlyUpper>().setZero();

    // Z: the part of the decays' gradient that stays within the chunk. Before dT and dP are overwritten.
    matrix<A>& Z = tmp;
    Z = dP.cwiseProduct(now.P) + dT.cwiseProduct(now.Tm);
    const double carried = static_cast<double>(now.decay[c - 1]) * dS.template cast<double>().cwiseProduct(
                               S.template cast<double>()).sum();

    // dk: the part that leaves with the state, before dS' is overwritten; dS' and the rest after it.
    matrix<A> dK1 = take(c, K), dQ1 = take(c, K);
    multiply(D, dS.transpose(), dK1);
    for (index_t s = 0; s < c; ++s) dK1.row(s) *= now.rest[s];
    back_to_state(now, x.problem.scale, dO, dW, dS);  // dW is dU, dO is diag(scale e^c) dO from here on
    multiply(dO, S.transpose(), dQ1);

    // dg_t = carried + sum_{s>=t} (q_s dq1_s + du_s u_s) + sum_{j<t} k_j dk1_j + sum_{s>=t, j<t} Z_sj. Summed as it
    // stands: the usual difference of row and column sums cancels, and dA_log inherits the error.
    {
      double row_sum[chunk<T>::max_chunk];
      double prefix[chunk<T>::max_chunk] = {};
      double column = 0;
      for (index_t s = c - 1; s >= 0; --s) {
        double r = 0;
        for (index_t i = 0; i < K; ++i) r += static_cast<double>(now.Q(s, i)) * static_cast<double>(dQ1(s, i));
        for (index_t j = 0; j < V; ++j) r += static_cast<double>(dW(s, j)) * static_cast<double>(U(s, j));
        row_sum[s] = r + (s + 1 < c ? row_sum[s + 1] : 0.0);
      }
      for (index_t t = 0; t < c; ++t) {
        double pairs = 0;
        for (index_t s = t; s < c; ++s) {
          if (t > 0) prefix[s] += static_cast<double>(Z(s, t - 1));
          pairs += prefix[s];
        }
        out.g(now.token(t), x.head) = static_cast<A>(carried + row_sum[t] + column + pairs);
        for (index_t i = 0; i < K; ++i) column += static_cast<double>(now.K(t, i)) * static_cast<double>(dK1(t, i));
      }
    }

    // dT -> G o dT; d_beta from T = (G o X) diag(b) and from L = stril(diag(b) K K^T).
    dT.array() *= now.G.array();
    double d_beta[chunk<T>::max_chunk] = {};
    for (index_t s = 0; s < c; ++s) {
      for (index_t t = 0; t <= s; ++t) d_beta[t] += static_cast<double>(dT(s, t)) * static_cast<double>(now.X(s, t));
    }
    for (index_t t = 0; t < c; ++t) dT.col(t) *= now.beta[t];  // dX
    multiply(now.X.transpose(), dT, tmp);
    multiply(tmp, now.X.transpose(), dL);
    dL = -dL;
    dL.template triangularView<Eigen::Upper>().setZero();
    for (index_t s = 0; s < c; ++s) {
      for (index_t t = 0; t < s; ++t) d_beta[s] += static_cast<double>(dL(s, t)) * static_cast<double>(now.KK(s, t));
      out.beta(now.token(s), x.head) = static_cast<A>(d_beta[s]);
      dL.row(s) *= now.beta[s];  // E
    }
    dP.array() *= x.problem.scale * now.G.array();

    matrix<A> dQ(dq_at, c, K);
    matrix<A> dK(dk_at, c, K);
    dQ += dQ1;
    add_product(dP, now.K, dQ);
    dK += dK1;
    add_product(dW, S.transpose(), dK);
    add_product(dP.transpose(), now.Q, dK);
    add_product(dL, now.K, dK);
    add_product(dL.transpose(), now.K, dK);
  }
};

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
