// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The sizes of heads that the delta rule's kernels take. Plain numbers: no device and no compiler of CUDA.

#include <optional>

#include <gdn/core/error.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// K and V are multiples of this: the rows of a matrix instruction, and pieces of 16 bytes of 16-bit numbers.
inline constexpr index_t head_size_step = 16;
inline constexpr index_t head_size_most = 256;

constexpr bool is_head_size(index_t n) noexcept { return 0 < n && n <= head_size_most && n % head_size_step == 0; }

/// The rule that K or V breaks, if any.
inline std::optional<diagnostic> validate_head_sizes(index_t key_dim, index_t value_dim) {
  if (is_head_size(key_dim) && is_head_size(value_dim)) return std::nullopt;
  const bool key = !is_head_size(key_dim);
  return diagnostic{say(key ? "K, the size of key heads, is" : "V, the size of value heads, is",
                        key ? key_dim : value_dim, "; the CUDA backend takes multiples of", head_size_step, "up to",
                        head_size_most)};
}

/// @throws backend_error with the text of validate_head_sizes()
inline void expects_head_sizes(index_t key_dim, index_t value_dim) {
  raise<backend_error>(validate_head_sizes(key_dim, value_dim));
}

static_assert(is_head_size(head_size_step) && is_head_size(head_size_most) && !is_head_size(0) && !is_head_size(24));

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
