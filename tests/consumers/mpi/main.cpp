// SPDX-License-Identifier: Apache-2.0
// A host program whose ranks are processes: mpirun -n 2 consumer. Each compares its rows with those of one rank.
#include <limits>
#include <vector>

#include <mpi.h>

#include <gdn/comm/self.hpp>
#include <gdn/mpi/communicator.hpp>

#include "../layer.hpp"

int main(int argc, char** argv) {
  int level = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  int status = 1;
  {
    const Kokkos::ScopeGuard kokkos;
    const consumer::problem p;
    std::vector<double> one(p.x.size()), mine(p.x.size(), std::numeric_limits<double>::quiet_NaN());
    gdn::self_communicator self;
    consumer::run(self, p.layer, p.x, one);
    gdn::mpi::mpi_communicator comm(MPI_COMM_WORLD);
    if (comm.size() == 2) {
      consumer::run(comm, p.layer, p.x, mine);
      status = consumer::compare(one, mine);
    }
  }
  MPI_Finalize();
  return status;
}
