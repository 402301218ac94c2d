// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  bfloat16 and float16: storage of 16 bits, with conversions and nothing else.

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <gdn/config.hpp>
#include <gdn/core/half.hpp>
#include <gdn/core/types.hpp>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gdn {
inline namespace v0 {

/// The upper half of a float, bit-compatible with CUDA's __nv_bfloat16. Rounds to nearest even; a NaN stays a NaN.
/// No arithmetic: values are widened to float, computed, and rounded once where they are stored.
struct bfloat16 {
  std::uint16_t bits;

  bfloat16() = default;
  GDN_HD explicit bfloat16(float value) noexcept {
#if defined(__CUDA_ARCH__)
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    bits = float_to_bf16(value);
#endif
  }
  explicit bfloat16(double value) noexcept : bits(to_bf16(value)) {}
  GDN_HD explicit operator float() const noexcept {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
#else
    return from_bf16(bits);
#endif
  }
  explicit operator double() const noexcept { return static_cast<double>(from_bf16(bits)); }
};

/// IEEE binary16, bit-compatible with CUDA's __half; otherwise as bfloat16. Values beyond 65504 become infinite.
struct float16 {
  std::uint16_t bits;

  float16() = default;
  GDN_HD explicit float16(float value) noexcept {
#if defined(__CUDA_ARCH__)
    bits = __half_as_ushort(__float2half_rn(value));
#else
    bits = to_f16(value);
#endif
  }
  explicit float16(double value) noexcept : bits(to_f16(value)) {}
  GDN_HD explicit operator float() const noexcept {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    return from_f16(bits);
#endif
  }
  explicit operator double() const noexcept { return static_cast<double>(from_f16(bits)); }
};

/// A type of weights and activations.
template <class T>
concept storage_type =
    std::same_as<T, double> || std::same_as<T, float> || std::same_as<T, bfloat16> || std::same_as<T, float16>;

static_assert(sizeof(bfloat16) == 2 && std::is_trivially_copyable_v<bfloat16> && std::is_trivial_v<bfloat16>);
static_assert(sizeof(float16) == 2 && std::is_trivially_copyable_v<float16> && std::is_trivial_v<float16>);

}  // namespace v0
}  // namespace gdn
