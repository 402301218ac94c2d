// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  P ranks as threads of one process: context parallelism on the CPU, and the communicator of most tests.

#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include <gdn/comm/rendezvous.hpp>
#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>

namespace gdn {
inline namespace v0 {

/// A rank of a group of threads, over host memory. A message is one copy, straight from the sender's buffer to the
/// receiver's; an exchange returns when what it sent was taken and what it receives has arrived.
///
/// A rank that fails, aborts or is destroyed ends the waiting of its peers with comm_error. Where a deadline is set,
/// so does waiting longer than that for a peer.
class thread_communicator {
 public:
  using memory_type = host_memory;
  using stream_type = host_stream;
  using duration = detail::rendezvous::duration;

  /// The `ranks` ends of a new group. @param deadline for one wait; zero waits for ever
  static std::vector<thread_communicator> make_group(int ranks, duration deadline = duration::zero()) {
    std::vector<thread_communicator> out;
    for (auto& place : detail::rendezvous::make_group(ranks, deadline)) {
      out.push_back(thread_communicator(std::move(place)));
    }
    return out;
  }

  int rank() const noexcept { return place_.rank(); }
  int size() const noexcept { return place_.size(); }
  comm_state state() const noexcept { return place_.state(); }
  /// The rank whose exchange failed first, or -1: the errors of others are its consequences.
  int first_failed() const noexcept { return place_.first_failed(); }

  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, host_stream) {
    struct nothing {};
    place_.exchange(sends, recvs, nothing{}, [](const nothing&, const void* from, void* to, std::size_t bytes, int, int) {
      std::memcpy(to, from, bytes);
    });
  }

  /// Ends the waiting of this rank, and of the peers that wait for it.
  void abort() noexcept { place_.leave(); }

 private:
  explicit thread_communicator(detail::rendezvous&& place) : place_(std::move(place)) {}
  detail::rendezvous place_;
};
static_assert(communicator<thread_communicator>);

/// Runs f(Comm&) on `ranks` threads and waits for all. If some throw, one error is thrown again: the first that
/// is not a comm_error, else that of the first exchange that failed; those of others are its consequences.
template <class Comm = thread_communicator, class F>
void run_on_threads(int ranks, F&& f, typename Comm::duration deadline = Comm::duration::zero()) {
  std::vector<std::exception_ptr> errors;
  std::atomic<int> first_failed = -1;
  {
    std::vector<std::jthread> threads;
    // Behind the threads, so gone before they are joined, should one of them not start.
    std::vector<Comm> group = Comm::make_group(ranks, deadline);
    errors.resize(group.size());
    for (std::size_t r = 0; r < errors.size(); ++r) {
      threads.emplace_back([&f, &first_failed, comm = std::move(group[r]), &error = errors[r]]() mutable {
        Comm mine = std::move(comm);  // leaves the group when this rank is done
        try {
          f(mine);
        } catch (...) {
          error = std::current_exception();
          if (const int rank = mine.first_failed(); rank >= 0) first_failed = rank;
        }
      });
    }
  }
  std::exception_ptr consequence = first_failed >= 0 ? errors[static_cast<std::size_t>(first_failed)] : nullptr;
  for (const std::exception_ptr& e : errors) {
    if (!e) continue;
    try {
      std::rethrow_exception(e);
    } catch (const comm_error&) {
      if (!consequence) consequence = e;
    } catch (...) {
      throw;
    }
  }
  if (consequence) std::rethrow_exception(consequence);
}

}  // namespace v0
}  // namespace gdn
