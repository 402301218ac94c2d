// SPDX-License-Identifier: Apache-2.0
/// @file  The plan of one rank: every rank builds its own, once per batch shape.

#include <algorithm>
#include <iterator>
#include <random>
#include <vector>

#include <benchmark/benchmark.h>

#include <gdn/plan/cp_plan.hpp>

namespace {

using gdn::index_t;

/// `documents` documents of random lengths that add up to `tokens`.
gdn::packing random_packing(index_t tokens, index_t documents) {
  std::mt19937_64 engine(1);
  std::uniform_int_distribution<index_t> anywhere(1, tokens - 1);
  std::vector<index_t> cu(static_cast<std::size_t>(documents) + 1, 0);
  std::generate(std::next(cu.begin()), std::prev(cu.end()), [&] { return anywhere(engine); });
  cu.back() = tokens;
  std::sort(cu.begin(), cu.end());
  return gdn::packing::from_cu_seqlens(cu, {}, 1, tokens);
}

/// Arguments: tokens, documents, ranks. The mean over eight ranks, from the first to the last.
template <class Layout>
void plan(benchmark::State& state, gdn::plan_options options) {
  const index_t tokens = state.range(0);
  const int world = static_cast<int>(state.range(2));
  const gdn::packing pack = random_packing(tokens, state.range(1));
  const gdn::plan_shape shape{.conv_width = 4, .summary = {32, 128, 128}, .chunk = 64, .hidden = 2048};
  const Layout layout{tokens, world};
  int rank = 0;
  for (auto _ : state) {
    const gdn::cp_plan p = gdn::plan_context_parallel(layout, pack, shape, 8192, options, rank);
    benchmark::DoNotOptimize(p.digest());
    rank = (rank + std::max(1, world / 7)) % world;
  }
  const auto fragments = static_cast<double>(layout.fragments().size());
  using benchmark::Counter;
  state.counters["fragments"] = fragments;
  state.counters["s/fragment"] = Counter(fragments, Counter::kIsIterationInvariantRate | Counter::kInvert);
}

void streams(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "documents", "ranks"})->Unit(benchmark::kMillisecond);
  b->Args({index_t{1} << 27, 100000, 4096})->Args({index_t{1} << 27, 1, 4096})->Args({1 << 20, 64, 64});
}
/// One fragment per token.
void tokens(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "documents", "ranks"})->Unit(benchmark::kMillisecond);
  b->Args({1 << 18, 64, 64})->Args({1 << 20, 64, 64})->Args({1 << 22, 64, 64});
}

constexpr gdn::plan_options reshard{.strategy = gdn::strategy::reshard};
constexpr gdn::plan_options in_place{.strategy = gdn::strategy::in_place};
constexpr gdn::plan_options with_states{
    .strategy = gdn::strategy::reshard, .initial_state = true, .final_state = true};

template <class Layout>
void add(const char* name, const gdn::plan_options& options, void (*sizes)(benchmark::internal::Benchmark*)) {
  benchmark::RegisterBenchmark(name, plan<Layout>, options)->Apply(sizes);
}

}  // namespace

int main(int argc, char** argv) {
  add<gdn::contiguous_layout>("plan/contiguous", reshard, streams);
  add<gdn::contiguous_layout>("plan/contiguous_states", with_states, streams);
  add<gdn::zigzag_layout>("plan/zigzag_reshard", reshard, streams);
  add<gdn::zigzag_layout>("plan/zigzag_in_place", in_place, streams);
  add<gdn::interleaved_layout>("plan/interleaved_reshard", reshard, tokens);
  add<gdn::interleaved_layout>("plan/interleaved_in_place", in_place, tokens);  // which compares, and reshards
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
