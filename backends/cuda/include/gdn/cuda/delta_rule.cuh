// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gated delta rule on the device in IEEE float, for any sizes: thread blocks walk over chunks.

#include <cstdint>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/cuda/detail/cta_product.cuh>
#include <gdn/cuda/detail/launch.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr index_t max_chunk = 128;
/// State columns that one block carries: columns are independent, so V is split where there are few heads.
inline constexpr index_t scan_columns = 32;

/// One chunk of c <= C tokens of one (segment, value head), in the gate-factored form: see docs/kernels.md. Its
/// matrices lie in the block's own scratch.
template <class T>
struct cta_chunk {
  const delta_rule_problem<T, device_memory>& p;
  const delta_rule_inputs<T, device_memory>& in;
  index_t head = 0;
  index_t token = 0;  // the chunk's first row
  index_t c = 0;
  float* X;                                       // [c, c] the chunk's inverse
  float *K, *Q;                                   // [c, K]
  float *G, *Tm, *P;                              // [c, c] lower triangular
  float *U, *W, *D, *O;                           // [c, n] for n <= V columns
  float *decay, *rest, *beta;                     // [c] e^c, e^(c_C - c)
  float* end;                                     // of the scratch

  static constexpr index_t elements(index_t C, index_t K, index_t n) {
    return 2 * C * K + 4 * C * C + 4 * C * n + 3 * C;
  }

  __device__ cta_chunk(const delta_rule_problem<T, device_memory>& problem,
                       const delta_rule_inputs<T, device_memory>& inputs, float* scratch, index_t n)
      : p(problem), in(inputs) {
    const index_t C = p.chunk;
    const auto take = [&](index_t count) {
      float* at = scratch;
      scratch += count;
      return at;
    };
    K = take(C * p.key_dim);
    Q = take(C * p.key_dim);
    G = take(C * C);
    Tm = take(C * C);
    P = take(C * C);
    X = take(C * C);
    U = take(C * n);
    W = take(C * n);
    D = take(C * n);
    O = take(C * n);
    decay = take(C);
    rest = take(C);
    beta = take(C);
    end = scratch;
  }

  /// Loads chunk `index` of a segment, with decays and T = (G o X) diag(beta); with queries, P = scale (Q K^T) o G.
  __device__ void load(const rule_segment& segment, index_t value_head, const T* prepared, index_t index,
                       bool queries) {
    __shared__ double cumulative[max_chunk];
    const index_t C = p.chunk;
    head = value_head;
    token = segment.begin + index * C;
    c = segment.count - index * C < C ? segment.count - index * C : C;
    const T* inverse = prepared + ((segment.chunk_begin + index) * p.value_heads + head) * C * C;
    const index_t key_head = head / (p.value_heads / p.key_heads);
    __syncthreads();
    if (threadIdx.x == 0) {
      double sum = 0;
      for (index_t s = 0; s < c; ++s) cumulative[s] = sum += static_cast<double>(in.g(token + s, head));
    }
    __syncthreads();
    cta_for(c, [&](index_t s) {
      decay[s] = expf(static_cast<float>(cumulative[s]));
      rest[s] = expf(static_cast<float>(cumulative[c - 1] - cumulative[s]));
      beta[s] = static_cast<float>(in.beta(token + s, head));
    });
    cta_for(c * p.key_dim, [&](index_t i) {
      K[i] = static_cast<float>(in.k(token + i / p.key_dim, key_head, i % p.key_dim));
      if (queries) Q[i] = static_cast<float>(in.q(token + i / p.key_dim, key_head, i % p.key_dim));
    });
    cta_for(c * c, [&](index_t i) {
      const index_t s = i / c;
      const index_t t = i % c;
      // Selected, not multiplied: above the diagonal the exponential may be infinite.
      const float g = t <= s ? expf(static_cast<float>(cumulative[s] - cumulative[t])) : 0.0f;
      G[i] = g;
      X[i] = static_cast<float>(inverse[s * C + t]);
      Tm[i] = t <= s ? g * X[i] * beta[t] : 0.0f;
    });
    if (!queries) return;
    cta_product(c, c, p.key_dim, {Q, p.key_dim}, {K, p.key_dim, true}, P, c, false);
    cta_for(c * c, [&](index_t i) { P[i] *= p.scale * G[i]; });
  }

  /// U = K S, W = V - diag(e^c) U, D = T W for n columns of V from `column` on; without values V is zero.
  __device__ void solve(const float* S, index_t S_stride, index_t n, index_t column, bool values) {
    cta_product(c, n, p.key_dim, {K, p.key_dim}, {S, S_stride}, U, n, false);
    cta_for(c * n, [&](index_t i) {
      const index_t s = i / n;
      const float v = values ? static_cast<float>(in.v(token + s, head, column + i % n)) : 0.0f;
      W[i] = v - decay[s] * U[i];
    });
    cta_product(c, n, c, {Tm, c}, {W, n}, D, n, false);
  }

  /// S <- e^(c_C) S + K^T diag(e^(c_C - c)) D. Spoils D.
  __device__ void advance(float* S, index_t S_stride, index_t n) {
    cta_for(c * n, [&](index_t i) { D[i] *= rest[i / n]; });
    const float all = decay[c - 1];
    cta_for(p.key_dim * n, [&](index_t i) { S[i / n * S_stride + i % n] *= all; });
    cta_product(p.key_dim, n, c, {K, p.key_dim, true}, {D, n}, S, S_stride, true);
  }

  /// Gradients of values: D <- dD = diag(e^(c_C - c)) K dS + P^T dO, W <- dW = T^T dD; O holds dO.
  __device__ void back_to_values(const float* dS, index_t dS_stride, index_t n, float* dD, float* dW) {
    cta_product(c, n, p.key_dim, {K, p.key_dim}, {dS, dS_stride}, dD, n, false);
    cta_for(c * n, [&](index_t i) { dD[i] *= rest[i / n]; });
    cta_product(c, n, c, {P, c, true}, {O, n}, dD, n, true);
    cta_product(c, n, c, {Tm, c, true}, {dD, n}, dW, n, false);
  }

  /// dS <- e^(c_C) dS + K^T dU + Q^T diag(scale e^c) dO. Leaves dU in dW and the decayed dO in O.
  __device__ void back_to_state(float* dS, index_t dS_stride, index_t n, float* dW) {
    const float all = decay[c - 1];
    cta_for(c * n, [&](index_t i) {
      dW[i] *= -decay[i / n];
      O[i] *= p.scale * decay[i / n];
    });
    cta_for(p.key_dim * n, [&](index_t i) { dS[i / n * dS_stride + i % n] *= all; });
    cta_product(p.key_dim, n, c, {K, p.key_dim, true}, {dW, n}, dS, dS_stride, true);
    cta_product(p.key_dim, n, c, {Q, p.key_dim, true}, {O, n}, dS, dS_stride, true);
  }

  __device__ void load_gradient(const tensor_ref<const T, 3, device_memory>& d_o, index_t n, index_t column) {
    cta_for(c * n, [&](index_t i) { O[i] = static_cast<float>(d_o(token + i / n, head, column + i % n)); });
  }
};

/// Blocks work through items in turn; the first `blocks` items start at once.
template <class F>
__device__ void for_each_item(index_t items, F&& f) {
  for (index_t i = blockIdx.x; i < items; i += gridDim.x) f(i);
}

/// X = (I + stril(diag(b) K K^T))^-1 of every chunk and value head, by forward substitution; kept in the layer's type.
template <class T>
__global__ void __launch_bounds__(cta_threads)
    prepare_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in, T* out,
                   float* scratch, index_t scratch_stride) {
  const index_t C = p.chunk;
  const index_t segments = p.segments.extent(0);
  float* K = scratch + blockIdx.x * scratch_stride;
  float* L = K + C * p.key_dim;
  float* X = L + C * C;
  for_each_item(p.chunks * p.value_heads, [&](index_t item) {
    const index_t at = item / p.value_heads;
    const index_t head = item % p.value_heads;
    index_t lo = 0;
    for (index_t hi = segments; hi - lo > 1;) {
      const index_t mid = (lo + hi) / 2;
      (p.segments(mid).chunk_begin <= at ? lo : hi) = mid;
    }
    const rule_segment segment = p.segments(lo);
    const index_t begin = (at - segment.chunk_begin) * C;
    const index_t c = segment.count - begin < C ? segment.count - begin : C;
    const index_t token = segment.begin + begin;
    const index_t key_head = head / (p.value_heads / p.key_heads);
    T* to = out + item * C * C;
    cta_for(c * p.key_dim, [&](index_t i) {
      K[i] = static_cast<float>(in.k(token + i / p.key_dim, key_head, i % p.key_dim));
    });
    cta_product(c, c, p.key_dim, {K, p.key_dim}, {K, p.key_dim, true}, L, c, false);
    for (index_t s = 0; s < c; ++s) {
      const float beta = static_cast<float>(in.beta(token + s, head));
      cta_for(c, [&](index_t j) {
        float sum = j == s ? 1.0f : 0.0f;
        for (index_t t = j; t < s; ++t) sum -= beta * L[s * c + t] * X[t * C + j];
        X[s * C + j] = j <= s ? sum : 0.0f;
        to[s * C + j] = static_cast<T>(X[s * C + j]);
      });
    }
  });
}

enum class scan : std::uint8_t { output, bias, transition, states };

/// Where a scan over a segment reads and writes.
template <class T>
struct scan_targets {
  const T* prepared;
  const_states_ref<T, device_memory> h0;
  tensor_ref<T, 3, device_memory> o;              // output
  states_ref<T, device_memory> ht;                // output
  tensor_ref<const published_summary, 1, device_memory> table;  // bias, transition
  float* summaries;
  float* states;                                  // states: [chunks, Hv, K, V] before each chunk
};

/// Walks over the chunks of (segment, head, block of columns), the state of those columns in scratch.
template <class T, scan Mode>
__global__ void __launch_bounds__(cta_threads)
    scan_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in, scan_targets<T> to,
                float* scratch, index_t scratch_stride) {
  constexpr bool summary = Mode == scan::bias || Mode == scan::transition;
  const index_t K = p.key_dim;
  const index_t columns = Mode == scan::transition ? K : p.value_dim;
  const index_t blocks = (columns + scan_columns - 1) / scan_columns;
  float* S = scratch + blockIdx.x * scratch_stride;
  cta_chunk<T> now(p, in, S + K * scan_columns, scan_columns);
  for_each_item((summary ? to.table.extent(0) : p.segments.extent(0)) * p.value_heads * blocks, [&](index_t item) {
    const index_t unit = item / blocks / p.value_heads;
    const index_t head = item / blocks % p.value_heads;
    const index_t column = item % blocks * scan_columns;
    const index_t n = columns - column < scan_columns ? columns - column : scan_columns;
    published_summary entry{};
    if constexpr (summary) entry = to.table(unit);
    if constexpr (Mode == scan::transition) {
      if (entry.transition < 0) return;
    }
    const rule_segment segment = p.segments(summary ? entry.segment : unit);
    const std::int32_t start = summary ? entry.start : segment.h0;
    cta_for(K * n, [&](index_t i) {
      const index_t row = i / n;
      const index_t col = column + i % n;
      if constexpr (Mode == scan::transition) {
        S[i] = row == col ? 1.0f : 0.0f;
      } else {
        S[i] = start >= 0 && to.h0.data() != nullptr ? to.h0(start, head, row, col) : 0.0f;
      }
    });
    const index_t chunks = (segment.count + p.chunk - 1) / p.chunk;
    for (index_t i = 0; i < chunks; ++i) {
      if constexpr (Mode == scan::states) {
        float* at = to.states + ((segment.chunk_begin + i) * p.value_heads + head) * K * p.value_dim;
        cta_for(K * n, [&](index_t e) { at[e / n * p.value_dim + column + e % n] = S[e]; });
        if (i + 1 == chunks) break;
      }
      now.load(segment, head, to.prepared, i, Mode == scan::output);
      now.solve(S, n, n, column, Mode != scan::transition);
      if constexpr (Mode == scan::output) {
        cta_product(now.c, n, K, {now.Q, K}, {S, n}, now.O, n, false);
        cta_for(now.c * n, [&](index_t e) { now.O[e] *= p.scale * now.decay[e / n]; });
        cta_product(now.c, n, now.c, {now.P, now.c}, {now.D, n}, now.O, n, true);
        cta_for(now.c * n, [&](index_t e) {
          to.o(now.token + e / n, head, column + e % n) = static_cast<T>(now.O[e]);
        });
      }
      now.advance(S, n, n);
    }
    if constexpr (Mode == scan::output) {
      if (segment.ht >= 0 && to.ht.data() != nullptr) {
        cta_for(K * n, [&](index_t i) { to.ht(segment.ht, head, i / n, column + i % n) = S[i]; });
      }
    } else if constexpr (summary) {
      const index_t place = Mode == scan::bias ? entry.bias : entry.transition;
      cta_for(K * n, [&](index_t i) {
        to.summaries[place + (head * K + i / n) * columns + column + i % n] = S[i];
      });
    }
    __syncthreads();
  });
}

/// Where a scan from the end of a segment to its begin reads and writes.
template <class T>
struct reverse_targets {
  const T* prepared;
  tensor_ref<const T, 3, device_memory> d_o;
  const_states_ref<T, device_memory> dht;
  tensor_ref<const published_summary, 1, device_memory> table;  // of summaries; else all segments
  float* summaries;
  float* states;                        // [chunks, Hv, K, V] gradient of the state after each chunk
  states_ref<T, device_memory> dh0;
};

template <class T, bool Summary>
__global__ void __launch_bounds__(cta_threads)
    reverse_scan_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in,
                        reverse_targets<T> to, float* scratch, index_t scratch_stride) {
  const index_t K = p.key_dim;
  const index_t V = p.value_dim;
  const index_t blocks = (V + scan_columns - 1) / scan_columns;
  float* dS = scratch + blockIdx.x * scratch_stride;
  cta_chunk<T> now(p, in, dS + K * scan_columns, scan_columns);
  for_each_item((Summary ? to.table.extent(0) : p.segments.extent(0)) * p.value_heads * blocks, [&](index_t item) {
    const index_t unit = item / blocks / p.value_heads;
    const index_t head = item / blocks % p.value_heads;
    const index_t column = item % blocks * scan_columns;
    const index_t n = V - column < scan_columns ? V - column : scan_columns;
    published_summary entry{};
    if constexpr (Summary) entry = to.table(unit);
    const rule_segment segment = p.segments(Summary ? entry.segment : unit);
    const std::int32_t start = Summary ? entry.start : segment.dht;
    cta_for(K * n, [&](index_t i) {
      dS[i] = start >= 0 && to.dht.data() != nullptr ? to.dht(start, head, i / n, column + i % n) : 0.0f;
    });
    for (index_t i = (segment.count + p.chunk - 1) / p.chunk - 1; i >= 0; --i) {
      if constexpr (!Summary) {
        float* at = to.states + ((segment.chunk_begin + i) * p.value_heads + head) * K * V;
        cta_for(K * n, [&](index_t e) { at[e / n * V + column + e % n] = dS[e]; });
        if (i == 0 && (segment.dh0 < 0 || to.dh0.data() == nullptr)) break;
      }
      now.load(segment, head, to.prepared, i, true);
      now.load_gradient(to.d_o, n, column);
      now.back_to_values(dS, n, n, now.D, now.W);
      now.back_to_state(dS, n, n, now.W);
    }
    if constexpr (Summary) {
      cta_for(K * n, [&](index_t i) {
        to.summaries[entry.bias + (head * K + i / n) * V + column + i % n] = dS[i];
      });
    } else if (segment.dh0 >= 0 && to.dh0.data() != nullptr) {
      cta_for(K * n, [&](index_t i) { to.dh0(segment.dh0, head, i / n, column + i % n) = dS[i]; });
    }
    __syncthreads();
  });
}

/// M^T of published segments from the tape.
template <class A>
__global__ void transpose_own_kernel(tensor_ref<const published_summary, 1, device_memory> table, index_t K,
                                     const A* own, A* summaries) {
  const published_summary e = table(blockIdx.x);
  if (e.transition < 0) return;
  const index_t h = blockIdx.y;
  for (index_t i = threadIdx.x; i < K * K; i += blockDim.x) {
    summaries[e.transition + h * K * K + i] = own[e.own_transition + h * K * K + i % K * K + i / K];
  }
}

/// The gradients of one chunk for all value heads of a key head, from the state before it and the gradient after it.
template <class T>
__global__ void __launch_bounds__(cta_threads)
    chunk_gradients_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in,
                           const T* prepared, const float* states, const float* d_states,
                           tensor_ref<const T, 3, device_memory> d_o, delta_rule_gradients<T, device_memory> out,
                           float* scratch, index_t scratch_stride) {
  const index_t K = p.key_dim;
  const index_t V = p.value_dim;
  const index_t C = p.chunk;
  const index_t segments = p.segments.extent(0);
  const index_t ratio = p.value_heads / p.key_heads;
  __shared__ double row_sum[max_chunk];
  __shared__ double key_sum[max_chunk];
  __shared__ double carried;
  cta_chunk<T> now(p, in, scratch + blockIdx.x * scratch_stride, V);
  float* at = now.end;
  const auto take = [&](index_t n) {
    float* p_at = at;
    at += n;
    return p_at;
  };
  float* dq = take(C * K);
  float* dk = take(C * K);
  float* dQ1 = take(C * K);
  float* dK1 = take(C * K);
  float* dD = take(C * V);
  float* dW = take(C * V);
  float* KK = take(C * C);
  float* dT = take(C * C);
  float* dP = take(C * C);
  float* dL = take(C * C);
  float* Z = take(C * C);
  for_each_item(p.chunks * p.key_heads, [&](index_t item) {
    const index_t index = item / p.key_heads;
    const index_t key_head = item % p.key_heads;
    index_t lo = 0;
    for (index_t hi = segments; hi - lo > 1;) {
      const index_t mid = (lo + hi) / 2;
      (p.segments(mid).chunk_begin <= index ? lo : hi) = mid;
    }
    const rule_segment segment = p.segments(lo);
    cta_for(2 * C * K, [&](index_t i) { dq[i] = 0.0f; });  // dq and dk
    for (index_t head = key_head * ratio; head < (key_head + 1) * ratio; ++head) {
      now.load(segment, head, prepared, index - segment.chunk_begin, true);
      const index_t c = now.c;
      const float* S = states + (index * p.value_heads + head) * K * V;
      const float* dS = d_states + (index * p.value_heads + head) * K * V;
      now.solve(S, V, V, 0, true);
      now.load_gradient(d_o, V, 0);
      now.back_to_values(dS, V, V, dD, dW);
      cta_for(c * V, [&](index_t i) { out.v(now.token + i / V, head, i % V) = static_cast<T>(dW[i]); });

      // Pairs (s, t) of the chunk.
      cta_product(c, c, K, {now.K, K}, {now.K, K, true}, KK, c, false);
      cta_product(c, c, V, {dD, V}, {now.W, V, true}, dT, c, false);
      cta_product(c, c, V, {now.O, V}, {now.D, V, true}, dP, c, false);
      cta_for(c * c, [&](index_t i) {
        if (i % c > i / c) dT[i] = dP[i] = 0.0f;
        Z[i] = dP[i] * now.P[i] + dT[i] * now.Tm[i];
      });

      // What leaves with the state and what comes with it.
      cta_product(c, K, V, {now.D, V}, {dS, V, true}, dK1, K, false);
      cta_for(c * K, [&](index_t i) { dK1[i] *= now.rest[i / K]; });
      cta_for(c * V, [&](index_t i) {
        dW[i] *= -now.decay[i / V];             // dU
        now.O[i] *= p.scale * now.decay[i / V];
      });
      cta_product(c, K, V, {now.O, V}, {S, V, true}, dQ1, K, false);

      // dg_t = carried + sum_{s>=t} (q_s dq1_s + du_s u_s) + sum_{j<t} k_j dk1_j + sum_{s>=t, j<t} Z_sj, summed as it
      // stands: the difference of row and column sums would cancel.
      const int warp = static_cast<int>(threadIdx.x / 32);
      const int lane = static_cast<int>(threadIdx.x % 32);
      for (index_t s = warp; s < c; s += cta_threads / 32) {
        double row = 0;
        double key = 0;
        for (index_t i = lane; i < K; i += 32) {
          row += static_cast<double>(now.Q[s * K + i]) * static_cast<double>(dQ1[s * K + i]);
          key += static_cast<double>(now.K[s * K + i]) * static_cast<double>(dK1[s * K + i]);
        }
        for (index_t j = lane; j < V; j += 32) {
          row += static_cast<double>(dW[s * V + j]) * static_cast<double>(now.U[s * V + j]);
        }
        row = warp_sum(row);
        key = warp_sum(key);
        if (lane == 0) {
          row_sum[s] = row;
          key_sum[s] = key;
        }
      }
      if (warp == 0) {
        double sum = 0;
        for (index_t i = lane; i < K * V; i += 32) sum += static_cast<double>(S[i]) * static_cast<double>(dS[i]);
        sum = warp_sum(sum);
        if (lane == 0) carried = sum * static_cast<double>(now.decay[c - 1]);
      }
      __syncthreads();
      cta_for(c, [&](index_t t) {
        double sum = carried;
        for (index_t s = t; s < c; ++s) {
          sum += row_sum[s];
          for (index_t j = 0; j < t; ++j) sum += static_cast<double>(Z[s * c + j]);
        }
        for (index_t j = 0; j < t; ++j) sum += key_sum[j];
        out.g(now.token + t, head) = static_cast<float>(sum);
      });

      // beta, through T = (G o X) diag(b) and through L = stril(diag(b) K K^T).
      cta_for(c * c, [&](index_t i) { dT[i] *= now.G[i]; });
      cta_for(c, [&](index_t t) {
        double sum = 0;
        for (index_t s = t; s < c; ++s) {
          sum += static_cast<double>(dT[s * c + t]) * static_cast<double>(now.X[s * c + t]);
        }
        row_sum[t] = sum;
      });
      cta_for(c * c, [&](index_t i) { dT[i] *= now.beta[i % c]; });  // dX
      cta_product(c, c, c, {now.X, c, true}, {dT, c}, Z, c, false);
      cta_product(c, c, c, {Z, c}, {now.X, c, true}, dL, c, false);
      cta_for(c * c, [&](index_t i) { dL[i] = i % c < i / c ? -dL[i] : 0.0f; });
      cta_for(c, [&](index_t s) {
        double sum = row_sum[s];
        for (index_t t = 0; t < s; ++t) {
          sum += static_cast<double>(dL[s * c + t]) * static_cast<double>(KK[s * c + t]);
        }
        out.beta(now.token + s, head) = static_cast<float>(sum);
      });
      cta_for(c * c, [&](index_t i) {
        dL[i] *= now.beta[i / c];  // E
        dP[i] *= p.scale * now.G[i];
      });

      cta_for(c * K, [&](index_t i) {
        dq[i] += dQ1[i];
        dk[i] += dK1[i];
      });
      cta_product(c, K, c, {dP, c}, {now.K, K}, dq, K, true);
      cta_product(c, K, V, {dW, V}, {S, V, true}, dk, K, true);
      cta_product(c, K, c, {dP, c, true}, {now.Q, K}, dk, K, true);
      cta_product(c, K, c, {dL, c}, {now.K, K}, dk, K, true);
      cta_product(c, K, c, {dL, c, true}, {now.K, K}, dk, K, true);
    }
    cta_for(now.c * K, [&](index_t i) {
      out.q(now.token + i / K, key_head, i % K) = static_cast<T>(dq[i]);
      out.k(now.token + i / K, key_head, i % K) = static_cast<T>(dk[i]);
    });
  });
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
