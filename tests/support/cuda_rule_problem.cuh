// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A delta rule problem in device memory, with the data that public kernels are timed with.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>

namespace gdn_test {

using gdn::index_t;
using device = gdn::device_memory;

struct rule_shape {
  index_t key_heads, value_heads;
  std::vector<index_t> lengths;
  index_t K = 128, V = 128;
};

/// Unit keys and queries, a quarter of the heads without decay, states in and out.
template <class T>
class rule_problem_on_device {
 public:
  rule_problem_on_device(const gdn::cuda::backend& be, const rule_shape& sizes, gdn::cuda::stream_ref s) : be_(be), s_(s) {
    p_.key_heads = sizes.key_heads;
    p_.value_heads = sizes.value_heads;
    p_.key_dim = sizes.K;
    p_.value_dim = sizes.V;
    p_.scale = 1.0f / std::sqrt(static_cast<float>(sizes.K));
    std::vector<gdn::rule_segment> segments;
    for (const index_t n : sizes.lengths) {
      const auto place = static_cast<std::int32_t>(segments.size());
      segments.push_back({p_.tokens, n, p_.chunks, place, place, place, place});
      p_.tokens += n;
      p_.chunks += (n + p_.chunk - 1) / p_.chunk;
      p_.longest = std::max(p_.longest, n);
    }
    const auto N = static_cast<index_t>(segments.size());
    p_.segments = gdn::make_tensor<device>(static_cast<const gdn::rule_segment*>(nullptr), N);  // sizes depend on N
    gdn::workspace<device> measure;
    carve(measure, N);
    memory_.emplace_back(measure.peak());
    auto ws = memory_[0].workspace();
    carve(ws, N);
    memory_.emplace_back(be.delta_rule_scratch(p_));
    gdn::cuda::copy_to_device<gdn::rule_segment>(segments, segments_, s);
    p_.segments = segments_;
    fill();
  }

  void prepare() const { be_.delta_rule_prepare(p_, in_, prepared_, s_); }
  void forward() const {
    auto ws = memory_[1].workspace();
    be_.delta_rule_prepare(p_, in_, prepared_, s_);
    be_.delta_rule_forward(p_, in_, prepared_, h0_, o_, ht_, ws, s_);
  }
  void backward() const {
    auto ws = memory_[1].workspace();
    be_.delta_rule_backward(p_, in_, prepared_, h0_, o_, ht_, {dq_, dk_, dv_, dg_, d_beta_}, dh0_, ws, s_);
  }
  index_t tokens() const { return p_.tokens; }

  // Open to tests, which look at results and call kernels themselves.
  void carve(gdn::workspace<device>& ws, index_t N) {
    const index_t L = p_.tokens, Hk = p_.key_heads, Hv = p_.value_heads, K = p_.key_dim, V = p_.value_dim;
    const auto keys = [&] { return ws.take<T>(L, Hk, K); };
    const auto values = [&] { return ws.take<T>(L, Hv, V); };
    const auto heads = [&] { return ws.take<float>(L, Hv); };
    const auto states = [&] { return ws.take<float>(N, Hv, K, V); };
    q_ = keys();
    k_ = keys();
    dq_ = keys();
    dk_ = keys();
    v_ = values();
    o_ = values();
    dv_ = values();
    g_ = heads();
    dg_ = heads();
    d_beta_ = heads();
    beta_ = ws.take<T>(L, Hv);
    h0_ = states();
    ht_ = states();
    dh0_ = states();
    segments_ = ws.take<gdn::rule_segment>(N);
    prepared_ = ws.take<float>(be_.delta_rule_prepared(p_));
    in_ = {q_, k_, v_, g_, beta_};
  }
  void fill() {
    // Normal numbers, which come again after a prime: drawing 10^8 of them would take longer than all else.
    std::mt19937 random(1);
    std::normal_distribution<float> distribution;
    std::vector<float> numbers(1048583);
    std::generate(numbers.begin(), numbers.end(), [&] { return distribution(random); });
    std::size_t drawn = 0;
    const auto normal = [&] {
      drawn = drawn + 1 == numbers.size() ? 0 : drawn + 1;
      return numbers[drawn];
    };
    const auto unit = [&](const auto& t) {
      std::vector<T> host(static_cast<std::size_t>(t.size()));
      std::vector<float> values(static_cast<std::size_t>(p_.key_dim));
      for (std::size_t row = 0; row < host.size(); row += values.size()) {
        float sum = 0;
        for (float& v : values) sum += (v = normal()) * v;
        const float scale = 1 / std::sqrt(sum);
        for (std::size_t i = 0; i < values.size(); ++i) host[row + i] = T(values[i] * scale);
      }
      gdn::cuda::copy_to_device<T>(host, t, s_);
    };
    unit(q_);
    unit(k_);
    std::vector<T> v(static_cast<std::size_t>(v_.size()));
    std::generate(v.begin(), v.end(), [&] { return T(normal()); });
    gdn::cuda::copy_to_device<T>(v, v_, s_);
    std::vector<float> g(static_cast<std::size_t>(g_.size()));
    std::vector<T> beta(g.size());
    for (std::size_t i = 0; i < g.size(); ++i) {
      const bool none = static_cast<index_t>(i) % p_.value_heads % 4 == 0;
      g[i] = none ? 0.0f : -std::log1p(std::exp(-normal())) / 16;
      beta[i] = T(1 / (1 + std::exp(-normal())));
    }
    gdn::cuda::copy_to_device<float>(g, g_, s_);
    gdn::cuda::copy_to_device<T>(beta, beta_, s_);
    std::vector<float> h(static_cast<std::size_t>(h0_.size()));
    std::generate(h.begin(), h.end(), normal);
    gdn::cuda::copy_to_device<float>(h, h0_, s_);
    gdn::cuda::copy_to_device<float>(h, ht_, s_);
  }

  const gdn::cuda::backend& be_;
  gdn::cuda::stream_ref s_;
  gdn::delta_rule_problem<T, device> p_;
  gdn::delta_rule_inputs<T, device> in_;
  gdn::tensor_ref<T, 3, device> q_, k_, v_, o_, dq_, dk_, dv_;
  gdn::tensor_ref<float, 2, device> g_, dg_, d_beta_;
  gdn::tensor_ref<T, 2, device> beta_;
  gdn::states_ref<T, device> h0_, ht_, dh0_;
  gdn::tensor_ref<gdn::rule_segment, 1, device> segments_;
  gdn::summaries_ref<T, device> prepared_;
  std::vector<gdn::cuda::device_block> memory_;
};

}  // namespace gdn_test
