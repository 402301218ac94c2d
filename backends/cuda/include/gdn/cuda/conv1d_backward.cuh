// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Gradients of the causal depthwise convolution on the device: one walk over x and dy gives dx, d_halo and dw.

#include <algorithm>
#include <cstdint>

#include <gdn/concepts/backend.hpp>
#include <gdn/concepts/operands.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/cuda/detail/activation.cuh>
#include <gdn/cuda/detail/conv_walk.cuh>
#include <gdn/cuda/detail/partial_sums.cuh>
#include <gdn/cuda/detail/token_ring.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int conv_warps = conv_threads / 32;

/// Tokens that a warp walks over; the warps of a block take neighbouring tiles of the same channels. It depends on L
/// only, and so does the order in which sums of dw are added. Long tiles read little twice and leave few sums; short
/// ones fill the device where there are few tokens.
constexpr index_t conv_backward_tile(index_t tokens) {
  return std::max(std::clamp<index_t>(divide_up(tokens, 32), 64, 128), divide_up(tokens, conv_warps * conv_tiles_most));
}
/// Blocks along the tokens, each of which leaves one partial sum; also without tokens, since segments of none may name
/// rows of d_halo, which become zero.
constexpr index_t conv_backward_blocks(index_t tokens) {
  return std::max<index_t>(divide_up(tokens, conv_warps * conv_backward_tile(tokens)), 1);
}
/// No less than that, and no less for more tokens.
constexpr index_t conv_sums_at_most(index_t tokens) {
  const index_t few = std::clamp<index_t>(divide_up(tokens, conv_warps * 64), 1, 8);
  return std::max(few, divide_up(tokens, conv_warps * 128));
}

/// What a thread knows while it walks: p is computed again from x, and dx lags W - 1 tokens behind.
///
/// dp_u = dy_u act'(p_u);  dx_t = sum_j w_j dp_{t+W-1-j};  dw_j = sum_u dp_u x_{u-W+1+j}
template <int N, class Kind>
struct conv_gradient {
  static constexpr int W = Kind::width;
  pack<float, N> w[W];
  pack<float, N> dw[W] = {};
  pack<float, N> window[W];  // x_{u-W+1} .. x_u
  pack<float, N> dp[W];      // dp_{u-W+1} .. dp_u

  /// Takes x_u and dy_u, zero behind the segment, and gives dx_{u-W+1}. `counts`: u is of this tile, so dw takes it.
  template <class T>
  __device__ pack<float, N> step(const raw_pack<T, N>& x, const raw_pack<T, N>& dy, bool counts) {
    shift_in<N, W>(window, widen(x));
    const pack<float, N> p = convolve<N, W>(w, window);
    pack<float, N> last = widen(dy);
#pragma unroll
    for (int c = 0; c < N; ++c) last[c] *= slope<T>(Kind::act, p[c]);
    shift_in<N, W>(dp, last);
    pack<float, N> dx{};
#pragma unroll
    for (int j = 0; j < W; ++j) {
#pragma unroll
      for (int c = 0; c < N; ++c) {
        if (counts) dw[j][c] += last[c] * window[j][c];
        dx[c] += w[j][c] * dp[W - 1 - j][c];
      }
    }
    return dx;
  }
};

/// Four blocks on a multiprocessor have up to 96 KB under way. Partial sums of dw, one per block: [blocks, D, W].
template <class T, int N, class Kind>
__global__ void __launch_bounds__(conv_threads, 4)
    conv_backward_kernel(token_tiles tiles, conv_input<T, N> in, tensor_ref<const T, 2, device_memory> weight,
                         const T* dy, index_t dy_stride, T* dx, index_t dx_stride, T* d_halo, index_t d_halo_stride,
                         float* partial, index_t channels) {
  constexpr int W = Kind::width;
  using ring_type = token_ring<T, N, 2>;  // x, dy
  constexpr int group = ring_type::group, groups = ring_type::groups;
  __shared__ union {
    ring_type ring;
    float sums[N][W][conv_threads];
  } shared;
  const index_t channel = (blockIdx.x * index_t{32} + threadIdx.x % 32) * N;
  const index_t tile = blockIdx.y * static_cast<index_t>(conv_warps) + threadIdx.x / 32;
  conv_gradient<N, Kind> gradient;
  if (channel < channels) {
    load_taps<N, W>(weight, channel, gradient.w);
    tiles.for_each_segment(tile, [&](const conv_segment& s, index_t first, index_t stop) {
      // One step per token, and W - 1 more: the last tokens' dx need what comes behind them.
      const auto count = static_cast<int>(stop - first);
      const index_t behind = s.begin + s.count - stop;
      int left = count + static_cast<int>(behind < W - 1 ? behind : W - 1);
      const T* from[] = {in.x + first * in.x_stride + channel, dy + first * dy_stride + channel};
      const index_t strides[] = {in.x_stride, dy_stride};
      T* to = dx + (first - (W - 1)) * dx_stride + channel;
      const index_t halo = first == s.begin ? s.halo : -1;  // rows of d_halo that are this tile's to write
      const auto fetch = [&](int k) {
        shared.ring.fetch(k, from, strides, left);
        left -= group;
      };
#pragma unroll
      for (int k = 0; k + 1 < groups; ++k) fetch(k);
      load_window<N, W>(in, s, first, channel, gradient.window);
#pragma unroll
      for (int j = 0; j < W; ++j) gradient.dp[j] = {};
      int k = 0;
      for (int u = 0; u < count + W - 1; u += group, k = (k + 1) % groups) {
        fetch((k + groups - 1) % groups);
        shared.ring.await();
        const auto step = [&](int i, bool counts) {
          return gradient.step(shared.ring(k, i, 0), shared.ring(k, i, 1), counts);
        };
        if (u >= W - 1 && u + group <= count) {
#pragma unroll
          for (int i = 0; i < group; ++i, next_row(to, dx_stride)) store<T, N>(to, step(i, true));
        } else {
#pragma unroll 1
          for (int i = 0; i < group && u + i < count + W - 1; ++i, next_row(to, dx_stride)) {
            const pack<float, N> d = step(i, u + i < count);
            const int t = u + i - (W - 1);  // of the rows from `first` on
            if (t >= 0) {
              store<T, N>(to, d);
            } else if (halo >= 0) {
              store<T, N>(d_halo + (halo + t + W - 1) * d_halo_stride + channel, d);
            }
          }
        }
      }
    });
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < N; ++c) {
#pragma unroll
    for (int j = 0; j < W; ++j) shared.sums[c][j][threadIdx.x] = gradient.dw[j][c];
  }
  __syncthreads();
  const index_t base = blockIdx.x * index_t{32} * N;  // the block's first channel
  for (int i = static_cast<int>(threadIdx.x); i < 32 * N * W; i += conv_threads) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < conv_warps; ++warp) sum += shared.sums[i / W % N][i % W][warp * 32 + i / (N * W)];
    if (base + i / W < channels) partial[(blockIdx.y * channels + base) * W + i] = sum;
  }
}

/// The same for any width, one channel at a time and without registers for the window.
template <class T>
__global__ void conv_backward_any_kernel(token_tiles tiles, conv_input<T, 1> in,
                                         tensor_ref<const T, 2, device_memory> weight, activation act, const T* dy,
                                         index_t dy_stride, T* dx, index_t dx_stride, T* d_halo, index_t d_halo_stride,
                                         float* partial, index_t channels) {
  const index_t channel = blockIdx.x * static_cast<index_t>(conv_threads) + threadIdx.x;
  if (channel >= channels) return;
  const index_t W = in.width;
  const auto w = [&](index_t j) { return static_cast<float>(weight(channel, j)); };
  const auto p_slope = [&](const conv_segment& s, index_t t) {
    float p = 0;
    for (index_t j = 0; j < W; ++j) p += w(j) * in(s, t - W + 1 + j, channel)[0];
    return static_cast<float>(dy[t * dy_stride + channel]) * slope<T>(act, p);
  };
  float* sums = partial + (blockIdx.y * channels + channel) * W;
  for (index_t j = 0; j < W; ++j) sums[j] = 0;
  tiles.for_each_segment(blockIdx.y, [&](const conv_segment& s, index_t first, index_t stop) {
    const bool with_halo = first == s.begin && s.halo >= 0;
    for (index_t t = with_halo ? first - (W - 1) : first; t < stop; ++t) {
      float d = 0;
      for (index_t j = 0; j < W; ++j) {
        const index_t u = t + W - 1 - j;
        if (u >= s.begin && u < s.begin + s.count) d += w(j) * p_slope(s, u);
      }
      if (t >= first) {
        dx[t * dx_stride + channel] = static_cast<T>(d);
        const float dp = p_slope(s, t);
        for (index_t j = 0; j < W; ++j) sums[j] += dp * in(s, t - W + 1 + j, channel)[0];
      } else {
        d_halo[(s.halo + t - s.begin + W - 1) * d_halo_stride + channel] = static_cast<T>(d);
      }
    }
  });
}

inline memory_requirement conv_scratch(index_t tokens, index_t channels, index_t width) {
  return {static_cast<std::size_t>(conv_sums_at_most(tokens) * channels * width) * sizeof(float)};
}

/// Of the segments it wants what causal_conv1d_forward() does.
template <class T>
void causal_conv1d_backward(tensor_ref<const conv_segment, 1, device_memory> segments, in_ref<T, 2> x,
                            in_ref<T, 2> halo, in_ref<T, 2> w, activation act, in_ref<T, 2> dy, out_ref<T, 2> dx,
                            out_ref<T, 2> d_halo, tensor_ref<float, 2, device_memory> dw, workspace<device_memory>& ws,
                            stream_ref s) {
  expects_causal_conv1d_backward(segments, x, halo, w, dy, dx, d_halo, dw);
  const index_t tokens = dx.extent(0);
  const index_t channels = dx.extent(1);
  const index_t width = w.extent(1);
  if (channels == 0 || segments.extent(0) == 0) return;
  const scoped_mark scope(ws);
  const index_t blocks = conv_backward_blocks(tokens);
  const auto partial = ws.take<float>(blocks, channels * width);
  /// `wide`: channels of a block.
  const auto run = [&]<int N>(auto kernel, index_t length, index_t wide, auto... more) {
    const conv_input<T, N> in{x.data(), x.stride(0), halo.data(), halo.stride(0), width};
    launch("causal_conv1d_backward", kernel, grid_of(divide_up(channels, wide), blocks), conv_threads, 0, s,
           token_tiles{segments.data(), segments.extent(0), tokens, length}, in, w, more..., dy.data(), dy.stride(0),
           dx.data(), dx.stride(0), d_halo.data(), d_halo.stride(0), partial.data(), channels);
  };
  const index_t length = conv_backward_tile(tokens);
  const bool compiled = with_conv_kind(width, act, [&]<class Kind>(Kind) {
    const auto packed = [&]<int N>() {
      run.template operator()<N>(conv_backward_kernel<T, N, Kind>, length, index_t{32} * N);
    };
    with_channels<8 / static_cast<int>(sizeof(T))>(packed, x, halo, dy, dx, d_halo);
  });
  if (!compiled) {
    run.template operator()<1>(conv_backward_any_kernel<T>, conv_warps * length, index_t{conv_threads}, act);
  }
  add_partial_sums(partial.data(), blocks, dw, s);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
