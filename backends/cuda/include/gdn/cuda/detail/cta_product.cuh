// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Matrix products of one thread block in IEEE float, for matrices that lie in global memory (in cache).

#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

inline constexpr int cta_threads = 256;

/// A row-major float matrix, or its transpose.
struct cta_matrix {
  const float* data;
  index_t stride;
  bool transpose = false;
  __device__ float operator()(index_t i, index_t j) const {
    return transpose ? data[j * stride + i] : data[i * stride + j];
  }
};

/// f(i) for i in [0, n), by all threads of the block; then they wait for each other.
template <class F>
__device__ void cta_for(index_t n, F&& f) {
  for (index_t i = threadIdx.x; i < n; i += cta_threads) f(i);
  __syncthreads();
}

/// c [rows, columns] = a b, or c += a b. Every thread of the block calls it, with the operands complete; on return the
/// result is. Sums run over the inner index in order.
__device__ __noinline__ inline void cta_product(index_t rows, index_t columns, index_t depth, cta_matrix a, cta_matrix b, float* c,
                                   index_t c_stride, bool add) {
  constexpr int tile = 64;
  constexpr int step = 16;
  __shared__ float as[step][tile + 4];
  __shared__ float bs[step][tile + 4];
  const int x = static_cast<int>(threadIdx.x % 16) * 4;
  const int y = static_cast<int>(threadIdx.x / 16) * 4;
  for (index_t i0 = 0; i0 < rows; i0 += tile) {
    for (index_t j0 = 0; j0 < columns; j0 += tile) {
      float sum[4][4] = {};
      for (index_t k0 = 0; k0 < depth; k0 += step) {
        for (int e = static_cast<int>(threadIdx.x); e < tile * step; e += cta_threads) {
          // Neighbouring threads read neighbouring addresses, whichever way the operand lies.
          const int ia = a.transpose ? e % tile : e / step;
          const int ka = a.transpose ? e / tile : e % step;
          as[ka][ia] = i0 + ia < rows && k0 + ka < depth ? a(i0 + ia, k0 + ka) : 0.0f;
          const int jb = b.transpose ? e / step : e % tile;
          const int kb = b.transpose ? e % step : e / tile;
          bs[kb][jb] = j0 + jb < columns && k0 + kb < depth ? b(k0 + kb, j0 + jb) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < step; ++k) {
          float av[4];
          float bv[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) av[i] = as[k][y + i];
#pragma unroll
          for (int j = 0; j < 4; ++j) bv[j] = bs[k][x + j];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] += av[i] * bv[j];
          }
        }
        __syncthreads();
      }
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
          if (i0 + y + i < rows && j0 + x + j < columns) {
            float& target = c[(i0 + y + i) * c_stride + j0 + x + j];
            target = add ? target + sum[i][j] : sum[i][j];
          }
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
