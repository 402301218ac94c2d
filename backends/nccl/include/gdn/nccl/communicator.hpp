// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Ranks over NCCL, one GPU each: context parallelism over device memory, on one machine or many.

#include <chrono>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <gdn/cuda/error.hpp>
#include <gdn/nccl/detail/endpoint.hpp>

namespace gdn {
inline namespace v0 {
namespace nccl {

/// What one rank makes and all get, by whatever way the host has: 128 bytes, as they are.
inline ncclUniqueId make_unique_id() {
  ncclUniqueId id{};
  check(ncclGetUniqueId(&id), "ncclGetUniqueId");
  return id;
}

/// A rank of an NCCL communicator that it owns, on the device that was current when it was made.
///
/// exchange() returns when its messages are enqueued on the stream; it waits for no message. Only where two ranks talk
/// for the first time it waits until NCCL has connected them, so both must come. It may be captured in a graph, once each
/// pair of ranks has talked; graphs end before the communicator does.
///
/// Peers that do not come hold up the *stream*. A host that waits with synchronize() or wait_until() instead of CUDA's
/// own calls gets comm_error after `options::deadline`, or as soon as NCCL sees that a peer is lost. A failure takes
/// NCCL's kernels off the device before the error is thrown, so memory can be freed; see abort_guard for other errors.
///
/// NCCL tells a rank of a lost connection, not of a peer that stops or leaves: what then ends it is the deadline. Ranks
/// that are threads of one process (make_group()) hear of peers that fail or leave.
class nccl_communicator {
 public:
  using memory_type = device_memory;
  using stream_type = cuda::stream_ref;
  using duration = std::chrono::milliseconds;

  /// Collective: returns when all ranks have come.
  /// @param id the same on all ranks, for one group
  /// @throws comm_error if NCCL refuses, or a rank does not come before the deadline
  nccl_communicator(const ncclUniqueId& id, int rank, int size, options o = {})
      : nccl_communicator(begin(id, rank, size, o, nullptr)) {
    meet();
  }

  /// The ends of a new group for threads of this process: rank r on device r. The thread of a rank makes the end's
  /// device() current before it uses it.
  static std::vector<nccl_communicator> make_group(int ranks, duration deadline = duration::zero()) {
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaErrorNoDevice) cuda::check(status, "cudaGetDeviceCount");
    expects<comm_error>(ranks >= 1, "a group needs at least one rank, has", ranks);
    expects<comm_error>(ranks <= devices, "NCCL needs a GPU for each rank of a process: ranks are", ranks,
                        ", GPUs are", devices);
    int current = 0;
    cuda::check(cudaGetDevice(&current), "cudaGetDevice");
    const ncclUniqueId id = make_unique_id();
    auto fellows = std::make_shared<detail::bulletin>(ranks);
    std::vector<nccl_communicator> out;
    check(ncclGroupStart(), "ncclGroupStart");
    try {
      for (int r = 0; r < ranks; ++r) {
        cuda::check(cudaSetDevice(r), "cudaSetDevice");
        out.push_back(nccl_communicator(begin(id, r, ranks, {deadline}, fellows)));
      }
    } catch (...) {
      static_cast<void>(ncclGroupEnd());
      throw;
    }
    check(ncclGroupEnd(), "ncclGroupEnd");
    cuda::check(cudaSetDevice(current), "cudaSetDevice");
    for (const nccl_communicator& c : out) c.meet();
    return out;
  }

  nccl_communicator(nccl_communicator&&) noexcept = default;
  nccl_communicator& operator=(nccl_communicator&& other) noexcept {
    std::swap(end_, other.end_);
    std::swap(device_, other.device_);
    return *this;
  }

  /// Gives NCCL its resources back if nothing is under way, otherwise aborts; waits for no peer.
  ~nccl_communicator() {
    if (end_) static_cast<void>(end_->finalize(detail::clock::now() + (end_->quiescent() ? patience : duration::zero())));
  }

  /// Waits until what was enqueued is done, and gives NCCL its resources back. Later exchanges throw.
  /// @return whether that was done in time; otherwise the communicator is aborted
  bool finalize(duration deadline) noexcept { return end_ && end_->finalize(detail::clock::now() + deadline); }

  int rank() const noexcept { return end_ ? end_->rank() : -1; }
  int size() const noexcept { return end_ ? end_->size() : 0; }
  int device() const noexcept { return device_; }
  comm_state state() const noexcept { return end_ ? end_->state() : comm_state::aborted; }
  /// Whether what failed is waiting: a peer did not come, or was lost. Then the cause is likely to be elsewhere.
  bool waited_in_vain() const noexcept { return end_ && end_->waited_in_vain(); }
  /// The rank of make_group() that failed first, or -1.
  int first_failed() const noexcept { return end_ ? end_->first_failed() : -1; }

  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, cuda::stream_ref s) {
    expects<comm_error>(end_ != nullptr, "a communicator that was moved from cannot exchange");
    end_->exchange(sends, recvs, s);
  }

  /// @return ok once the work of the stream is done; in_progress if it is not by `until`, and nothing is changed;
  ///         otherwise how this rank ended, or failed for a peer that has. What was received is then unspecified
  comm_state wait_until(cuda::stream_ref s, std::chrono::steady_clock::time_point until) {
    return end_ ? end_->wait_until(s, until) : comm_state::aborted;
  }
  /// Waits for the work of the stream, no longer than `options::deadline`.
  /// @throws comm_error then, or if a peer is lost; the communicator has failed
  void synchronize(cuda::stream_ref s) {
    expects<comm_error>(end_ != nullptr, "a communicator that was moved from cannot wait");
    end_->synchronize(s);
  }

  /// Takes NCCL's kernels off the device. From any thread; should a call of NCCL be under way, after a second at most.
  void abort() noexcept {
    if (end_) end_->end(comm_state::aborted);
  }

 private:
  static constexpr duration patience{500};  // for NCCL's own threads, when nothing is under way

  explicit nccl_communicator(std::unique_ptr<detail::endpoint> end) : end_(std::move(end)) {
    cuda::check(cudaGetDevice(&device_), "cudaGetDevice");
  }

  static std::unique_ptr<detail::endpoint> begin(const ncclUniqueId& id, int rank, int size, options o,
                                                 std::shared_ptr<detail::bulletin> fellows) {
    expects<comm_error>(0 <= rank && rank < size, "there is no rank", rank, "of", size);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclComm_t comm = nullptr;
    const ncclResult_t status = ncclCommInitRankConfig(&comm, size, id, rank, &config);
    auto end = std::make_unique<detail::endpoint>(comm, rank, size, o, ncclCommAbort, std::move(fellows));
    if (status != ncclSuccess && status != ncclInProgress) end->end(comm_state::failed);
    check(status, "ncclCommInitRankConfig");
    return end;
  }

  /// Until all ranks have come.
  void meet() const {
    try {
      end_->settle([this] { return say("for the", size(), "ranks of the group, but not all of them came"); });
    } catch (...) {
      end_->end(comm_state::failed);
      throw;
    }
  }

  std::unique_ptr<detail::endpoint> end_;
  int device_ = 0;
};
static_assert(waits_for_streams<nccl_communicator>);

}  // namespace nccl
}  // namespace v0
}  // namespace gdn
