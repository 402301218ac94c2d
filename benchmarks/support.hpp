// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What the benchmarks share: random tensors, the yardstick, counters, and a main that starts Kokkos.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include <Eigen/Core>
#include <Kokkos_Core.hpp>
#include <benchmark/benchmark.h>

#include <gdn/core/tensor.hpp>
#include <gdn/core/workspace.hpp>

namespace gdn_bench {

using gdn::index_t;

/// Memory for a workspace, touched so that no benchmark pays for its pages.
class block {
 public:
  block() = default;
  explicit block(gdn::memory_requirement need) : bytes_(need.bytes + 256, std::byte{0}) {}
  gdn::workspace<gdn::host_memory> workspace() {
    const auto at = reinterpret_cast<std::uintptr_t>(bytes_.data());
    const std::size_t skip = (256 - at % 256) % 256;
    return {bytes_.data() + skip, bytes_.size() - 256};
  }

 private:
  std::vector<std::byte> bytes_;
};

/// Normal values of a fixed seed; `T` from float.
template <class T>
std::vector<T> random_values(index_t n, double scale = 1.0, unsigned seed = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0F, static_cast<float>(scale));
  std::vector<T> v(static_cast<std::size_t>(n));
  for (T& x : v) x = static_cast<T>(normal(engine));
  return v;
}

/// Operations and bytes of one iteration, as rates.
inline void count(benchmark::State& state, double flops, double bytes) {
  using benchmark::Counter;
  if (flops > 0) state.counters["FLOP/s"] = Counter(flops, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  if (bytes > 0) state.counters["bytes/s"] = Counter(bytes, Counter::kIsIterationInvariantRate, Counter::kIs1000);
}

/// The yardstick: Eigen's own product of two 1024 x 1024 matrices in fp32, on one thread.
inline void eigen_product(benchmark::State& state) {
  constexpr Eigen::Index n = 1024;
  Eigen::setNbThreads(1);
  const Eigen::MatrixXf a = Eigen::MatrixXf::Random(n, n);
  const Eigen::MatrixXf b = Eigen::MatrixXf::Random(n, n);
  Eigen::MatrixXf c(n, n);
  for (auto _ : state) {
    c.noalias() = a * b;
    benchmark::DoNotOptimize(c.data());
  }
  count(state, 2.0 * n * n * n, 0);
}

/// Registered first, so that each program measures it in the same run.
inline void add_yardstick() {
  benchmark::RegisterBenchmark("eigen_product/f32/1024", eigen_product)->Unit(benchmark::kMillisecond);
}

/// main() after the benchmarks are registered.
inline int run(int argc, char** argv) {
  const Kokkos::ScopeGuard kokkos(Kokkos::InitializationSettings().set_disable_warnings(true));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace gdn_bench
