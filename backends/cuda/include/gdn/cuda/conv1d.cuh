// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Causal depthwise convolution on the device: a thread owns a few channels and slides over a tile of tokens.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <gdn/concepts/backend.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/cuda/detail/activation.cuh>
#include <gdn/cuda/detail/partial_sums.cuh>
#include <gdn/cuda/detail/vector.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int conv_threads = 128;
/// Tokens whose loads a thread has in flight together.
inline constexpr int conv_ahead = 8;

/// Tokens that one thread walks over. It depends on L only, and so does the order in which partial sums of dw, one per
/// tile, are added. Long tiles read little twice and leave few sums; short ones fill the device where there are few
/// tokens.
constexpr index_t conv_tile(index_t tokens) {
  const index_t even = divide_up(tokens, 128);
  return even < 64 ? 64 : even > 256 ? 256 : even;
}
/// At least divide_up(tokens, conv_tile(tokens)) and 1, and no less for more tokens.
constexpr index_t conv_tiles_at_most(index_t tokens) {
  const index_t few = divide_up(tokens, 64);
  const index_t many = divide_up(tokens, 256);
  return few < 1 ? 1 : few < 128 ? few : many > 128 ? many : 128;
}

/// What a block walks over: tokens of a tile, and the segments that start or go on in it.
struct token_tile {
  const conv_segment* segments;
  index_t n_segments, tokens, length;

  /// f(segment, first, stop) for each of them, those without tokens included, where their rows are [first, stop).
  template <class F>
  __device__ void for_each_segment(F&& f) const {
    const index_t begin = blockIdx.x * length;
    const index_t end = begin + length < tokens ? begin + length : tokens;
    index_t at = 0;  // the last that starts at `begin` or before
    for (index_t hi = n_segments; hi - at > 1;) {
      const index_t mid = (at + hi) / 2;
      (segments[mid].begin <= begin ? at : hi) = mid;
    }
    while (at > 0 && segments[at].begin == begin && segments[at - 1].begin == begin) --at;
    for (; at < n_segments; ++at) {
      const conv_segment s = segments[at];
      if (s.begin >= end && end < tokens) return;
      const index_t stop = s.begin + s.count < end ? s.begin + s.count : end;
      f(s, s.begin > begin ? s.begin : begin, stop);
    }
  }
};

/// What the convolution reads at token t (before its segment: history, or zero), N channels at once.
template <class T, int N>
struct conv_input {
  const T* x;
  index_t x_stride;
  const T* halo;
  index_t halo_stride;
  index_t width;  // W

  __device__ raw_pack<T, N> raw(const conv_segment& s, index_t t, index_t channel) const {
    if (t >= s.begin) return load_raw<T, N>(x + t * x_stride + channel);
    if (s.halo < 0) return {};
    return load_raw<T, N>(halo + (s.halo + t - s.begin + width - 1) * halo_stride + channel);
  }
  __device__ pack<float, N> operator()(const conv_segment& s, index_t t, index_t channel) const {
    return widen(raw(s, t, channel));
  }
};

template <int N, int W, class T>
__device__ void load_taps(tensor_ref<const T, 2, device_memory> weight, index_t channel, pack<float, N> (&w)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
#pragma unroll
    for (int c = 0; c < N; ++c) w[j][c] = static_cast<float>(weight(channel + c, j));
  }
}

/// sum_j w_j window_j
template <int N, int W>
__device__ pack<float, N> convolve(const pack<float, N> (&w)[W], const pack<float, N> (&window)[W]) {
  pack<float, N> p{};
#pragma unroll
  for (int j = 0; j < W; ++j) {
#pragma unroll
    for (int c = 0; c < N; ++c) p[c] += w[j][c] * window[j][c];
  }
  return p;
}

template <int N, int W>
__device__ void shift_in(pack<float, N> (&window)[W], const pack<float, N>& next) {
#pragma unroll
  for (int j = 0; j + 1 < W; ++j) window[j] = window[j + 1];
  window[W - 1] = next;
}

/// The last W inputs stay in registers.
template <class T, class Y, int N, int W>
__global__ void __launch_bounds__(conv_threads)
    conv_forward_kernel(token_tile tile, conv_input<T, N> in, tensor_ref<const T, 2, device_memory> weight,
                        activation act, Y* y, index_t y_stride, index_t channels) {
  const index_t channel = (blockIdx.y * static_cast<index_t>(conv_threads) + threadIdx.x) * N;
  if (channel >= channels) return;
  pack<float, N> w[W];
  load_taps<N, W>(weight, channel, w);
  tile.for_each_segment([&](const conv_segment& s, index_t first, index_t stop) {
    pack<float, N> window[W];
    for (int j = 0; j + 1 < W; ++j) window[j + 1] = in(s, first - W + 1 + j, channel);
    for (index_t t = first; t < stop; t += conv_ahead) {
      const int n = static_cast<int>(stop - t < conv_ahead ? stop - t : conv_ahead);
      raw_pack<T, N> next[conv_ahead];
      const T* from = in.x + t * in.x_stride + channel;
#pragma unroll
      for (int i = 0; i < conv_ahead; ++i) {
        if (i < n) next[i] = load_raw<T, N>(from + i * in.x_stride);
      }
      Y* to = y + t * y_stride + channel;
#pragma unroll
      for (int i = 0; i < conv_ahead; ++i) {
        if (i >= n) break;
        shift_in<N, W>(window, widen(next[i]));
        pack<float, N> p = convolve<N, W>(w, window);
#pragma unroll
        for (int c = 0; c < N; ++c) p[c] = apply<Y>(act, p[c]);
        store<Y, N>(to + i * y_stride, p);
      }
    }
  });
}

/// The same for any width, one channel at a time; inputs are read again for each tap.
template <class T, class Y>
__global__ void conv_forward_any_kernel(token_tile tile, conv_input<T, 1> in,
                                        tensor_ref<const T, 2, device_memory> weight, activation act, Y* y,
                                        index_t y_stride, index_t channels) {
  const index_t channel = blockIdx.y * static_cast<index_t>(conv_threads) + threadIdx.x;
  if (channel >= channels) return;
  tile.for_each_segment([&](const conv_segment& s, index_t first, index_t stop) {
    for (index_t t = first; t < stop; ++t) {
      float p = 0;
      for (index_t j = 0; j < in.width; ++j) {
        p += static_cast<float>(weight(channel, j)) * in(s, t - in.width + 1 + j, channel)[0];
      }
      y[t * y_stride + channel] = static_cast<Y>(apply<Y>(act, p));
    }
  });
}

/// dp_t = dy_t act'(p_t);  dx_t = sum_j w_j dp_{t+W-1-j} within the segment; rows before it go to d_halo;
/// dw_j = sum_t dp_t x_{t-W+1+j}, one partial sum per tile in `partial` [tiles, D, W].
template <class T, int N, int W>
__global__ void __launch_bounds__(conv_threads)
    conv_backward_kernel(token_tile tile, conv_input<T, N> in, tensor_ref<const T, 2, device_memory> weight,
                         activation act, const T* dy, index_t dy_stride, T* dx, index_t dx_stride, T* d_halo,
                         index_t d_halo_stride, float* partial, index_t channels) {
  constexpr int ahead = conv_ahead / 2;  // of two inputs
  const index_t channel = (blockIdx.y * static_cast<index_t>(conv_threads) + threadIdx.x) * N;
  if (channel >= channels) return;
  pack<float, N> w[W];
  pack<float, N> dw[W] = {};
  load_taps<N, W>(weight, channel, w);
  tile.for_each_segment([&](const conv_segment& s, index_t first, index_t stop) {
    const index_t segment_end = s.begin + s.count;
    const bool with_halo = first == s.begin && s.halo >= 0;
    pack<float, N> window[W];
    pack<float, N> dp[W] = {};  // dp[j] = dp_{u-W+1+j}
    for (int j = 0; j + 1 < W; ++j) window[j + 1] = in(s, first - W + 1 + j, channel);
    // One step per token, and W - 1 more: the last tokens' dx need what comes behind them.
    for (index_t u0 = first; u0 < stop + W - 1; u0 += ahead) {
      raw_pack<T, N> next[ahead];
      raw_pack<T, N> d_next[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        next[i] = d_next[i] = raw_pack<T, N>{};
        if (u0 + i < segment_end && u0 + i < stop + W - 1) {
          next[i] = load_raw<T, N>(in.x + (u0 + i) * in.x_stride + channel);
          d_next[i] = load_raw<T, N>(dy + (u0 + i) * dy_stride + channel);
        }
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        const index_t u = u0 + i;
        if (u >= stop + W - 1) break;
        shift_in<N, W>(window, widen(next[i]));
        pack<float, N> d_last = widen(d_next[i]);  // zero behind the segment
        const pack<float, N> p = convolve<N, W>(w, window);
#pragma unroll
        for (int c = 0; c < N; ++c) d_last[c] *= slope<T>(act, p[c]);
        shift_in<N, W>(dp, d_last);
        if (u < stop) {
#pragma unroll
          for (int j = 0; j < W; ++j) {
#pragma unroll
            for (int c = 0; c < N; ++c) dw[j][c] += d_last[c] * window[j][c];
          }
        }
        const index_t t = u - (W - 1);
        if (t < first && !with_halo) continue;
        pack<float, N> d{};
#pragma unroll
        for (int j = 0; j < W; ++j) {
#pragma unroll
          for (int c = 0; c < N; ++c) d[c] += w[j][c] * dp[W - 1 - j][c];  // dp_{t + W - 1 - j}
        }
        if (t >= first) {
          store<T, N>(dx + t * dx_stride + channel, d);
        } else {
          store<T, N>(d_halo + (s.halo + t - s.begin + W - 1) * d_halo_stride + channel, d);
        }
      }
    }
  });
  float* sums = partial + (blockIdx.x * channels + channel) * W;
#pragma unroll
  for (int c = 0; c < N; ++c) {
    pack<float, W> of_channel;
#pragma unroll
    for (int j = 0; j < W; ++j) of_channel[j] = dw[j][c];
    store<float, W>(sums + c * W, of_channel);
  }
}

/// The same for any width, one channel at a time and without registers for the window.
template <class T>
__global__ void conv_backward_any_kernel(token_tile tile, conv_input<T, 1> in,
                                         tensor_ref<const T, 2, device_memory> weight, activation act, const T* dy,
                                         index_t dy_stride, T* dx, index_t dx_stride, T* d_halo, index_t d_halo_stride,
                                         float* partial, index_t channels) {
  const index_t channel = blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x;
  if (channel >= channels) return;
  const index_t W = in.width;
  const auto w = [&](index_t j) { return static_cast<float>(weight(channel, j)); };
  const auto p_slope = [&](const conv_segment& s, index_t t) {
    float p = 0;
    for (index_t j = 0; j < W; ++j) p += w(j) * in(s, t - W + 1 + j, channel)[0];
    return static_cast<float>(dy[t * dy_stride + channel]) * slope<T>(act, p);
  };
  float* sums = partial + (blockIdx.x * channels + channel) * W;
  for (index_t j = 0; j < W; ++j) sums[j] = 0;
  tile.for_each_segment([&](const conv_segment& s, index_t first, index_t stop) {
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

/// Calls f.operator()<N>() with the channels per thread: N where all tensors allow it, else one.
template <int N, class F, class... Tensors>
void with_channels(F&& f, const Tensors&... tensors) {
  if ((moves_in_packs(tensors, N) && ...)) {
    f.template operator()<N>();
  } else {
    f.template operator()<1>();
  }
}

/// Calls f with the width as a constant, if it is one that the kernels hold in registers.
template <class F>
bool with_width(index_t width, F&& f) {
  switch (width) {
    case 1:
      f(std::integral_constant<int, 1>{});
      return true;
    case 2:
      f(std::integral_constant<int, 2>{});
      return true;
    case 3:
      f(std::integral_constant<int, 3>{});
      return true;
    case 4:
      f(std::integral_constant<int, 4>{});
      return true;
    default:
      return false;
  }
}

template <class T, class Y>
void causal_conv1d_forward(tensor_ref<const conv_segment, 1, device_memory> segments, in_ref<T, 2> x, in_ref<T, 2> halo,
                           in_ref<T, 2> w, activation act, out_ref<Y, 2> y, stream_ref s) {
  const index_t tokens = y.extent(0);
  const index_t channels = y.extent(1);
  if (y.size() == 0) return;
  const index_t length = conv_tile(tokens);
  const index_t tiles = divide_up(tokens, length);
  const auto run = [&]<int N>(auto kernel) {
    const conv_input<T, N> in{x.data(), x.stride(0), halo.data(), halo.stride(0), w.extent(1)};
    launch("causal_conv1d_forward", kernel, grid_of(tiles, divide_up(channels, conv_threads * N)), conv_threads, 0, s,
           token_tile{segments.data(), segments.extent(0), tokens, length}, in, w, act, y.data(), y.stride(0),
           channels);
  };
  const bool compiled = with_width(w.extent(1), [&](auto width) {
    constexpr int most = 16 / static_cast<int>(std::max(sizeof(T), sizeof(Y)));
    with_channels<most>([&]<int N>() { run.template operator()<N>(conv_forward_kernel<T, Y, N, width()>); }, x, halo,
                        y);
  });
  if (!compiled) run.template operator()<1>(conv_forward_any_kernel<T, Y>);
}

inline memory_requirement conv_scratch(index_t tokens, index_t channels, index_t width) {
  return {static_cast<std::size_t>(conv_tiles_at_most(tokens) * channels * width) * sizeof(float)};
}

template <class T>
void causal_conv1d_backward(tensor_ref<const conv_segment, 1, device_memory> segments, in_ref<T, 2> x,
                            in_ref<T, 2> halo, in_ref<T, 2> w, activation act, in_ref<T, 2> dy, out_ref<T, 2> dx,
                            out_ref<T, 2> d_halo, tensor_ref<float, 2, device_memory> dw, workspace<device_memory>& ws,
                            stream_ref s) {
  const index_t tokens = dx.extent(0);
  const index_t channels = dx.extent(1);
  const index_t width = w.extent(1);
  if (channels == 0 || segments.extent(0) == 0) return;
  const scoped_mark scope(ws);
  // Without tokens, too: segments of none may name rows of d_halo, which become zero.
  const index_t length = conv_tile(tokens);
  const index_t tiles = std::max<index_t>(divide_up(tokens, length), 1);
  const auto partial = ws.take<float>(tiles, channels * width);
  const auto run = [&]<int N>(auto kernel) {
    const conv_input<T, N> in{x.data(), x.stride(0), halo.data(), halo.stride(0), width};
    launch("causal_conv1d_backward", kernel, grid_of(tiles, divide_up(channels, conv_threads * N)), conv_threads, 0, s,
           token_tile{segments.data(), segments.extent(0), tokens, length}, in, w, act, dy.data(), dy.stride(0),
           dx.data(), dx.stride(0), d_halo.data(), d_halo.stride(0), partial.data(), channels);
  };
  const bool compiled = with_width(width, [&](auto W) {
    with_channels<4>([&]<int N>() { run.template operator()<N>(conv_backward_kernel<T, N, W()>); }, x, halo, dy, dx,
                     d_halo);
  });
  if (!compiled) run.template operator()<1>(conv_backward_any_kernel<T>);
  add_partial_sums(partial.data(), tiles, dw, s);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
