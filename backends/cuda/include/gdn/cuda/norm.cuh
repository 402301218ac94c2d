// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Norms on the device: a warp per row of a head.

#include <gdn/cuda/conv1d.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int norm_warps = 8;

/// f(row, head) for each of L H rows, a warp each; rows are dealt out to blocks in one fixed way.
template <class F>
__device__ void for_each_head_row(index_t tokens, index_t heads, F&& f) {
  const index_t n = tokens * heads;
  for (index_t i = blockIdx.x * static_cast<index_t>(norm_warps) + threadIdx.x / 32; i < n;
       i += static_cast<index_t>(gridDim.x) * norm_warps) {
    f(i / heads, i % heads);
  }
}

inline index_t norm_blocks(index_t tokens, index_t heads) {
  const index_t blocks = divide_up(tokens * heads, norm_warps);
  return blocks < 2048 ? blocks : 2048;
}

template <class X, class T>
__global__ void l2norm_forward_kernel(tensor_ref<const X, 3, device_memory> x, float eps,
                                      tensor_ref<T, 3, device_memory> y, tensor_ref<float, 2, device_memory> rstd) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const index_t D = x.extent(2);
  for_each_head_row(x.extent(0), x.extent(1), [&](index_t t, index_t h) {
    const X* from = &x(t, h, 0);
    float sum = 0;
    for (index_t i = lane; i < D; i += 32) {
      const float v = static_cast<float>(from[i]);
      sum += v * v;
    }
    const float r = 1.0f / sqrtf(warp_sum(sum) + eps);
    T* to = &y(t, h, 0);
    for (index_t i = lane; i < D; i += 32) to[i] = static_cast<T>(static_cast<float>(from[i]) * r);
    if (lane == 0) rstd(t, h) = r;
  });
}

template <class T>
__global__ void l2norm_backward_kernel(tensor_ref<const T, 3, device_memory> dy,
                                       tensor_ref<const T, 3, device_memory> y,
                                       tensor_ref<const float, 2, device_memory> rstd,
                                       tensor_ref<T, 3, device_memory> dx) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const index_t D = y.extent(2);
  for_each_head_row(y.extent(0), y.extent(1), [&](index_t t, index_t h) {
    float dot = 0;
    for (index_t i = lane; i < D; i += 32) dot += static_cast<float>(dy(t, h, i)) * static_cast<float>(y(t, h, i));
    dot = warp_sum(dot);
    for (index_t i = lane; i < D; i += 32) {
      dx(t, h, i) = static_cast<T>(rstd(t, h) * (static_cast<float>(dy(t, h, i)) - static_cast<float>(y(t, h, i)) * dot));
    }
  });
}

template <class T>
__global__ void gated_norm_forward_kernel(tensor_ref<const T, 3, device_memory> o,
                                          tensor_ref<const T, 3, device_memory> z, const float* w, float eps,
                                          tensor_ref<T, 3, device_memory> y, tensor_ref<float, 2, device_memory> rstd) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const index_t D = o.extent(2);
  for_each_head_row(o.extent(0), o.extent(1), [&](index_t t, index_t h) {
    float sum = 0;
    for (index_t i = lane; i < D; i += 32) {
      const float v = static_cast<float>(o(t, h, i));
      sum += v * v;
    }
    const float r = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(D) + eps);
    for (index_t i = lane; i < D; i += 32) {
      const float gate = apply(activation::silu, static_cast<float>(z(t, h, i)));
      y(t, h, i) = static_cast<T>(w[i] * (static_cast<float>(o(t, h, i)) * r) * gate);
    }
    if (lane == 0) rstd(t, h) = r;
  });
}

/// Each warp keeps its own sum of dw in shared memory; the block's warps are added in their order, then the blocks.
template <class T>
__global__ void gated_norm_backward_kernel(tensor_ref<const T, 3, device_memory> dy,
                                           tensor_ref<const T, 3, device_memory> o,
                                           tensor_ref<const T, 3, device_memory> z, const float* w,
                                           tensor_ref<const float, 2, device_memory> rstd,
                                           tensor_ref<T, 3, device_memory> d_o, tensor_ref<T, 3, device_memory> dz,
                                           float* partial) {
  extern __shared__ float sums[];  // [warps, D]
  const int lane = static_cast<int>(threadIdx.x % 32);
  const index_t D = o.extent(2);
  float* mine = sums + threadIdx.x / 32 * D;
  for (index_t i = lane; i < D; i += 32) mine[i] = 0;
  for_each_head_row(o.extent(0), o.extent(1), [&](index_t t, index_t h) {
    const float r = rstd(t, h);
    float dot = 0;
    for (index_t i = lane; i < D; i += 32) {
      const float gate = apply(activation::silu, static_cast<float>(z(t, h, i)));
      const float d_hat = static_cast<float>(dy(t, h, i)) * w[i] * gate;
      dot += static_cast<float>(o(t, h, i)) * r * d_hat;
    }
    dot = warp_sum(dot) / static_cast<float>(D);
    for (index_t i = lane; i < D; i += 32) {
      const float zi = static_cast<float>(z(t, h, i));
      const float g = static_cast<float>(dy(t, h, i));
      const float x_hat = static_cast<float>(o(t, h, i)) * r;
      const float gate = apply(activation::silu, zi);
      mine[i] += g * x_hat * gate;
      dz(t, h, i) = static_cast<T>(g * w[i] * x_hat * slope(activation::silu, zi));
      d_o(t, h, i) = static_cast<T>(r * (g * w[i] * gate - x_hat * dot));
    }
  });
  __syncthreads();
  for (index_t i = threadIdx.x; i < D; i += blockDim.x) {
    float sum = 0;
    for (int k = 0; k < norm_warps; ++k) sum += sums[k * D + i];
    partial[blockIdx.x * D + i] = sum;
  }
}

template <class X, class T>
void l2norm_forward(tensor_ref<const X, 3, device_memory> x, double eps, out_ref<T, 3> y,
                    tensor_ref<float, 2, device_memory> rstd, stream_ref s) {
  launch("l2norm_forward", l2norm_forward_kernel<X, T>, grid_of(norm_blocks(x.extent(0), x.extent(1))), 32 * norm_warps, 0,
         s, x, static_cast<float>(eps), y, rstd);
}

template <class T>
void l2norm_backward(in_ref<T, 3> dy, in_ref<T, 3> y, in_ref<float, 2> rstd, out_ref<T, 3> dx, stream_ref s) {
  launch("l2norm_backward", l2norm_backward_kernel<T>, grid_of(norm_blocks(y.extent(0), y.extent(1))), 32 * norm_warps,
         0, s, dy, y, rstd, dx);
}

template <class T>
void gated_norm_forward(in_ref<T, 3> o, in_ref<T, 3> z, in_ref<float, 1> w, double eps, out_ref<T, 3> y,
                        tensor_ref<float, 2, device_memory> rstd, stream_ref s) {
  launch("gated_norm_forward", gated_norm_forward_kernel<T>, grid_of(norm_blocks(o.extent(0), o.extent(1))),
         32 * norm_warps, 0, s, o, z, w.data(), static_cast<float>(eps), y, rstd);
}

inline memory_requirement norm_scratch(index_t tokens, index_t heads, index_t dim) {
  return {static_cast<std::size_t>(norm_blocks(tokens, heads) * dim) * sizeof(float)};
}

template <class T>
void gated_norm_backward(in_ref<T, 3> dy, in_ref<T, 3> o, in_ref<T, 3> z, in_ref<float, 1> w, in_ref<float, 2> rstd,
                         out_ref<T, 3> d_o, other_ref<T, 3> dz, tensor_ref<float, 1, device_memory> dw,
                         workspace<device_memory>& ws, stream_ref s) {
  if (d_o.size() == 0) return;
  const scoped_mark scope(ws);
  const index_t blocks = norm_blocks(o.extent(0), o.extent(1));
  const index_t D = o.extent(2);
  const auto partial = ws.take<float>(blocks, D);
  launch("gated_norm_backward", gated_norm_backward_kernel<T>, grid_of(blocks), 32 * norm_warps,
         static_cast<std::size_t>(norm_warps * D) * sizeof(float), s, dy, o, z, w.data(), rstd, d_o, dz, partial.data());
  add_partial_sums(partial.data(), blocks, make_tensor<device_memory>(dw.data(), 1, D), s);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
