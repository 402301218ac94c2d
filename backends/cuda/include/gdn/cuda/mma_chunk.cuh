// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What the tensor core kernels of the delta rule share: sizes, decays of a chunk, its two gated matrices.

#include <cstdint>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/cuda/detail/mma.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Keys of up to 128 elements, zero-filled to one of two compiled widths; chunks of 64 tokens; blocks of 64 columns of V.
inline constexpr int mma_chunk = 64;
inline constexpr int mma_values = 64;
constexpr int mma_key_width(index_t key_dim) { return key_dim <= 64 ? 64 : 128; }

/// Bytes in the kernels' 16-bit states: [chunks, Hv, V to a multiple of 64, Key].
template <class T>
index_t mma_state_elements(const delta_rule_problem<T, device_memory>& p) {
  const index_t columns = (p.value_dim + mma_values - 1) / mma_values * mma_values;
  return p.chunks * p.value_heads * columns * mma_key_width(p.key_dim);
}

/// The chunk `index` of all chunks belongs to this segment.
__device__ inline index_t segment_of_chunk(const tensor_ref<const rule_segment, 1, device_memory>& segments,
                                           index_t index) {
  index_t lo = 0;
  for (index_t hi = segments.extent(0); hi - lo > 1;) {
    const index_t mid = (lo + hi) / 2;
    (segments(mid).chunk_begin <= index ? lo : hi) = mid;
  }
  return lo;
}

/// Tokens of chunk i of a segment.
__device__ inline int tokens_of_chunk(const rule_segment& segment, index_t i) {
  const index_t rest = segment.count - i * mma_chunk;
  return static_cast<int>(rest < mma_chunk ? rest : mma_chunk);
}

/// Pieces of 8 elements that a row of n elements has from `begin` on.
__device__ inline int pieces_from(index_t n, index_t begin) { return static_cast<int>((n - begin) / 8); }

/// Decays of one chunk in shared memory, in the base of ex2.
struct chunk_gates {
  float log[mma_chunk];    // c_s, base 2; the last valid one beyond the chunk
  float decay[mma_chunk];  // e^c
  float rest[mma_chunk];   // e^(c_C - c)
  float beta[mma_chunk];   // 0 beyond the chunk

  /// e^(c_s - c_t), 0 above the diagonal: selected, not multiplied, since the exponential may be infinite there.
  __device__ float between(int s, int t) const { return t <= s ? exp2_fast(log[s] - log[t]) : 0.0f; }
  __device__ float all() const { return decay[mma_chunk - 1]; }
};

/// By one warp, two tokens per lane.
template <class T>
__device__ void load_gates(chunk_gates& to, const delta_rule_inputs<T, device_memory>& in, index_t token, index_t head,
                           int c) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int s = 2 * lane;
  constexpr float log2e = 1.4426950408889634f;
  const float g0 = s < c ? in.g(token + s, head) * log2e : 0.0f;
  const float g1 = s + 1 < c ? in.g(token + s + 1, head) * log2e : 0.0f;
  float sum = g0 + g1;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += before;
  }
  const float total = __shfl_sync(0xffffffffu, sum, 31);
  to.log[s] = sum - g1;
  to.log[s + 1] = sum;
  to.decay[s] = exp2_fast(sum - g1);
  to.decay[s + 1] = exp2_fast(sum);
  to.rest[s] = exp2_fast(total - (sum - g1));
  to.rest[s + 1] = exp2_fast(total - sum);
  to.beta[s] = s < c ? static_cast<float>(in.beta(token + s, head)) : 0.0f;
  to.beta[s + 1] = s + 1 < c ? static_cast<float>(in.beta(token + s + 1, head)) : 0.0f;
}

/// The place of a thread in its warp's 16 x 8 results: two neighbouring columns of an upper and a lower row.
struct quad_place {
  int row = static_cast<int>(threadIdx.x % 32) / 4;
  int column = 2 * (static_cast<int>(threadIdx.x) % 4);
};

/// Operand A of 16 results' columns: two neighbouring 16 x 8 results, rounded.
template <class T>
__device__ inline void pack_operand(std::uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack2<T>(left[0], left[1]);
  a[1] = pack2<T>(left[2], left[3]);
  a[2] = pack2<T>(right[0], right[1]);
  a[3] = pack2<T>(right[2], right[3]);
}

/// T = (G o X) diag(b) and, if Scores, P = scale (Q K^T) o G, by four warps, 16 rows each.
template <class T, int Key, bool Scores>
__device__ void make_gated(tile<Key> queries, tile<Key> keys, tile<mma_chunk> inverse, const chunk_gates& gates,
                           float scale, tile<mma_chunk> gated, tile<mma_chunk> scores) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const quad_place at;
  float sum[8][4] = {};
  if constexpr (Scores) {
#pragma unroll
    for (int k = 0; k < Key / 16; ++k) {
      std::uint32_t a[4];
      ldmatrix(a, queries.a(16 * warp, 2 * k));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (n > warp) break;
        std::uint32_t b[4];
        ldmatrix(b, keys.b(16 * n, 2 * k));
        mma<T>(sum[2 * n], a, b[0], b[1]);
        mma<T>(sum[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // upper and lower row
      const int s = 16 * warp + at.row + 8 * e;
      const int t = 8 * n + at.column;
      const float g0 = gates.between(s, t);
      const float g1 = gates.between(s, t + 1);
      const auto place = static_cast<std::uint32_t>(at.column) * 2;
      const float2 x = unpack2<T>(load_shared(inverse.at(s, n) + place));
      store_shared(gated.at(s, n) + place, pack2<T>(g0 * x.x * gates.beta[t], g1 * x.y * gates.beta[t + 1]));
      if constexpr (Scores) {
        store_shared(scores.at(s, n) + place, pack2<T>(scale * g0 * sum[n][2 * e], scale * g1 * sum[n][2 * e + 1]));
      }
    }
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
