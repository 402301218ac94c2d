// SPDX-License-Identifier: Apache-2.0
#include <support/rule_reference.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace gdn_test {

namespace {

using state = std::vector<double>;  // [K, V]

/// One value head of one segment.
class head_run {
 public:
  head_run(const rule_numbers& n, const gdn::rule_segment& s, index_t head)
      : n_(n),
        s_(s),
        head_(head),
        key_head_(head / (n.v.extent(1) / n.q.extent(1))),
        K_(n.q.extent(2)),
        V_(n.v.extent(2)),
        read_(static_cast<std::size_t>(V_)),
        delta_(static_cast<std::size_t>(V_)),
        d_delta_(static_cast<std::size_t>(V_)) {}

  void forward(rule_answers& out) {
    state S = start(n_.h0, s_.h0);
    for (index_t t = 0; t < s_.count; ++t) {
      advance(t, S);
      double* o = &out.o(s_.begin + t, head_, 0);
      std::fill(o, o + V_, 0.0);
      for (index_t i = 0; i < K_; ++i) {
        const double q = query(t)[i] * n_.scale;
        const double* row = S.data() + i * V_;
        for (index_t j = 0; j < V_; ++j) o[j] += q * row[j];
      }
    }
    if (s_.ht >= 0) std::copy(S.begin(), S.end(), &out.ht(s_.ht, head_, 0, 0));
  }

  void backward(rule_answers& out) {
    constexpr index_t block = 64;  // states are kept before each block, and rebuilt within one
    std::vector<state> starts;
    state S = start(n_.h0, s_.h0);
    for (index_t t = 0; t < s_.count; ++t) {
      if (t % block == 0) starts.push_back(S);
      advance(t, S);
    }
    state G = start(n_.dht, s_.dht);
    for (index_t b = static_cast<index_t>(starts.size()) - 1; b >= 0; --b) {
      const index_t begin = b * block, end = std::min(s_.count, begin + block);
      std::vector<state> before = {starts[static_cast<std::size_t>(b)]};
      for (index_t t = begin; t + 1 < end; ++t) {
        before.push_back(before.back());
        advance(t, before.back());
      }
      for (index_t t = end - 1; t >= begin; --t) token_backward(t, before[static_cast<std::size_t>(t - begin)], G, out);
    }
    if (s_.dh0 >= 0) std::copy(G.begin(), G.end(), &out.dh0(s_.dh0, head_, 0, 0));
  }

 private:
  const double* query(index_t t) const { return &n_.q(s_.begin + t, key_head_, 0); }
  const double* key(index_t t) const { return &n_.k(s_.begin + t, key_head_, 0); }
  const double* value(index_t t) const { return &n_.v(s_.begin + t, head_, 0); }
  double alpha(index_t t) const { return std::exp(n_.g(s_.begin + t, head_)); }
  double beta(index_t t) const { return n_.beta(s_.begin + t, head_); }

  state start(const host_tensor<double, 4>& from, index_t place) const {
    if (place < 0) return state(static_cast<std::size_t>(K_ * V_), 0.0);
    const double* at = &from(place, head_, 0, 0);
    return {at, at + K_ * V_};
  }

  /// S <- a S, and reads S^T k.
  void decay(index_t t, state& S) {
    const double a = alpha(t);
    std::fill(read_.begin(), read_.end(), 0.0);
    for (index_t i = 0; i < K_; ++i) {
      const double k = key(t)[i];
      double* row = S.data() + i * V_;
      for (index_t j = 0; j < V_; ++j) {
        row[j] *= a;
        read_[static_cast<std::size_t>(j)] += k * row[j];
      }
    }
    const double b = beta(t);
    for (index_t j = 0; j < V_; ++j) {
      const auto at = static_cast<std::size_t>(j);
      delta_[at] = b * (value(t)[j] - read_[at]);
    }
  }
  void advance(index_t t, state& S) {
    decay(t, S);
    for (index_t i = 0; i < K_; ++i) {
      const double k = key(t)[i];
      double* row = S.data() + i * V_;
      for (index_t j = 0; j < V_; ++j) row[j] += k * delta_[static_cast<std::size_t>(j)];
    }
  }

  /// G is dl/dS_t of all later uses, and becomes dl/dS_{t-1}; S is the state before the token, and is spoilt.
  void token_backward(index_t t, state& S, state& G, rule_answers& out) {
    const index_t row = s_.begin + t;
    const double *q = query(t), *k = key(t), *d_o = &n_.d_o(row, head_, 0);
    const double a = alpha(t), b = beta(t);
    decay(t, S);  // S~
    std::fill(d_delta_.begin(), d_delta_.end(), 0.0);
    for (index_t i = 0; i < K_; ++i) {
      double* Gi = G.data() + i * V_;
      for (index_t j = 0; j < V_; ++j) {
        Gi[j] += n_.scale * q[i] * d_o[j];
        d_delta_[static_cast<std::size_t>(j)] += k[i] * Gi[j];
      }
    }
    double d_beta = 0;
    for (index_t j = 0; j < V_; ++j) {
      const auto at = static_cast<std::size_t>(j);
      out.dv(row, head_, j) = b * d_delta_[at];
      d_beta += d_delta_[at] * (value(t)[j] - read_[at]);
    }
    double d_g = 0;
    for (index_t i = 0; i < K_; ++i) {
      const double* Si = S.data() + i * V_;
      double* Gi = G.data() + i * V_;
      double dq = 0, dk = 0;
      for (index_t j = 0; j < V_; ++j) {
        const auto at = static_cast<std::size_t>(j);
        dq += (Si[j] + k[i] * delta_[at]) * d_o[j];
        dk += Gi[j] * delta_[at] - b * Si[j] * d_delta_[at];
        Gi[j] -= b * k[i] * d_delta_[at];
        d_g += Gi[j] * Si[j];
        Gi[j] *= a;
      }
      out.dq(row, key_head_, i) += n_.scale * dq;
      out.dk(row, key_head_, i) += dk;
    }
    out.dg(row, head_) = d_g;
    out.dbeta(row, head_) = d_beta;
  }

  const rule_numbers& n_;
  const gdn::rule_segment& s_;
  index_t head_, key_head_, K_, V_;
  std::vector<double> read_, delta_, d_delta_;
};

}  // namespace

rule_answers by_recurrence(const rule_numbers& n, bool backward) {
  const index_t L = n.q.extent(0), Hk = n.q.extent(1), K = n.q.extent(2), Hv = n.v.extent(1), V = n.v.extent(2);
  rule_answers out;
  out.o = out.dv = host_tensor<double, 3>({L, Hv, V});
  out.dq = out.dk = host_tensor<double, 3>({L, Hk, K});
  out.dg = out.dbeta = host_tensor<double, 2>({L, Hv});
  const auto untouched = [&](index_t places) {
    host_tensor<double, 4> t({places, Hv, K, V});
    t.for_each([](double& v) { v = std::numeric_limits<double>::quiet_NaN(); });
    return t;
  };
  index_t states = 0;
  for (const gdn::rule_segment& s : n.segments) states = std::max<index_t>({states, s.ht + 1, s.dh0 + 1});
  out.ht = out.dh0 = untouched(states);
  for (const gdn::rule_segment& s : n.segments) {
    for (index_t h = 0; h < Hv; ++h) {
      head_run run(n, s, h);
      run.forward(out);
      if (backward) run.backward(out);
    }
  }
  return out;
}

}  // namespace gdn_test
