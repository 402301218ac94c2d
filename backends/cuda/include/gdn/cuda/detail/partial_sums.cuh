// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Sums of gradients over tokens: partial sums of tiles, added in one fixed order.

#include <gdn/core/tensor.hpp>
#include <gdn/cuda/detail/launch.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// to[i] += sum over tiles of partial[tile, i]. A warp's lanes own neighbouring sums; each of 32 warps adds every 32nd
/// tile, and the warps' sums are added in one fixed order. The second row of blocks, if there is one, adds the partial
/// sums behind these to `other`.
template <class A>
__global__ void __launch_bounds__(1024) add_partial_sums_kernel(const A* partial, index_t tiles, index_t n, A* to,
                                                                index_t row, index_t to_stride, A* other) {
  __shared__ double sums[32][33];
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const auto warp = static_cast<int>(threadIdx.x / 32);
  const index_t first = blockIdx.x * index_t{32};
  if (blockIdx.y == 1) {
    partial += tiles * n;
    to = other;
  }
  double sum = 0;
  if (first + lane < n) {
#pragma unroll 8
    for (index_t t = warp; t < tiles; t += 32) sum += static_cast<double>(partial[t * n + first + lane]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  const index_t i = first + warp;
  sum = warp_sum(sums[lane][warp]);
  if (lane > 0 || i >= n) return;
  A& target = to[i / row * to_stride + i % row];
  target = static_cast<A>(static_cast<double>(target) + sum);
}

inline void add_partial_sums(const float* partial, index_t tiles, tensor_ref<float, 2, device_memory> to,
                             stream_ref s) {
  launch("add_partial_sums", add_partial_sums_kernel<float>, grid_of(divide_up(to.size(), 32)), 1024, 0, s, partial,
         tiles, to.size(), to.data(), to.extent(1), to.stride(0), nullptr);
}
/// Two at once: partial [2, tiles, n].
inline void add_partial_sums(const float* partial, index_t tiles, tensor_ref<float, 1, device_memory> to,
                             tensor_ref<float, 1, device_memory> other, stream_ref s) {
  const index_t n = to.size();
  launch("add_partial_sums", add_partial_sums_kernel<float>, grid_of(divide_up(n, 32), 2), 1024, 0, s, partial, tiles,
         n, to.data(), n, n, other.data());
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
