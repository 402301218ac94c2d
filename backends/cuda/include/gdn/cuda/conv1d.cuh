// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Causal depthwise convolution on the device: a thread owns a few channels and slides over a tile of tokens.

#include <cstdint>

#include <gdn/concepts/backend.hpp>
#include <gdn/cuda/detail/vector.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Tokens that one thread walks over. Partial sums of dw are one per tile, so their order depends on L only.
inline constexpr index_t conv_tile = 128;
inline constexpr int conv_threads = 128;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// y and its derivative with respect to p.
__device__ inline float apply(activation act, float p) { return act == activation::silu ? p * sigmoid(p) : p; }
__device__ inline float slope(activation act, float p) {
  if (act == activation::none) return 1.0f;
  const float s = sigmoid(p);
  return s * (1.0f + p * (1.0f - s));
}

/// The segment that holds token t; segments tile the tokens.
__device__ inline index_t segment_at(const conv_segment* segments, index_t n, index_t t) {
  index_t lo = 0;
  for (index_t hi = n; hi - lo > 1;) {
    const index_t mid = (lo + hi) / 2;
    (segments[mid].begin <= t ? lo : hi) = mid;
  }
  return lo;
}

/// What the convolution reads at token t (before its segment: history, or zero), N channels at once.
template <class T, int N>
struct conv_input {
  const T* x;
  index_t x_stride;
  const T* halo;
  index_t halo_stride;
  index_t width;  // W

  __device__ pack<float, N> operator()(const conv_segment& s, index_t t, index_t channel) const {
    if (t >= s.begin) return load<T, N>(x + t * x_stride + channel);
    if (s.halo < 0) return {};
    return load<T, N>(halo + (s.halo + t - s.begin + width - 1) * halo_stride + channel);
  }
};

/// W > 0: the last W inputs stay in registers. W = 0: any width, inputs are read again for each tap.
template <class T, class Y, int N, int W>
__global__ void conv_forward_kernel(const conv_segment* segments, index_t n_segments, conv_input<T, N> in,
                                    const T* weight, activation act, Y* y, index_t y_stride, index_t tokens,
                                    index_t channels) {
  const index_t channel = (blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x) * N;
  if (channel >= channels) return;
  const index_t begin = blockIdx.x * conv_tile;
  const index_t end = begin + conv_tile < tokens ? begin + conv_tile : tokens;
  const index_t width = in.width;
  pack<float, N> w[W > 0 ? W : 1];
  if constexpr (W > 0) {
    for (int j = 0; j < W; ++j) {
      for (int c = 0; c < N; ++c) w[j][c] = static_cast<float>(weight[(channel + c) * W + j]);
    }
  }
  index_t at = segment_at(segments, n_segments, begin);
  for (index_t t = begin; t < end; ++at) {
    const conv_segment s = segments[at];
    const index_t stop = s.begin + s.count < end ? s.begin + s.count : end;
    pack<float, N> window[W > 0 ? W : 1];
    if constexpr (W > 0) {
      for (int j = 0; j + 1 < W; ++j) window[j + 1] = in(s, t - W + 1 + j, channel);
    }
    for (; t < stop; ++t) {
      pack<float, N> p{};
      if constexpr (W > 0) {
#pragma unroll
        for (int j = 0; j + 1 < W; ++j) window[j] = window[j + 1];
        window[W - 1] = in(s, t, channel);
#pragma unroll
        for (int j = 0; j < W; ++j) {
#pragma unroll
          for (int c = 0; c < N; ++c) p[c] += w[j][c] * window[j][c];
        }
      } else {
        for (index_t j = 0; j < width; ++j) {
          const pack<float, N> v = in(s, t - width + 1 + j, channel);
          for (int c = 0; c < N; ++c) p[c] += static_cast<float>(weight[(channel + c) * width + j]) * v[c];
        }
      }
      for (int c = 0; c < N; ++c) p[c] = apply(act, p[c]);
      store<Y, N>(y + t * y_stride + channel, p);
    }
  }
}

/// dp_t = dy_t act'(p_t);  dx_t = sum_j w_j dp_{t+W-1-j} within the segment; rows before it go to d_halo;
/// dw_j = sum_t dp_t x_{t-W+1+j}, one partial sum per tile in `partial` [tiles, D, W].
template <class T, int N, int W>
__global__ void conv_backward_kernel(const conv_segment* segments, index_t n_segments, conv_input<T, N> in,
                                     const T* weight, activation act, const T* dy, index_t dy_stride, T* dx,
                                     index_t dx_stride, T* d_halo, index_t d_halo_stride, float* partial,
                                     index_t tokens, index_t channels) {
  const index_t channel = (blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x) * N;
  if (channel >= channels) return;
  const index_t begin = blockIdx.x * conv_tile;
  const index_t end = begin + conv_tile < tokens ? begin + conv_tile : tokens;
  pack<float, N> w[W];
  pack<float, N> dw[W] = {};
  for (int j = 0; j < W; ++j) {
    for (int c = 0; c < N; ++c) w[j][c] = static_cast<float>(weight[(channel + c) * W + j]);
  }
  index_t at = segment_at(segments, n_segments, begin);
  for (index_t first = begin; first < end; ++at) {
    const conv_segment s = segments[at];
    const index_t segment_end = s.begin + s.count;
    const index_t stop = segment_end < end ? segment_end : end;
    pack<float, N> window[W];
    pack<float, N> dp[W] = {};  // dp[j] = dp_{u-W+1+j}
    for (int j = 0; j + 1 < W; ++j) window[j + 1] = in(s, first - W + 1 + j, channel);
    // One step per token, and W - 1 more: the last tokens' dx need what comes behind them.
    for (index_t u = first; u < stop + W - 1; ++u) {
#pragma unroll
      for (int j = 0; j + 1 < W; ++j) {
        window[j] = window[j + 1];
        dp[j] = dp[j + 1];
      }
      dp[W - 1] = {};
      if (u < segment_end) {
        window[W - 1] = in(s, u, channel);
        pack<float, N> p{};
#pragma unroll
        for (int j = 0; j < W; ++j) {
#pragma unroll
          for (int c = 0; c < N; ++c) p[c] += w[j][c] * window[j][c];
        }
        const pack<float, N> g = load<T, N>(dy + u * dy_stride + channel);
#pragma unroll
        for (int c = 0; c < N; ++c) dp[W - 1][c] = g[c] * slope(act, p[c]);
        if (u < stop) {
#pragma unroll
          for (int j = 0; j < W; ++j) {
#pragma unroll
            for (int c = 0; c < N; ++c) dw[j][c] += dp[W - 1][c] * window[j][c];
          }
        }
      }
      const index_t t = u - (W - 1);
      pack<float, N> d{};
#pragma unroll
      for (int j = 0; j < W; ++j) {
#pragma unroll
        for (int c = 0; c < N; ++c) d[c] += w[j][c] * dp[W - 1 - j][c];  // dp_{t + W - 1 - j}
      }
      if (t >= first) {
        store<T, N>(dx + t * dx_stride + channel, d);
      } else if (first == s.begin && s.halo >= 0) {
        store<T, N>(d_halo + (s.halo + t - s.begin + W - 1) * d_halo_stride + channel, d);
      }
    }
    first = stop;
  }
  for (int j = 0; j < W; ++j) {
    for (int c = 0; c < N; ++c) partial[(blockIdx.x * channels + channel + c) * W + j] = dw[j][c];
  }
}

/// The same for any width, one channel at a time and without registers for the window.
template <class T>
__global__ void conv_backward_any_kernel(const conv_segment* segments, index_t n_segments, conv_input<T, 1> in,
                                         const T* weight, activation act, const T* dy, index_t dy_stride, T* dx,
                                         index_t dx_stride, T* d_halo, index_t d_halo_stride, float* partial,
                                         index_t tokens, index_t channels) {
  const index_t channel = blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x;
  if (channel >= channels) return;
  const index_t W = in.width;
  const T* w = weight + channel * W;
  const auto p_slope = [&](const conv_segment& s, index_t t) {
    float p = 0;
    for (index_t j = 0; j < W; ++j) p += static_cast<float>(w[j]) * in(s, t - W + 1 + j, channel)[0];
    return static_cast<float>(dy[t * dy_stride + channel]) * slope(act, p);
  };
  const index_t begin = blockIdx.x * conv_tile;
  const index_t end = begin + conv_tile < tokens ? begin + conv_tile : tokens;
  float* sums = partial + (blockIdx.x * channels + channel) * W;
  for (index_t j = 0; j < W; ++j) sums[j] = 0;
  index_t at = segment_at(segments, n_segments, begin);
  for (index_t first = begin; first < end; ++at) {
    const conv_segment s = segments[at];
    const index_t segment_end = s.begin + s.count;
    const index_t stop = segment_end < end ? segment_end : end;
    const bool with_halo = first == s.begin && s.halo >= 0;
    for (index_t t = with_halo ? first - (W - 1) : first; t < stop; ++t) {
      float d = 0;
      for (index_t j = 0; j < W; ++j) {
        const index_t u = t + W - 1 - j;
        if (u >= s.begin && u < segment_end) d += static_cast<float>(w[j]) * p_slope(s, u);
      }
      if (t >= first) {
        dx[t * dx_stride + channel] = static_cast<T>(d);
        const float dp = p_slope(s, t);
        for (index_t j = 0; j < W; ++j) sums[j] += dp * in(s, t - W + 1 + j, channel)[0];
      } else {
        d_halo[(s.halo + t - s.begin + W - 1) * d_halo_stride + channel] = static_cast<T>(d);
      }
    }
    first = stop;
  }
}

/// to[i] += sum over tiles, in their order, of partial[tile, i].
template <class A>
__global__ void add_partial_sums_kernel(const A* partial, index_t tiles, index_t n, A* to, index_t row,
                                        index_t to_stride) {
  const index_t i = blockIdx.x * static_cast<index_t>(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  double sum = 0;
  for (index_t t = 0; t < tiles; ++t) sum += static_cast<double>(partial[t * n + i]);
  A& target = to[i / row * to_stride + i % row];
  target = static_cast<A>(static_cast<double>(target) + sum);
}

inline void add_partial_sums(const float* partial, index_t tiles, tensor_ref<float, 2, device_memory> to,
                             stream_ref s) {
  launch("add_partial_sums", add_partial_sums_kernel<float>, grid_of(divide_up(to.size(), 128)), 128, 0, s, partial, tiles,
         to.size(), to.data(), to.extent(1), to.stride(0));
}

/// One thread per channel of one sequence's token.
template <class T, class Y>
__global__ void conv_step_kernel(tensor_ref<const T, 2, device_memory> x, tensor_ref<T, 3, device_memory> states,
                                 const std::int32_t* slots, const T* weight, activation act,
                                 tensor_ref<Y, 2, device_memory> y) {
  const index_t channel = blockIdx.y * static_cast<index_t>(blockDim.x) + threadIdx.x;
  const index_t row = blockIdx.x;
  if (channel >= x.extent(1)) return;
  const std::int32_t slot = slots[row];
  if (slot < 0) {
    y(row, channel) = static_cast<Y>(0.0f);
    return;
  }
  const index_t W = states.extent(2);
  T* state = &states(slot, channel, 0);
  const index_t stride = states.stride(2);
  float p = 0;
  for (index_t j = 0; j < W; ++j) {
    const T v = j + 1 < W ? state[(j + 1) * stride] : x(row, channel);
    state[j * stride] = v;
    p += static_cast<float>(weight[channel * W + j]) * static_cast<float>(v);
  }
  y(row, channel) = static_cast<Y>(apply(act, p));
}

/// Four channels per thread where alignment allows, else one.
template <class F>
void with_channels(bool aligned, F&& f) {
  aligned ? f.template operator()<4>() : f.template operator()<1>();
}

template <class T>
bool channels_aligned(index_t channels, std::initializer_list<std::pair<const void*, index_t>> tensors) {
  bool good = channels % 4 == 0;
  for (const auto& [data, stride] : tensors) {
    good = good && reinterpret_cast<std::uintptr_t>(data) % (4 * sizeof(T)) == 0 && stride % 4 == 0;
  }
  return good;
}

template <class T, class Y>
void causal_conv1d_forward(tensor_ref<const conv_segment, 1, device_memory> segments, in_ref<T, 2> x,
                           in_ref<T, 2> halo, in_ref<T, 2> w, activation act, out_ref<Y, 2> y, stream_ref s) {
  const index_t tokens = y.extent(0);
  const index_t channels = y.extent(1);
  if (y.size() == 0) return;
  const bool aligned = channels_aligned<T>(channels, {{x.data(), x.stride(0)}, {halo.data(), halo.stride(0)}}) &&
                       channels_aligned<Y>(channels, {{y.data(), y.stride(0)}});
  with_channels(aligned, [&]<int N>() {
    const conv_input<T, N> in{x.data(), x.stride(0), halo.data(), halo.stride(0), w.extent(1)};
    const dim3 grid = grid_of(divide_up(tokens, conv_tile), divide_up(channels, conv_threads * N));
    const auto run = [&](auto kernel) {
      launch("causal_conv1d_forward", kernel, grid, conv_threads, 0, s, segments.data(), segments.extent(0), in,
             w.data(), act, y.data(), y.stride(0), tokens, channels);
    };
    switch (w.extent(1)) {
      case 1: return run(conv_forward_kernel<T, Y, N, 1>);
      case 2: return run(conv_forward_kernel<T, Y, N, 2>);
      case 3: return run(conv_forward_kernel<T, Y, N, 3>);
      case 4: return run(conv_forward_kernel<T, Y, N, 4>);
      default: return run(conv_forward_kernel<T, Y, N, 0>);
    }
  });
}

inline memory_requirement conv_scratch(index_t tokens, index_t channels, index_t width) {
  return {static_cast<std::size_t>(divide_up(tokens, conv_tile) * channels * width) * sizeof(float)};
}

template <class T>
void causal_conv1d_backward(tensor_ref<const conv_segment, 1, device_memory> segments, in_ref<T, 2> x,
                            in_ref<T, 2> halo, in_ref<T, 2> w, activation act, in_ref<T, 2> dy, out_ref<T, 2> dx,
                            out_ref<T, 2> d_halo, tensor_ref<float, 2, device_memory> dw,
                            workspace<device_memory>& ws, stream_ref s) {
  const index_t tokens = dx.extent(0);
  const index_t channels = dx.extent(1);
  const index_t width = w.extent(1);
  if (dx.size() == 0) return;
  const scoped_mark scope(ws);
  const index_t tiles = divide_up(tokens, conv_tile);
  const auto partial = ws.take<float>(tiles, channels * width);
  const bool aligned = channels_aligned<T>(channels, {{x.data(), x.stride(0)},
                                                      {halo.data(), halo.stride(0)},
                                                      {dy.data(), dy.stride(0)},
                                                      {dx.data(), dx.stride(0)},
                                                      {d_halo.data(), d_halo.stride(0)}});
  const auto run = [&]<int N>(auto kernel) {
    const conv_input<T, N> in{x.data(), x.stride(0), halo.data(), halo.stride(0), width};
    launch("causal_conv1d_backward", kernel, grid_of(tiles, divide_up(channels, conv_threads * N)), conv_threads, 0, s,
           segments.data(), segments.extent(0), in, w.data(), act, dy.data(), dy.stride(0), dx.data(), dx.stride(0),
           d_halo.data(), d_halo.stride(0), partial.data(), tokens, channels);
  };
  if (width > 4) {
    run.template operator()<1>(conv_backward_any_kernel<T>);
  } else {
    with_channels(aligned, [&]<int N>() {
      switch (width) {
        case 1: return run.template operator()<N>(conv_backward_kernel<T, N, 1>);
        case 2: return run.template operator()<N>(conv_backward_kernel<T, N, 2>);
        case 3: return run.template operator()<N>(conv_backward_kernel<T, N, 3>);
        default: return run.template operator()<N>(conv_backward_kernel<T, N, 4>);
      }
    });
  }
  add_partial_sums(partial.data(), tiles, dw, s);
}

template <class T, class Y>
void causal_conv1d_step(in_ref<T, 2> x, out_ref<T, 3> states, tensor_ref<const std::int32_t, 1, device_memory> slots,
                        in_ref<T, 2> w, activation act, out_ref<Y, 2> y, stream_ref s) {
  launch("causal_conv1d_step", conv_step_kernel<T, Y>, grid_of(x.extent(0), divide_up(x.extent(1), 128)), 128, 0, s, x,
         states, slots.data(), w.data(), act, y);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
