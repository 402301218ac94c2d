// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on one GPU: device time of graph replays with a cold L2, at the sequence sets of public kernels.
//   cuda_rule_bench --benchmark_filter=forward

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <support/cuda_rule_problem.cuh>

namespace {

using gdn::index_t;
using problem = gdn_test::rule_problem_on_device<gdn::bfloat16>;
using shape = gdn_test::rule_shape;

/// Captures the work in a graph and times its replays, the L2 filled with something else before each.
void time_graph(benchmark::State& state, gdn::cuda::stream_ref s, const std::function<void()>& work) {
  using gdn::cuda::check;
  work();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  work();
  check(cudaStreamEndCapture(s.get(), &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  const gdn::cuda::device_block flush({std::size_t{256} << 20});
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  for (auto _ : state) {
    check(cudaMemsetAsync(flush.data(), 0, flush.bytes(), s.get()), "cudaMemsetAsync");
    check(cudaEventRecord(begin, s.get()), "cudaEventRecord");
    check(cudaGraphLaunch(exec, s.get()), "cudaGraphLaunch");
    check(cudaEventRecord(end, s.get()), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    state.SetIterationTime(static_cast<double>(ms) / 1000);
  }
  check(cudaEventDestroy(begin), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  check(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
}

}  // namespace

int main(int argc, char** argv) {
  const gdn::cuda::backend be;
  const gdn::cuda::stream s;
  const std::vector<std::pair<std::string, std::vector<index_t>>> sets = {
      {"1x32768", {32768}},
      {"1x8192", {8192}},
      {"1x2048", {2048}},
      {"8192x4", std::vector<index_t>(4, 8192)},
      {"4096x8", std::vector<index_t>(8, 4096)},
      {"1024x8", std::vector<index_t>(8, 1024)}};
  for (const auto& [Hk, Hv] : {std::pair<index_t, index_t>{16, 32}, {16, 64}, {16, 48}, {16, 16}, {4, 16}, {2, 8}}) {
    for (const auto& [name, lengths] : sets) {
      const shape sizes{Hk, Hv, lengths};
      const auto add = [&](const char* what, void (problem::*call)() const) {
        const std::string label = std::string(what) + "/" + std::to_string(Hk) + "," + std::to_string(Hv) + "/" + name;
        benchmark::RegisterBenchmark(label.c_str(), [&be, &s, sizes, call](benchmark::State& state) {
          const problem p(be, sizes, s);
          p.forward();
          time_graph(state, s, [&] { (p.*call)(); });
          state.counters["tokens/s"] = benchmark::Counter(
              static_cast<double>(p.tokens()), benchmark::Counter::kIsIterationInvariantRate);
        })->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(20);
      };
      add("prepare", &problem::prepare);
      add("forward", &problem::forward);
      add("backward", &problem::backward);
    }
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
