// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A communicator chosen at run time, so that one instantiation of the layer serves several transports.

#include <concepts>
#include <span>

#include <gdn/concepts/communicator.hpp>

namespace gdn {
inline namespace v0 {

/// Refers to any communicator over `Memory` and `Stream`, which must outlive it. Costs a call through a pointer.
template <memory_kind Memory, stream_handle Stream>
class any_communicator {
 public:
  using memory_type = Memory;
  using stream_type = Stream;

  template <communicator Comm>
    requires std::same_as<typename Comm::memory_type, Memory> && std::same_as<typename Comm::stream_type, Stream> &&
             (waits_for_streams<Comm> || Memory::host_accessible)
  explicit any_communicator(Comm& comm)
      : comm_(&comm),
        rank_(comm.rank()),
        size_(comm.size()),
        state_([](const void* c) noexcept { return static_cast<const Comm*>(c)->state(); }),
        exchange_([](void* c, std::span<const send_op> sends, std::span<const recv_op> recvs, Stream s) {
          static_cast<Comm*>(c)->exchange(sends, recvs, s);
        }),
        synchronize_([](void* c, Stream s) {
          if constexpr (waits_for_streams<Comm>) static_cast<Comm*>(c)->synchronize(s);
        }),
        abort_([](void* c) noexcept { static_cast<Comm*>(c)->abort(); }) {}
  any_communicator(const any_communicator&) = delete;
  any_communicator& operator=(const any_communicator&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  comm_state state() const noexcept { return state_(comm_); }
  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, Stream s) {
    exchange_(comm_, sends, recvs, s);
  }
  void synchronize(Stream s) { synchronize_(comm_, s); }
  void abort() noexcept { abort_(comm_); }

 private:
  void* comm_;
  int rank_, size_;
  comm_state (*state_)(const void*) noexcept;
  void (*exchange_)(void*, std::span<const send_op>, std::span<const recv_op>, Stream);
  void (*synchronize_)(void*, Stream);
  void (*abort_)(void*) noexcept;
};
static_assert(waits_for_streams<any_communicator<host_memory, host_stream>>);

}  // namespace v0
}  // namespace gdn
