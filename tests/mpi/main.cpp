// SPDX-License-Identifier: Apache-2.0
// Tests that run as several processes: mpirun -n P mpi_test. All processes run the same tests in the same order.
#include <cstdio>
#include <cstring>

#include <gtest/gtest.h>
#include <mpi.h>

#include <gdn/mpi/communicator.hpp>
#include <support/errors.hpp>

#include "group.hpp"

namespace {

/// Under a thread level that is too low a communicator is refused, and the error names the level.
int refuses_low_level(int* argc, char*** argv) {
  int level = MPI_THREAD_FUNNELED;
  MPI_Init_thread(argc, argv, MPI_THREAD_SINGLE, &level);
  const std::string text =
      gdn_test::text_of<gdn::comm_error>([] { gdn::mpi::mpi_communicator comm(MPI_COMM_WORLD); });
  MPI_Finalize();
  if (level == MPI_THREAD_SINGLE &&
      text == "MPI was initialised with MPI_THREAD_SINGLE; gdn::mpi needs MPI_THREAD_FUNNELED or more") {
    return 0;
  }
  std::fprintf(stderr, "level %d: %s\n", level, text.c_str());
  return level == MPI_THREAD_SINGLE ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const auto refused = [] {
    return gdn_test::text_of<gdn::comm_error>([] { gdn::mpi::mpi_communicator comm(MPI_COMM_WORLD); });
  };
  bool before = refused() == "MPI is not initialised: the host calls MPI_Init_thread before gdn::mpi is used";
  if (argc > 1 && std::strcmp(argv[1], "--single") == 0) return before ? refuses_low_level(&argc, &argv) : 1;

  int level = MPI_THREAD_SINGLE;
  int rank = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &gdn_test::processes);
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
  int failed = RUN_ALL_TESTS();
  MPI_Finalize();
  before = before && refused() == "MPI was finalised before this communicator was made";
  return failed != 0 || !before ? 1 : 0;
}
