// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What the ranks of the scaling benchmark share: a communicator that counts and takes the time, and figures that
/// all ranks agree on.

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include <gdn/comm/any.hpp>
#include <gdn/cuda/memory.hpp>

namespace gdn_bench {

using gdn::index_t;
using device_communicator = gdn::any_communicator<gdn::device_memory, gdn::cuda::stream_ref>;

/// An event that takes a time stamp.
class time_stamp {
 public:
  time_stamp() { gdn::cuda::check(cudaEventCreate(&event_), "cudaEventCreate"); }
  time_stamp(time_stamp&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  time_stamp& operator=(time_stamp&&) = delete;
  ~time_stamp() {
    if (event_ != nullptr) static_cast<void>(cudaEventDestroy(event_));
  }
  void record(gdn::cuda::stream_ref s) const { gdn::cuda::check(cudaEventRecord(event_, s.get()), "cudaEventRecord"); }
  /// Of two events that have passed.
  double milliseconds_since(const time_stamp& begin) const {
    float ms = 0;
    gdn::cuda::check(cudaEventElapsedTime(&ms, begin.event_, event_), "cudaEventElapsedTime");
    return static_cast<double>(ms);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// Counts what a rank receives from others, and how long its stream is in exchanges: moving bytes, or waiting for peers.
class timed_communicator {
 public:
  using memory_type = gdn::device_memory;
  using stream_type = gdn::cuda::stream_ref;

  explicit timed_communicator(device_communicator& comm) : comm_(comm) {}
  timed_communicator(const timed_communicator&) = delete;
  timed_communicator& operator=(const timed_communicator&) = delete;

  int rank() const noexcept { return comm_.rank(); }
  int size() const noexcept { return comm_.size(); }
  gdn::comm_state state() const noexcept { return comm_.state(); }
  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, gdn::cuda::stream_ref s) {
    for (const gdn::recv_op& m : recvs) bytes_ += m.peer == rank() ? 0 : static_cast<index_t>(m.bytes);
    if (2 * used_ == stamps_.size()) stamps_.resize(stamps_.size() + 2);
    stamps_[2 * used_].record(s);
    comm_.exchange(sends, recvs, s);
    stamps_[2 * used_ + 1].record(s);
    ++used_;
  }
  void abort() noexcept { comm_.abort(); }
  void synchronize(gdn::cuda::stream_ref s) { comm_.synchronize(s); }

  struct totals {
    index_t bytes = 0;
    double milliseconds = 0;
  };
  /// Since the last call; the stream's work must be done.
  totals take() {
    totals out{bytes_, 0};
    for (std::size_t i = 0; i < used_; ++i) out.milliseconds += stamps_[2 * i + 1].milliseconds_since(stamps_[2 * i]);
    bytes_ = 0;
    used_ = 0;
    return out;
  }

 private:
  device_communicator& comm_;
  index_t bytes_ = 0;
  std::size_t used_ = 0;
  std::vector<time_stamp> stamps_;  // begin, end
};

/// The largest of each figure over the ranks, on all of them; they meet here.
inline std::vector<double> largest(device_communicator& comm, std::vector<double> mine, gdn::cuda::stream_ref s) {
  if (comm.size() == 1) return mine;
  const auto n = static_cast<index_t>(mine.size());
  const gdn::cuda::device_block block({mine.size() * sizeof(double) * static_cast<std::size_t>(comm.size()) + 512});
  auto ws = block.workspace();
  const auto all = ws.take<double>(comm.size(), n);
  gdn::cuda::copy_to_device<double>(mine, gdn::make_tensor<gdn::device_memory>(all.data() + comm.rank() * n, n), s);
  std::vector<gdn::send_op> sends;
  std::vector<gdn::recv_op> recvs;
  for (int r = 0; r < comm.size(); ++r) {
    if (r == comm.rank()) continue;
    sends.push_back({all.data() + comm.rank() * n, mine.size() * sizeof(double), r});
    recvs.push_back({all.data() + r * n, mine.size() * sizeof(double), r});
  }
  comm.exchange(sends, recvs, s);
  comm.synchronize(s);
  const std::vector<double> of_all = gdn::cuda::copy_to_host(all, s);
  for (std::size_t i = 0; i < of_all.size(); ++i) {
    mine[i % mine.size()] = std::max(mine[i % mine.size()], of_all[i]);
  }
  return mine;
}

}  // namespace gdn_bench
