// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Tensor core products of one warp, and the shared-memory tiles they read.

#include <cstdint>

#include <gdn/core/storage.hpp>
#include <gdn/core/types.hpp>
#include <gdn/cuda/detail/async_copy.cuh>
#include <gdn/cuda/detail/async_copy.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// D (16 x 8) += A (16 x 16) B (16 x 8), 16-bit operands, float sums (mma.sync m16n8k16). A thread holds of a 16 x 8
/// result the elements (lane / 4 [+ 8], 2 (lane % 4) [+ 1]): d[0], d[1] in the upper row, d[2], d[3] in the lower.
template <class T>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <>
__device__ inline void mma<bfloat16>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<float16>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two floats rounded to one register, the first in the lower half.
template <class T>
__device__ inline std::uint32_t pack2(float low, float high);
template <>
__device__ inline std::uint32_t pack2<bfloat16>(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ inline std::uint32_t pack2<float16>(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class T>
__device__ inline float2 unpack2(std::uint32_t v) {
  T low, high;
  low.bits = static_cast<std::uint16_t>(v);
  high.bits = static_cast<std::uint16_t>(v >> 16);
  return {static_cast<float>(low), static_cast<float>(high)};
}

/// Four 8 x 8 blocks of 16-bit elements; lane l names row l % 8 of block l / 8. Untransposed, a thread receives
/// (lane / 4, 2 (lane % 4) ..) of each block: operand A from a row-major tile, operand B from one that lies [n][k].
__device__ inline void ldmatrix(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void ldmatrix_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// A tile [64 rows][Columns] of 16-bit elements in shared memory. Pieces of 16 bytes are permuted within a row by the
/// row's number, so that ldmatrix meets no bank twice.
template <int Columns>
struct tile {
  static constexpr int pieces = Columns / 8;
  static constexpr int bytes = 64 * Columns * 2;
  std::uint32_t base;

  __device__ std::uint32_t at(int row, int piece) const {
    return base + static_cast<std::uint32_t>(row * (Columns * 2) + ((piece ^ (row & 7)) << 4));
  }
  /// Block l / 8, row l % 8 of an operand A of rows [row, row + 16), inner pieces [piece, piece + 2).
  __device__ std::uint32_t a(int row, int piece) const {
    const int l = static_cast<int>(threadIdx.x % 32);
    return at(row + (l / 8 % 2) * 8 + l % 8, piece + l / 16);
  }
  /// Of operands B that lie [n][k]: n in [row, row + 16), k in pieces [piece, piece + 2): b0, b1 of two results.
  __device__ std::uint32_t b(int row, int piece) const {
    const int l = static_cast<int>(threadIdx.x % 32);
    return at(row + l / 16 * 8 + l % 8, piece + l / 8 % 2);
  }
  /// Of operands B that lie [k][n] (transposed load): k in [row, row + 16), n in pieces [piece, piece + 2).
  __device__ std::uint32_t b_transposed(int row, int piece) const {
    return a(row, piece);
  }
  /// Of an operand A that lies [k][row] (transposed load): k in [k, k + 16), rows in pieces [piece, piece + 2).
  __device__ std::uint32_t a_transposed(int k, int piece) const {
    return b(k, piece);
  }
  /// Loads rows of global memory, `stride` elements apart; from the given row and piece on it becomes zero.
  template <class T, int Threads>
  __device__ void load(const T* from, index_t stride, int valid_rows, int valid_pieces) const {
#pragma unroll
    for (int n = 0; n < 64 * pieces / Threads; ++n) {
      const int i = n * Threads + static_cast<int>(threadIdx.x);
      const int row = i / pieces;
      const int piece = i % pieces;
      const bool in = row < valid_rows && piece < valid_pieces;
      copy_async(at(row, piece), in ? from + row * stride + piece * 8 : from, in);
    }
  }
};

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline void store_shared(std::uint32_t address, std::uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ inline void store_shared(std::uint32_t address, std::uint16_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}
__device__ inline void store_shared16(std::uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ inline std::uint32_t load_shared(std::uint32_t address) {
  std::uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ inline uint4 load_shared16(std::uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address)
               : "memory");
  return v;
}

/// The adjoint of ldmatrix_transposed: four 8 x 8 blocks, each stored with rows and columns exchanged.
__device__ inline void stmatrix_transposed(std::uint32_t address, const std::uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  // Lane l holds elements (l / 4, 2 (l % 4)) and the one beside it of each block; the row to write is named by the
  // lane 8 m + column.
  const int l = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t row = __shfl_sync(0xffffffffu, address, 8 * m + 2 * (l % 4) + half);
      const auto value = static_cast<std::uint16_t>(half == 0 ? r[m] : r[m] >> 16);
      asm volatile("st.shared.b16 [%0], %1;" ::"r"(row + static_cast<std::uint32_t>(l / 4 * 2)), "h"(value)
                   : "memory");
    }
  }
#endif
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
