// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The inverses of the chunks' unit triangular matrices, K K^T on tensor cores.

#include <gdn/cuda/mma_chunk.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int prepare_mma_threads = 128;

/// X = (I + stril(diag(b) K K^T))^-1 in 16 bits, [chunks, Hv, 64, 64], rows and columns beyond a short chunk zero.
///
/// A block holds K K^T of one (chunk, key head) in shared memory. A thread then solves one column of one value head
/// by substitution in float, its 64 unknowns in registers; two value heads at a time.
template <class T, int Key>
__global__ void __launch_bounds__(prepare_mma_threads)
    prepare_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in, T* out) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  constexpr int pitch = mma_chunk + 4;
  const tile<Key> keys{shared_address(tiles)};
  float* kk = reinterpret_cast<float*>(tiles + tile<Key>::bytes);  // [64][pitch]
  __shared__ float beta[2][mma_chunk];

  const index_t index = blockIdx.x;
  const index_t key_head = blockIdx.y;
  const rule_segment segment = p.segments(segment_of_chunk(p.segments, index));
  const int c = tokens_of_chunk(segment, index - segment.chunk_begin);
  const index_t token = segment.begin + (index - segment.chunk_begin) * mma_chunk;
  keys.template load<T, prepare_mma_threads>(&in.k(token, key_head, 0), in.k.stride(0), c, pieces_from(p.key_dim, 0));
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  {
    float sum[8][4] = {};
    for (int k = 0; k < Key / 16; ++k) {
      std::uint32_t a[4];
      ldmatrix(a, keys.a(16 * warp, 2 * k));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (n > warp) break;  // only the lower triangle is read
        std::uint32_t b[4];
        ldmatrix(b, keys.b(16 * n, 2 * k));
        mma<T>(sum[2 * n], a, b[0], b[1]);
        mma<T>(sum[2 * n + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int row = 16 * warp + lane / 4;
      const int column = 8 * n + 2 * (lane % 4);
      kk[row * pitch + column] = sum[n][0];
      kk[row * pitch + column + 1] = sum[n][1];
      kk[(row + 8) * pitch + column] = sum[n][2];
      kk[(row + 8) * pitch + column + 1] = sum[n][3];
    }
  }

  const index_t ratio = p.value_heads / p.key_heads;
  const int half = static_cast<int>(threadIdx.x / mma_chunk);
  const int column = static_cast<int>(threadIdx.x % mma_chunk);
  for (index_t first = 0; first < ratio; first += 2) {
    const index_t head = key_head * ratio + first + half;
    const bool active = first + half < ratio;
    __syncthreads();
    if (active) beta[half][column] = column < c ? static_cast<float>(in.beta(token + column, head)) : 0.0f;
    __syncthreads();
    if (!active) continue;
    float x[mma_chunk];
    T* to = out + (index * p.value_heads + head) * mma_chunk * mma_chunk + column;
#pragma unroll
    for (int s = 0; s < mma_chunk; ++s) {
      float part[4] = {};
#pragma unroll
      for (int t = 0; t < s; ++t) part[t % 4] += kk[s * pitch + t] * x[t];
      const float sum = (part[0] + part[1]) + (part[2] + part[3]);
      x[s] = (s == column ? 1.0f : 0.0f) - beta[half][s] * sum;
      to[s * mma_chunk] = static_cast<T>(s < c && column < c ? x[s] : 0.0f);
    }
  }
}

template <int Key>
inline constexpr std::size_t prepare_mma_shared = tile<Key>::bytes + mma_chunk * (mma_chunk + 4) * sizeof(float);

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
