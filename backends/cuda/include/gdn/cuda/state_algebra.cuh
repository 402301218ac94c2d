// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The algebra of summaries in IEEE float: S <- M S + E, for blocks of columns, which are independent.

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/cuda/detail/launch.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int algebra_threads = 256;
inline constexpr int algebra_columns = 16;

/// Sixteen columns X [K, 16] of a state or a transition in shared memory. A thread holds eight of them for one row of
/// 128. M passes by in slabs of a few columns, four of them under way.
/// @tparam Keys 128 or 256, K at most
template <int Keys>
struct algebra_block {
  static constexpr int slab = 2048 / Keys;
  static constexpr int ahead = 4;
  static constexpr int per_thread = slab * Keys / algebra_threads;

  alignas(16) float X[Keys][algebra_columns];
  float M[2][slab][Keys + 1];

  /// X <- f(row, column).
  template <class F>
  __device__ void set(index_t K, F&& f) {
    for (int e = static_cast<int>(threadIdx.x); e < K * algebra_columns; e += algebra_threads) {
      X[e / algebra_columns][e % algebra_columns] = f(e / algebra_columns, e % algebra_columns);
    }
    __syncthreads();
  }
  /// f(row, column, X) for n columns.
  template <class F>
  __device__ void for_each(index_t K, int n, F&& f) const {
    for (int e = static_cast<int>(threadIdx.x); e < K * algebra_columns; e += algebra_threads) {
      const int j = e % algebra_columns;
      if (j < n) f(e / algebra_columns, j, X[e / algebra_columns][j]);
    }
  }
  /// to[row, column] <- X for n columns; rows lie `stride` apart.
  __device__ void write(float* to, index_t stride, index_t K, int n) const {
    for_each(K, n, [&](index_t row, int j, float x) { to[row * stride + j] = x; });
  }

  /// X <- M X + E, or M^T X + E.
  /// @param transition [K, K]
  /// @param bias       (0, first column) of E, whose rows lie `stride` apart; null for none
  template <bool Transposed>
  __device__ void apply(const float* transition, const float* bias, index_t stride, index_t K, int n) {
    const int t = static_cast<int>(threadIdx.x);
    const int size = static_cast<int>(K);
    const int slabs = (size + slab - 1) / slab;
    const int first = t / 128 * 8;  // column
    float next[ahead][per_thread];
    // Element i of this thread's part of a slab: neighbouring threads read neighbouring elements of M.
    const auto row_of = [&](int i) {
      const int e = i * algebra_threads + t;
      return Transposed ? e % Keys : e / slab;
    };
    const auto key_of = [&](int i) {
      const int e = i * algebra_threads + t;
      return Transposed ? e / Keys : e % slab;
    };
    const auto fetch = [&](float(&to)[per_thread], int s) {
#pragma unroll
      for (int i = 0; i < per_thread; ++i) {
        const int row = row_of(i);
        const int k = s * slab + key_of(i);
        to[i] = row < size && k < size ? transition[Transposed ? k * K + row : row * K + k] : 0.0f;
      }
    };
    float sum[Keys / 128][8];
#pragma unroll
    for (int h = 0; h < Keys / 128; ++h) {
      const int row = t % 128 + 128 * h;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum[h][j] = bias != nullptr && row < size && first + j < n ? bias[row * stride + first + j] : 0.0f;
      }
    }
#pragma unroll
    for (int a = 0; a < ahead; ++a) fetch(next[a], a);
    for (int begin = 0; begin < slabs; begin += ahead) {
#pragma unroll
      for (int a = 0; a < ahead; ++a) {
        const int s = begin + a;
        if (s >= slabs) break;
#pragma unroll
        for (int i = 0; i < per_thread; ++i) M[a % 2][key_of(i)][row_of(i)] = next[a][i];
        __syncthreads();  // and nobody reads the slab before the last any more
        fetch(next[a], s + ahead);
#pragma unroll
        for (int k = 0; k < slab; ++k) {
          if (s * slab + k >= size) break;
          const float4 low = *reinterpret_cast<const float4*>(&X[s * slab + k][first]);
          const float4 high = *reinterpret_cast<const float4*>(&X[s * slab + k][first + 4]);
          const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int h = 0; h < Keys / 128; ++h) {
            const float m = M[a % 2][k][t % 128 + 128 * h];
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[h][j] += m * x[j];
          }
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < Keys / 128; ++h) {
      const int row = t % 128 + 128 * h;
      if (row >= size) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) X[row][first + j] = sum[h][j];
    }
    __syncthreads();
  }
};

/// A state of one head, or none (zero): element (k, j) lies at k * row + j * column.
struct state_source {
  const float* data = nullptr;
  index_t row = 0, column = 1;

  state_source() = default;
  __device__ state_source(const float* at, index_t columns) : data(at), row(columns) {}
  __device__ state_source(const tensor_ref<const float, 4, device_memory>& states, std::int32_t place, index_t head) {
    if (place < 0 || states.data() == nullptr) return;
    data = &states(place, head, 0, 0);
    row = states.stride(2);
    column = states.stride(3);
  }
  __device__ bool none() const { return data == nullptr; }
  __device__ float operator()(index_t k, index_t j) const { return data[k * row + j * column]; }
};

/// Columns [column, column + n) of a state that is there, zero beyond.
__device__ inline auto columns_of(const state_source& from, index_t column, int n) {
  return [=](index_t row, int j) { return j < n ? from(row, column + j) : 0.0f; };
}
__device__ inline int columns_from(index_t columns, index_t column) {
  return static_cast<int>(columns - column < algebra_columns ? columns - column : algebra_columns);
}

/// Which columns of a summary a block has: blocks of `width` columns of E [K, V] come first, then those of M [K, K].
struct summary_columns {
  bool of_bias;
  index_t columns;  // in all
  index_t first;    // of the block's

  __device__ summary_columns(index_t block, index_t width, index_t K, index_t V) {
    const index_t of_values = (V + width - 1) / width;
    of_bias = block < of_values;
    columns = of_bias ? V : K;
    first = (block - (of_bias ? 0 : of_values)) * width;
  }
};
__host__ __device__ inline index_t algebra_blocks(index_t columns) {
  return divide_up(columns, algebra_columns);
}

/// A block composes some columns of E, or of M behind those.
template <class A, int Keys>
__global__ void __launch_bounds__(algebra_threads)
    compose_kernel(index_t heads, index_t K, index_t V, const compose_item* items, A* buffer) {
  __shared__ algebra_block<Keys> block;
  const auto [x, h, z] = flat_place(algebra_blocks(V) + algebra_blocks(K), heads);
  const compose_item e = items[z];
  const auto [of_bias, columns, column] = summary_columns(x, algebra_columns, K, V);
  if (!of_bias && e.transition < 0) return;
  const int width = columns_from(columns, column);
  const auto at = [&](index_t place, index_t row) { return buffer + place + h * K * row; };
  const state_source earlier(at(of_bias ? e.earlier_bias : e.earlier_transition, columns), columns);
  block.set(K, columns_of(earlier, column, width));
  block.template apply<false>(at(e.later_transition, K), of_bias ? at(e.later_bias, V) + column : nullptr, V, K, width);
  block.write(at(of_bias ? e.bias : e.transition, columns) + column, columns, K, width);
}

/// A block folds some columns.
template <class A, int Keys>
__global__ void __launch_bounds__(algebra_threads)
    fold_kernel(index_t heads, index_t K, index_t V, const fold_item* items, const fold_link* links, const A* summaries,
                tensor_ref<A, 4, device_memory> states) {
  __shared__ algebra_block<Keys> block;
  const auto [x, h, z] = flat_place(algebra_blocks(V), heads);
  const fold_item e = items[z];
  const index_t column = x * algebra_columns;
  const int n = columns_from(V, column);
  const auto bias = [&](index_t i) { return summaries + links[i].bias + h * K * V; };
  block.set(K, columns_of({bias(e.begin), V}, column, n));
  for (index_t i = e.begin + 1; i < e.begin + e.count; ++i) {
    block.template apply<false>(summaries + links[i].transition + h * K * K, bias(i) + column, V, K, n);
  }
  block.for_each(K, n, [&](index_t row, int j, float x) { states(e.target, h, row, column + j) = x; });
}

inline void compose(index_t heads, index_t K, index_t V, tensor_ref<const compose_item, 1, device_memory> items,
                    tensor_ref<float, 1, device_memory> summaries, stream_ref s) {
  launch("compose", K <= 128 ? compose_kernel<float, 128> : compose_kernel<float, 256>,
         flat_grid(algebra_blocks(V) + algebra_blocks(K), heads, items.extent(0)), algebra_threads, 0, s, heads, K, V,
         items.data(), summaries.data());
}

inline void fold(index_t heads, index_t K, index_t V, tensor_ref<const fold_item, 1, device_memory> items,
                 tensor_ref<const fold_link, 1, device_memory> links, in_ref<float, 1> summaries,
                 tensor_ref<float, 4, device_memory> states, stream_ref s) {
  launch("fold", K <= 128 ? fold_kernel<float, 128> : fold_kernel<float, 256>,
         flat_grid(algebra_blocks(V), heads, items.extent(0)), algebra_threads, 0, s, heads, K, V, items.data(),
         links.data(), summaries.data(), states);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
