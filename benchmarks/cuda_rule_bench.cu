// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on one GPU, at the sequence sets of public kernels.
//   cuda_rule_bench --benchmark_filter=forward

#include <string>
#include <utility>
#include <vector>

#include <support/cuda_rule_problem.cuh>

#include "cuda_timing.cuh"

namespace {

using gdn::index_t;
using problem = gdn_test::rule_problem_on_device<gdn::bfloat16>;
using shape = gdn_test::rule_shape;

}  // namespace

int main(int argc, char** argv) {
  const gdn::cuda::backend be;
  const gdn::cuda::stream s;
  gdn_bench::stopwatch watch(s);
  const std::vector<std::pair<std::string, std::vector<index_t>>> sets = {{"1x32768", {32768}},
                                                                          {"1x8192", {8192}},
                                                                          {"1x2048", {2048}},
                                                                          {"8192x4", std::vector<index_t>(4, 8192)},
                                                                          {"4096x8", std::vector<index_t>(8, 4096)},
                                                                          {"1024x8", std::vector<index_t>(8, 1024)}};
  const auto add_all = [&](const std::string& name, const shape& sizes) {
    const auto add = [&](const char* what, void (problem::*call)() const) {
      const std::string label = std::string(what) + "/" + std::to_string(sizes.key_heads) + "," +
                                std::to_string(sizes.value_heads) + "/" + name;
      gdn_bench::add(label, [&be, &s, &watch, sizes, call](benchmark::State& state) {
        const problem p(be, sizes, s);
        p.forward();  // leaves what backward reads
        gdn_bench::report(state, watch, s, 0, 0, [&] { (p.*call)(); });
        state.counters["tokens/s"] =
            benchmark::Counter(static_cast<double>(p.tokens()), benchmark::Counter::kIsIterationInvariantRate);
      })->Unit(benchmark::kMillisecond);
    };
    add("prepare", &problem::prepare);
    add("forward", &problem::forward);
    add("backward", &problem::backward);
  };
  for (const auto& [Hk, Hv] : {std::pair<index_t, index_t>{16, 32}, {16, 64}, {16, 48}, {16, 16}, {4, 16}, {2, 8}}) {
    for (const auto& [name, lengths] : sets) add_all(name, {Hk, Hv, lengths});
  }
  // Long keys, which no published model has: K x V behind the set.
  for (const index_t V : {128, 256}) {
    const std::string heads = "/256x" + std::to_string(V);
    add_all("1x8192" + heads, {8, 16, {8192}, 256, V});
    add_all("2048x8" + heads, {8, 16, std::vector<index_t>(8, 2048), 256, V});
  }
  return gdn_bench::run(argc, argv);
}
