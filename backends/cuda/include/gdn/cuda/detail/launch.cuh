// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One checked way to launch a kernel, and index arithmetic that kernels share.

#include <string_view>
#include <utility>

#include <cuda_runtime.h>

#include <gdn/core/types.hpp>
#include <gdn/cuda/error.hpp>
#include <gdn/cuda/stream.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

__host__ __device__ constexpr index_t divide_up(index_t n, index_t by) noexcept { return (n + by - 1) / by; }

/// Enqueues a kernel; nothing if the grid is empty. @throws backend_error that names the kernel
template <class... Parameters, class... Arguments>
void launch(std::string_view name, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared,
            stream_ref s, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = s.get();
  check(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...), name);
}

inline dim3 grid_of(index_t x, index_t y = 1, index_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

/// x by y by z blocks in one dimension, x fastest: CUDA's others end at 65,535, and documents do not.
inline dim3 flat_grid(index_t x, index_t y, index_t z) {
  const index_t blocks = x * y * z;
  expects<backend_error>(blocks < index_t{1} << 31, "a grid has at most 2^31 - 1 blocks, is asked for", blocks);
  return grid_of(blocks);
}
/// Where this block is in such a grid.
struct flat_place {
  index_t x, y, z;

  __device__ flat_place(index_t nx, index_t ny) {
    const auto row = blockIdx.x / static_cast<unsigned>(nx);
    x = blockIdx.x % static_cast<unsigned>(nx);
    y = row % static_cast<unsigned>(ny);
    z = row / static_cast<unsigned>(ny);
  }
};

/// Threads that stride over n elements: enough blocks to fill any GPU, never more than needed.
inline dim3 striding_grid(index_t n, int threads) {
  const index_t blocks = divide_up(n, threads);
  return grid_of(blocks < 4096 ? blocks : 4096);
}

/// n / by, in 32 bits where they suffice: the wide division is a long routine.
__device__ inline index_t quotient(index_t n, index_t by) {
  if (((n | by) >> 32) == 0) return static_cast<index_t>(static_cast<unsigned>(n) / static_cast<unsigned>(by));
  return n / by;
}

/// Sum over each `Lanes` neighbouring lanes of a warp; all of them have it. The order is fixed.
template <class A, int Lanes = 32>
__device__ inline A warp_sum(A v) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
