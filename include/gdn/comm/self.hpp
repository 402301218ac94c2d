// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One rank alone: the communicator of a layer without context parallelism.

#include <atomic>
#include <cstddef>
#include <cstring>
#include <span>

#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {

/// A group of one: its messages to itself are copies. @tparam Copy copies bytes: (to, from, bytes, stream)
template <memory_kind Memory, class Stream, auto Copy>
class group_of_one {
 public:
  using memory_type = Memory;
  using stream_type = Stream;

  int rank() const noexcept { return 0; }
  int size() const noexcept { return 1; }
  comm_state state() const noexcept { return state_; }
  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, Stream s) {
    expects<comm_error>(state() == comm_state::ok, "rank 0 cannot exchange: its communicator has",
                        state() == comm_state::aborted ? "been aborted" : "failed");
    try {
      copy(sends, recvs, s);
    } catch (...) {
      end(comm_state::failed);
      throw;
    }
  }
  void abort() noexcept { end(comm_state::aborted); }

 private:
  void end(comm_state how) noexcept {
    comm_state ok = comm_state::ok;
    state_.compare_exchange_strong(ok, how);
  }
  static void copy(std::span<const send_op> sends, std::span<const recv_op> recvs, Stream s) {
    expects<comm_error>(sends.size() == recvs.size(), "rank 0 sends itself", sends.size(), "messages but receives",
                        recvs.size());
    for (std::size_t i = 0; i < sends.size(); ++i) {
      expects<comm_error>(sends[i].peer == 0 && recvs[i].peer == 0, "a group of one has no rank",
                          sends[i].peer != 0 ? sends[i].peer : recvs[i].peer);
      expects<comm_error>(sends[i].bytes == recvs[i].bytes, "rank 0 sends itself", sends[i].bytes,
                          "bytes but receives", recvs[i].bytes);
      Copy(recvs[i].data, sends[i].data, sends[i].bytes, s);
    }
  }

  std::atomic<comm_state> state_ = comm_state::ok;  // abort() may come from another thread
};

inline void copy_on_host(void* to, const void* from, std::size_t bytes, host_stream) { std::memcpy(to, from, bytes); }

}  // namespace detail

/// The only rank, over host memory.
class self_communicator : public detail::group_of_one<host_memory, host_stream, detail::copy_on_host> {};
static_assert(communicator<self_communicator>);

}  // namespace v0
}  // namespace gdn
