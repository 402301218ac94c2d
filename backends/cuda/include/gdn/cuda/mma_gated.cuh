// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The two gated matrices of every chunk, made once for all walks over a segment: they are not on the chain.

#include <gdn/core/workspace.hpp>
#include <gdn/cuda/mma_chunk.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Of every chunk and value head, in the walks' scratch.
template <class T>
struct gated_chunks {
  T* transfer;    // [chunks, Hv, 64, 64]  T = (G o X) diag(b)
  T* scores;      // [chunks, Hv, 64, 64]  P = scale (Q K^T) o G; null if nobody reads it
  float* decays;  // [chunks, Hv, 2, 64]   e^c; e^(c_C - c)
};

template <class T>
gated_chunks<T> take_gated(const delta_rule_problem<T, device_memory>& p, bool scores, workspace<device_memory>& ws) {
  const index_t n = p.chunks * p.value_heads;
  gated_chunks<T> to{};
  to.transfer = ws.take<T>(n, mma_chunk, mma_chunk).data();
  if (scores) to.scores = ws.take<T>(n, mma_chunk, mma_chunk).data();
  to.decays = ws.take<float>(n, 2, mma_chunk).data();
  return to;
}

inline constexpr int gated_mma_threads = 128;
template <int Key>
inline constexpr std::size_t gated_mma_shared = 2 * tile<Key>::bytes + 3 * tile<mma_chunk>::bytes;

/// A block makes Q K^T of one (chunk, key head), and from it the matrices of all value heads that read this key head.
/// A warp holds 16 rows.
template <class T, int Key, bool Scores>
__global__ void __launch_bounds__(gated_mma_threads)
    gated_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in, const T* prepared,
                     gated_chunks<T> to) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  __shared__ chunk_gates gates;
  const std::uint32_t base = shared_address(tiles);
  const tile<mma_chunk> inverse{base};
  const tile<mma_chunk> transfer{base + tile<mma_chunk>::bytes};
  const tile<mma_chunk> scores{base + 2 * tile<mma_chunk>::bytes};
  const tile<Key> keys{base + 3 * tile<mma_chunk>::bytes};
  const tile<Key> queries{base + 3 * tile<mma_chunk>::bytes + tile<Key>::bytes};

  const index_t index = blockIdx.x;
  const index_t key_head = blockIdx.y;
  const rule_segment segment = p.segments(segment_of_chunk(p.segments, index));
  const int c = tokens_of_chunk(segment, index - segment.chunk_begin);
  const index_t token = segment.begin + (index - segment.chunk_begin) * mma_chunk;
  const index_t ratio = p.value_heads / p.key_heads;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const quad_place at;
  const auto pair = static_cast<std::uint32_t>(at.column) * 2;

  const auto place_of = [&](index_t head) { return (index * p.value_heads + head) * mma_chunk * mma_chunk; };
  const auto load_inverse = [&](index_t head) {
    inverse.load<T, gated_mma_threads>(prepared + place_of(head), mma_chunk, mma_chunk, mma_chunk / 8);
    commit_copies();
  };
  if constexpr (Scores) {
    const int pieces = pieces_from(p.key_dim, 0);
    keys.template load<T, gated_mma_threads>(&in.k(token, key_head, 0), in.k.stride(0), c, pieces);
    queries.template load<T, gated_mma_threads>(&in.q(token, key_head, 0), in.q.stride(0), c, pieces);
  }
  load_inverse(key_head * ratio);
  float QK[8][4] = {};
  if constexpr (Scores) {
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Key / 16; ++k) {
      std::uint32_t a[4];
      ldmatrix(a, queries.a(16 * warp, 2 * k));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (n > warp) break;
        std::uint32_t b[4];
        ldmatrix(b, keys.b(16 * n, 2 * k));
        mma<T>(QK[2 * n], a, b[0], b[1]);
        mma<T>(QK[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  for (index_t head = key_head * ratio; head < (key_head + 1) * ratio; ++head) {
    if (warp == 0) load_gates(gates, in, token, head, c);
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // upper and lower row
        const int s = 16 * warp + at.row + 8 * e;
        const int t = 8 * n + at.column;
        const float g0 = gates.between(s, t);
        const float g1 = gates.between(s, t + 1);
        const float2 x = unpack2<T>(load_shared(inverse.at(s, n) + pair));
        store_shared(transfer.at(s, n) + pair, pack2<T>(g0 * x.x * gates.beta[t], g1 * x.y * gates.beta[t + 1]));
        if constexpr (Scores) {
          store_shared(scores.at(s, n) + pair, pack2<T>(p.scale * g0 * QK[n][2 * e], p.scale * g1 * QK[n][2 * e + 1]));
        }
      }
    }
    __syncthreads();
    if (head + 1 < (key_head + 1) * ratio) load_inverse(head + 1);
    const auto write = [&](tile<mma_chunk> from, T* out) {
#pragma unroll
      for (int n = 0; n < tile<mma_chunk>::bytes / 16 / gated_mma_threads; ++n) {
        const int i = n * gated_mma_threads + static_cast<int>(threadIdx.x);
        *reinterpret_cast<uint4*>(out + 8 * i) = load_shared16(from.at(i / 8, i % 8));
      }
    };
    write(transfer, to.transfer + place_of(head));
    if constexpr (Scores) write(scores, to.scores + place_of(head));
    float* decays = to.decays + (index * p.value_heads + head) * 2 * mma_chunk;
    const int t = static_cast<int>(threadIdx.x);
    decays[t] = t < mma_chunk ? gates.decay[t] : gates.rest[t - mma_chunk];
    __syncthreads();
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
