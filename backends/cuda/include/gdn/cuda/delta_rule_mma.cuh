// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The delta rule on tensor cores, forward: the state stays in registers, transposed, as operand A.

#include <cstdint>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/cuda/delta_rule.cuh>
#include <gdn/cuda/detail/mma.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// Sizes of the tensor core kernels: K = 128, chunks of 64 tokens, 64 columns of V per block (16 per warp).
inline constexpr int mma_key = 128;
inline constexpr int mma_chunk = 64;
inline constexpr int mma_values = 64;
inline constexpr int mma_threads = 128;

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

// ---- the chunk inverses ---------------------------------------------------------------------------------------------

/// X = (I + stril(diag(b) K K^T))^-1 in 16 bits, [chunks, Hv, 64, 64], rows and columns beyond a short chunk zero.
///
/// A block holds K K^T of one (chunk, key head) in shared memory. A thread then solves one column of one value head
/// by substitution in float, its 64 unknowns in registers; two value heads at a time.
template <class T>
__global__ void __launch_bounds__(mma_threads)
    prepare_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in, T* out) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  constexpr int pitch = mma_chunk + 4;
  const tile<mma_key> keys{shared_address(tiles)};
  float* kk = reinterpret_cast<float*>(tiles + tile<mma_key>::bytes);  // [64][pitch]
  __shared__ float beta[2][mma_chunk];

  const index_t index = blockIdx.x;
  const index_t key_head = blockIdx.y;
  const rule_segment segment = p.segments(segment_of_chunk(p.segments, index));
  const index_t begin = (index - segment.chunk_begin) * mma_chunk;
  const int c = static_cast<int>(segment.count - begin < mma_chunk ? segment.count - begin : mma_chunk);
  const index_t token = segment.begin + begin;
  keys.load<T, mma_threads>(&in.k(token, key_head, 0), in.k.stride(0), c);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  {
    float sum[8][4] = {};
    for (int k = 0; k < mma_key / 16; ++k) {
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

inline constexpr std::size_t prepare_mma_shared = tile<mma_key>::bytes + mma_chunk * (mma_chunk + 4) * sizeof(float);

// ---- the scan -------------------------------------------------------------------------------------------------------

/// Decays of one chunk in shared memory, in the base of ex2.
struct chunk_gates {
  float log[mma_chunk];    // c_s, base 2; the last valid one beyond the chunk
  float decay[mma_chunk];  // e^c
  float rest[mma_chunk];   // e^(c_C - c)
  float beta[mma_chunk];   // 0 beyond the chunk
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

/// Shared memory of a scanning block: two stages of what is loaded, and the two gated matrices.
struct scan_shared {
  static constexpr std::uint32_t keys = 0;
  static constexpr std::uint32_t queries = keys + tile<mma_key>::bytes;
  static constexpr std::uint32_t values = queries + tile<mma_key>::bytes;
  static constexpr std::uint32_t inverse = values + tile<mma_values>::bytes;
  static constexpr std::uint32_t stage = inverse + tile<mma_chunk>::bytes;
  static constexpr std::uint32_t gated = 2 * stage;                         // T
  static constexpr std::uint32_t scores = gated + tile<mma_chunk>::bytes;   // P
  static constexpr std::uint32_t bytes = scores + tile<mma_chunk>::bytes;
};

/// Walks over the chunks of (segment, value head, 64 columns of V). A warp owns 16 columns of V for the whole segment:
/// its part of S^T [16, K] stays in its accumulators, and is operand A of all products with the state:
///   U^T = S^T K^T;  W^T = V^T - U^T diag(e^c);  D^T = W^T T^T;  O^T = S^T Q^T diag(scale e^c) + D^T P^T;
///   S^T <- e^(c_C) S^T + D^T diag(e^(c_C - c)) K.
/// Results become operands without a shuffle, so warps meet only over the tiles T = (G o X) diag(b) and
/// P = scale (Q K^T) o G, which they make together.
template <class T, scan Mode>
__global__ void __launch_bounds__(mma_threads, 2)
    scan_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in, scan_targets<T> to,
                    const T* prepared, T* states) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  __shared__ chunk_gates gates;
  const std::uint32_t base = shared_address(tiles);
  const tile<mma_chunk> gated{base + scan_shared::gated};
  const tile<mma_chunk> scores{base + scan_shared::scores};
  constexpr bool output = Mode == scan::output;

  const index_t column = blockIdx.x * static_cast<index_t>(mma_values);
  const index_t head = blockIdx.y;
  const rule_segment segment = p.segments(blockIdx.z);
  const index_t key_head = head / (p.value_heads / p.key_heads);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int v0 = 16 * warp;        // of the block's columns
  const int quad_row = lane / 4;   // rows of results: columns of V
  const int quad_col = 2 * (lane % 4);

  const auto chunks = static_cast<int>((segment.count + mma_chunk - 1) / mma_chunk);
  const auto tokens_of = [&](int i) {
    const index_t rest = segment.count - static_cast<index_t>(i) * mma_chunk;
    return static_cast<int>(rest < mma_chunk ? rest : mma_chunk);
  };
  const auto load_chunk = [&](int i) {
    const std::uint32_t at = base + (i % 2) * scan_shared::stage;
    const index_t token = segment.begin + static_cast<index_t>(i) * mma_chunk;
    const int c = tokens_of(i);
    tile<mma_key>{at + scan_shared::keys}.template load<T, mma_threads>(&in.k(token, key_head, 0), in.k.stride(0), c);
    if constexpr (output) {
      tile<mma_key>{at + scan_shared::queries}.template load<T, mma_threads>(&in.q(token, key_head, 0), in.q.stride(0),
                                                                             c);
    }
    tile<mma_values>{at + scan_shared::values}.template load<T, mma_threads>(&in.v(token, head, column), in.v.stride(0),
                                                                             c);
    tile<mma_chunk>{at + scan_shared::inverse}.template load<T, mma_threads>(
        prepared + ((segment.chunk_begin + i) * p.value_heads + head) * mma_chunk * mma_chunk, mma_chunk, mma_chunk);
    commit_copies();
  };

  // S^T: n-th result holds columns 8 n .. of K.
  float S[16][4];
#pragma unroll
  for (int n = 0; n < 16; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const index_t k = 8 * n + quad_col + e % 2;
      const index_t v = column + v0 + quad_row + e / 2 * 8;
      S[n][e] = segment.h0 >= 0 && to.h0.data() != nullptr ? to.h0(segment.h0, head, k, v) : 0.0f;
    }
  }

  load_chunk(0);
  for (int i = 0; i < chunks; ++i) {
    const int c = tokens_of(i);
    const index_t token = segment.begin + static_cast<index_t>(i) * mma_chunk;
    if constexpr (Mode == scan::states) {
      // S^T before the chunk, [V][K], in 16 bits: what the chunk's gradients read.
      T* at = states + (((segment.chunk_begin + i) * p.value_heads + head) * p.value_dim + column + v0) * mma_key;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        *reinterpret_cast<std::uint32_t*>(at + quad_row * mma_key + 8 * n + quad_col) = pack2<T>(S[n][0], S[n][1]);
        *reinterpret_cast<std::uint32_t*>(at + (quad_row + 8) * mma_key + 8 * n + quad_col) =
            pack2<T>(S[n][2], S[n][3]);
      }
      if (i + 1 == chunks) break;
    }
    if (i + 1 < chunks) {
      load_chunk(i + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    if (warp == 0) load_gates(gates, in, token, head, c);
    __syncthreads();

    const std::uint32_t stage = base + (i % 2) * scan_shared::stage;
    const tile<mma_key> keys{stage + scan_shared::keys};
    const tile<mma_key> queries{stage + scan_shared::queries};
    const tile<mma_values> values{stage + scan_shared::values};
    const tile<mma_chunk> inverse{stage + scan_shared::inverse};

    // T and P, rows 16 warp .. 16 warp + 15.
    {
      float sum[8][4] = {};
      if constexpr (output) {
#pragma unroll
        for (int k = 0; k < mma_key / 16; ++k) {
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
          const int s = 16 * warp + quad_row + 8 * e;
          const int t = 8 * n + quad_col;
          // Selected, not multiplied: above the diagonal the exponential may be infinite.
          const float g0 = t <= s ? exp2_fast(gates.log[s] - gates.log[t]) : 0.0f;
          const float g1 = t + 1 <= s ? exp2_fast(gates.log[s] - gates.log[t + 1]) : 0.0f;
          const std::uint32_t place = static_cast<std::uint32_t>(quad_col) * 2;
          const float2 x = unpack2<T>(load_shared(inverse.at(s, n) + place));
          store_shared(gated.at(s, n) + place, pack2<T>(g0 * x.x * gates.beta[t], g1 * x.y * gates.beta[t + 1]));
          if constexpr (output) {
            store_shared(scores.at(s, n) + place,
                         pack2<T>(t <= s ? p.scale * g0 * sum[n][2 * e] : 0.0f,
                                  t + 1 <= s ? p.scale * g1 * sum[n][2 * e + 1] : 0.0f));
          }
        }
      }
    }
    __syncthreads();

    // U^T and, of the same operand, S^T Q^T.
    float U[8][4] = {};
    float O[8][4] = {};
#pragma unroll
    for (int k = 0; k < mma_key / 16; ++k) {
      const std::uint32_t a[4] = {pack2<T>(S[2 * k][0], S[2 * k][1]), pack2<T>(S[2 * k][2], S[2 * k][3]),
                                  pack2<T>(S[2 * k + 1][0], S[2 * k + 1][1]),
                                  pack2<T>(S[2 * k + 1][2], S[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t b[4];
        ldmatrix(b, keys.b(16 * n, 2 * k));
        mma<T>(U[2 * n], a, b[0], b[1]);
        mma<T>(U[2 * n + 1], a, b[2], b[3]);
        if constexpr (output) {
          ldmatrix(b, queries.b(16 * n, 2 * k));
          mma<T>(O[2 * n], a, b[0], b[1]);
          mma<T>(O[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
    // W^T as operands over tokens.
    std::uint32_t W[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t v[4];  // V^T of tokens 16 n ..: (tokens, lower columns), (tokens, upper columns), next 8 tokens
      const int l = lane;
      ldmatrix_transposed(v, values.at(16 * n + l / 16 * 8 + l % 8, v0 / 8 + l / 8 % 2));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int s = 16 * n + 8 * h + quad_col;
        const float2 low = unpack2<T>(v[2 * h]);
        const float2 high = unpack2<T>(v[2 * h + 1]);
        const float d0 = gates.decay[s];
        const float d1 = gates.decay[s + 1];
        W[n][2 * h] = pack2<T>(low.x - d0 * U[2 * n + h][0], low.y - d1 * U[2 * n + h][1]);
        W[n][2 * h + 1] = pack2<T>(high.x - d0 * U[2 * n + h][2], high.y - d1 * U[2 * n + h][3]);
      }
    }
    // D^T; tokens t beyond s do not count.
    float D[8][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int n = k; n < 4; ++n) {
        std::uint32_t b[4];
        ldmatrix(b, gated.b(16 * n, 2 * k));
        mma<T>(D[2 * n], W[k], b[0], b[1]);
        mma<T>(D[2 * n + 1], W[k], b[2], b[3]);
      }
    }
    if constexpr (output) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float d0 = p.scale * gates.decay[8 * n + quad_col];
        const float d1 = p.scale * gates.decay[8 * n + quad_col + 1];
        O[n][0] *= d0;
        O[n][1] *= d1;
        O[n][2] *= d0;
        O[n][3] *= d1;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const std::uint32_t a[4] = {pack2<T>(D[2 * k][0], D[2 * k][1]), pack2<T>(D[2 * k][2], D[2 * k][3]),
                                    pack2<T>(D[2 * k + 1][0], D[2 * k + 1][1]),
                                    pack2<T>(D[2 * k + 1][2], D[2 * k + 1][3])};
#pragma unroll
        for (int n = k; n < 4; ++n) {
          std::uint32_t b[4];
          ldmatrix(b, scores.b(16 * n, 2 * k));
          mma<T>(O[2 * n], a, b[0], b[1]);
          mma<T>(O[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
    // S^T.
    const float all = gates.decay[mma_chunk - 1];
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) S[n][e] *= all;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      std::uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float r0 = gates.rest[16 * k + 8 * h + quad_col];
        const float r1 = gates.rest[16 * k + 8 * h + quad_col + 1];
        a[2 * h] = pack2<T>(r0 * D[2 * k + h][0], r1 * D[2 * k + h][1]);
        a[2 * h + 1] = pack2<T>(r0 * D[2 * k + h][2], r1 * D[2 * k + h][3]);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        std::uint32_t b[4];
        ldmatrix_transposed(b, keys.b_transposed(16 * k, 2 * n));
        mma<T>(S[2 * n], a, b[0], b[1]);
        mma<T>(S[2 * n + 1], a, b[2], b[3]);
      }
    }
    if constexpr (output) {
      // O takes the place of the warp's own columns of V, and leaves in pieces of 16 bytes.
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const std::uint32_t r[4] = {pack2<T>(O[2 * n][0], O[2 * n][1]), pack2<T>(O[2 * n][2], O[2 * n][3]),
                                    pack2<T>(O[2 * n + 1][0], O[2 * n + 1][1]),
                                    pack2<T>(O[2 * n + 1][2], O[2 * n + 1][3])};
        stmatrix_transposed(values.at(16 * n + lane / 16 * 8 + lane % 8, v0 / 8 + lane / 8 % 2), r);
      }
      __syncwarp();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int s = (lane + 32 * e) / 2;
        const int half = lane % 2;
        if (s < c) {
          *reinterpret_cast<uint4*>(&to.o(token + s, head, column + v0 + 8 * half)) =
              load_shared16(values.at(s, v0 / 8 + half));
        }
      }
    }
    __syncthreads();
  }

  if constexpr (output) {
    if (segment.ht >= 0 && to.ht.data() != nullptr) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          to.ht(segment.ht, head, 8 * n + quad_col + e % 2, column + v0 + quad_row + e / 2 * 8) = S[n][e];
        }
      }
    }
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
