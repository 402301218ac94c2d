// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One rank's end of an NCCL communicator: messages, bounded waiting, and how it ends.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <gdn/comm/back_off.hpp>
#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>
#include <gdn/cuda/event.hpp>
#include <gdn/cuda/stream.hpp>
#include <gdn/nccl/detail/bulletin.hpp>
#include <gdn/nccl/error.hpp>

namespace gdn {
inline namespace v0 {
namespace nccl {

struct options {
  /// Longest wait of one call for peers: for all of them in a constructor, for those of an exchange until it is
  /// enqueued, and in synchronize() for all work of the stream. Zero waits for ever.
  std::chrono::milliseconds deadline{0};
};

namespace detail {

using clock = std::chrono::steady_clock;

/// The end of a wait that begins now.
inline clock::time_point end_of_wait(std::chrono::milliseconds deadline) {
  return deadline.count() == 0 ? clock::time_point::max() : clock::now() + deadline;
}

/// Only what holds `mutex_` uses the handle: another thread may take it away.
class endpoint {
 public:
  /// Ends an NCCL communicator: frees it, or leaves it to its owner with nothing under way.
  using ending = ncclResult_t (*)(ncclComm_t);

  endpoint(ncclComm_t comm, int rank, int size, options o, ending how, std::shared_ptr<bulletin> fellows = nullptr)
      : comm_(comm), rank_(rank), size_(size), options_(o), end_(how), fellows_(std::move(fellows)) {}
  endpoint(const endpoint&) = delete;
  endpoint& operator=(const endpoint&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  bool waited_in_vain() const noexcept { return in_vain_; }
  int first_failed() const noexcept { return fellows_ ? fellows_->first_failed() : -1; }

  /// Looks at what NCCL has found in the meantime, too.
  comm_state state() noexcept {
    const std::unique_lock lock(mutex_, std::chrono::seconds(1));
    if (lock.owns_lock()) look();
    return state_;
  }

  /// Until NCCL has done what it does in the background: connect the group, or put messages on a stream.
  /// @throws comm_error
  template <class Rule>
  void settle(const Rule& what) {
    const auto until = end_of_wait(options_.deadline);
    for (gdn::detail::back_off pause;; pause()) {
      {
        const std::lock_guard lock(mutex_);
        if (state_ == comm_state::ok) look();
        if (state_ == comm_state::ok && !busy_) return;
        expects_sound(what);
      }
      expects_fellows(what);
      if (clock::now() >= until) {
        in_vain_ = true;
        throw comm_error(say("rank", rank_, "waited", options_.deadline.count(), "ms", what()));
      }
    }
  }

  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, cuda::stream_ref s) {
    const auto what = [this] { return say("in exchange", exchanges_, "until its peers connect"); };
    try {
      {
        const std::lock_guard lock(mutex_);
        ++exchanges_;
        look();
        expects<comm_error>(state_ == comm_state::ok, "rank", rank_, "cannot exchange: its communicator has",
                            state_ == comm_state::aborted ? "been aborted" : "failed" + reason_);
        if (!list(sends, recvs, s)) return;
        if (fellows_) fellows_->post(rank_, away_sends_, away_recvs_);
        post(s);
      }
      settle(what);
      if (!is_capturing(s)) cuda::check(cudaEventRecord(last_.get(), s.get()), "cudaEventRecord");
    } catch (...) {
      end(comm_state::failed);
      throw;
    }
  }

  /// @return ok once the work of the stream is done, in_progress if it is not by `until`, otherwise how this rank or a
  /// peer for which it waited ended. NCCL's kernels return without an error when they are aborted, so the state counts,
  /// not the stream.
  comm_state wait_until(cuda::stream_ref s, clock::time_point until) {
    for (gdn::detail::back_off pause;; pause()) {
      const cudaError_t done = cudaStreamQuery(s.get());
      if (done != cudaErrorNotReady) cuda::check(done, "cudaStreamQuery");
      if (const comm_state now = state(); now != comm_state::ok) return now;
      if (done == cudaSuccess) return comm_state::ok;
      if (missing() >= 0) {
        end(comm_state::failed);
        return comm_state::failed;
      }
      if (clock::now() >= until) return comm_state::in_progress;
    }
  }

  void synchronize(cuda::stream_ref s) {
    const auto what = [this] { return say("for its stream, behind exchange", exchanges_); };
    const comm_state now = wait_until(s, end_of_wait(options_.deadline));
    if (now == comm_state::ok) return;
    in_vain_ = now != comm_state::aborted;
    end(comm_state::failed);
    expects_fellows(what);
    if (now == comm_state::in_progress) {
      throw comm_error(say("rank", rank_, "waited", options_.deadline.count(), "ms", what()));
    }
    const std::lock_guard lock(mutex_);
    expects_sound(what);
  }

  /// Sticky: the first ending counts. Kernels that wait for a peer leave the device.
  void end(comm_state how) noexcept {
    // Who holds the mutex calls NCCL. Should that be stuck, NCCL lets another thread abort it.
    const std::unique_lock lock(mutex_, std::chrono::seconds(1));
    if (state_ == comm_state::ok) state_ = how;
    if (fellows_) fellows_->leave(rank_, state_);
    if (const ncclComm_t comm = std::exchange(comm_, nullptr); comm != nullptr) static_cast<void>(end_(comm));
  }

  /// Whether all that exchanges have enqueued is done. What graphs replay is not known here.
  bool quiescent() const noexcept { return cudaEventQuery(last_.get()) == cudaSuccess; }

  /// Gives the communicator back to NCCL once nothing is under way.
  /// @return whether that came about before `until`; otherwise, and if anything failed, it is ended
  bool finalize(clock::time_point until) noexcept {
    if (left_) return true;
    gdn::detail::back_off pause;
    while (state() == comm_state::ok && !quiescent() && clock::now() < until) pause();
    if (quiescent() && give_back(until)) return true;
    end(comm_state::aborted);
    return false;
  }

 private:
  static bool is_capturing(cuda::stream_ref s) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(s.get(), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

  int missing() const { return fellows_ ? fellows_->missing(rank_) : -1; }

  /// Asks NCCL for what it found or finished. Called with the mutex.
  void look() noexcept {
    if (comm_ == nullptr || state_ != comm_state::ok) return;
    ncclResult_t result = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &result);
    if (asked != ncclSuccess) result = asked;
    busy_ = result == ncclInProgress;
    if (result == ncclSuccess || busy_) return;
    state_ = comm_state::failed;
    if (fellows_) fellows_->leave(rank_, state_);
    try {
      reason_ = ": " + text_of(result);
    } catch (...) {  // no memory for a reason
    }
  }

  template <class Rule>
  void expects_sound(const Rule& what) const {
    if (state_ == comm_state::ok) return;
    throw comm_error(say("rank", rank_, state_ == comm_state::aborted ? "was aborted" : "failed", "while it waited",
                         what() + reason_));
  }
  template <class Rule>
  void expects_fellows(const Rule& what) {
    const int peer = missing();
    if (peer < 0) return;
    in_vain_ = true;
    throw comm_error(say("rank", rank_, "waited", what() + ", but rank", peer, "failed, left or was aborted"));
  }

  /// Checks what is asked for and carries out copies. @return whether a message travels
  bool list(std::span<const send_op> sends, std::span<const recv_op> recvs, cuda::stream_ref s) {
    std::vector<const send_op*> to_self;
    std::vector<const recv_op*> from_self;
    away_sends_.clear();
    away_recvs_.clear();
    const auto check_peer = [&](int p) {
      expects<comm_error>(0 <= p && p < size_, "rank", rank_, "has no peer", p, "in a group of", size_);
    };
    for (const send_op& m : sends) {
      check_peer(m.peer);
      m.peer == rank_ ? to_self.push_back(&m) : away_sends_.push_back(m);
    }
    for (const recv_op& m : recvs) {
      check_peer(m.peer);
      m.peer == rank_ ? from_self.push_back(&m) : away_recvs_.push_back(m);
    }
    expects<comm_error>(to_self.size() == from_self.size(), "rank", rank_, "sends itself", to_self.size(),
                        "messages in exchange", exchanges_, "but receives", from_self.size());
    for (std::size_t i = 0; i < to_self.size(); ++i) {
      expects<comm_error>(to_self[i]->bytes == from_self[i]->bytes, "rank", rank_, "sends itself", to_self[i]->bytes,
                          "bytes in exchange", exchanges_, "but receives", from_self[i]->bytes);
      cuda::check(cudaMemcpyAsync(from_self[i]->data, to_self[i]->data, to_self[i]->bytes, cudaMemcpyDeviceToDevice,
                                  s.get()),
                  "cudaMemcpyAsync");
    }
    return !away_sends_.empty() || !away_recvs_.empty();
  }

  /// One group, in which NCCL starts all before it waits for any.
  void post(cuda::stream_ref s) {
    check(ncclGroupStart(), "ncclGroupStart");
    ncclResult_t bad = ncclSuccess;  // the group is closed before anything is thrown: it belongs to the thread
    const char* call = "ncclRecv";
    const auto good = [&](ncclResult_t r) {
      if (r == ncclSuccess || r == ncclInProgress) return true;
      bad = r;
      return false;
    };
    bool all = true;
    for (const recv_op& m : away_recvs_) {
      all = all && good(ncclRecv(m.data, m.bytes, ncclUint8, m.peer, comm_, s.get()));
    }
    if (all) call = "ncclSend";
    for (const send_op& m : away_sends_) {
      all = all && good(ncclSend(m.data, m.bytes, ncclUint8, m.peer, comm_, s.get()));
    }
    const ncclResult_t closed = ncclGroupEnd();
    check(bad, call);
    check(closed, "ncclGroupEnd");
  }

  bool give_back(clock::time_point until) noexcept {
    const auto call = [&](auto f) {
      const std::lock_guard lock(mutex_);
      if (comm_ == nullptr || state_ != comm_state::ok) return false;
      const ncclResult_t r = f(comm_);
      return r == ncclSuccess || r == ncclInProgress;
    };
    if (!call(ncclCommFinalize)) return false;
    gdn::detail::back_off pause;
    for (busy_ = true; busy_; pause()) {
      if (state() != comm_state::ok || (busy_ && clock::now() >= until)) return false;
    }
    const std::lock_guard lock(mutex_);
    if (comm_ == nullptr) return false;
    state_ = comm_state::aborted;  // for later exchanges
    left_ = true;
    if (fellows_) fellows_->leave(rank_, comm_state::in_progress);
    const ncclResult_t r = ncclCommDestroy(std::exchange(comm_, nullptr));
    return r == ncclSuccess || r == ncclInProgress;
  }

  std::timed_mutex mutex_;
  ncclComm_t comm_;
  const int rank_;
  const int size_;
  const options options_;
  const ending end_;
  const std::shared_ptr<bulletin> fellows_;  // where the ranks are threads of one process
  std::atomic<comm_state> state_ = comm_state::ok;
  std::string reason_;           // NCCL's, if it found a failure
  std::atomic<bool> in_vain_ = false;
  bool busy_ = false;            // NCCL works in the background
  bool left_ = false;
  std::uint64_t exchanges_ = 0;
  cuda::event last_;             // behind the latest exchange
  std::vector<send_op> away_sends_;  // of one exchange; here to keep their memory
  std::vector<recv_op> away_recvs_;
};

}  // namespace detail
}  // namespace nccl
}  // namespace v0
}  // namespace gdn
