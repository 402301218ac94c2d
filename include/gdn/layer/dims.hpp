// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The sizes of a Gated DeltaNet layer.

#include <cmath>
#include <optional>

#include <gdn/core/error.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {

/// Sizes under the names of the checkpoints' `config.json`, with the letters that comments use.
struct layer_dims {
  index_t hidden = 0;       ///< hid: hidden_size
  index_t key_heads = 0;    ///< Hk: linear_num_key_heads
  index_t value_heads = 0;  ///< Hv: linear_num_value_heads, a multiple of Hk; value head h reads key head h / (Hv / Hk)
  index_t key_dim = 0;      ///< K: linear_key_head_dim
  index_t value_dim = 0;    ///< V: linear_value_head_dim
  index_t conv_width = 4;   ///< W: linear_conv_kernel_dim
  double norm_eps = 1e-6;   ///< rms_norm_eps of the gated norm
  double l2_eps = 1e-6;     ///< added to the sum of squares of q and k

  constexpr index_t ratio() const noexcept { return value_heads / key_heads; }
  constexpr index_t keys() const noexcept { return key_heads * key_dim; }        ///< Hk K, the width of q and of k
  constexpr index_t values() const noexcept { return value_heads * value_dim; }  ///< Hv V
  constexpr index_t channels() const noexcept { return 2 * keys() + values(); }  ///< Dc, in the order q | k | v
  constexpr index_t state_size() const noexcept { return value_heads * key_dim * value_dim; }
  constexpr bool operator==(const layer_dims&) const = default;
};

inline std::optional<diagnostic> validate_dims(const layer_dims& d) {
  const auto positive = [](const char* name, index_t v) -> std::optional<diagnostic> {
    constexpr index_t limit = index_t{1} << 24;  // products of three sizes stay far from overflow
    if (v < 1 || v > limit) return diagnostic{say(name, "is", v, "; it must lie in 1 to", limit)};
    return std::nullopt;
  };
  if (auto e = positive("hidden_size", d.hidden)) return e;
  if (auto e = positive("linear_num_key_heads", d.key_heads)) return e;
  if (auto e = positive("linear_num_value_heads", d.value_heads)) return e;
  if (auto e = positive("linear_key_head_dim", d.key_dim)) return e;
  if (auto e = positive("linear_value_head_dim", d.value_dim)) return e;
  if (auto e = positive("linear_conv_kernel_dim", d.conv_width)) return e;
  if (d.value_heads % d.key_heads != 0) {
    return diagnostic{say("linear_num_value_heads", d.value_heads, "is no multiple of linear_num_key_heads",
                          d.key_heads)};
  }
  if (!std::isfinite(d.norm_eps) || d.norm_eps <= 0) {
    return diagnostic{say("rms_norm_eps is", d.norm_eps, "; it must be finite and positive")};
  }
  if (!std::isfinite(d.l2_eps) || d.l2_eps <= 0) {
    return diagnostic{say("the eps of l2norm is", d.l2_eps, "; it must be finite and positive")};
  }
  return std::nullopt;
}

}  // namespace v0
}  // namespace gdn
