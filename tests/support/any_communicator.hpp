// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A communicator chosen at run time, so that one instantiation of the layer serves all tests.

#include <span>

#include <gdn/concepts/communicator.hpp>

namespace gdn_test {

/// Refers to a communicator over host memory, which must outlive it.
class any_communicator {
 public:
  using memory_type = gdn::host_memory;
  using stream_type = gdn::host_stream;

  template <class Comm>
    requires gdn::communicator<Comm>
  explicit any_communicator(Comm& comm)
      : comm_(&comm),
        rank_(comm.rank()),
        size_(comm.size()),
        state_of_([](const void* c) noexcept { return static_cast<const Comm*>(c)->state(); }),
        exchange_([](void* c, std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs) {
          static_cast<Comm*>(c)->exchange(sends, recvs, gdn::host_stream{});
        }),
        abort_([](void* c) noexcept { static_cast<Comm*>(c)->abort(); }) {}
  any_communicator(const any_communicator&) = delete;
  any_communicator& operator=(const any_communicator&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  gdn::comm_state state() const noexcept { return state_of_(comm_); }
  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, gdn::host_stream) {
    exchange_(comm_, sends, recvs);
  }
  void abort() noexcept { abort_(comm_); }

 private:
  void* comm_;
  int rank_, size_;
  gdn::comm_state (*state_of_)(const void*) noexcept;
  void (*exchange_)(void*, std::span<const gdn::send_op>, std::span<const gdn::recv_op>);
  void (*abort_)(void*) noexcept;
};
static_assert(gdn::communicator<any_communicator>);

}  // namespace gdn_test
