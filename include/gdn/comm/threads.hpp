// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  P ranks as threads of one process: context parallelism on the CPU, and the communicator of most tests.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

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
  using duration = std::chrono::milliseconds;

  /// The `ranks` ends of a new group. @param deadline for one wait; zero waits for ever
  static std::vector<thread_communicator> make_group(int ranks, duration deadline = duration::zero()) {
    expects<comm_error>(ranks >= 1, "a group needs at least one rank, has", ranks);
    auto shared = std::make_shared<group>(ranks, deadline);
    std::vector<thread_communicator> out;
    for (int r = 0; r < ranks; ++r) out.push_back(thread_communicator(shared, r));
    return out;
  }

  thread_communicator(thread_communicator&& other) noexcept = default;
  thread_communicator& operator=(thread_communicator&& other) noexcept {
    leave(comm_state::aborted);
    shared_ = std::move(other.shared_);
    rank_ = other.rank_;
    return *this;
  }
  ~thread_communicator() { leave(comm_state::aborted); }

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return shared_ ? static_cast<int>(shared_->ranks.size()) : 0; }
  comm_state state() const noexcept {
    if (!shared_) return comm_state::aborted;  // moved from
    const std::lock_guard lock(shared_->mutex);
    return me().state;
  }

  /// The rank of the group whose exchange was the first to fail, or -1: what others throw is a consequence of that.
  int first_failed() const noexcept {
    if (!shared_) return -1;
    const std::lock_guard lock(shared_->mutex);
    return shared_->first_failed;
  }

  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, host_stream) {
    expects<comm_error>(shared_ != nullptr, "rank", rank_, "cannot exchange: its communicator was moved from");
    std::unique_lock lock(shared_->mutex);
    ++me().operations;
    expects<comm_error>(me().state == comm_state::ok, "rank", rank_, "cannot exchange: its communicator has",
                        me().state == comm_state::aborted ? "been aborted" : "failed");
    std::vector<message> posted(sends.size());
    try {
      for (std::size_t i = 0; i < sends.size(); ++i) {
        check_peer(sends[i].peer);
        posted[i] = {sends[i].data, sends[i].bytes, sends[i].peer, step::posted};
        channel(rank_, sends[i].peer).push_back(&posted[i]);
        if (sends[i].peer != rank_) at(sends[i].peer).wake.notify_all();
      }
      for (const recv_op& r : recvs) receive(r, lock);
      for (const message& m : posted) {
        await(lock, m.peer, "takes what was sent", [&] { return m.at == step::taken; });
      }
    } catch (...) {
      if (me().state == comm_state::ok) me().state = comm_state::failed;
      if (shared_->first_failed < 0) shared_->first_failed = rank_;
      withdraw(posted, lock);
      wake_all();
      throw;
    }
  }

  /// Ends the waiting of this rank, and of the peers that wait for it.
  void abort() noexcept { leave(comm_state::aborted); }

 private:
  enum class step { posted, copying, taken };
  struct message {
    const void* data = nullptr;
    std::size_t bytes = 0;
    int peer = 0;
    step at = step::taken;
  };
  struct end {
    comm_state state = comm_state::ok;
    std::size_t operations = 0;
    std::condition_variable wake;
  };
  struct group {
    group(int n, duration d)
        : ranks(static_cast<std::size_t>(n)), channels(ranks.size() * ranks.size()), deadline(d) {}
    std::mutex mutex;  // guards all that follows
    std::vector<end> ranks;
    std::vector<std::deque<message*>> channels;  // [from][to]
    duration deadline;
    int first_failed = -1;
  };

  thread_communicator(std::shared_ptr<group> shared, int rank) : shared_(std::move(shared)), rank_(rank) {}

  end& at(int rank) const { return shared_->ranks[static_cast<std::size_t>(rank)]; }
  end& me() const { return at(rank_); }
  std::deque<message*>& channel(int from, int to) const {
    return shared_->channels[static_cast<std::size_t>(from) * shared_->ranks.size() + static_cast<std::size_t>(to)];
  }
  void check_peer(int peer) const {
    expects<comm_error>(0 <= peer && peer < size(), "rank", rank_, "has no peer", peer, "in a group of", size());
  }
  void wake_all() const {
    for (end& e : shared_->ranks) e.wake.notify_all();
  }

  template <class Done>
  void await(std::unique_lock<std::mutex>& lock, int peer, const char* what, Done done) {
    const auto over = [&] {
      return done() || peer == rank_ || me().state != comm_state::ok || at(peer).state != comm_state::ok;
    };
    bool in_time = true;
    if (shared_->deadline == duration::zero()) {
      me().wake.wait(lock, over);
    } else {
      in_time = me().wake.wait_for(lock, shared_->deadline, over);
    }
    if (done()) return;
    const std::size_t n = me().operations;
    expects<comm_error>(peer != rank_, "rank", rank_, "waits in exchange", n, "for ever until it itself", what);
    expects<comm_error>(me().state == comm_state::ok, "rank", rank_, "was aborted in exchange", n,
                        "while it waited until rank", peer, what);
    expects<comm_error>(in_time, "rank", rank_, "waited", shared_->deadline.count(), "ms in exchange", n,
                        "until rank", peer, what);
    throw comm_error(say("rank", rank_, "waited in exchange", n, "until rank", peer, what, ", but rank", peer,
                         at(peer).state == comm_state::aborted ? "left or was aborted" : "failed"));
  }

  void receive(const recv_op& r, std::unique_lock<std::mutex>& lock) {
    check_peer(r.peer);
    std::deque<message*>& from = channel(r.peer, rank_);
    await(lock, r.peer, "sends", [&] { return !from.empty(); });
    message& m = *from.front();
    expects<comm_error>(m.bytes == r.bytes, "rank", rank_, "expects", r.bytes, "bytes from rank", r.peer,
                        "in exchange", me().operations, ", which sends", m.bytes);
    from.pop_front();
    m.at = step::copying;
    lock.unlock();
    std::memcpy(r.data, m.data, r.bytes);
    lock.lock();
    m.at = step::taken;
    at(r.peer).wake.notify_all();
  }

  // The messages stand on the stack of exchange(): none may be left in a channel, nor be under copy.
  void withdraw(std::vector<message>& posted, std::unique_lock<std::mutex>& lock) {
    for (message& m : posted) {
      if (m.at == step::posted) std::erase(channel(rank_, m.peer), &m);
      me().wake.wait(lock, [&] { return m.at != step::copying; });
    }
  }

  void leave(comm_state how) noexcept {
    if (!shared_) return;
    const std::lock_guard lock(shared_->mutex);
    if (me().state == comm_state::ok) me().state = how;
    wake_all();
  }

  std::shared_ptr<group> shared_;
  int rank_ = 0;
};
static_assert(communicator<thread_communicator>);

/// Runs f(communicator&) on `ranks` threads and waits for all. If some throw, one error is thrown again: the first that
/// is not a comm_error, else that of the first exchange that failed; those of others are its consequences.
template <class F>
void run_on_threads(int ranks, F&& f, thread_communicator::duration deadline = thread_communicator::duration::zero()) {
  std::vector<std::exception_ptr> errors;
  std::atomic<int> first_failed = -1;
  {
    std::vector<std::jthread> threads;
    // Behind the threads, so gone before they are joined, should one of them not start.
    std::vector<thread_communicator> group = thread_communicator::make_group(ranks, deadline);
    errors.resize(group.size());
    for (std::size_t r = 0; r < errors.size(); ++r) {
      threads.emplace_back([&f, &first_failed, comm = std::move(group[r]), &error = errors[r]]() mutable {
        thread_communicator mine = std::move(comm);  // leaves the group when this rank is done
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
