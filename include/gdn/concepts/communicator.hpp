// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What ranks need to exchange rows: lists of messages.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include <gdn/core/stream.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {

struct send_op {
  const void* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
};
struct recv_op {
  void* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
};

/// Sticky: after `failed` or `aborted` every later exchange throws.
enum class comm_state : std::uint8_t { ok, in_progress, failed, aborted };

/// A rank's end of a group of ranks. `exchange(sends, recvs, stream)` moves bytes:
/// 1. Messages between two ranks are matched pairwise and in order; nothing else is synchronised. A rank with empty
///    lists returns at once. Both sides know the sizes (they come from a common plan); a difference that is seen is
///    a comm_error.
/// 2. A call holds at most one message per peer and direction. Messages to oneself are local copies.
/// 3. Messages of zero bytes are dropped by the caller, on both sides.
/// 4. The work is enqueued on `stream`; the buffers belong to the call until the stream has passed it. Sends and
///    receives of one call must not overlap.
/// 5. After a failure `state()` is sticky, and every later call throws comm_error before it touches a buffer. What
///    was received by a failed call is unspecified.
/// 6. `abort()` ends pending and later exchanges of this rank and of every rank that waits for it; it may be called
///    from another thread. Destroying a communicator never waits for a peer; peers that wait for it then fail.
/// 7. One thread at a time uses a communicator (except for abort()).
template <class C>
concept communicator =
    stream_handle<typename C::stream_type> && memory_kind<typename C::memory_type> &&
    requires(C& comm, const C& view, typename C::stream_type stream, std::span<const send_op> sends,
             std::span<const recv_op> recvs) {
      { view.rank() } noexcept -> std::same_as<int>;
      { view.size() } noexcept -> std::same_as<int>;
      { view.state() } noexcept -> std::same_as<comm_state>;
      { comm.exchange(sends, recvs, stream) } -> std::same_as<void>;
      { comm.abort() } noexcept;
    };

/// Optional: `synchronize(stream)` returns when the work of the stream is done. It throws comm_error where that work
/// waits for a peer in vain, so it takes the place of a wait that knows nothing of peers.
template <class C>
concept waits_for_streams = communicator<C> && requires(C& comm, typename C::stream_type stream) {
  { comm.synchronize(stream) } -> std::same_as<void>;
};

}  // namespace v0
}  // namespace gdn
