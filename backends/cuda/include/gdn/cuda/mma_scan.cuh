// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The delta rule's walk over a segment on tensor cores: the state stays in registers, transposed, as operand A.

#include <gdn/cuda/delta_rule.cuh>
#include <gdn/cuda/mma_gated.cuh>
#include <gdn/cuda/mma_pieces.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int scan_mma_threads = 128;

/// Shared memory of a walking block: two stages of what one chunk needs.
template <int Key, bool Queries>
struct scan_shared {
  static constexpr std::uint32_t keys = 0;
  static constexpr std::uint32_t values = keys + tile<Key>::bytes;  // or dO
  static constexpr std::uint32_t transfer = values + tile<mma_values>::bytes;
  static constexpr std::uint32_t decays = transfer + tile<mma_chunk>::bytes;
  static constexpr std::uint32_t queries = decays + 2 * mma_chunk * sizeof(float);
  static constexpr std::uint32_t scores = queries + (Queries ? tile<Key>::bytes : 0);
  static constexpr std::uint32_t stage = scores + (Queries ? tile<mma_chunk>::bytes : 0);
  static constexpr std::uint32_t bytes = 2 * stage;
};

/// What a walking block sees of one chunk.
template <int Key, bool Queries>
struct scan_stage {
  using shared = scan_shared<Key, Queries>;
  std::uint32_t base;
  const float* decay;  // e^c
  const float* rest;   // e^(c_C - c)

  __device__ scan_stage(unsigned char* tiles, int i) {
    unsigned char* at = tiles + (i % 2) * shared::stage;
    base = shared_address(at);
    decay = reinterpret_cast<const float*>(at + shared::decays);
    rest = decay + mma_chunk;
  }
  __device__ tile<Key> keys() const { return {base + shared::keys}; }
  __device__ tile<Key> queries() const { return {base + shared::queries}; }
  __device__ tile<mma_values> values() const { return {base + shared::values}; }
  __device__ tile<mma_chunk> transfer() const { return {base + shared::transfer}; }
  __device__ tile<mma_chunk> scores() const { return {base + shared::scores}; }
  __device__ float all() const { return decay[mma_chunk - 1]; }

  /// Starts to copy chunk `index` of all chunks, c tokens from `token` on; values are V or dO, or null for none.
  template <class T>
  __device__ void load(const delta_rule_problem<T, device_memory>& p, const delta_rule_inputs<T, device_memory>& in,
                       const gated_chunks<T>& gated, index_t index, index_t head, index_t token, int c,
                       const T* value_rows, index_t value_stride, int value_pieces) const {
    const index_t key_head = head / (p.value_heads / p.key_heads);
    const int key_pieces = pieces_from(p.key_dim, 0);
    const index_t place = index * p.value_heads + head;
    keys().template load<T, scan_mma_threads>(&in.k(token, key_head, 0), in.k.stride(0), c, key_pieces);
    if (value_rows != nullptr) {
      values().template load<T, scan_mma_threads>(value_rows, value_stride, c, value_pieces);
    }
    transfer().template load<T, scan_mma_threads>(gated.transfer + place * mma_chunk * mma_chunk, mma_chunk, mma_chunk,
                                                  mma_chunk / 8);
    if constexpr (Queries) {
      queries().template load<T, scan_mma_threads>(&in.q(token, key_head, 0), in.q.stride(0), c, key_pieces);
      scores().template load<T, scan_mma_threads>(gated.scores + place * mma_chunk * mma_chunk, mma_chunk, mma_chunk,
                                                  mma_chunk / 8);
    }
    const int t = static_cast<int>(threadIdx.x);
    if (t < 2 * mma_chunk / 4) {
      copy_async(base + shared::decays + static_cast<std::uint32_t>(16 * t),
                 gated.decays + place * 2 * mma_chunk + 4 * t, true);
    }
    commit_copies();
  }
};

/// A warp's 16 columns of V of a state, transposed: result n holds columns 8 n .. of K.
template <int Key>
struct state_columns {
  float S[Key / 8][4];

  /// f(k, v) of every element, v counted from the warp's first column.
  template <class F>
  __device__ void for_each(F&& f) {
    const quad_place at;
#pragma unroll
    for (int n = 0; n < Key / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(S[n][e], 8 * n + at.column + e % 2, at.row + e / 2 * 8);
    }
  }
  /// [V][Key] in 16 bits.
  template <class T>
  __device__ void store(T* to) const {
    const quad_place at;
#pragma unroll
    for (int n = 0; n < Key / 8; ++n) {
      T* place = to + at.row * Key + 8 * n + at.column;
      *reinterpret_cast<std::uint32_t*>(place) = pack2<T>(S[n][0], S[n][1]);
      *reinterpret_cast<std::uint32_t*>(place + 8 * Key) = pack2<T>(S[n][2], S[n][3]);
    }
  }
  __device__ void scale(float by) {
#pragma unroll
    for (int n = 0; n < Key / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) S[n][e] *= by;
    }
  }
  /// S^T += A^T B for the tokens of operand `a` (16 k ..) and rows of a tile [tokens][K].
  template <class T>
  __device__ void add_product(const std::uint32_t (&a)[4], tile<Key> rows, int k) {
#pragma unroll
    for (int n = 0; n < Key / 16; ++n) {
      std::uint32_t b[4];
      ldmatrix_transposed(b, rows.b_transposed(16 * k, 2 * n));
      mma<T>(S[2 * n], a, b[0], b[1]);
      mma<T>(S[2 * n + 1], a, b[2], b[3]);
    }
  }
};

/// Operand A of columns [column, column + 16) of V for tokens 16 k .. of a tile [tokens][V].
__device__ inline void load_columns(std::uint32_t (&a)[4], tile<mma_values> values, int column, int k) {
  const int l = static_cast<int>(threadIdx.x % 32);
  ldmatrix_transposed(a, values.at(16 * k + l / 16 * 8 + l % 8, column / 8 + l / 8 % 2));
}

/// Writes a warp's 16 x 64 results, columns of V by tokens, as rows of global memory, through the warp's own columns
/// of a tile that nobody reads any more: pieces of 16 bytes. `to` is (first token, the block's first column).
template <class T>
__device__ void store_columns(const float (&results)[8][4], tile<mma_values> through, int column, T* to, index_t stride,
                              int valid_rows, int valid_pieces) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    std::uint32_t r[4];
    pack_operand<T>(r, results[2 * n], results[2 * n + 1]);
    stmatrix_transposed(through.at(16 * n + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2), r);
  }
  __syncwarp();
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int s = (lane + 32 * e) / 2;
    const int piece = column / 8 + lane % 2;
    if (s < valid_rows && piece < valid_pieces) {
      *reinterpret_cast<uint4*>(to + s * stride + 8 * piece) = load_shared16(through.at(s, piece));
    }
  }
}

/// Walks over the chunks of (piece, value head, 64 columns of V). A warp owns 16 columns all along: its part of S^T
/// [16, K] stays in its accumulators, and is operand A of all products with the state:
///   U^T = S^T K^T;  W^T = V^T - U^T diag(e^c);  D^T = W^T T^T;  O^T = S^T Q^T diag(scale e^c) + D^T P^T;
///   S^T <- e^(c_C) S^T + D^T diag(e^(c_C - c)) K.
/// Results become operands without a shuffle, so warps meet only when a stage has arrived and when it is free again.
/// The transition of a piece is what its walk makes of the identity where V is zero.
template <class T, int Key, scan Mode>
__device__ void walk(const delta_rule_problem<T, device_memory>& p, const delta_rule_inputs<T, device_memory>& in,
                     const gated_chunks<T>& gated, const piece& part, index_t head, index_t column,
                     unsigned char* tiles, state_columns<Key>& state, const tensor_ref<T, 3, device_memory>& o,
                     T* states) {
  constexpr bool output = Mode == scan::output;
  constexpr bool has_values = Mode != scan::transition;
  using stage_type = scan_stage<Key, output>;

  const rule_segment& segment = part.segment;
  const int value_pieces = has_values ? pieces_from(p.value_dim, column) : 0;
  const int v0 = 16 * static_cast<int>(threadIdx.x / 32);  // the warp's columns, of the block's
  const quad_place at;
  const auto load_chunk = [&](int i) {
    const index_t token = segment.begin + static_cast<index_t>(i) * mma_chunk;
    stage_type(tiles, i).template load<T>(
        p, in, gated, segment.chunk_begin + i, head, token, tokens_of_chunk(segment, i),
        has_values ? &in.v(token, head, column) : nullptr, in.v.stride(0), value_pieces);
  };

  load_chunk(part.begin);
  for (int i = part.begin; i < part.end; ++i) {
    if constexpr (Mode == scan::states) {
      const index_t values = mma_blocks(p.value_dim) * mma_values;
      state.store(states + (((segment.chunk_begin + i) * p.value_heads + head) * values + column + v0) * Key);
      if (i + 1 == part.end) break;
    }
    wait_copies<0>();
    __syncthreads();  // chunk i is here, and chunk i - 1 is not read any more
    if (i + 1 < part.end) load_chunk(i + 1);
    const stage_type now(tiles, i);
    const tile<Key> keys = now.keys();
    const tile<mma_values> values = now.values();

    // U^T and, of the same operand, S^T Q^T.
    float U[8][4] = {};
    float O[8][4] = {};
#pragma unroll
    for (int k = 0; k < Key / 16; ++k) {
      std::uint32_t a[4];
      pack_operand<T>(a, state.S[2 * k], state.S[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t b[4];
        ldmatrix(b, keys.b(16 * n, 2 * k));
        mma<T>(U[2 * n], a, b[0], b[1]);
        mma<T>(U[2 * n + 1], a, b[2], b[3]);
        if constexpr (output) {
          ldmatrix(b, now.queries().b(16 * n, 2 * k));
          mma<T>(O[2 * n], a, b[0], b[1]);
          mma<T>(O[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
    // W^T as operands over tokens.
    std::uint32_t W[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t v[4] = {};
      if constexpr (has_values) load_columns(v, values, v0, n);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float d0 = now.decay[16 * n + 8 * h + at.column];
        const float d1 = now.decay[16 * n + 8 * h + at.column + 1];
        const float2 low = unpack2<T>(v[2 * h]);
        const float2 high = unpack2<T>(v[2 * h + 1]);
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
        ldmatrix(b, now.transfer().b(16 * n, 2 * k));
        mma<T>(D[2 * n], W[k], b[0], b[1]);
        mma<T>(D[2 * n + 1], W[k], b[2], b[3]);
      }
    }
    if constexpr (output) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float d0 = p.scale * now.decay[8 * n + at.column];
        const float d1 = p.scale * now.decay[8 * n + at.column + 1];
        O[n][0] *= d0;
        O[n][1] *= d1;
        O[n][2] *= d0;
        O[n][3] *= d1;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        std::uint32_t a[4];
        pack_operand<T>(a, D[2 * k], D[2 * k + 1]);
#pragma unroll
        for (int n = k; n < 4; ++n) {
          std::uint32_t b[4];
          ldmatrix(b, now.scores().b(16 * n, 2 * k));
          mma<T>(O[2 * n], a, b[0], b[1]);
          mma<T>(O[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
    state.scale(now.all());
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      std::uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float r0 = now.rest[16 * k + 8 * h + at.column];
        const float r1 = now.rest[16 * k + 8 * h + at.column + 1];
        a[2 * h] = pack2<T>(r0 * D[2 * k + h][0], r1 * D[2 * k + h][1]);
        a[2 * h + 1] = pack2<T>(r0 * D[2 * k + h][2], r1 * D[2 * k + h][3]);
      }
      state.template add_product<T>(a, keys, k);
    }
    if constexpr (output) {
      store_columns<T>(O, values, v0, &o(segment.begin + static_cast<index_t>(i) * mma_chunk, head, column),
                       o.stride(0), tokens_of_chunk(segment, i), value_pieces);
    }
  }
}

/// The part of a state that a warp walks with, from where it lies in float.
template <int Key>
__device__ void read_state(state_columns<Key>& state, const state_source& from, index_t key_dim, index_t columns,
                           index_t column) {
  state.for_each([&](float& x, int k, int v) {
    const index_t j = column + v;
    x = !from.none() && k < key_dim && j < columns ? from(k, j) : 0.0f;
  });
}
template <int Key>
__device__ void write_state(state_columns<Key>& state, float* to, index_t row, index_t stride, index_t key_dim,
                            index_t columns, index_t column) {
  state.for_each([&](float& x, int k, int v) {
    const index_t j = column + v;
    if (k < key_dim && j < columns) to[k * row + j * stride] = x;
  });
}

/// Outputs and final states, or the states before all chunks, from the states before all pieces.
template <class T, int Key, scan Mode>
__global__ void __launch_bounds__(scan_mma_threads, 2)
    scan_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in,
                    gated_chunks<T> gated, segment_pieces pieces, scan_targets<T> to, T* states) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  const flat_place block(mma_blocks(p.value_dim), p.value_heads);
  const piece part(p.segments, pieces, block.z);
  if (part.empty()) return;
  const index_t column = block.x * mma_values;
  const index_t head = block.y;
  const index_t own = column + 16 * static_cast<index_t>(threadIdx.x / 32);
  const state_source start =
      part.first() ? state_source(to.h0, part.segment.h0, head)
                   : state_source(pieces.between + ((part.unit - 1) * p.value_heads + head) * p.key_dim * p.value_dim,
                                  p.value_dim);
  state_columns<Key> state;
  read_state(state, start, p.key_dim, p.value_dim, own);
  walk<T, Key, Mode>(p, in, gated, part, head, column, tiles, state, to.o, states);
  if constexpr (Mode == scan::output) {
    if (!part.last() || part.segment.ht < 0 || to.ht.data() == nullptr) return;
    write_state(state, &to.ht(part.segment.ht, head, 0, 0), to.ht.stride(2), to.ht.stride(3), p.key_dim, p.value_dim,
                own);
  }
}

/// E and M: of published segments, or of the pieces of all segments. Blocks of columns of E come first, then those of
/// M.
/// @param chained E of a first piece starts from zero, not from the given state, and no piece is left out: others
///                will compose them
template <class T, int Key>
__global__ void __launch_bounds__(scan_mma_threads, 2)
    summary_mma_kernel(delta_rule_problem<T, device_memory> p, delta_rule_inputs<T, device_memory> in,
                       gated_chunks<T> gated, segment_pieces pieces, scan_targets<T> to, bool chained) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  const flat_place block(mma_blocks(p.value_dim) + mma_blocks(p.key_dim), p.value_heads);
  const index_t head = block.y;
  const auto [of_bias, columns, column] = summary_columns(block.x, mma_values, p.key_dim, p.value_dim);
  const index_t own = column + 16 * static_cast<index_t>(threadIdx.x / 32);

  published_summary entry{};
  if (!pieces.cut()) entry = to.table(block.z);
  const piece part = pieces.cut() ? piece(p.segments, pieces, block.z) : piece(p.segments(entry.segment));
  float* target;
  state_source start;
  if (pieces.cut()) {
    if (part.empty() || (!chained && (part.last() || (!of_bias && part.first())))) return;
    target = (of_bias ? pieces.biases : pieces.transitions) + part.unit * p.value_heads * p.key_dim * columns;
    if (!chained && part.first()) start = state_source(to.h0, part.segment.h0, head);
  } else {
    if (!of_bias && entry.transition < 0) return;
    target = to.summaries + (of_bias ? entry.bias : entry.transition);
    start = state_source(to.h0, entry.start, head);
  }

  state_columns<Key> state;
  if (of_bias) {
    read_state(state, start, p.key_dim, p.value_dim, own);
    walk<T, Key, scan::bias>(p, in, gated, part, head, column, tiles, state, {}, nullptr);
  } else {
    state.for_each([&](float& x, int k, int v) { x = k == own + v ? 1.0f : 0.0f; });
    walk<T, Key, scan::transition>(p, in, gated, part, head, column, tiles, state, {}, nullptr);
  }
  write_state(state, target + head * p.key_dim * columns, columns, 1, p.key_dim, columns, own);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
