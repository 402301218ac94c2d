// SPDX-License-Identifier: Apache-2.0
// Tests that run as several processes with a GPU each, or with one GPU for all: mpirun -n P nccl_test. All processes run
// the same tests in the same order.
#include <cstdio>
#include <cstdlib>
#include <string>

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include "group.hpp"

namespace {

/// NCCL takes processes that share a GPU for ranks of one machine and refuses, unless each names a machine of its own;
/// then they talk through sockets.
void share_one_gpu(int rank) {
  setenv("NCCL_HOSTID", ("process" + std::to_string(rank)).c_str(), 0);
  setenv("NCCL_SOCKET_IFNAME", "lo", 0);
  for (const char* off : {"NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"}) setenv(off, "1", 0);
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  int level = MPI_THREAD_SINGLE, rank = 0, devices = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &gdn_test::processes);
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    if (rank == 0) std::puts("[  SKIPPED ] no CUDA device");
    MPI_Finalize();
    return 0;
  }
  if (devices < gdn_test::processes) share_one_gpu(rank);
  if (cudaSetDevice(rank % devices) != cudaSuccess) return 1;
  if (rank != 0) {  // the others speak of failures only
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    class failures : public testing::EmptyTestEventListener {
      void OnTestPartResult(const testing::TestPartResult& r) override {
        if (r.failed()) std::fprintf(stderr, "%s:%d: %s\n", r.file_name(), r.line_number(), r.message());
      }
    };
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new failures);
  }
  const int failed = RUN_ALL_TESTS();
  MPI_Finalize();
  return failed;
}
