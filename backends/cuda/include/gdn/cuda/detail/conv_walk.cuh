// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  How the kernels of the convolution walk: tiles of tokens, their segments, and a window of inputs in
/// registers.

#include <cstdint>
#include <type_traits>

#include <gdn/concepts/backend.hpp>
#include <gdn/cuda/detail/launch.cuh>
#include <gdn/cuda/detail/vector.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int conv_threads = 128;
/// Blocks along the tokens, the second axis of a grid.
inline constexpr index_t conv_tiles_most = 65535;

/// Tokens in tiles of `length`, and the segments that start or go on in each.
struct token_tiles {
  const conv_segment* segments;
  index_t n_segments, tokens, length;

  /// f(segment, first, stop) for each of a tile, those without tokens included, where their rows are [first, stop).
  template <class F>
  __device__ void for_each_segment(index_t tile, F&& f) const {
    const index_t begin = tile * length;
    if (tile > 0 && begin >= tokens) return;
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

  __device__ pack<float, N> operator()(const conv_segment& s, index_t t, index_t channel) const {
    if (t >= s.begin) return load<T, N>(x + t * x_stride + channel);
    if (s.halo < 0) return {};
    return load<T, N>(halo + (s.halo + t - s.begin + width - 1) * halo_stride + channel);
  }
};

/// Moves a pointer on by a row, hidden from the compiler, which would compute the addresses of several rows ahead and
/// keep them in registers.
template <class T>
__device__ void next_row(T*& at, index_t stride) {
  at += stride;
  asm volatile("" : "+l"(at));
}

template <int N, int W, class T>
__device__ void load_taps(tensor_ref<const T, 2, device_memory> weight, index_t channel, pack<float, N> (&w)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
#pragma unroll
    for (int c = 0; c < N; ++c) w[j][c] = static_cast<float>(weight(channel + c, j));
  }
}

/// The W - 1 inputs before token `first`, for shift_in() to go on from.
template <int N, int W, class T>
__device__ void load_window(const conv_input<T, N>& in, const conv_segment& s, index_t first, index_t channel,
                            pack<float, N> (&window)[W]) {
#pragma unroll
  for (int j = 0; j + 1 < W; ++j) window[j + 1] = in(s, first - W + 1 + j, channel);
}
template <int N, int W>
__device__ void shift_in(pack<float, N> (&window)[W], const pack<float, N>& next) {
#pragma unroll
  for (int j = 0; j + 1 < W; ++j) window[j] = window[j + 1];
  window[W - 1] = next;
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

/// Calls f.operator()<N>() with the channels per thread: N where all tensors allow it, else one.
template <int N, class F, class... Tensors>
void with_channels(F&& f, const Tensors&... tensors) {
  if ((moves_in_packs(tensors, N) && ...)) {
    f.template operator()<N>();
  } else {
    f.template operator()<1>();
  }
}

template <int W, activation Act>
struct conv_kind {
  static constexpr int width = W;
  static constexpr activation act = Act;
};

/// Calls f with the width and the activation as constants, if the kernels hold a window of this width in registers.
template <class F>
bool with_conv_kind(index_t width, activation act, F&& f) {
  const auto run = [&]<int W>() {
    if (act == activation::silu) {
      f(conv_kind<W, activation::silu>{});
    } else {
      f(conv_kind<W, activation::none>{});
    }
    return true;
  };
  switch (width) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    default:
      return false;
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
