// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Causal depthwise convolution on the device: a thread owns a few channels and slides over a tile of tokens.
/// Its gradients are in conv1d_backward.cuh.

#include <algorithm>

#include <gdn/concepts/backend.hpp>
#include <gdn/concepts/operands.hpp>
#include <gdn/cuda/conv1d_backward.cuh>
#include <gdn/cuda/detail/activation.cuh>
#include <gdn/cuda/detail/conv_walk.cuh>
#include <gdn/cuda/detail/token_ring.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Tokens that one thread walks over: few, so that blocks come in many waves and the last one matters little. What the
/// next tile reads again, W - 1 rows, is mostly still in the L2.
constexpr index_t conv_forward_tile(index_t tokens) {
  return std::max<index_t>(divide_up(tokens, conv_tiles_most), 32);
}

/// The last W inputs stay in registers. Blocks that run together are neighbours along the channels and read whole rows.
template <class T, class Y, int N, class Kind>
__global__ void __launch_bounds__(conv_threads, 5)
    conv_forward_kernel(token_tiles tiles, conv_input<T, N> in, tensor_ref<const T, 2, device_memory> weight, Y* y,
                        index_t y_stride, index_t channels) {
  constexpr int W = Kind::width;
  using ring_type = token_ring<T, N, 1>;
  constexpr int group = ring_type::group, groups = ring_type::groups;
  __shared__ ring_type ring;
  const index_t channel = (blockIdx.x * static_cast<index_t>(conv_threads) + threadIdx.x) * N;
  if (channel >= channels) return;
  pack<float, N> w[W];
  load_taps<N, W>(weight, channel, w);
  tiles.for_each_segment(blockIdx.y, [&](const conv_segment& s, index_t first, index_t stop) {
    const auto count = static_cast<int>(stop - first);
    int left = count;
    const T* from[] = {in.x + first * in.x_stride + channel};
    const index_t strides[] = {in.x_stride};
    Y* to = y + first * y_stride + channel;
    const auto fetch = [&](int k) {
      ring.fetch(k, from, strides, left);
      left -= group;
    };
#pragma unroll
    for (int k = 0; k + 1 < groups; ++k) fetch(k);
    pack<float, N> window[W];
    load_window<N, W>(in, s, first, channel, window);
    int k = 0;
    for (int t = 0; t < count; t += group, k = (k + 1) % groups) {
      fetch((k + groups - 1) % groups);
      ring.await();
      const auto step = [&](int i) {
        shift_in<N, W>(window, widen(ring(k, i, 0)));
        pack<float, N> p = convolve<N, W>(w, window);
#pragma unroll
        for (int c = 0; c < N; ++c) p[c] = apply<T>(Kind::act, p[c]);
        store<Y, N>(to, p);
        next_row(to, y_stride);
      };
      if (t + group <= count) {
#pragma unroll
        for (int i = 0; i < group; ++i) step(i);
      } else {
#pragma unroll 1
        for (int i = 0; t + i < count; ++i) step(i);
      }
    }
  });
}

/// The same for any width, one channel at a time; inputs are read again for each tap.
template <class T, class Y>
__global__ void conv_forward_any_kernel(token_tiles tiles, conv_input<T, 1> in,
                                        tensor_ref<const T, 2, device_memory> weight, activation act, Y* y,
                                        index_t y_stride, index_t channels) {
  const index_t channel = blockIdx.x * static_cast<index_t>(conv_threads) + threadIdx.x;
  if (channel >= channels) return;
  tiles.for_each_segment(blockIdx.y, [&](const conv_segment& s, index_t first, index_t stop) {
    for (index_t t = first; t < stop; ++t) {
      float p = 0;
      for (index_t j = 0; j < in.width; ++j) {
        p += static_cast<float>(weight(channel, j)) * in(s, t - in.width + 1 + j, channel)[0];
      }
      y[t * y_stride + channel] = static_cast<Y>(apply<T>(act, p));
    }
  });
}

/// Segments must tile the rows of x, and the halo rows that they name must exist: they lie on the device, where nobody
/// looks at them before the kernel does.
template <class T, class Y>
void causal_conv1d_forward(tensor_ref<const conv_segment, 1, device_memory> segments, in_ref<T, 2> x, in_ref<T, 2> halo,
                           in_ref<T, 2> w, activation act, out_ref<Y, 2> y, stream_ref s) {
  expects_causal_conv1d_forward(segments, x, halo, w, y);
  const index_t channels = y.extent(1);
  if (y.size() == 0) return;
  const token_tiles tiles{segments.data(), segments.extent(0), y.extent(0), conv_forward_tile(y.extent(0))};
  const auto run = [&]<int N>(auto kernel, auto... more) {
    const conv_input<T, N> in{x.data(), x.stride(0), halo.data(), halo.stride(0), w.extent(1)};
    launch("causal_conv1d_forward", kernel,
           grid_of(divide_up(channels, conv_threads * N), divide_up(tiles.tokens, tiles.length)), conv_threads, 0, s,
           tiles, in, w, more..., y.data(), y.stride(0), channels);
  };
  const bool compiled = with_conv_kind(w.extent(1), act, [&]<class Kind>(Kind) {
    const auto packed = [&]<int N>() { run.template operator()<N>(conv_forward_kernel<T, Y, N, Kind>); };
    with_channels<8 / static_cast<int>(sizeof(T))>(packed, x, halo, y);
  });
  if (!compiled) run.template operator()<1>(conv_forward_any_kernel<T, Y>, act);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
