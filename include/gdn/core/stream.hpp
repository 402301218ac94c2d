// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What orders the work: a stream handle, and the host's, on which everything is already ordered.

#include <concepts>
#include <type_traits>

namespace gdn {
inline namespace v0 {

/// 1. Two equal handles order their work among each other; a copy is equal to its original.
/// 2. There is no requirement of a default: a stream is always named by the caller.
template <class S>
concept stream_handle = std::copyable<S> && std::equality_comparable<S> && std::is_trivially_copyable_v<S>;

/// The order of statements of the calling thread: every call has finished when it returns.
struct host_stream {
  constexpr bool operator==(const host_stream&) const = default;
};
static_assert(stream_handle<host_stream>);

}  // namespace v0
}  // namespace gdn
