// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What the tensor core kernels of the delta rule share: sizes, decays of a chunk, its two gated matrices.

#include <cstdint>
#include <type_traits>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/cuda/detail/launch.cuh>
#include <gdn/cuda/detail/mma.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Keys of up to 256 elements, zero-filled to one of three widths; chunks of 64 tokens; blocks of 64 columns of V.
inline constexpr int mma_chunk = 64;
inline constexpr int mma_values = 64;
constexpr int mma_key_width(index_t key_dim) { return key_dim <= 64 ? 64 : key_dim <= 128 ? 128 : 256; }

/// Blocks of columns of V, or of K where those of M are walked for.
__host__ __device__ constexpr index_t mma_blocks(index_t columns) { return divide_up(columns, mma_values); }

/// f with the compiled width of keys that holds key_dim, as a constant.
template <class F>
auto with_key_width(index_t key_dim, F&& f) {
  switch (mma_key_width(key_dim)) {
    case 64: return f(std::integral_constant<int, 64>{});
    case 128: return f(std::integral_constant<int, 128>{});
    default: return f(std::integral_constant<int, 256>{});
  }
}

/// Bytes in the kernels' 16-bit states: [chunks, Hv, V to a multiple of 64, Key].
template <class T>
index_t mma_state_elements(const delta_rule_problem<T, device_memory>& p) {
  return p.chunks * p.value_heads * mma_blocks(p.value_dim) * mma_values * mma_key_width(p.key_dim);
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

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
