// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The delta rule's walk from the end of a segment to its begin on tensor cores: gradients of states and values.

#include <gdn/cuda/mma_scan.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Walks back over the chunks of (segment, value head, 64 columns of V). As in the forward walk a warp owns 16 columns:
///   dD^T = dS^T K^T diag(e^(c_C - c)) + dO^T P;  dV^T = dW^T = dD^T T;  dU^T = -dW^T diag(e^c);
///   dS^T <- e^(c_C) dS^T + dU^T K + dO^T diag(scale e^c) Q.
/// Writes dV, and the gradient of the state after each chunk in 16 bits [chunks, Hv, V, K]; of a summary only what
/// arrives before the segment.
template <class T, int Key, bool Summary>
__global__ void __launch_bounds__(scan_mma_threads, 2)
    reverse_scan_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in,
                            gated_chunks<T> gated, reverse_targets<T> to, tensor_ref<T, 3, device_memory> d_v,
                            T* d_states) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  using stage_type = scan_stage<Key, true>;

  const index_t column = blockIdx.x * static_cast<index_t>(mma_values);
  const index_t head = blockIdx.y;
  published_summary entry{};
  if constexpr (Summary) entry = to.table(blockIdx.z);
  const rule_segment segment = p.segments(Summary ? entry.segment : static_cast<index_t>(blockIdx.z));
  const int value_pieces = pieces_from(p.value_dim, column);
  const int v0 = 16 * static_cast<int>(threadIdx.x / 32);
  const quad_place at;
  const auto chunks = static_cast<int>((segment.count + mma_chunk - 1) / mma_chunk);
  const auto load_chunk = [&](int i) {
    const index_t token = segment.begin + static_cast<index_t>(i) * mma_chunk;
    stage_type(tiles, i).template load<T>(p, in, gated, segment.chunk_begin + i, head, token,
                                          tokens_of_chunk(segment, i), &to.d_o(token, head, column), to.d_o.stride(0),
                                          value_pieces);
  };

  state_columns<Key> d_state;
  const std::int32_t start = Summary ? entry.start : segment.dht;
  d_state.for_each([&](float& x, int k, int v) {
    const index_t j = column + v0 + v;
    x = start >= 0 && to.dht.data() != nullptr && k < p.key_dim && j < p.value_dim ? to.dht(start, head, k, j) : 0.0f;
  });

  load_chunk(chunks - 1);
  for (int i = chunks - 1; i >= 0; --i) {
    if constexpr (!Summary) {
      d_state.store(d_states +
                    (((segment.chunk_begin + i) * p.value_heads + head) * gridDim.x * mma_values + column + v0) * Key);
    }
    wait_copies<0>();
    __syncthreads();  // chunk i is here, and chunk i + 1 is not read any more
    if (i > 0) load_chunk(i - 1);
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
    d_state.scale(now.all());
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      std::uint32_t dU[4];
      std::uint32_t decayed[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float d0 = now.decay[16 * k + 8 * h + at.column];
        const float d1 = now.decay[16 * k + 8 * h + at.column + 1];
        dU[2 * h] = pack2<T>(-d0 * dW[2 * k + h][0], -d1 * dW[2 * k + h][1]);
        dU[2 * h + 1] = pack2<T>(-d0 * dW[2 * k + h][2], -d1 * dW[2 * k + h][3]);
        const float2 low = unpack2<T>(dO[k][2 * h]);
        const float2 high = unpack2<T>(dO[k][2 * h + 1]);
        decayed[2 * h] = pack2<T>(p.scale * d0 * low.x, p.scale * d1 * low.y);
        decayed[2 * h + 1] = pack2<T>(p.scale * d0 * high.x, p.scale * d1 * high.y);
      }
      d_state.template add_product<T>(dU, keys, k);
      d_state.template add_product<T>(decayed, queries, k);
    }
    if constexpr (!Summary) {
      __syncwarp();
      store_columns<T>(dW, values, v0, &d_v(segment.begin + static_cast<index_t>(i) * mma_chunk, head, column),
                       d_v.stride(0), tokens_of_chunk(segment, i), value_pieces);
    }
  }

  if constexpr (Summary) {
    float* place = to.summaries + entry.bias + head * p.key_dim * p.value_dim;
    d_state.for_each([&](float& x, int k, int v) {
      const index_t j = column + v0 + v;
      if (k < p.key_dim && j < p.value_dim) place[k * p.value_dim + j] = x;
    });
  } else if (segment.dh0 >= 0 && to.dh0.data() != nullptr) {
    d_state.for_each([&](float& x, int k, int v) {
      const index_t j = column + v0 + v;
      if (k < p.key_dim && j < p.value_dim) to.dh0(segment.dh0, head, k, j) = x;
    });
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
