// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Groups of the first processes of the job; the others wait until they are done.

#include <chrono>
#include <exception>

#include <gtest/gtest.h>
#include <mpi.h>

#include <gdn/mpi/communicator.hpp>

namespace gdn_test {

inline int processes = 1;  // of the job; main() sets it

/// f(mpi_communicator&) on the first `ranks` processes, then all meet.
/// @param together the ranks leave together, unless one failed
template <class F>
void run_on_processes(int ranks, gdn::mpi::options o, F&& f, bool together = false) {
  int me = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &me);
  MPI_Comm part = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, me < ranks ? 0 : MPI_UNDEFINED, me, &part);
  std::exception_ptr failure;
  if (part != MPI_COMM_NULL) {
    try {
      gdn::mpi::mpi_communicator comm(part, o);
      f(comm);
      const bool left = !together || comm.state() != gdn::comm_state::ok || comm.finalize(std::chrono::seconds(10));
      EXPECT_TRUE(left);
    } catch (...) {
      failure = std::current_exception();
    }
    MPI_Comm_free(&part);
  }
  MPI_Barrier(MPI_COMM_WORLD);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gdn_test
