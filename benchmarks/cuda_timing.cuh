// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Device time for the CUDA benchmarks: graph replays with a cold L2, medians, and the copy bandwidth.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <gdn/core/storage.hpp>
#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>

namespace gdn_bench {

using gdn::index_t;
using device = gdn::device_memory;
using gdn::cuda::check;

/// A captured piece of work, replayed on the stream it was captured from.
class graph {
 public:
  template <class F>
  graph(gdn::cuda::stream_ref s, F&& work) : s_(s) {
    work();  // loads modules, and what else only a first call does
    cudaGraph_t captured = nullptr;
    check(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    work();
    check(cudaStreamEndCapture(s.get(), &captured), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&exec_, captured, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(captured), "cudaGraphDestroy");
  }
  graph(const graph&) = delete;
  graph& operator=(const graph&) = delete;
  ~graph() { static_cast<void>(cudaGraphExecDestroy(exec_)); }
  void replay() const { check(cudaGraphLaunch(exec_, s_.get()), "cudaGraphLaunch"); }

 private:
  gdn::cuda::stream_ref s_;
  cudaGraphExec_t exec_ = nullptr;
};

template <class T>
__global__ void fill_kernel(T* to, index_t n, float scale, float shift, unsigned seed) {
  for (index_t i = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    auto hash = static_cast<std::uint32_t>(i) * 0x9e3779b9u + seed;
    float sum = 0;  // of four uniform values: nearly normal, deviation 1
    for (int k = 0; k < 4; ++k) {
      hash = (hash ^ (hash >> 16)) * 0x7feb352du;
      hash = (hash ^ (hash >> 15)) * 0x846ca68bu;
      hash ^= hash >> 16;
      sum += static_cast<float>(hash >> 8) * 0x1p-24f - 0.5f;
    }
    to[i] = static_cast<T>(sum * 1.7320508f * scale + shift);
  }
}

template <class T>
__global__ void read_kernel(const T* from, index_t n, T* never) {
  T sum{};
  for (index_t i = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    sum += from[i];
  }
  if (sum == T(1)) *never = sum;  // the memory is all zeros
}

/// A copy as fast as they get: 16 bytes per access, four accesses of a thread under way, every word used once.
template <class Word>
__global__ void copy_kernel(const Word* from, Word* to, index_t n) {
  const index_t first = blockIdx.x * static_cast<index_t>(4 * blockDim.x) + threadIdx.x;
  Word words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k * blockDim.x < n) words[k] = from[first + k * blockDim.x];
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (first + k * blockDim.x < n) to[first + k * blockDim.x] = words[k];
  }
}

/// Replays a graph and takes the median. Before each replay 256 MB are written, then as many read: nothing of the work
/// is in the L2, nor anything that must be written back first.
class stopwatch {
 public:
  explicit stopwatch(gdn::cuda::stream_ref s) : s_(s), flush_({flush_bytes}) {
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  stopwatch(const stopwatch&) = delete;
  stopwatch& operator=(const stopwatch&) = delete;
  ~stopwatch() {
    static_cast<void>(cudaEventDestroy(begin_));
    static_cast<void>(cudaEventDestroy(end_));
  }

  /// Seconds of the median of `replays`, after at least 30 ms that bring the clocks up.
  double median(const graph& work, int replays = 21) const {
    for (double warm = 0; warm < 0.03; warm += 1e-4) warm += once(work);
    std::vector<double> times;
    for (int i = 0; i < replays; ++i) times.push_back(once(work));
    std::nth_element(times.begin(), times.begin() + replays / 2, times.end());
    return times[static_cast<std::size_t>(replays / 2)];
  }

  /// Bytes per second, read and written, of a copy of 1 GiB by a kernel (in a graph, cudaMemcpyAsync is slower): the
  /// yardstick, measured once a run.
  double copy_bandwidth() {
    if (copy_bandwidth_ == 0) copy_bandwidth_ = copy_bandwidth(std::size_t{1} << 30);
    return copy_bandwidth_;
  }
  double copy_bandwidth(std::size_t bytes) const {
    const gdn::cuda::device_block from({bytes}), to({bytes});
    check(cudaMemsetAsync(from.data(), 1, bytes, s_.get()), "cudaMemsetAsync");
    const auto n = static_cast<index_t>(bytes / sizeof(uint4));
    const graph copy(s_, [&] {
      gdn::cuda::detail::launch("copy", copy_kernel<uint4>, gdn::cuda::detail::grid_of((n + 1023) / 1024), 256, 0, s_,
                                static_cast<const uint4*>(from.data()), static_cast<uint4*>(to.data()), n);
    });
    return 2 * static_cast<double>(bytes) / median(copy);
  }

 private:
  static constexpr std::size_t flush_bytes = std::size_t{256} << 20;

  double once(const graph& work) const {
    check(cudaMemsetAsync(flush_.data(), 0, flush_bytes, s_.get()), "cudaMemsetAsync");
    read_kernel<float><<<1024, 512, 0, s_.get()>>>(static_cast<const float*>(flush_.data()),
                                                   static_cast<index_t>(flush_bytes / sizeof(float)),
                                                   static_cast<float*>(flush_.data()));
    check(cudaEventRecord(begin_, s_.get()), "cudaEventRecord");
    work.replay();
    check(cudaEventRecord(end_, s_.get()), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return static_cast<double>(ms) / 1000;
  }

  gdn::cuda::stream_ref s_;
  gdn::cuda::device_block flush_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  double copy_bandwidth_ = 0;
};

/// What all benchmarks of a program share.
struct bench {
  gdn::cuda::backend be;
  gdn::cuda::stream s;
  stopwatch watch{s};
};
inline bench& setup() {
  static bench b;
  return b;
}

/// Memory for one benchmark: a call to carve(workspace) lays it out, twice, first to measure.
class memory {
 public:
  template <class F>
  explicit memory(F&& carve) : block_(measured(carve)) {
    auto ws = block_.workspace();
    carve(ws);
  }

 private:
  template <class F>
  static gdn::cuda::device_block measured(F& carve) {
    gdn::workspace<device> measure;
    carve(measure);
    return gdn::cuda::device_block(measure.peak());
  }
  gdn::cuda::device_block block_;
};

template <class T, int R>
void fill(const gdn::tensor_ref<T, R, device>& t, gdn::cuda::stream_ref s, float scale = 1, float shift = 0) {
  static unsigned seed = 0;
  if (t.size() == 0) return;
  gdn::cuda::detail::launch("fill", fill_kernel<T>, gdn::cuda::detail::striding_grid(t.size(), 256), 256, 0, s,
                            t.data(), t.size(), scale, shift, ++seed * 0x85ebca6bu);
}

/// Times `work` as one iteration of a benchmark with manual time.
/// @param bytes  each input read once, each output written once; their share of the copy bandwidth is reported
/// @param flops  of matrix products, or 0
template <class F>
void report(benchmark::State& state, stopwatch& watch, gdn::cuda::stream_ref s, double bytes, double flops, F&& work) {
  const double copy = watch.copy_bandwidth();
  double seconds = 0;
  {
    const graph captured(s, std::forward<F>(work));
    for (auto _ : state) state.SetIterationTime(seconds = watch.median(captured));
  }
  if (bytes > 0) {
    state.counters["MB"] = bytes / 1e6;
    state.counters["TB/s"] = bytes / seconds / 1e12;
    state.counters["of copy"] = bytes / seconds / copy;
  }
  if (flops > 0) state.counters["TFLOP/s"] = flops / seconds / 1e12;
}

/// Registers a benchmark whose one iteration is a median.
template <class F>
benchmark::internal::Benchmark* add(const std::string& name, F&& f) {
  return benchmark::RegisterBenchmark(name.c_str(), std::forward<F>(f))
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
}

/// Published sizes (K = V = 128, 16 key heads, convolution of width 4).
struct geometry {
  const char* name;
  index_t hidden, value_heads;
};
inline constexpr geometry geometries[] = {
    {"0.8B", 1024, 16}, {"2B", 2048, 16},  {"4B", 2560, 32},   {"9B", 4096, 32},
    {"27B", 5120, 48},  {"35B", 2048, 32}, {"122B", 3072, 64}, {"397B", 4096, 64},
};

inline int run(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace gdn_bench
