// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gradients of a chunk on tensor cores, from the state before it and the gradient of the state after it.

#include <gdn/cuda/mma_scan.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int gradients_mma_threads = 256;

/// Shared memory of a block: keys and queries; one or two stages of 64 columns of V; the chunk inverses of a head and
/// of those that are under way; four tiles that change their meaning.
template <int Key, int Stages>
struct gradients_shared {
  static constexpr std::uint32_t keys = 0;
  static constexpr std::uint32_t queries = keys + tile<Key>::bytes;
  static constexpr std::uint32_t stages = queries + tile<Key>::bytes;
  // of a stage
  static constexpr std::uint32_t state = 0;                                     // S^T [V, K]
  static constexpr std::uint32_t d_state = state + tile<Key>::bytes;            // dS^T [V, K]
  static constexpr std::uint32_t values = d_state + tile<Key>::bytes;           // V, then W
  static constexpr std::uint32_t d_output = values + tile<mma_values>::bytes;   // dO
  static constexpr std::uint32_t d_values = d_output + tile<mma_values>::bytes; // dV = dW
  static constexpr std::uint32_t stage = d_values + tile<mma_values>::bytes;
  static constexpr std::uint32_t inverses = stages + Stages * stage;  // X of a head, and of those under way
  static constexpr std::uint32_t first = inverses + (Stages + 1) * tile<mma_chunk>::bytes;  // T, then E
  static constexpr std::uint32_t second = first + tile<mma_chunk>::bytes;        // P, then dP
  static constexpr std::uint32_t third = second + tile<mma_chunk>::bytes;        // D, then dX
  static constexpr std::uint32_t fourth = third + tile<mma_chunk>::bytes;        // dD, then X^T dX
  static constexpr std::uint32_t products = fourth + tile<mma_chunk>::bytes;  // K K^T in float, each thread's own part
  static constexpr std::uint32_t bytes = products + 16 * gradients_mma_threads * sizeof(float);
};

/// Sums over rows and columns of a chunk, as the warps leave them; added in a fixed order.
struct gradient_sums {
  float later[2][mma_chunk];       // by half of the columns: what counts for tokens up to s
  float earlier[2][mma_chunk];     // likewise: what counts for tokens after s
  float columns[4][mma_chunk];     // of Z, by block of 16 rows
  float beta_columns[4][mma_chunk];
  float beta_rows[2][mma_chunk];
  float beta_own[2][mma_chunk];    // <dD, W> of each token, by half of the columns of V
  float states[8];                 // <S, dS>, by warp
};

/// Results of a warp: 16 rows by 8 N columns.
template <int N>
struct warp_results {
  float x[N][4] = {};
};

/// Columns 16 n .. of the results += A B, for operands that are in registers.
template <class T, int N>
__device__ inline void add_block(warp_results<N>& results, int n, const std::uint32_t (&a)[4],
                                 const std::uint32_t (&b)[4]) {
  mma<T>(results.x[2 * n], a, b[0], b[1]);
  mma<T>(results.x[2 * n + 1], a, b[2], b[3]);
}

/// results += A B over 16 columns of A per step, for operands that `a(k)` and `b(k, n)` name; n counts 16 columns.
template <class T, bool TransposedA, bool TransposedB, int N, class A, class B>
__device__ inline void add_step(warp_results<N>& results, int k, const A& a, const B& b) {
  std::uint32_t left[4];
  if constexpr (TransposedA) {
    ldmatrix_transposed(left, a(k));
  } else {
    ldmatrix(left, a(k));
  }
#pragma unroll
  for (int n = 0; n < N / 2; ++n) {
    std::uint32_t right[4];
    if constexpr (TransposedB) {
      ldmatrix_transposed(right, b(k, n));
    } else {
      ldmatrix(right, b(k, n));
    }
    add_block<T>(results, n, left, right);
  }
}

/// The sum over the four lanes that share a row.
__device__ inline float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
/// The sum over the eight lanes that share a column.
__device__ inline float column_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 4);
  v += __shfl_xor_sync(0xffffffffu, v, 8);
  return v + __shfl_xor_sync(0xffffffffu, v, 16);
}

/// The gradients of q, k, g and beta of one chunk, for all value heads of a key head. Eight warps: warp w holds rows
/// 16 (w % 4) .. of every product, and half w / 4 of its columns. Formulas: docs/kernels.md.
/// @tparam Stages 2, or 1 where shared memory is short (sm_80)
template <class T, int Key, int Stages>
__global__ void __launch_bounds__(gradients_mma_threads, 1)
    gradients_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in,
                         const T* prepared, const T* states, const T* d_states,
                         tensor_ref<const T, 3, device_memory> d_o, delta_rule_gradients<T, device_memory> out) {
  using shared = gradients_shared<Key, Stages>;
  constexpr int threads = gradients_mma_threads;
  constexpr int KN = Key / 16;  // results of 8 columns in half a row of K
  constexpr int PN = 4;         // of those, what products with a state make at once: registers are short
  extern __shared__ __align__(1024) unsigned char tiles[];
  __shared__ chunk_gates gates;
  __shared__ gradient_sums sums;

  const index_t index = blockIdx.x;
  const index_t key_head = blockIdx.y;
  const rule_segment segment = p.segments(segment_of_chunk(p.segments, index));
  const int c = tokens_of_chunk(segment, index - segment.chunk_begin);
  const index_t token = segment.begin + (index - segment.chunk_begin) * mma_chunk;
  const auto ratio = static_cast<int>(p.value_heads / p.key_heads);
  const auto blocks = static_cast<int>(mma_blocks(p.value_dim));  // of columns of V
  const index_t first_head = key_head * ratio;

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int r = warp % 4;     // block of 16 rows
  const int half = warp / 4;  // of the columns
  const quad_place at;
  const std::uint32_t pair = static_cast<std::uint32_t>(at.column) * 2;  // bytes within a piece
  const auto row_of = [&](int e) { return 16 * r + at.row + 8 * e; };

  const std::uint32_t base = shared_address(tiles);
  const tile<Key> keys{base + shared::keys};
  const tile<Key> queries{base + shared::queries};
  const tile<mma_chunk> first{base + shared::first};
  const tile<mma_chunk> second{base + shared::second};
  const tile<mma_chunk> third{base + shared::third};
  const tile<mma_chunk> fourth{base + shared::fourth};
  const auto inverse_of = [&](int h) {
    return tile<mma_chunk>{base + shared::inverses + h % (Stages + 1) * tile<mma_chunk>::bytes};
  };

  // A step is one block of columns of V of one head.
  const int steps = ratio * blocks;
  const auto load_step = [&](int step) {
    if (step < steps) {
      const index_t head = first_head + step / blocks;
      const index_t column = static_cast<index_t>(step % blocks) * mma_values;
      const std::uint32_t stage = base + shared::stages + step % Stages * shared::stage;
      const index_t place = ((index * p.value_heads + head) * blocks * mma_values + column) * Key;
      const int pieces = pieces_from(p.value_dim, column);
      tile<Key>{stage + shared::state}.template load<T, threads>(states + place, Key, mma_values, Key / 8);
      tile<Key>{stage + shared::d_state}.template load<T, threads>(d_states + place, Key, mma_values, Key / 8);
      tile<mma_values>{stage + shared::values}.template load<T, threads>(&in.v(token, head, column), in.v.stride(0), c,
                                                                         pieces);
      tile<mma_values>{stage + shared::d_output}.template load<T, threads>(&d_o(token, head, column), d_o.stride(0), c,
                                                                           pieces);
      tile<mma_values>{stage + shared::d_values}.template load<T, threads>(&out.v(token, head, column),
                                                                           out.v.stride(0), c, pieces);
      if (column == 0) {
        inverse_of(step / blocks)
            .template load<T, threads>(prepared + (index * p.value_heads + head) * mma_chunk * mma_chunk, mma_chunk,
                                       mma_chunk, mma_chunk / 8);
      }
    }
    commit_copies();
  };

  keys.template load<T, threads>(&in.k(token, key_head, 0), in.k.stride(0), c, pieces_from(p.key_dim, 0));
  queries.template load<T, threads>(&in.q(token, key_head, 0), in.q.stride(0), c, pieces_from(p.key_dim, 0));
#pragma unroll
  for (int step = 0; step < Stages; ++step) load_step(step);
  wait_copies<Stages - 1>();
  __syncthreads();

  warp_results<4> QK;  // raw, rows s, tokens t
  float4* const products = reinterpret_cast<float4*>(tiles + shared::products) + threadIdx.x;
  {
    warp_results<4> KK;
#pragma unroll
    for (int k = 0; k < Key / 16; ++k) {
      const auto b = [&](int i, int n) { return keys.b(32 * half + 16 * n, 2 * i); };
      add_step<T, false, false>(QK, k, [&](int i) { return queries.a(16 * r, 2 * i); }, b);
      add_step<T, false, false>(KK, k, [&](int i) { return keys.a(16 * r, 2 * i); }, b);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) products[n * threads] = {KK.x[n][0], KK.x[n][1], KK.x[n][2], KK.x[n][3]};
  }
  warp_results<KN> dq;
  warp_results<KN> dk;

  for (int h = 0; h < ratio; ++h) {
    const index_t head = first_head + h;
    const tile<mma_chunk> inverse = inverse_of(h);
    if (warp == 0) load_gates(gates, in, token, head, c);
    wait_copies<Stages - 1>();
    __syncthreads();

    // T and P.
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int s = row_of(e);
        const int t = 32 * half + 8 * n + at.column;
        const float g0 = gates.between(s, t);
        const float g1 = gates.between(s, t + 1);
        const float2 x = unpack2<T>(load_shared(inverse.at(s, 4 * half + n) + pair));
        store_shared(first.at(s, 4 * half + n) + pair, pack2<T>(g0 * x.x * gates.beta[t], g1 * x.y * gates.beta[t + 1]));
        store_shared(second.at(s, 4 * half + n) + pair,
                     pack2<T>(p.scale * g0 * QK.x[n][2 * e], p.scale * g1 * QK.x[n][2 * e + 1]));
      }
    }

    warp_results<4> dT;
    warp_results<4> dP;
    float later[2] = {};
    float earlier[2] = {};
    float own[2] = {};
    float carried = 0;
    for (int block = 0; block < blocks; ++block) {
      const int step = h * blocks + block;
      const std::uint32_t stage = base + shared::stages + step % Stages * shared::stage;
      const tile<Key> state{stage + shared::state};
      const tile<Key> d_state{stage + shared::d_state};
      const tile<mma_values> values{stage + shared::values};
      const tile<mma_values> d_output{stage + shared::d_output};
      const tile<mma_values> d_values{stage + shared::d_values};
      if (block > 0) {
        wait_copies<Stages - 1>();
        __syncthreads();
      }

      // U = K S and K dS; W takes the place of V.
      warp_results<4> dD;
      warp_results<4> W;
      {
        warp_results<4> U;
#pragma unroll
        for (int k = 0; k < Key / 16; ++k) {
          std::uint32_t a[4];
          ldmatrix(a, keys.a(16 * r, 2 * k));
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            std::uint32_t b[4];
            ldmatrix(b, state.b(32 * half + 16 * n, 2 * k));
            add_block<T>(U, n, a, b);
            ldmatrix(b, d_state.b(32 * half + 16 * n, 2 * k));
            add_block<T>(dD, n, a, b);
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int s = row_of(e);
            const std::uint32_t place = values.at(s, 4 * half + n) + pair;
            const float2 v = unpack2<T>(load_shared(place));
            const float2 dv = unpack2<T>(load_shared(d_values.at(s, 4 * half + n) + pair));
            const float decay = gates.decay[s];
            const float u0 = decay * U.x[n][2 * e];
            const float u1 = decay * U.x[n][2 * e + 1];
            W.x[n][2 * e] = v.x - u0;
            W.x[n][2 * e + 1] = v.y - u1;
            store_shared(place, pack2<T>(W.x[n][2 * e], W.x[n][2 * e + 1]));
            later[e] -= dv.x * u0 + dv.y * u1;
            dD.x[n][2 * e] *= gates.rest[s];
            dD.x[n][2 * e + 1] *= gates.rest[s];
          }
        }
      }
      __syncthreads();

      // D = T W; dD += P^T dO. <dD, W> in float: a token's own part of dbeta is most of it where gates are strong.
      {
        warp_results<4> D;
        for (int k = 0; k < 4; ++k) {
          if (k <= r) {
            add_step<T, false, true>(D, k, [&](int i) { return first.a(16 * r, 2 * i); },
                                     [&](int i, int n) { return values.b_transposed(16 * i, 4 * half + 2 * n); });
          }
          if (k >= r) {
            add_step<T, true, true>(dD, k, [&](int i) { return second.a_transposed(16 * i, 2 * r); },
                                    [&](int i, int n) { return d_output.b_transposed(16 * i, 4 * half + 2 * n); });
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int s = row_of(e);
            store_shared(third.at(s, 4 * half + n) + pair, pack2<T>(D.x[n][2 * e], D.x[n][2 * e + 1]));
            store_shared(fourth.at(s, 4 * half + n) + pair, pack2<T>(dD.x[n][2 * e], dD.x[n][2 * e + 1]));
            own[e] += dD.x[n][2 * e] * W.x[n][2 * e] + dD.x[n][2 * e + 1] * W.x[n][2 * e + 1];
          }
        }
      }
      __syncthreads();

      // Pairs of tokens: dT = dD W^T, dP = dO D^T.
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        add_step<T, false, false>(dT, k, [&](int i) { return fourth.a(16 * r, 2 * i); },
                                  [&](int i, int n) { return values.b(32 * half + 16 * n, 2 * i); });
        add_step<T, false, false>(dP, k, [&](int i) { return d_output.a(16 * r, 2 * i); },
                                  [&](int i, int n) { return third.b(32 * half + 16 * n, 2 * i); });
      }
      // What left with the state and what came with it: dO S^T and dU S^T, which read S once; D dS^T.
#pragma unroll
      for (int part = 0; part < KN; part += PN) {
        const int piece = KN * half + part;
        {
          warp_results<PN> of_output;
          warp_results<PN> of_values;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            std::uint32_t dO[4];
            std::uint32_t dV[4];
            ldmatrix(dO, d_output.a(16 * r, 2 * k));
            ldmatrix(dV, d_values.a(16 * r, 2 * k));
#pragma unroll
            for (int n = 0; n < PN / 2; ++n) {
              std::uint32_t b[4];
              ldmatrix_transposed(b, state.b_transposed(16 * k, piece + 2 * n));
              add_block<T>(of_output, n, dO, b);
              add_block<T>(of_values, n, dV, b);
            }
          }
#pragma unroll
          for (int n = 0; n < PN; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float decay = gates.decay[row_of(e)];
              const float by = p.scale * decay;
              const float2 q = unpack2<T>(load_shared(queries.at(row_of(e), piece + n) + pair));
              const float d0 = by * of_output.x[n][2 * e];
              const float d1 = by * of_output.x[n][2 * e + 1];
              later[e] += q.x * d0 + q.y * d1;
              dq.x[part + n][2 * e] += d0;
              dq.x[part + n][2 * e + 1] += d1;
              dk.x[part + n][2 * e] -= decay * of_values.x[n][2 * e];
              dk.x[part + n][2 * e + 1] -= decay * of_values.x[n][2 * e + 1];
            }
          }
        }
        {
          warp_results<PN> product;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            add_step<T, false, true>(product, k, [&](int i) { return third.a(16 * r, 2 * i); },
                                     [&](int i, int n) { return d_state.b_transposed(16 * i, piece + 2 * n); });
          }
#pragma unroll
          for (int n = 0; n < PN; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float by = gates.rest[row_of(e)];
              const float2 key = unpack2<T>(load_shared(keys.at(row_of(e), piece + n) + pair));
              const float d0 = by * product.x[n][2 * e];
              const float d1 = by * product.x[n][2 * e + 1];
              earlier[e] += key.x * d0 + key.y * d1;
              dk.x[part + n][2 * e] += d0;
              dk.x[part + n][2 * e + 1] += d1;
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < tile<Key>::bytes / 16 / threads; ++n) {
        const auto offset = static_cast<std::uint32_t>(n * threads + static_cast<int>(threadIdx.x)) * 16;
        const uint4 x = load_shared16(state.base + offset);
        const uint4 y = load_shared16(d_state.base + offset);
        const auto add = [&](std::uint32_t u, std::uint32_t w) {
          const float2 one = unpack2<T>(u);
          const float2 other = unpack2<T>(w);
          carried += one.x * other.x + one.y * other.y;
        };
        add(x.x, y.x);
        add(x.y, y.y);
        add(x.z, y.z);
        add(x.w, y.w);
      }
      __syncthreads();
      load_step(step + Stages);
    }

    // dg_t = <S, dS> e^(c_C) + sum_{s>=t} later_s + sum_{s<t} earlier_s + sum_{s>=t, j<t} Z_sj; the last term as the
    // sum over s >= t of rows of Z less columns, in float: Z = dP o P + dT o T below the diagonal. On it they would
    // cancel, and drown what strong decay leaves.
    float z_columns[4][2] = {};
    float beta_columns[4][2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int s = row_of(e);
        const float2 x = unpack2<T>(load_shared(inverse.at(s, 4 * half + n) + pair));
        float d_x[2];
        float d_p[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int t = 32 * half + 8 * n + at.column + i;
          const float g = gates.between(s, t);
          const float d_t = g * dT.x[n][2 * e + i];
          const float by_beta = d_t * (i == 0 ? x.x : x.y);
          d_x[i] = d_t * gates.beta[t];
          d_p[i] = p.scale * g * dP.x[n][2 * e + i];
          if (t == s) continue;  // no part of Z, and what beta gets is in `own`
          const float z = d_p[i] * QK.x[n][2 * e + i] + by_beta * gates.beta[t];
          later[e] += z;
          z_columns[n][i] += z;
          beta_columns[n][i] += by_beta;
        }
        store_shared(third.at(s, 4 * half + n) + pair, pack2<T>(d_x[0], d_x[1]));
        store_shared(second.at(s, 4 * half + n) + pair, pack2<T>(d_p[0], d_p[1]));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float z = column_sum(z_columns[n][i]);
        const float b = column_sum(beta_columns[n][i]);
        if (lane < 4) {
          sums.columns[r][32 * half + 8 * n + at.column + i] = z;
          sums.beta_columns[r][32 * half + 8 * n + at.column + i] = b;
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float l = row_sum(later[e]);
      const float k = row_sum(earlier[e]);
      const float b = row_sum(own[e]);
      if (lane % 4 == 0) {
        sums.beta_own[half][row_of(e)] = b;
        sums.later[half][row_of(e)] = l;
        sums.earlier[half][row_of(e)] = k;
      }
    }
    carried = warp_sum(carried);
    if (lane == 0) sums.states[warp] = carried;
    __syncthreads();

    // dL = -stril(X^T dX X^T); E = diag(b) dL.
    {
      warp_results<4> Y;
      for (int k = r; k < 4; ++k) {
        add_step<T, true, true>(Y, k, [&](int i) { return inverse.a_transposed(16 * i, 2 * r); },
                                [&](int i, int n) { return third.b_transposed(16 * i, 4 * half + 2 * n); });
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          store_shared(fourth.at(row_of(e), 4 * half + n) + pair, pack2<T>(Y.x[n][2 * e], Y.x[n][2 * e + 1]));
        }
      }
    }
    __syncthreads();
    {
      warp_results<4> dL;
      for (int k = 0; k <= r; ++k) {
        add_step<T, false, false>(dL, k, [&](int i) { return fourth.a(16 * r, 2 * i); },
                                  [&](int i, int n) { return inverse.b(32 * half + 16 * n, 2 * i); });
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int s = row_of(e);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int t = 32 * half + 8 * n + at.column;
          const float l0 = t < s ? -dL.x[n][2 * e] : 0.0f;
          const float l1 = t + 1 < s ? -dL.x[n][2 * e + 1] : 0.0f;
          const float4 kk = products[n * threads];
          sum += e == 0 ? l0 * kk.x + l1 * kk.y : l0 * kk.z + l1 * kk.w;
          store_shared(first.at(s, 4 * half + n) + pair, pack2<T>(gates.beta[s] * l0, gates.beta[s] * l1));
        }
        sum = row_sum(sum);
        if (lane % 4 == 0) sums.beta_rows[half][s] = sum;
      }
    }
    __syncthreads();

    // dq += dP K; dk += (E + E^T) K + dP^T Q.
    {
      const auto rows_of_keys = [&](int i, int n) { return keys.b_transposed(16 * i, KN * half + 2 * n); };
      const auto rows_of_queries = [&](int i, int n) { return queries.b_transposed(16 * i, KN * half + 2 * n); };
      for (int k = 0; k < 4; ++k) {
        if (k <= r) {
          add_step<T, false, true>(dq, k, [&](int i) { return second.a(16 * r, 2 * i); }, rows_of_keys);
          add_step<T, false, true>(dk, k, [&](int i) { return first.a(16 * r, 2 * i); }, rows_of_keys);
        }
        if (k >= r) {
          add_step<T, true, true>(dk, k, [&](int i) { return first.a_transposed(16 * i, 2 * r); }, rows_of_keys);
          add_step<T, true, true>(dk, k, [&](int i) { return second.a_transposed(16 * i, 2 * r); }, rows_of_queries);
        }
      }
    }
    if (warp == 0) {  // two tokens per lane
      const int t = 2 * lane;
      const auto later_at = [&](int s) {
        return sums.later[0][s] + sums.later[1][s] -
               ((sums.columns[0][s] + sums.columns[1][s]) + (sums.columns[2][s] + sums.columns[3][s]));
      };
      const auto earlier_at = [&](int s) { return sums.earlier[0][s] + sums.earlier[1][s]; };
      float total = 0;
#pragma unroll
      for (int w = 0; w < 8; ++w) total += sums.states[w];
      total *= gates.all();
      const float l1 = later_at(t + 1);
      const float k0 = earlier_at(t);
      float after = later_at(t) + l1;  // of this lane and all that follow
      float before = k0 + earlier_at(t + 1);
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const float a = __shfl_down_sync(0xffffffffu, after, offset);
        const float b = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane + offset < 32) after += a;
        if (lane >= offset) before += b;
      }
      // Of the lanes behind and before only: subtracting this lane's share would cancel.
      float behind = __shfl_down_sync(0xffffffffu, after, 1);
      before = __shfl_up_sync(0xffffffffu, before, 1);
      if (lane == 31) behind = 0;
      if (lane == 0) before = 0;
      if (t < c) out.g(token + t, head) = total + after + before;
      if (t + 1 < c) out.g(token + t + 1, head) = total + (behind + l1) + (before + k0);
    } else if (warp < 3) {
      const int t = 32 * (warp - 1) + lane;
      const float b = (sums.beta_columns[0][t] + sums.beta_columns[1][t]) +
                      (sums.beta_columns[2][t] + sums.beta_columns[3][t]) +
                      (sums.beta_rows[0][t] + sums.beta_rows[1][t]) + (sums.beta_own[0][t] + sums.beta_own[1][t]);
      if (t < c) out.beta(token + t, head) = b;
    }
    __syncthreads();
  }

#pragma unroll
  for (int n = 0; n < KN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int s = row_of(e);
      const int k = 8 * KN * half + 8 * n + at.column;
      if (s >= c || k >= p.key_dim) continue;
      *reinterpret_cast<std::uint32_t*>(&out.q(token + s, key_head, k)) = pack2<T>(dq.x[n][2 * e], dq.x[n][2 * e + 1]);
      *reinterpret_cast<std::uint32_t*>(&out.k(token + s, key_head, k)) = pack2<T>(dk.x[n][2 * e], dk.x[n][2 * e + 1]);
    }
  }
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
