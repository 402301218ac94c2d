// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Groups of the first processes of the job over NCCL; the others wait until they are done.

#include <chrono>
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include <gtest/gtest.h>
#include <mpi.h>

#include <gdn/cuda/memory.hpp>
#include <gdn/nccl/communicator.hpp>

namespace gdn_test {

inline int processes = 1;  // of the job; main() sets it

inline int process() {
  int me = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &me);
  return me;
}

/// The id that process 0 makes, on all.
inline ncclUniqueId common_id() {
  ncclUniqueId id{};
  if (process() == 0) id = gdn::nccl::make_unique_id();
  MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
  return id;
}

/// f(nccl_communicator&) on the first `ranks` processes, then all meet.
template <class F>
void run_on_gpus(int ranks, gdn::nccl::options o, F&& f) {
  const ncclUniqueId id = common_id();
  std::exception_ptr failure;
  if (process() < ranks) {
    try {
      gdn::nccl::nccl_communicator comm(id, process(), ranks, o);
      f(comm);
    } catch (...) {
      failure = std::current_exception();
    }
  }
  MPI_Barrier(MPI_COMM_WORLD);
  if (failure) std::rethrow_exception(failure);
}

/// As run_on_gpus, on a communicator that stays for the next call with so many ranks, unless a rank lost it.
template <class F>
void run_on_lasting_group(int ranks, F&& f) {
  static std::map<int, std::unique_ptr<gdn::nccl::nccl_communicator>> groups;
  auto& group = groups[ranks];
  int lost = process() < ranks && !group ? 1 : 0;
  MPI_Allreduce(MPI_IN_PLACE, &lost, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  if (lost != 0) {
    const ncclUniqueId id = common_id();
    group.reset();
    if (process() < ranks) {
      group = std::make_unique<gdn::nccl::nccl_communicator>(id, process(), ranks,
                                                             gdn::nccl::options{std::chrono::seconds(30)});
    }
  }
  std::exception_ptr failure;
  if (process() < ranks) {
    try {
      f(*group);
    } catch (...) {
      failure = std::current_exception();
    }
    if (failure || group->state() != gdn::comm_state::ok) group.reset();
  }
  MPI_Barrier(MPI_COMM_WORLD);
  if (failure) std::rethrow_exception(failure);
}

/// Device memory with bytes of the host.
class device_bytes {
 public:
  explicit device_bytes(const std::vector<std::byte>& content) : block_({content.size()}) {
    gdn::cuda::check(cudaMemcpy(block_.data(), content.data(), content.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    // The copy may still be on its way to the device, and no other stream waits for it.
    gdn::cuda::check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  }
  void* data() { return block_.data(); }
  std::vector<std::byte> host() const {
    std::vector<std::byte> out(block_.bytes());
    gdn::cuda::check(cudaMemcpy(out.data(), block_.data(), out.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return out;
  }

 private:
  gdn::cuda::device_block block_;
};

}  // namespace gdn_test
