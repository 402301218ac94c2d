// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A rank of an NCCL communicator that the host owns.

#include <chrono>
#include <span>

#include <nccl.h>

#include <gdn/nccl/detail/endpoint.hpp>

namespace gdn {
inline namespace v0 {
namespace nccl {

/// Refers to an `ncclComm_t` of the host, which outlives it and is ready. Exchanges are as nccl_communicator's; so are
/// waiting and state.
///
/// abort() and failures end what is under way with ncclCommRevoke, where this NCCL has it (2.28.9 and later); the host
/// still destroys the communicator. An older NCCL lets nobody but the owner end it: then the host calls ncclCommAbort.
///
/// A blocking communicator works, but waits without a deadline where NCCL connects two ranks for the first time.
class nccl_communicator_ref {
 public:
  using memory_type = device_memory;
  using stream_type = cuda::stream_ref;

  /// Made on the communicator's device. @throws comm_error if NCCL does not know the communicator
  explicit nccl_communicator_ref(ncclComm_t comm, options o = {}) : end_{comm, rank_of(comm), size_of(comm), o, revoke} {}

  int rank() const noexcept { return end_.rank(); }
  int size() const noexcept { return end_.size(); }
  comm_state state() const noexcept { return end_.state(); }

  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, cuda::stream_ref s) {
    end_.exchange(sends, recvs, s);
  }
  comm_state wait_until(cuda::stream_ref s, std::chrono::steady_clock::time_point until) {
    return end_.wait_until(s, until);
  }
  void synchronize(cuda::stream_ref s) { end_.synchronize(s); }
  void abort() noexcept { end_.end(comm_state::aborted); }

 private:
  static int rank_of(ncclComm_t comm) {
    int rank = 0;
    expects<comm_error>(comm != nullptr, "gdn::nccl needs a communicator, not NULL");
    check(ncclCommUserRank(comm, &rank), "ncclCommUserRank");
    return rank;
  }
  static int size_of(ncclComm_t comm) {
    int size = 0;
    check(ncclCommCount(comm, &size), "ncclCommCount");
    return size;
  }
  static ncclResult_t revoke([[maybe_unused]] ncclComm_t comm) {
#if NCCL_VERSION_CODE >= 22809
    return ncclCommRevoke(comm, NCCL_REVOKE_DEFAULT);
#else
    return ncclSuccess;
#endif
  }

  mutable detail::endpoint end_;  // state() looks for what NCCL has found
};
static_assert(waits_for_streams<nccl_communicator_ref>);

}  // namespace nccl
}  // namespace v0
}  // namespace gdn
