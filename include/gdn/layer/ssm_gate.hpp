// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The type in which a model keeps A_log and dt_bias: `mamba_ssm_dtype` of its config.

#include <concepts>
#include <optional>
#include <string_view>

#include <gdn/core/dtype.hpp>
#include <gdn/core/error.hpp>
#include <gdn/core/half.hpp>

namespace gdn {
inline namespace v0 {

/// What a model without `mamba_ssm_dtype` keeps them in.
inline constexpr dtype default_ssm_dtype = dtype::f32;

/// The type that a name of torch means, with or without `torch.`; nothing unless it is a floating type of gdn.
constexpr std::optional<dtype> floating_type_named(std::string_view name) noexcept {
  constexpr std::string_view module = "torch.";
  if (name.starts_with(module)) name.remove_prefix(module.size());
  if (name == "float32" || name == "float") return dtype::f32;
  if (name == "float64" || name == "double") return dtype::f64;
  if (name == "bfloat16") return dtype::bf16;
  if (name == "float16" || name == "half") return dtype::f16;
  return std::nullopt;
}

inline std::optional<diagnostic> validate_ssm_dtype(std::string_view name) {
  if (floating_type_named(name)) return std::nullopt;
  return diagnostic{say("mamba_ssm_dtype is '" + std::string(name.substr(0, 40)) +
                        "'; it must be float32, float64, bfloat16 or float16")};
}

/// @throws metadata_error unless `name` is a floating type
inline dtype resolve_ssm_dtype(std::string_view name) {
  raise(validate_ssm_dtype(name));
  return *floating_type_named(name);
}

/// `value` as a parameter kept in `ssm` has it. The 16-bit types round once, to nearest even. float32 and float64 leave
/// it as it is: they are the floor of accumulate_t, which is where A_log and dt_bias live whatever the layer's type.
template <std::floating_point A>
constexpr A round_through(dtype ssm, A value) noexcept {
  if (ssm == dtype::bf16) return static_cast<A>(from_bf16(to_bf16(static_cast<double>(value))));
  if (ssm == dtype::f16) return static_cast<A>(from_f16(to_f16(static_cast<double>(value))));
  return value;
}

static_assert(floating_type_named("torch.bfloat16") == dtype::bf16 && !floating_type_named("int8"));
static_assert(round_through(dtype::bf16, 1.0F + 0x1p-9F) == 1.0F && round_through(dtype::f32, 0.1) == 0.1);

}  // namespace v0
}  // namespace gdn
