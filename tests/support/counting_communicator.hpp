// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A communicator that counts what passes through another one.

#include <span>

#include <gdn/concepts/communicator.hpp>
#include <gdn/core/types.hpp>

namespace gdn_test {

struct message_counts {
  gdn::index_t exchanges = 0;  ///< with at least one message
  gdn::index_t messages_sent = 0, messages_received = 0;
  gdn::index_t bytes_sent = 0, bytes_received = 0;
  constexpr bool operator==(const message_counts&) const = default;
};

/// Messages to oneself do not count: they are copies.
template <gdn::communicator Comm>
class counting_communicator {
 public:
  using memory_type = typename Comm::memory_type;
  using stream_type = typename Comm::stream_type;

  explicit counting_communicator(Comm& comm) : comm_(comm) {}
  counting_communicator(const counting_communicator&) = delete;
  counting_communicator& operator=(const counting_communicator&) = delete;

  int rank() const noexcept { return comm_.rank(); }
  int size() const noexcept { return comm_.size(); }
  gdn::comm_state state() const noexcept { return comm_.state(); }
  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, stream_type s) {
    for (const gdn::send_op& m : sends) add(m, counts_.messages_sent, counts_.bytes_sent);
    for (const gdn::recv_op& m : recvs) add(m, counts_.messages_received, counts_.bytes_received);
    if (!sends.empty() || !recvs.empty()) ++counts_.exchanges;
    comm_.exchange(sends, recvs, s);
  }
  void synchronize(stream_type s)
    requires gdn::waits_for_streams<Comm>
  {
    comm_.synchronize(s);
  }
  void abort() noexcept { comm_.abort(); }

  /// What passed since the last call.
  message_counts take() {
    const message_counts out = counts_;
    counts_ = {};
    return out;
  }

 private:
  template <class Message>
  void add(const Message& m, gdn::index_t& messages, gdn::index_t& bytes) const {
    if (m.peer == comm_.rank()) return;
    ++messages;
    bytes += static_cast<gdn::index_t>(m.bytes);
  }

  Comm& comm_;
  message_counts counts_;
};

}  // namespace gdn_test
