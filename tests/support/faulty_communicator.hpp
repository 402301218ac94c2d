// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Communicators that misbehave: one fails in a chosen exchange, one is late.

#include <chrono>
#include <cstdint>
#include <span>
#include <thread>
#include <vector>

#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>
#include <support/random.hpp>

namespace gdn_test {

enum class fault {
  throws,     ///< instead of exchanging, and ends the group: what a transport does that notices its failure
  leaves,     ///< throws, and says nothing to the others until it is destroyed
  truncates,  ///< sends one byte less than agreed
};

/// Fails in its exchange number `at` (from 0); exchanges without messages do not count.
template <gdn::communicator Comm>
class faulty_communicator {
 public:
  using memory_type = typename Comm::memory_type;
  using stream_type = typename Comm::stream_type;

  faulty_communicator(Comm& comm, fault kind, int at) : comm_(comm), kind_(kind), left_(at) {}
  faulty_communicator(const faulty_communicator&) = delete;
  faulty_communicator& operator=(const faulty_communicator&) = delete;

  int rank() const noexcept { return comm_.rank(); }
  int size() const noexcept { return comm_.size(); }
  gdn::comm_state state() const noexcept { return failed_ ? gdn::comm_state::failed : comm_.state(); }
  bool struck() const noexcept { return struck_; }

  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, stream_type s) {
    gdn::expects<gdn::comm_error>(!failed_, "rank", rank(), "cannot exchange: its communicator has failed");
    if (left_ != 0 || (sends.empty() && recvs.empty())) {
      left_ -= sends.empty() && recvs.empty() ? 0 : 1;
      return comm_.exchange(sends, recvs, s);
    }
    left_ = -1;
    struck_ = true;
    if (kind_ == fault::truncates && !sends.empty()) {
      std::vector<gdn::send_op> shorter(sends.begin(), sends.end());
      for (gdn::send_op& m : shorter) --m.bytes;
      return comm_.exchange(shorter, recvs, s);
    }
    failed_ = true;
    if (kind_ != fault::leaves) comm_.abort();
    throw gdn::comm_error(gdn::say("rank", rank(), "lost its link"));
  }
  void abort() noexcept { comm_.abort(); }

 private:
  Comm& comm_;
  fault kind_;
  int left_;
  bool failed_ = false, struck_ = false;
};

/// Waits a random while before each exchange, so that ranks meet in another order on every run.
template <gdn::communicator Comm>
class late_communicator {
 public:
  using memory_type = typename Comm::memory_type;
  using stream_type = typename Comm::stream_type;

  late_communicator(Comm& comm, std::uint64_t n) : comm_(comm), random_(n) {}
  late_communicator(const late_communicator&) = delete;
  late_communicator& operator=(const late_communicator&) = delete;

  int rank() const noexcept { return comm_.rank(); }
  int size() const noexcept { return comm_.size(); }
  gdn::comm_state state() const noexcept { return comm_.state(); }
  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, stream_type s) {
    std::this_thread::sleep_for(std::chrono::microseconds(random_.between(0, 300)));
    comm_.exchange(sends, recvs, s);
  }
  void abort() noexcept { comm_.abort(); }

 private:
  Comm& comm_;
  random_source random_;
};

}  // namespace gdn_test
