// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Ranks over host memory, threads of this process or processes of an MPI job, behind one type: each type of the
/// layer is compiled once for all of them.

#include <functional>
#include <span>

#include <gdn/concepts/communicator.hpp>

#include "options.hpp"

namespace gdn_run {

/// One rank's end of a group, whatever the group is.
class host_communicator {
 public:
  using memory_type = gdn::host_memory;
  using stream_type = gdn::host_stream;

  virtual int rank() const noexcept = 0;
  virtual int size() const noexcept = 0;
  virtual gdn::comm_state state() const noexcept = 0;
  virtual void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, gdn::host_stream s) = 0;
  virtual void abort() noexcept = 0;

 protected:
  host_communicator() = default;
  ~host_communicator() = default;
};
static_assert(gdn::communicator<host_communicator>);

/// A communicator of the library as a host_communicator, which does not own it.
template <gdn::communicator Comm>
class host_communicator_of final : public host_communicator {
 public:
  explicit host_communicator_of(Comm& comm) : comm_(comm) {}
  int rank() const noexcept override { return comm_.rank(); }
  int size() const noexcept override { return comm_.size(); }
  gdn::comm_state state() const noexcept override { return comm_.state(); }
  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, gdn::host_stream s) override {
    comm_.exchange(sends, recvs, s);
  }
  void abort() noexcept override { comm_.abort(); }

 private:
  Comm& comm_;
};

/// Runs f on every rank that `--comm` puts into this process: on P threads, or under mpirun on this thread.
/// @throws what f threw
void run_host_ranks(const options& o, const std::function<void(host_communicator&)>& f);

}  // namespace gdn_run
