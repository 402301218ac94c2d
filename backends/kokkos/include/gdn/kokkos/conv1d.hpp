// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Depthwise causal convolution over the segments of a rank, with the rows of earlier ranks as halo.

#include <algorithm>
#include <cstdint>

#include <gdn/concepts/backend.hpp>
#include <gdn/concepts/operands.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>
#include <gdn/kokkos/detail/activation.hpp>
#include <gdn/kokkos/detail/parallel.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// Channels that a thread works on at once, at most, and elements of its tables [W, channels].
inline constexpr index_t conv_channels = 64;
inline constexpr index_t conv_table = 2048;

/// Wide windows take fewer channels at once, so that tables fit; the bits of a channel stay the same.
inline index_t conv_channels_for(index_t width) {
  expects<backend_error>(width <= conv_table, "the convolution has a width of", width, "and this backend goes up to",
                         conv_table);
  return std::min(conv_channels, conv_table / width);
}

/// The weights of some channels, tap by tap: [W, channels].
template <class A>
class conv_taps {
 public:
  template <class T>
  conv_taps(const tensor_ref<const T, 2>& w, range channels) : channels_(channels.count) {
    for (index_t j = 0; j < w.extent(1); ++j) {
      for (index_t c = 0; c < channels_; ++c) tap_[j * channels_ + c] = static_cast<A>(w(channels.begin + c, j));
    }
  }
  const A* operator[](index_t j) const noexcept { return tap_ + j * channels_; }

 private:
  index_t channels_;
  A tap_[conv_table];
};

/// Where the rows around a segment lie: row 0 is its first one, rows -(W - 1) to -1 are its history.
template <class T>
struct conv_rows {
  tensor_ref<T, 2> own;
  tensor_ref<T, 2> halo;
  index_t history = 0;  // W - 1

  /// Channel `c` of row `i`, or null for a history of zeros.
  T* operator()(const conv_segment& s, index_t i, index_t c) const noexcept {
    if (i >= 0) return own.data() + (s.begin + i) * own.stride(0) + c;
    if (s.halo < 0) return nullptr;
    return halo.data() + (s.halo + history + i) * halo.stride(0) + c;
  }
};

/// p += tap * from, channel by channel. All ways to p go through here, so that a compiler that fuses one of them into
/// multiply-adds fuses all, and decoding gives the bits of a whole sequence.
template <class A, class T>
void add_tap(const A* tap, const T* from, index_t channels, A* p) {
  for (index_t c = 0; c < channels; ++c) p[c] += tap[c] * static_cast<A>(from[c]);
}

/// p [channels] of row `i`: the sum over the taps, oldest first.
template <class A, class T>
void conv_row(const conv_taps<A>& taps, index_t width, const conv_rows<const T>& x, const conv_segment& s, index_t i,
              range channels, A* p) {
  std::fill_n(p, channels.count, A(0));
  for (index_t j = 0; j < width; ++j) {
    const T* from = x(s, i - (width - 1) + j, channels.begin);
    if (from != nullptr) add_tap(taps[j], from, channels.count, p);
  }
}

/// Segments must tile [0, length), and the halo rows that they name must exist.
inline void expects_segments(const tensor_ref<const conv_segment, 1>& segments, index_t length, index_t halo_rows,
                             index_t width) {
  index_t next = 0;
  for (index_t i = 0; i < segments.extent(0); ++i) {
    const conv_segment& s = segments(i);
    expects<shape_error>(s.begin == next && s.count >= 0, "segment", i, "has", s.count, "rows from", s.begin,
                         "and must begin where the one before ends, at", next);
    expects<shape_error>(s.halo < 0 || s.halo + width - 1 <= halo_rows, "segment", i, "reads", width - 1,
                         "halo rows from", s.halo, "of a buffer of", halo_rows);
    next += s.count;
  }
  expects<shape_error>(next == length, "segments cover", next, "of", length, "rows");
}

/// The segment that holds `row`.
inline index_t segment_of(const tensor_ref<const conv_segment, 1>& segments, index_t row) noexcept {
  index_t lo = 0, hi = segments.extent(0);
  while (hi - lo > 1) {
    const index_t mid = lo + (hi - lo) / 2;
    (segments(mid).begin <= row ? lo : hi) = mid;
  }
  return lo;
}

template <class T, class W, class Y, class Exec>
void causal_conv1d_forward(const Exec& exec, tensor_ref<const conv_segment, 1> segments, in_ref<T, 2> x,
                           in_ref<T, 2> halo, tensor_ref<const W, 2> w, activation act, tensor_ref<Y, 2> y) {
  using A = accumulate_t<T>;
  constexpr index_t row_block = 64;
  const index_t length = x.extent(0), dim = w.extent(0), width = w.extent(1);
  expects_causal_conv1d_forward(segments, x, halo, w, y);
  const index_t channel_block = conv_channels_for(width);
  expects_segments(segments, length, halo.extent(0), width);

  const index_t channel_blocks = blocks_of(dim, channel_block);
  for_each_item(exec, blocks_of(length, row_block) * channel_blocks, [=](index_t item) {
    const range rows = block_at(item / channel_blocks, row_block, length);
    const range channels = block_at(item % channel_blocks, channel_block, dim);
    const conv_rows<const T> xs{x, halo, width - 1};
    const conv_taps<A> taps(w, channels);
    A p[conv_channels];
    index_t n = segment_of(segments, rows.begin);
    for (index_t t = rows.begin; t < rows.end(); ++t) {
      while (t >= segments(n).begin + segments(n).count) ++n;
      conv_row(taps, width, xs, segments(n), t - segments(n).begin, channels, p);
      Y* ys = &y(t, channels.begin);
      if (act == activation::silu) {
        for (index_t c = 0; c < channels.count; ++c) ys[c] = static_cast<Y>(silu(p[c]));
      } else {
        for (index_t c = 0; c < channels.count; ++c) ys[c] = static_cast<Y>(p[c]);
      }
    }
  });
}

/// Each item takes some channels through all rows in order, computes p again, and keeps what it still needs: the sums
/// dw [W, channels] in double, and the last W rows of dx, which later rows add to.
template <class T, class W, class Exec>
void causal_conv1d_backward(const Exec& exec, tensor_ref<const conv_segment, 1> segments, in_ref<T, 2> x,
                            in_ref<T, 2> halo, tensor_ref<const W, 2> w, activation act, in_ref<T, 2> dy,
                            tensor_ref<T, 2> dx, tensor_ref<T, 2> dhalo, out_ref<accumulate_t<T>, 2> dw) {
  using A = accumulate_t<T>;
  const index_t length = x.extent(0), dim = w.extent(0), width = w.extent(1);
  expects_causal_conv1d_backward(segments, x, halo, w, dy, dx, dhalo, dw);
  const index_t channel_block = conv_channels_for(width);
  expects_segments(segments, length, halo.extent(0), width);

  for_each_item(exec, blocks_of(dim, channel_block), [=](index_t item) {
    const range channels = block_at(item, channel_block, dim);
    const index_t count = channels.count;
    const conv_rows<const T> xs{x, halo, width - 1};
    const conv_rows<T> dxs{dx, dhalo, width - 1};
    const conv_taps<A> taps(w, channels);
    A dp[conv_channels];
    A open[conv_table];      // [W, channels]: row i of dx stands at i mod W until nothing adds to it any more
    double dws[conv_table];  // [W, channels]
    std::fill_n(dws, width * count, 0.0);

    for (index_t n = 0; n < segments.extent(0); ++n) {
      const conv_segment& s = segments(n);
      const auto open_row = [&](index_t i) { return open + (i + width) % width * count; };
      const auto close_row = [&](index_t i) {
        A* row = open_row(i);
        if (T* to = dxs(s, i, channels.begin)) {
          for (index_t c = 0; c < count; ++c) to[c] = static_cast<T>(row[c]);
        }
        std::fill_n(row, count, A(0));
      };
      std::fill_n(open, width * count, A(0));
      for (index_t i = 0; i < s.count; ++i) {
        conv_row(taps, width, xs, s, i, channels, dp);
        const T* dys = &dy(s.begin + i, channels.begin);
        if (act == activation::silu) {
          for (index_t c = 0; c < count; ++c) dp[c] = static_cast<A>(dys[c]) * silu_slope(dp[c]);
        } else {
          for (index_t c = 0; c < count; ++c) dp[c] = static_cast<A>(dys[c]);
        }
        for (index_t j = 0; j < width; ++j) {
          const index_t from = i - (width - 1) + j;
          const A* tap = taps[j];
          A* row = open_row(from);
          for (index_t c = 0; c < count; ++c) row[c] += tap[c] * dp[c];
          if (const T* xr = xs(s, from, channels.begin)) {
            double* sum = dws + j * count;
            for (index_t c = 0; c < count; ++c)
              sum[c] += static_cast<double>(dp[c]) * static_cast<double>(static_cast<A>(xr[c]));
          }
        }
        close_row(i - (width - 1));
      }
      // Rows whose window reaches past the segment's end; in a short segment some of them are history.
      for (index_t i = s.count - (width - 1); i < s.count; ++i) close_row(i);
    }
    for (index_t c = 0; c < count; ++c) {
      for (index_t j = 0; j < width; ++j) {
        A& target = dw(channels.begin + c, j);
        target = static_cast<A>(static_cast<double>(target) + dws[j * count + c]);
      }
    }
  });
}

/// A slot may stand in `slots` once. The new column is convolved as it comes in x, and rounded where it is kept.
template <class X, class T, class W, class Y, class Exec>
void causal_conv1d_step(const Exec& exec, tensor_ref<const X, 2> x, tensor_ref<T, 3> states,
                        tensor_ref<const std::int32_t, 1> slots, tensor_ref<const W, 2> w, activation act,
                        tensor_ref<Y, 2> y) {
  using A = accumulate_t<T>;
  const index_t sequences = x.extent(0), dim = w.extent(0), width = w.extent(1);
  expects_causal_conv1d_step(x, states, slots, w, y);
  for (index_t i = 0; i < sequences; ++i) {
    expects<shape_error>(slots(i) >= -1 && slots(i) < states.extent(0), "slot", slots(i), "of sequence", i,
                         "must lie in -1 to", states.extent(0) - 1);
  }
  const index_t channel_blocks = blocks_of(dim, conv_channels);
  for_each_item(exec, sequences * channel_blocks, [=](index_t item) {
    const index_t i = item / channel_blocks;
    const range channels = block_at(item % channel_blocks, conv_channels, dim);
    if (slots(i) < 0) {
      std::fill_n(&y(i, channels.begin), channels.count, Y{});
      return;
    }
    A p[conv_channels] = {}, tap[conv_channels];
    A column[conv_channels];
    for (index_t j = 0; j < width; ++j) {
      for (index_t c = 0; c < channels.count; ++c) {
        const index_t channel = channels.begin + c;
        column[c] = j + 1 < width ? static_cast<A>(states(slots(i), channel, j + 1)) : static_cast<A>(x(i, channel));
        states(slots(i), channel, j) = static_cast<T>(column[c]);
        tap[c] = static_cast<A>(w(channel, j));
      }
      add_tap(tap, column, channels.count, p);
    }
    Y* ys = &y(i, channels.begin);
    for (index_t c = 0; c < channels.count; ++c) ys[c] = static_cast<Y>(act == activation::silu ? silu(p[c]) : p[c]);
  });
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
