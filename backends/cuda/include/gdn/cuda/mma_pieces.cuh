// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Long segments in pieces: where few of them would leave most of the device idle, pieces are walked at once.
///
/// What a piece does to the state (M, E) does not depend on the state before it. So the effects of all pieces come
/// first, then the states between them, S <- M S + E, and then the walks proper, each from its own state; going back
/// likewise, dS <- M^T dS + F. Summaries for other ranks are these effects, composed.

#include <algorithm>

#include <gdn/cuda/mma_chunk.cuh>
#include <gdn/cuda/state_algebra.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// No piece is shorter, in chunks: a piece costs a walk for its effect and a step of the chain between pieces.
inline constexpr index_t shortest_piece = 8;

/// How segments are cut, and what is known of every piece, in float.
struct segment_pieces {
  index_t length = index_t{1} << 40;  // chunks of a piece; the last one of a segment may be shorter
  index_t count = 1;                  // pieces of the longest segment; 1: nothing is cut
  float* transitions = nullptr;       // [N, count, Hv, K, K] M, kept from forward to backward
  float* biases = nullptr;            // [N, count, Hv, K, V] E, likewise
  float* gradients = nullptr;         // [N, count, Hv, K, V] F
  float* between = nullptr;           // [N, count, Hv, K, V] the state after each piece; back, its gradient before it

  __host__ __device__ bool cut() const { return count > 1; }
  __device__ index_t of(const rule_segment& segment) const {
    return ((segment.count + mma_chunk - 1) / mma_chunk + length - 1) / length;
  }
};

/// Cuts so that walks fill the device once, where they would fill less than half of it.
template <class T>
segment_pieces cut_segments(index_t sm_count, const delta_rule_problem<T, device_memory>& p) {
  const index_t walks = p.segments.extent(0) * p.value_heads * divide_up(p.value_dim, mma_values);
  const index_t chunks = divide_up(p.longest, mma_chunk);
  segment_pieces to;
  if (walks == 0 || 2 * walks > sm_count || chunks < 2 * shortest_piece) return to;
  to.length = std::max(shortest_piece, divide_up(chunks, sm_count / walks));
  to.count = divide_up(chunks, to.length);
  return to;
}

/// Rows [N, count, Hv, K] of what is known of pieces: M, E and F are kept, states between pieces are a call's own.
template <class T>
index_t piece_rows(const segment_pieces& pieces, const delta_rule_problem<T, device_memory>& p) {
  return pieces.cut() ? p.segments.extent(0) * pieces.count * p.value_heads * p.key_dim : 0;
}
template <class T>
index_t piece_elements(const segment_pieces& pieces, const delta_rule_problem<T, device_memory>& p) {
  return piece_rows(pieces, p) * (p.key_dim + 2 * p.value_dim);
}
template <class T>
segment_pieces place_pieces(segment_pieces pieces, const delta_rule_problem<T, device_memory>& p, float* at) {
  pieces.transitions = at;
  pieces.biases = at + piece_rows(pieces, p) * p.key_dim;
  pieces.gradients = pieces.biases + piece_rows(pieces, p) * p.value_dim;
  return pieces;
}

/// One piece, or a whole segment: chunks [begin, end) of the segment's.
struct piece {
  rule_segment segment;
  index_t unit = 0;  // among [N, count]
  int begin = 0, end = 0, chunks = 0;

  /// @param unit of [N, count]
  __device__ piece(const tensor_ref<const rule_segment, 1, device_memory>& segments, const segment_pieces& pieces,
                   index_t at)
      : piece(segments(at / pieces.count)) {
    unit = at;
    const index_t first = at % pieces.count * pieces.length;
    const index_t behind = first + pieces.length;
    begin = static_cast<int>(first < chunks ? first : chunks);
    end = static_cast<int>(behind < chunks ? behind : chunks);
  }
  /// All of a segment.
  __device__ explicit piece(const rule_segment& all)
      : segment(all), chunks(static_cast<int>((all.count + mma_chunk - 1) / mma_chunk)) {
    end = chunks;
  }
  __device__ bool empty() const { return begin == end; }  // of a shorter segment than the longest
  __device__ bool first() const { return begin == 0; }
  __device__ bool last() const { return end == chunks; }
};

/// What a chain over pieces runs through: forward M and E from the state before the segment, back M^T and F from the
/// gradient of the state after it.
template <bool Back>
struct piece_chain {
  const segment_pieces& pieces;
  index_t heads, K, V, head;

  __device__ const float* transition(index_t unit) const { return pieces.transitions + (unit * heads + head) * K * K; }
  __device__ const float* bias(index_t unit) const {
    return (Back ? pieces.gradients : pieces.biases) + (unit * heads + head) * K * V;
  }
  __device__ float* between(index_t unit) const { return pieces.between + (unit * heads + head) * K * V; }
};

/// The states between the pieces of every segment; back, the gradients. The walk for E of a segment's first piece
/// (back: for F of its last) started from the given state, unless `apply_given` says that it was not known yet.
template <class T, bool Back, int Keys>
__global__ void __launch_bounds__(algebra_threads, 2)
    fold_pieces_kernel(delta_rule_problem<T, device_memory> p, segment_pieces pieces,
                       const_states_ref<T, device_memory> given, bool apply_given) {
  __shared__ algebra_block<Keys> block;
  const index_t K = p.key_dim, V = p.value_dim;
  const auto [x, head, n] = flat_place(algebra_blocks(V), p.value_heads);
  const piece_chain<Back> chain{pieces, p.value_heads, K, V, head};
  const index_t column = x * algebra_columns;
  const int width = columns_from(V, column);
  const rule_segment segment = p.segments(n);
  const index_t count = pieces.of(segment);
  const auto unit = [&](index_t i) { return n * pieces.count + (Back ? count - 1 - i : i); };
  const state_source start(given, Back ? segment.dht : segment.h0, head);
  const bool apply_first = apply_given && !start.none();

  block.set(K, columns_of(apply_first ? start : state_source(chain.bias(unit(0)), V), column, width));
  for (index_t i = 0; i + 1 < count; ++i) {
    if (i > 0 || apply_first) {
      block.template apply<Back>(chain.transition(unit(i)), chain.bias(unit(i)) + column, V, K, width);
    }
    block.write(chain.between(unit(i)) + column, V, K, width);
  }
}

/// The summaries that other ranks read, composed of the effects of pieces: E (back: F), and M behind it where wanted.
template <class T, bool Back, int Keys>
__global__ void __launch_bounds__(algebra_threads, 2)
    join_pieces_kernel(delta_rule_problem<T, device_memory> p, segment_pieces pieces,
                       const_states_ref<T, device_memory> given,
                       tensor_ref<const published_summary, 1, device_memory> table, float* summaries) {
  __shared__ algebra_block<Keys> block;
  const index_t K = p.key_dim, V = p.value_dim;
  const auto [x, head, z] = flat_place(algebra_blocks(V) + (Back ? 0 : algebra_blocks(K)), p.value_heads);
  const published_summary entry = table(z);
  const piece_chain<Back> chain{pieces, p.value_heads, K, V, head};
  const auto [of_bias, columns, column] = summary_columns(x, algebra_columns, K, V);
  if (!of_bias && entry.transition < 0) return;
  const int width = columns_from(columns, column);
  const index_t count = pieces.of(p.segments(entry.segment));
  const auto unit = [&](index_t i) { return entry.segment * pieces.count + (Back ? count - 1 - i : i); };
  const state_source start(given, entry.start, head);

  const bool from_state = of_bias && !start.none();
  const state_source of_first(of_bias ? chain.bias(unit(0)) : chain.transition(unit(0)), columns);

  block.set(K, columns_of(from_state ? start : of_first, column, width));
  for (index_t i = from_state ? 0 : 1; i < count; ++i) {
    block.template apply<Back>(chain.transition(unit(i)), of_bias ? chain.bias(unit(i)) + column : nullptr, V, K,
                               width);
  }
  block.write(summaries + (of_bias ? entry.bias : entry.transition) + head * K * columns + column, columns, K, width);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
