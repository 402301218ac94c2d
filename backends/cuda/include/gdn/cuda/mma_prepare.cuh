// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The inverses of the chunks' unit triangular matrices: substitution in float, one merge on tensor cores.

#include <algorithm>

#include <gdn/cuda/mma_chunk.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int prepare_mma_threads = 128;
inline constexpr int leaf = mma_chunk / 2;

/// Columns of the two diagonal blocks of X, in float16: [64 columns][32 rows], rows that ldmatrix reads without conflict.
struct leaf_columns {
  static constexpr int pitch = 80;  // bytes
  static constexpr std::uint32_t bytes = mma_chunk * pitch;
  std::uint32_t base;
  __device__ std::uint32_t at(int column, int piece) const {
    return base + static_cast<std::uint32_t>(column * pitch + 16 * piece);
  }
};

/// Shared memory: the keys' tile, later two heads' results; K K^T; the leaves of two heads.
template <int Key>
struct prepare_shared {
  static constexpr int pitch = mma_chunk + 4;  // floats
  static constexpr std::uint32_t results = 0;
  static constexpr std::uint32_t products = std::max(tile<Key>::bytes, 2 * tile<mma_chunk>::bytes);
  static constexpr std::uint32_t leaves = products + mma_chunk * pitch * sizeof(float);
  static constexpr std::uint32_t bytes = leaves + 2 * leaf_columns::bytes;
};

/// X = (I + L)^-1 with L = stril(diag(b) K K^T), in 16 bits, [chunks, Hv, 64, 64], rows and columns beyond a short chunk
/// zero.
///
/// A block holds K K^T of one (chunk, key head) in shared memory, and inverts for two value heads at a time. A thread
/// solves one column of one 32 x 32 diagonal block by substitution in float, its unknowns in registers. What is left of
/// X is -X22 L21 X11, on tensor cores in float16, made transposed so that the first product is operand A of the second;
/// for unit keys all its operands lie within 1, and its error within 2^-11 of that.
template <class T, int Key>
__global__ void __launch_bounds__(prepare_mma_threads)
    prepare_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in, T* out) {
  using shared = prepare_shared<Key>;
  constexpr int pitch = shared::pitch;
  extern __shared__ __align__(1024) unsigned char tiles[];
  __shared__ float beta[2][mma_chunk];
  const std::uint32_t base = shared_address(tiles);
  float* kk = reinterpret_cast<float*>(tiles + shared::products);  // [64][pitch]

  const index_t index = blockIdx.x;
  const index_t key_head = blockIdx.y;
  const rule_segment segment = p.segments(segment_of_chunk(p.segments, index));
  const int c = tokens_of_chunk(segment, index - segment.chunk_begin);
  const index_t token = segment.begin + (index - segment.chunk_begin) * mma_chunk;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const quad_place at;
  {
    const tile<Key> keys{base};
    keys.template load<T, prepare_mma_threads>(&in.k(token, key_head, 0), in.k.stride(0), c, pieces_from(p.key_dim, 0));
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float sum[8][4] = {};
#pragma unroll
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
      float* to = kk + (16 * warp + at.row) * pitch + 8 * n + at.column;
      *reinterpret_cast<float2*>(to) = {sum[n][0], sum[n][1]};
      *reinterpret_cast<float2*>(to + 8 * pitch) = {sum[n][2], sum[n][3]};
    }
  }

  const index_t ratio = p.value_heads / p.key_heads;
  const int half = static_cast<int>(threadIdx.x / mma_chunk);  // which of the two heads
  const int column = static_cast<int>(threadIdx.x % mma_chunk);
  const int block = column / leaf * leaf;  // first row and column of the thread's diagonal block
  const tile<mma_chunk> result{base + shared::results + half * tile<mma_chunk>::bytes};
  const leaf_columns leaves{base + shared::leaves + half * leaf_columns::bytes};
  for (index_t first = 0; first < ratio; first += 2) {
    const index_t head = key_head * ratio + first + half;
    const bool active = first + half < ratio;
    __syncthreads();
    beta[half][column] = active && column < c ? static_cast<float>(in.beta(token + column, head)) : 0.0f;
    __syncthreads();
    {
      float x[leaf];
      const float* rows = kk + block * pitch + block;
#pragma unroll
      for (int s = 0; s < leaf; ++s) {
        float part[4] = {};
#pragma unroll
        for (int t = 0; t + 4 <= s; t += 4) {  // four at once: the loads would be the limit
          const float4 row = *reinterpret_cast<const float4*>(rows + s * pitch + t);
          part[0] += row.x * x[t];
          part[1] += row.y * x[t + 1];
          part[2] += row.z * x[t + 2];
          part[3] += row.w * x[t + 3];
        }
#pragma unroll
        for (int t = s / 4 * 4; t < s; ++t) part[t % 4] += rows[s * pitch + t] * x[t];
        const float sum = (part[0] + part[1]) + (part[2] + part[3]);
        x[s] = (block + s == column ? 1.0f : 0.0f) - beta[half][block + s] * sum;
        const bool inside = block + s < c && column < c;
        store_shared(result.at(block + s, column / 8) + 2 * static_cast<std::uint32_t>(column % 8),
                     static_cast<T>(inside ? x[s] : 0.0f).bits);
        if (block != 0) {  // above the diagonal
          store_shared(result.at(s, column / 8) + 2 * static_cast<std::uint32_t>(column % 8), std::uint16_t{0});
        }
      }
#pragma unroll
      for (int s = 0; s < leaf; s += 8) {
        store_shared16(leaves.at(column, s / 8),
                       {pack2<float16>(x[s], x[s + 1]), pack2<float16>(x[s + 2], x[s + 3]),
                        pack2<float16>(x[s + 4], x[s + 5]), pack2<float16>(x[s + 6], x[s + 7])});
      }
    }
    __syncthreads();
    {
      // X21^T = -(X11^T L21^T) X22^T for 16 columns of X11 per warp.
      const int columns = 16 * (warp % 2);
      const int l = static_cast<int>(threadIdx.x % 32);
      float Z[4][4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        std::uint32_t a[4];
        ldmatrix(a, leaves.at(columns + l / 8 % 2 * 8 + l % 8, 2 * k + l / 16));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int s = leaf + 8 * n + at.row;
          const float* row = kk + s * pitch + 16 * k + at.column;
          const float b = beta[half][s];
          mma<float16>(Z[n], a, pack2<float16>(b * row[0], b * row[1]), pack2<float16>(b * row[8], b * row[9]));
        }
      }
      float X[4][4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        std::uint32_t a[4];
        pack_operand<float16>(a, Z[2 * k], Z[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          std::uint32_t b[4];
          ldmatrix_transposed(b, leaves.at(leaf + 16 * k + l / 8 % 2 * 8 + l % 8, 2 * n + l / 16));
          mma<float16>(X[2 * n], a, b[0], b[1]);
          mma<float16>(X[2 * n + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        std::uint32_t r[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          X[2 * n][e] = -X[2 * n][e];
          X[2 * n + 1][e] = -X[2 * n + 1][e];
        }
        pack_operand<T>(r, X[2 * n], X[2 * n + 1]);
        stmatrix_transposed(result.at(leaf + 16 * n + l / 16 * 8 + l % 8, columns / 8 + l / 8 % 2), r);
      }
    }
    __syncthreads();
    if (!active) continue;
    T* to = out + (index * p.value_heads + head) * mma_chunk * mma_chunk;
#pragma unroll
    for (int n = 0; n < tile<mma_chunk>::bytes / 16 / mma_chunk; ++n) {
      const int i = n * mma_chunk + column;
      *reinterpret_cast<uint4*>(to + 8 * i) = load_shared16(result.at(i / 8, i % 8));
    }
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
