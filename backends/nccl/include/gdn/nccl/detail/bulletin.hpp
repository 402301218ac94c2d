// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What ranks that are threads of one process tell each other beside NCCL: what they posted, and who has gone.

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include <gdn/concepts/communicator.hpp>

namespace gdn {
inline namespace v0 {
namespace nccl {
namespace detail {

/// NCCL does not tell a rank that a peer has gone: its kernel waits on. The ranks of one process look here instead.
class bulletin {
 public:
  explicit bulletin(int ranks)
      : gone_(static_cast<std::size_t>(ranks), comm_state::ok), sent_(gone_.size() * gone_.size()), received_(sent_) {}

  /// The messages of one exchange of `rank`, before they are enqueued.
  void post(int rank, std::span<const send_op> sends, std::span<const recv_op> recvs) {
    const std::lock_guard lock(mutex_);
    for (const send_op& m : sends) ++sent_[at(rank, m.peer)];
    for (const recv_op& m : recvs) ++received_[at(m.peer, rank)];
  }

  /// @param how failed, or aborted: what it posted may never come; in_progress: it left when all of that was done
  void leave(int rank, comm_state how) noexcept {
    const std::lock_guard lock(mutex_);
    comm_state& gone = gone_[static_cast<std::size_t>(rank)];
    if (gone == comm_state::ok) gone = how;
    if (how == comm_state::failed && first_failed_ < 0) first_failed_ = rank;
  }

  /// A peer for which a wait of `rank` is in vain, or -1: it failed and had messages with `rank`, or it left and lacks
  /// the counterpart of one that `rank` has posted.
  int missing(int rank) const {
    const std::lock_guard lock(mutex_);
    for (int p = 0; p < static_cast<int>(gone_.size()); ++p) {
      const comm_state gone = gone_[static_cast<std::size_t>(p)];
      if (p == rank || gone == comm_state::ok) continue;
      const std::size_t to = at(rank, p), from = at(p, rank);
      if (sent_[to] > received_[to] || received_[from] > sent_[from]) return p;
      if (gone != comm_state::in_progress && sent_[to] + received_[from] > 0) return p;
    }
    return -1;
  }

  /// The rank that failed first, or -1: the errors of others are its consequences.
  int first_failed() const noexcept {
    const std::lock_guard lock(mutex_);
    return first_failed_;
  }

 private:
  std::size_t at(int from, int to) const {
    return static_cast<std::size_t>(from) * gone_.size() + static_cast<std::size_t>(to);
  }

  mutable std::mutex mutex_;  // guards all that follows
  std::vector<comm_state> gone_;
  std::vector<std::uint64_t> sent_, received_;  // messages [from][to], as each side counts them
  int first_failed_ = -1;
};

}  // namespace detail
}  // namespace nccl
}  // namespace v0
}  // namespace gdn
