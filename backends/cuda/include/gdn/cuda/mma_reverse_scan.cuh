// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The delta rule's walk from the end of a segment to its begin on tensor cores: gradients of states and values.

#include <type_traits>

#include <gdn/cuda/mma_scan.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Walks back over the chunks of (piece, value head, 64 columns of V). As in the forward walk a warp owns 16 columns:
///   dD^T = dS^T K^T diag(e^(c_C - c)) + dO^T P;  dV^T = dW^T = dD^T T;  dU^T = -dW^T diag(e^c);
///   dS^T <- e^(c_C) dS^T + dU^T K + dO^T diag(scale e^c) Q.
/// Writes dV, and the gradient of the state after each chunk in 16 bits [chunks, Hv, V, K]; of a summary only F, what
/// arrives before the piece.
/// @param chained of summaries: F of a last piece starts from zero, not from the given gradient, and no piece is left
///                out
template <class T, int Key, bool Summary>
__global__ void __launch_bounds__(scan_mma_threads, 2)
    reverse_scan_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in,
                            gated_chunks<T> gated, segment_pieces pieces, reverse_targets<T> to,
                            tensor_ref<T, 3, device_memory> d_v, T* d_states, bool chained) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  using stage_type = scan_stage<Key, true>;

  const flat_place block(mma_blocks(p.value_dim), p.value_heads);
  const index_t column = block.x * mma_values;
  const index_t head = block.y;
  const bool of_table = Summary && !pieces.cut();
  published_summary entry{};
  if (of_table) entry = to.table(block.z);
  const piece part = of_table ? piece(p.segments(entry.segment)) : piece(p.segments, pieces, block.z);
  if (part.empty()) return;
  const rule_segment& segment = part.segment;
  const index_t state_size = p.key_dim * p.value_dim;
  state_source start;
  if (of_table) {
    start = state_source(to.dht, entry.start, head);
  } else if (Summary) {
    if (!chained && part.first()) return;
    if (!chained && part.last()) start = state_source(to.dht, segment.dht, head);
  } else if (part.last()) {
    start = state_source(to.dht, segment.dht, head);
  } else {
    start = state_source(pieces.between + ((part.unit + 1) * p.value_heads + head) * state_size, p.value_dim);
  }

  const int value_pieces = pieces_from(p.value_dim, column);
  const int v0 = 16 * static_cast<int>(threadIdx.x / 32);
  const quad_place at;
  const auto load_chunk = [&](int i) {
    const index_t token = segment.begin + static_cast<index_t>(i) * mma_chunk;
    stage_type(tiles, i).template load<T>(p, in, gated, segment.chunk_begin + i, head, token,
                                          tokens_of_chunk(segment, i), &to.d_o(token, head, column), to.d_o.stride(0),
                                          value_pieces);
  };

  state_columns<Key> d_state;
  read_state(d_state, start, p.key_dim, p.value_dim, column + v0);
  load_chunk(part.end - 1);
  for (int i = part.end - 1; i >= part.begin; --i) {
    if constexpr (!Summary) {
      const index_t values = mma_blocks(p.value_dim) * mma_values;
      d_state.store(d_states + (((segment.chunk_begin + i) * p.value_heads + head) * values + column + v0) * Key);
    }
    wait_copies<0>();
    __syncthreads();  // chunk i is here, and chunk i + 1 is not read any more
    if (i > part.begin) load_chunk(i - 1);
    const stage_type now(tiles, i);
    const tile<Key> keys = now.keys();
    const tile<Key> queries = now.queries();
    const tile<mma_values> values = now.values();  // of dO

    float dD[8][4] = {};
#pragma unroll
    for (int k = 0; k < Key / 16; ++k) {
      std::uint32_t a[4];
      pack_operand<T>(a, d_state.S[2 * k], d_state.S[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t b[4];
        ldmatrix(b, keys.b(16 * n, 2 * k));
        mma<T>(dD[2 * n], a, b[0], b[1]);
        mma<T>(dD[2 * n + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float r0 = now.rest[8 * n + at.column];
      const float r1 = now.rest[8 * n + at.column + 1];
      dD[n][0] *= r0;
      dD[n][1] *= r1;
      dD[n][2] *= r0;
      dD[n][3] *= r1;
    }
    std::uint32_t dO[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      load_columns(dO[k], values, v0, k);
#pragma unroll
      for (int n = 0; n <= k; ++n) {  // tokens before s only
        std::uint32_t b[4];
        ldmatrix_transposed(b, now.scores().b_transposed(16 * k, 2 * n));
        mma<T>(dD[2 * n], dO[k], b[0], b[1]);
        mma<T>(dD[2 * n + 1], dO[k], b[2], b[3]);
      }
    }
    float dW[8][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      std::uint32_t a[4];
      pack_operand<T>(a, dD[2 * k], dD[2 * k + 1]);
#pragma unroll
      for (int n = 0; n <= k; ++n) {
        std::uint32_t b[4];
        ldmatrix_transposed(b, now.transfer().b_transposed(16 * k, 2 * n));
        mma<T>(dW[2 * n], a, b[0], b[1]);
        mma<T>(dW[2 * n + 1], a, b[2], b[3]);
      }
    }
    // float16 ends at 6e-8, so e^c would not survive as an operand where the first gate is strong. Decays only fall: in
    // units of the first they are near 1 wherever they matter, and the sum takes the unit in float.
    float unit = 1.0f;
    float in_units = 1.0f;
    if constexpr (std::is_same_v<T, float16>) {
      unit = now.decay[0];
      in_units = unit >= 0x1p-126f ? 1.0f / unit : 0.0f;
    }
    d_state.scale(in_units * now.all());
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      std::uint32_t dU[4];
      std::uint32_t decayed[4];
      std::uint32_t rounded[4];  // what rounding took from decayed: without it dh0 has up to twice the error
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float d0 = in_units * now.decay[16 * k + 8 * h + at.column];
        const float d1 = in_units * now.decay[16 * k + 8 * h + at.column + 1];
        dU[2 * h] = pack2<T>(-d0 * dW[2 * k + h][0], -d1 * dW[2 * k + h][1]);
        dU[2 * h + 1] = pack2<T>(-d0 * dW[2 * k + h][2], -d1 * dW[2 * k + h][3]);
        const float2 low = unpack2<T>(dO[k][2 * h]);
        const float2 high = unpack2<T>(dO[k][2 * h + 1]);
        const auto split = [&](int j, float x, float y) {
          decayed[j] = pack2<T>(x, y);
          const float2 near = unpack2<T>(decayed[j]);
          rounded[j] = pack2<T>(x - near.x, y - near.y);
        };
        split(2 * h, p.scale * d0 * low.x, p.scale * d1 * low.y);
        split(2 * h + 1, p.scale * d0 * high.x, p.scale * d1 * high.y);
      }
      d_state.template add_product<T>(dU, keys, k);
      d_state.template add_product<T>(decayed, queries, k);
      d_state.template add_product<T>(rounded, queries, k);
    }
    if constexpr (std::is_same_v<T, float16>) d_state.scale(unit);
    if constexpr (!Summary) {
      __syncwarp();
      store_columns<T>(dW, values, v0, &d_v(segment.begin + static_cast<index_t>(i) * mma_chunk, head, column),
                       d_v.stride(0), tokens_of_chunk(segment, i), value_pieces);
    }
  }

  if constexpr (Summary) {
    float* place = of_table ? to.summaries + entry.bias + head * state_size
                            : pieces.gradients + (part.unit * p.value_heads + head) * state_size;
    write_state(d_state, place, p.value_dim, 1, p.key_dim, p.value_dim, column + v0);
  } else if (part.first() && segment.dh0 >= 0 && to.dh0.data() != nullptr) {
    write_state(d_state, &to.dh0(segment.dh0, head, 0, 0), to.dh0.stride(2), to.dh0.stride(3), p.key_dim, p.value_dim,
                column + v0);
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
