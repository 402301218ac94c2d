// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A group of one on the device: its messages to itself are copies, which a graph may hold.

#include <atomic>
#include <cstddef>
#include <span>

#include <cuda_runtime_api.h>

#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>
#include <gdn/cuda/stream.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// The only rank. An exchange is enqueued on its stream, allocates and waits for nothing, and may be captured.
class self_communicator {
 public:
  using memory_type = device_memory;
  using stream_type = stream_ref;

  int rank() const noexcept { return 0; }
  int size() const noexcept { return 1; }
  comm_state state() const noexcept { return state_; }
  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, stream_ref s) {
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
  static void copy(std::span<const send_op> sends, std::span<const recv_op> recvs, stream_ref s) {
    expects<comm_error>(sends.size() == recvs.size(), "rank 0 sends itself", sends.size(), "messages but receives",
                        recvs.size());
    for (std::size_t i = 0; i < sends.size(); ++i) {
      expects<comm_error>(sends[i].peer == 0 && recvs[i].peer == 0, "a group of one has no rank",
                          sends[i].peer != 0 ? sends[i].peer : recvs[i].peer);
      expects<comm_error>(sends[i].bytes == recvs[i].bytes, "rank 0 sends itself", sends[i].bytes, "bytes but receives",
                          recvs[i].bytes);
      check(cudaMemcpyAsync(recvs[i].data, sends[i].data, sends[i].bytes, cudaMemcpyDeviceToDevice, s.get()),
            "cudaMemcpyAsync");
    }
  }

  std::atomic<comm_state> state_ = comm_state::ok;  // abort() may come from another thread
};
static_assert(communicator<self_communicator>);

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
