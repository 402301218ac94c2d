// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Rendezvous: how ranks that are threads of one process meet to hand over messages, and fail together.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>

namespace gdn {
inline namespace v0 {
namespace detail {

/// One rank's place in a group of threads. An exchange posts what it sends, takes what it receives with a `copy` that
/// the owner supplies, and returns when all it sent was taken. A rank that fails, aborts or leaves ends the waiting of
/// its peers with comm_error; where a deadline is set, so does waiting longer than that for a peer.
class rendezvous {
 public:
  using duration = std::chrono::milliseconds;

  static std::vector<rendezvous> make_group(int ranks, duration deadline) {
    expects<comm_error>(ranks >= 1, "a group needs at least one rank, has", ranks);
    auto shared = std::make_shared<group>(ranks, deadline);
    std::vector<rendezvous> out;
    for (int r = 0; r < ranks; ++r) out.push_back(rendezvous(shared, r));
    return out;
  }

  rendezvous(rendezvous&& other) noexcept = default;
  rendezvous& operator=(rendezvous&& other) noexcept {
    leave();
    shared_ = std::move(other.shared_);
    rank_ = other.rank_;
    return *this;
  }
  ~rendezvous() { leave(); }

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return shared_ ? static_cast<int>(shared_->ranks.size()) : 0; }
  comm_state state() const noexcept {
    if (!shared_) return comm_state::aborted;  // moved from
    const std::lock_guard lock(shared_->mutex);
    return me().state;
  }

  /// The rank whose exchange failed first, or -1: the errors of others are its consequences.
  int first_failed() const noexcept {
    if (!shared_) return -1;
    const std::lock_guard lock(shared_->mutex);
    return shared_->first_failed;
  }

  /// @param context what `copy` may know of this rank as a sender
  /// @param copy    copy(sender's context, from, to, bytes, sender, receiver), called without a lock
  template <class Context, class Copy>
  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, const Context& context, Copy&& copy) {
    expects<comm_error>(shared_ != nullptr, "rank", rank_, "cannot exchange: its communicator was moved from");
    std::unique_lock lock(shared_->mutex);
    ++me().operations;
    expects<comm_error>(me().state == comm_state::ok, "rank", rank_, "cannot exchange: its communicator has",
                        me().state == comm_state::aborted ? "been aborted" : "failed");
    std::vector<message> posted(sends.size());
    try {
      for (std::size_t i = 0; i < sends.size(); ++i) {
        check_peer(sends[i].peer);
        posted[i] = {sends[i].data, sends[i].bytes, sends[i].peer, step::posted, &context};
        channel(rank_, sends[i].peer).push_back(&posted[i]);
        if (sends[i].peer != rank_) at(sends[i].peer).wake.notify_all();
      }
      for (const recv_op& r : recvs) receive<Context>(r, lock, copy);
      for (const message& m : posted) {
        await(lock, m.peer, "takes what was sent", [&] { return m.at == step::taken; });
      }
    } catch (...) {
      if (me().state == comm_state::ok) {
        me().state = comm_state::failed;
        if (shared_->first_failed < 0) shared_->first_failed = rank_;
      }
      withdraw(posted, lock);
      wake_all();
      throw;
    }
  }

  /// Ends the waiting of this rank, and of the peers that wait for it. Also what leaving does.
  void leave() noexcept {
    if (!shared_) return;
    const std::lock_guard lock(shared_->mutex);
    if (me().state == comm_state::ok) me().state = comm_state::aborted;
    wake_all();
  }

 private:
  enum class step { posted, copying, taken };
  struct message {
    const void* data = nullptr;
    std::size_t bytes = 0;
    int peer = 0;
    step at = step::taken;
    const void* context = nullptr;
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

  rendezvous(std::shared_ptr<group> shared, int rank) : shared_(std::move(shared)), rank_(rank) {}

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

  template <class Context, class Copy>
  void receive(const recv_op& r, std::unique_lock<std::mutex>& lock, Copy& copy) {
    check_peer(r.peer);
    std::deque<message*>& from = channel(r.peer, rank_);
    await(lock, r.peer, "sends", [&] { return !from.empty(); });
    message& m = *from.front();
    expects<comm_error>(m.bytes == r.bytes, "rank", rank_, "expects", r.bytes, "bytes from rank", r.peer,
                        "in exchange", me().operations, ", which sends", m.bytes);
    from.pop_front();
    m.at = step::copying;
    lock.unlock();
    std::exception_ptr failure;
    try {
      copy(*static_cast<const Context*>(m.context), m.data, r.data, r.bytes, r.peer, rank_);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    m.at = step::taken;
    at(r.peer).wake.notify_all();
    if (failure) std::rethrow_exception(failure);
  }

  // The messages stand on the stack of exchange(): none may be left in a channel, nor be under copy.
  void withdraw(std::vector<message>& posted, std::unique_lock<std::mutex>& lock) {
    for (message& m : posted) {
      if (m.at == step::posted) std::erase(channel(rank_, m.peer), &m);
      me().wake.wait(lock, [&] { return m.at != step::copying; });
    }
  }

  std::shared_ptr<group> shared_;
  int rank_ = 0;
};

}  // namespace detail
}  // namespace v0
}  // namespace gdn
