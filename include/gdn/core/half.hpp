// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  bf16 and f16 as bit patterns: exact to float, rounded once from float and double.

#include <bit>
#include <cstdint>

namespace gdn {
inline namespace v0 {

namespace detail {
/// The nearest value of a format with 1 + Exponent + Mantissa = 16 bits, ties to even; beyond the largest it is
/// infinite, subnormals are kept, a NaN stays a quiet NaN with its sign and leading bits.
template <int Exponent, int Mantissa>
constexpr std::uint16_t round_to_16_bits(double value) noexcept {
  static_assert(Exponent + Mantissa == 15);
  constexpr int top = (1 << Exponent) - 1;  // the biased exponent of infinity
  constexpr int bias = top >> 1;
  const auto bits = std::bit_cast<std::uint64_t>(value);
  const auto sign = static_cast<std::uint32_t>(bits >> 63) << 15;
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
  const std::uint64_t fraction = bits & 0xf'ffff'ffff'ffff;

  std::uint32_t magnitude = static_cast<std::uint32_t>(top) << Mantissa;
  if (exponent == 0x7ff && fraction != 0) {
    magnitude |= static_cast<std::uint32_t>(fraction >> (52 - Mantissa)) | 1U << (Mantissa - 1);
  } else if (const int e = exponent - 1023 + bias; exponent != 0x7ff && e < top) {
    const std::uint64_t significand = fraction | std::uint64_t{1} << 52;
    const int drop = 52 - Mantissa + (e < 1 ? 1 - e : 0);
    if (exponent == 0 || drop > 53) {
      magnitude = 0;  // less than half the smallest subnormal
    } else {
      const std::uint64_t half = std::uint64_t{1} << (drop - 1);
      const std::uint64_t rest = significand & (2 * half - 1);
      const std::uint64_t kept = significand >> drop;
      const bool up = rest > half || (rest == half && (kept & 1) != 0);
      // The implicit bit of `kept` adds one to the exponent; a carry adds another, up to infinity.
      magnitude = (e < 1 ? 0U : static_cast<std::uint32_t>(e - 1) << Mantissa) + static_cast<std::uint32_t>(kept) +
                  (up ? 1U : 0U);
    }
  }
  return static_cast<std::uint16_t>(sign | magnitude);
}
}  // namespace detail

/// @return the bits of the nearest bf16, ties to even. A float passes through double exactly, so it rounds once, too.
constexpr std::uint16_t to_bf16(double value) noexcept {
  return detail::round_to_16_bits<8, 7>(value);
}
/// The same for a float, without branches: loops over it become vector code.
constexpr std::uint16_t float_to_bf16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool nan = (bits & 0x7fff'ffff) > 0x7f80'0000;
  return static_cast<std::uint16_t>(nan ? bits >> 16 | 0x40 : nearest);
}
/// @return the bits of the nearest f16 (IEEE binary16), ties to even
constexpr std::uint16_t to_f16(double value) noexcept {
  return detail::round_to_16_bits<5, 10>(value);
}

constexpr float from_bf16(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}
constexpr float from_f16(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t exponent = bits >> 10 & 0x1f;
  const std::uint32_t fraction = bits & 0x3ff;
  if (exponent == 0) {  // fraction * 2^-24, which float holds as a normal number
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(fraction) * 0x1p-24F));
  }
  return std::bit_cast<float>(sign | (exponent == 0x1f ? 0xffU : exponent + 127 - 15) << 23 | fraction << 13);
}

static_assert(float_to_bf16(1 + 0x1p-8F) == 0x3f80 && float_to_bf16(1 + 0x3p-8F) == 0x3f82);  // ties to even
static_assert(to_bf16(1.0) == 0x3f80 && to_f16(1.0) == 0x3c00);
static_assert(to_f16(65519.99) == 0x7bff && to_f16(65520.0) == 0x7c00);  // the tie above the largest goes to infinity
static_assert(to_f16(0x1p-25) == 0 && to_f16(0x1.8p-24) == 2);           // ties to even among subnormals
// Rounding through float first would make a tie of this, and lose the last bit.
static_assert(to_bf16(1.0 + 0x1p-8 + 0x1p-40) == 0x3f81);

}  // namespace v0
}  // namespace gdn
