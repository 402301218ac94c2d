// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Element types as values, under the names that safetensors files give them.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace gdn {
inline namespace v0 {

/// Types of elements in files. gdn computes with `f64` to `bf16` and indexes with `i64` and `i32`; of the others it
/// only knows the size, so that it can step over them.
enum class dtype : std::uint8_t {
  f64,
  f32,
  f16,
  bf16,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
  u8,
  boolean,
  c64,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  f6_e2m3,
  f6_e3m2,
  f4
};

struct dtype_info {
  dtype type;
  std::string_view name;
  int bits;
};

inline constexpr std::array<dtype_info, 22> dtypes = {{
    {dtype::f64, "F64", 64},
    {dtype::f32, "F32", 32},
    {dtype::f16, "F16", 16},
    {dtype::bf16, "BF16", 16},
    {dtype::i64, "I64", 64},
    {dtype::i32, "I32", 32},
    {dtype::i16, "I16", 16},
    {dtype::i8, "I8", 8},
    {dtype::u64, "U64", 64},
    {dtype::u32, "U32", 32},
    {dtype::u16, "U16", 16},
    {dtype::u8, "U8", 8},
    {dtype::boolean, "BOOL", 8},
    {dtype::c64, "C64", 64},
    {dtype::f8_e5m2, "F8_E5M2", 8},
    {dtype::f8_e4m3, "F8_E4M3", 8},
    {dtype::f8_e8m0, "F8_E8M0", 8},
    {dtype::f8_e4m3fnuz, "F8_E4M3FNUZ", 8},
    {dtype::f8_e5m2fnuz, "F8_E5M2FNUZ", 8},
    {dtype::f6_e2m3, "F6_E2M3", 6},
    {dtype::f6_e3m2, "F6_E3M2", 6},
    {dtype::f4, "F4", 4},
}};

constexpr std::string_view name_of(dtype t) noexcept {
  return dtypes[static_cast<std::size_t>(t)].name;
}
/// Bits of one element: 4 and 6 occur, too.
constexpr int bits_of(dtype t) noexcept {
  return dtypes[static_cast<std::size_t>(t)].bits;
}
constexpr std::optional<dtype> dtype_named(std::string_view name) noexcept {
  for (const dtype_info& d : dtypes) {
    if (d.name == name) return d.type;
  }
  return std::nullopt;
}
/// The floating types that gdn reads values of.
constexpr bool is_floating(dtype t) noexcept {
  return t <= dtype::bf16;
}
/// The integer types that gdn reads positions, lengths and ids of.
constexpr bool is_index(dtype t) noexcept {
  return t == dtype::i64 || t == dtype::i32;
}

static_assert([] {
  for (std::size_t i = 0; i < dtypes.size(); ++i) {
    if (static_cast<std::size_t>(dtypes[i].type) != i) return false;
  }
  return true;
}());

}  // namespace v0
}  // namespace gdn
