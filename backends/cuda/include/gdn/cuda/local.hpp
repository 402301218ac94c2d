// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  P ranks as threads on one GPU: context parallelism of the CUDA path where there is one device only.

#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include <gdn/comm/rendezvous.hpp>
#include <gdn/concepts/communicator.hpp>
#include <gdn/cuda/event.hpp>
#include <gdn/cuda/stream.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// A rank of a group of threads that share a device; each works on a stream of its own. A message is a device copy on
/// the receiver's stream, ordered by events: it starts when the sender's stream has come to the exchange, and the
/// sender's stream goes on when it is done. The host threads meet, so an exchange cannot be captured in a graph.
///
/// Failure and deadline as thread_communicator: they concern the host's waiting, not the device's.
class local_communicator {
 public:
  using memory_type = device_memory;
  using stream_type = stream_ref;
  using duration = gdn::detail::rendezvous::duration;

  static std::vector<local_communicator> make_group(int ranks, duration deadline = duration::zero()) {
    std::vector<local_communicator> out;
    for (auto& place : gdn::detail::rendezvous::make_group(ranks, deadline)) {
      out.push_back(local_communicator(std::move(place)));
    }
    return out;
  }

  int rank() const noexcept { return place_.rank(); }
  int size() const noexcept { return place_.size(); }
  comm_state state() const noexcept { return place_.state(); }
  int first_failed() const noexcept { return place_.first_failed(); }

  /// @throws comm_error if the stream is being captured
  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, stream_ref s) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(s.get(), &capture), "cudaStreamIsCapturing");
    expects<comm_error>(capture == cudaStreamCaptureStatusNone, "rank", rank(),
                        "cannot capture an exchange between threads in a graph");
    check(cudaEventRecord(events_->ready.get(), s.get()), "cudaEventRecord");
    place_.exchange(sends, recvs, *events_,
                    [s](const events& sender, const void* from, void* to, std::size_t bytes, int, int receiver) {
                      const cudaEvent_t done = sender.taken[static_cast<std::size_t>(receiver)].get();
                      check(cudaStreamWaitEvent(s.get(), sender.ready.get(), 0), "cudaStreamWaitEvent");
                      check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, s.get()), "cudaMemcpyAsync");
                      check(cudaEventRecord(done, s.get()), "cudaEventRecord");
                    });
    for (const send_op& m : sends) {
      check(cudaStreamWaitEvent(s.get(), events_->taken[static_cast<std::size_t>(m.peer)].get(), 0),
            "cudaStreamWaitEvent");
    }
  }

  /// What a failure of the group cannot hold up: no work on a stream waits for a host thread.
  void synchronize(stream_ref s) { check(cudaStreamSynchronize(s.get()), "cudaStreamSynchronize"); }

  void abort() noexcept { place_.leave(); }

 private:
  /// Only their owner waits for `taken`, before it sends again: no event is recorded anew while someone needs it.
  struct events {
    event ready;
    std::vector<event> taken;  // by each peer
  };
  explicit local_communicator(gdn::detail::rendezvous&& place)
      : place_(std::move(place)), events_(std::make_unique<events>()) {
    events_->taken.resize(static_cast<std::size_t>(place_.size()));
  }

  gdn::detail::rendezvous place_;
  std::unique_ptr<events> events_;
};
static_assert(waits_for_streams<local_communicator>);

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
