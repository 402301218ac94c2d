// SPDX-License-Identifier: Apache-2.0
/// @file  The gated delta rule on the CPU: forward (with its chunk inverses) and backward, l2norm and gates outside.

#include <algorithm>
#include <concepts>
#include <string>

#include <gdn/core/storage.hpp>
#include <gdn/kokkos/backend.hpp>

#include "support.hpp"

namespace {

using gdn::accumulate_t;
using gdn::host_memory;
using gdn::index_t;
using gdn::make_tensor;
using gdn_bench::random_values;

#if defined(KOKKOS_ENABLE_OPENMP)
using executor = Kokkos::OpenMP;
executor make_executor(int threads) { return executor(threads); }
#else
using executor = Kokkos::Serial;
executor make_executor(int) { return executor(); }
#endif

/// One document of `tokens` tokens, Hk key heads and Hv value heads, everything that a call needs.
template <class T>
struct rule_case {
  using A = accumulate_t<T>;
  index_t tokens, Hk, Hv, K, V;
  gdn::rule_segment segment;
  gdn::delta_rule_problem<T, host_memory> problem;
  std::vector<T> q, k, v, beta, d_o, o, dq, dk, dv;
  std::vector<A> g, h0, dg, d_beta;

  rule_case(index_t tokens_, index_t Hk_, index_t Hv_, index_t K_, index_t V_)
      : tokens(tokens_), Hk(Hk_), Hv(Hv_), K(K_), V(V_),
        q(unit_rows(2)), k(unit_rows(3)), v(random_values<T>(tokens * Hv * V)), beta(random_values<T>(tokens * Hv)),
        d_o(random_values<T>(tokens * Hv * V, 1.0, 4)), o(v.size()), dq(q.size()), dk(k.size()), dv(v.size()),
        g(random_values<A>(tokens * Hv)), h0(static_cast<std::size_t>(Hv * K * V)), dg(g.size()), d_beta(g.size()) {
    for (T& x : beta) x = static_cast<T>(1.0F / (1.0F + std::exp(-static_cast<float>(x))));
    for (A& x : g) x = A(-0.05) * std::log1p(std::exp(x));
    segment = gdn::rule_segment{};
    segment.begin = 0;
    segment.count = static_cast<decltype(segment.count)>(tokens);
    segment.chunk_begin = 0;
    segment.h0 = segment.ht = segment.dht = segment.dh0 = -1;
    problem = {tokens, Hk, Hv, K, V, 64, (tokens + 63) / 64, tokens, A(1) / std::sqrt(static_cast<A>(K)),
               make_tensor(static_cast<const gdn::rule_segment*>(&segment), 1)};
  }
  std::vector<T> unit_rows(unsigned seed) const {
    std::vector<float> x = random_values<float>(tokens * Hk * K, 1.0, seed);
    for (index_t i = 0; i < tokens * Hk; ++i) {
      Eigen::Map<Eigen::VectorXf>(x.data() + i * K, K).normalize();
    }
    std::vector<T> rows(x.size());
    std::transform(x.begin(), x.end(), rows.begin(), [](float y) { return static_cast<T>(y); });
    return rows;
  }
  gdn::delta_rule_inputs<T, host_memory> inputs() const {
    return {make_tensor(q.data(), tokens, Hk, K), make_tensor(k.data(), tokens, Hk, K),
            make_tensor(v.data(), tokens, Hv, V), make_tensor(g.data(), tokens, Hv),
            make_tensor(beta.data(), tokens, Hv)};
  }
  gdn::delta_rule_gradients<T, host_memory> gradients() {
    return {make_tensor(dq.data(), tokens, Hk, K), make_tensor(dk.data(), tokens, Hk, K),
            make_tensor(dv.data(), tokens, Hv, V), make_tensor(dg.data(), tokens, Hv),
            make_tensor(d_beta.data(), tokens, Hv)};
  }
};

enum class pass { prepare, forward, backward };

/// Arguments: tokens, Hk, Hv, K, V, threads.
template <class T>
void delta_rule(benchmark::State& state, pass which) {
  using A = accumulate_t<T>;
  rule_case<T> c(state.range(0), state.range(1), state.range(2), state.range(3), state.range(4));
  const gdn::kokkos::backend<executor> be(make_executor(static_cast<int>(state.range(5))));
  std::vector<A> prepared(static_cast<std::size_t>(be.delta_rule_prepared(c.problem)));
  gdn_bench::block memory(be.delta_rule_scratch(c.problem));
  auto ws = memory.workspace();
  const auto kept = make_tensor(prepared.data(), static_cast<index_t>(prepared.size()));
  const auto o = make_tensor(c.o.data(), c.tokens, c.Hv, c.V);
  const auto d_o = make_tensor(static_cast<const T*>(c.d_o.data()), c.tokens, c.Hv, c.V);
  const gdn::states_ref<T, host_memory> none{};
  be.template delta_rule_prepare<T>(c.problem, c.inputs(), kept, {});
  for (auto _ : state) {
    switch (which) {
      case pass::prepare:
        be.template delta_rule_prepare<T>(c.problem, c.inputs(), kept, {});
        break;
      case pass::forward:
        be.template delta_rule_prepare<T>(c.problem, c.inputs(), kept, {});
        be.template delta_rule_forward<T>(c.problem, c.inputs(), kept, none, o, none, ws, {});
        break;
      case pass::backward:
        be.template delta_rule_backward<T>(c.problem, c.inputs(), kept, none, d_o, none, c.gradients(), none, ws, {});
        break;
    }
    benchmark::DoNotOptimize(c.o.data());
    benchmark::ClobberMemory();
  }
  // Operations per token and value head as they are carried out, with what backward computes again: triangles count
  // half, and products that belong to a key head are shared. K = V = 128, Hv = 2 Hk: 124 and 390 kFLOP.
  const double token_heads = static_cast<double>(c.tokens * c.Hv);
  const double K = static_cast<double>(c.K), V = static_cast<double>(c.V), C = 64;
  const double shared = static_cast<double>(c.Hk) / static_cast<double>(c.Hv);
  const double inverse = shared * C * K + C * C / 3;
  const double forward = inverse + shared * C * K + 6 * K * V + 2 * C * V;
  const double backward = 18 * K * V + 6 * C * V + 5 * C * K + 4 * C * C / 3;
  const double values = static_cast<double>(c.Hv) * V, keys = static_cast<double>(c.Hk) * K;
  const double tokens = static_cast<double>(c.tokens);
  gdn_bench::count(state,
                   token_heads * (which == pass::prepare ? inverse : which == pass::forward ? forward : backward),
                   which == pass::prepare
                       ? 0
                       : tokens * static_cast<double>(sizeof(T)) *
                             (which == pass::forward ? 2 * values + 2 * keys : 3 * values + 4 * keys));
  state.counters["us/token/head"] = benchmark::Counter(
      token_heads * 1e-6, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void published(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "Hk", "Hv", "K", "V", "threads"});
  b->Args({4096, 16, 32, 128, 128, 1})->Args({4096, 16, 32, 128, 128, 2})->Args({2048, 16, 64, 128, 128, 1});
  b->Unit(benchmark::kMillisecond)->UseRealTime()->MeasureProcessCPUTime();
}
void others(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "Hk", "Hv", "K", "V", "threads"});
  b->Args({1024, 16, 32, 128, 128, 1});
  b->Unit(benchmark::kMillisecond)->UseRealTime()->MeasureProcessCPUTime();
}

template <class T>
void add(const std::string& name, pass which) {
  benchmark::RegisterBenchmark(name.c_str(), delta_rule<T>, which)->Apply(std::same_as<T, float> ? published : others);
}

}  // namespace

int main(int argc, char** argv) {
  gdn_bench::add_yardstick();
  add<float>("delta_rule_prepare/f32", pass::prepare);
  add<float>("delta_rule_forward/f32", pass::forward);
  add<float>("delta_rule_backward/f32", pass::backward);
  add<gdn::bfloat16>("delta_rule_forward/bf16", pass::forward);
  add<gdn::bfloat16>("delta_rule_backward/bf16", pass::backward);
  add<double>("delta_rule_forward/f64", pass::forward);
  add<double>("delta_rule_backward/f64", pass::backward);
  return gdn_bench::run(argc, argv);
}
