// SPDX-License-Identifier: Apache-2.0
// What only NCCL's communicators do: graphs, bounded waiting, communicators of the host, giving back.
#include <array>
#include <chrono>
#include <cstddef>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <gdn/comm/abort_guard.hpp>
#include <gdn/nccl/communicator_ref.hpp>
#include <support/deadline.hpp>
#include <support/errors.hpp>

#include "group.hpp"

namespace {

using namespace gdn_test;
using namespace std::chrono_literals;
using gdn::comm_error;
using gdn::comm_state;
using gdn::nccl::nccl_communicator;
using testing::AllOf;
using testing::HasSubstr;

class nccl_communicators : public testing::Test {
 protected:
  void SetUp() override {
    if (processes < 2) GTEST_SKIP() << "has no peers";
  }
  deadline deadline_{60s};
};

/// A number that goes round: what arrives is the number of the rank before.
class ring {
 public:
  explicit ring(const nccl_communicator& comm)
      : next_((comm.rank() + 1) % comm.size()),
        before_((comm.rank() + comm.size() - 1) % comm.size()),
        block_({512}),
        out_(block_.workspace().take<int>(1)) {
    auto ws = block_.workspace();
    out_ = ws.take<int>(1);
    in_ = ws.take<int>(1);
  }
  void set(int value, gdn::cuda::stream_ref s) { gdn::cuda::copy_to_device<int>(std::vector<int>{value}, out_, s); }
  int get(gdn::cuda::stream_ref s) const { return gdn::cuda::copy_to_host(in_, s)[0]; }
  int before() const { return before_; }
  template <class Comm>
  void turn(Comm& comm, gdn::cuda::stream_ref s) const {
    const std::array sends = {gdn::send_op{out_.data(), sizeof(int), next_}};
    const std::array recvs = {gdn::recv_op{in_.data(), sizeof(int), before_}};
    comm.exchange(sends, recvs, s);
  }
  /// Receives what nobody sends.
  template <class Comm>
  void receive(Comm& comm, int peer, gdn::cuda::stream_ref s) const {
    const std::array recvs = {gdn::recv_op{in_.data(), sizeof(int), peer}};
    comm.exchange({}, recvs, s);
  }

 private:
  int next_, before_;
  gdn::cuda::device_block block_;
  gdn::tensor_ref<int, 1, gdn::device_memory> out_, in_;
};

template <class F>
double seconds(F&& f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

TEST_F(nccl_communicators, AGraphOfAnExchangeIsReplayedWithNewData) {
  run_on_gpus(processes, {20s}, [](nccl_communicator& comm) {
    const gdn::cuda::stream s;
    ring r(comm);
    r.set(0, s);
    r.turn(comm, s);  // connects
    comm.synchronize(s);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    gdn::cuda::check(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    r.turn(comm, s);
    r.turn(comm, s);
    gdn::cuda::check(cudaStreamEndCapture(s.get(), &graph), "cudaStreamEndCapture");
    gdn::cuda::check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    for (int round = 1; round <= 20; ++round) {
      r.set(100 * round + comm.rank(), s);
      gdn::cuda::check(cudaGraphLaunch(exec, s.get()), "cudaGraphLaunch");
      ASSERT_EQ(comm.wait_until(s, std::chrono::steady_clock::now() + 20s), comm_state::ok);
      EXPECT_EQ(r.get(s), 100 * round + r.before());
    }
    gdn::cuda::check(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    gdn::cuda::check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    r.set(7 + comm.rank(), s);  // and without a graph again
    r.turn(comm, s);
    comm.synchronize(s);
    EXPECT_EQ(r.get(s), 7 + r.before());
    EXPECT_TRUE(comm.finalize(10s));
  });
}

TEST_F(nccl_communicators, AnEndKnowsTheDeviceThatWasCurrentWhenItWasMade) {
  run_on_gpus(processes, {20s}, [](nccl_communicator& comm) {
    int device = -1;
    gdn::cuda::check(cudaGetDevice(&device), "cudaGetDevice");
    EXPECT_EQ(comm.device(), device);  // not 0, where there are several GPUs
  });
}

TEST_F(nccl_communicators, AnExchangeWaitsForNoMessage) {
  run_on_gpus(processes, {20s}, [](nccl_communicator& comm) {
    const gdn::cuda::stream s;
    ring r(comm);
    r.set(comm.rank(), s);
    r.turn(comm, s);
    comm.synchronize(s);
    MPI_Barrier(MPI_COMM_WORLD);
    if (comm.rank() == 0) std::this_thread::sleep_for(1s);
    const double enqueued = seconds([&] { r.turn(comm, s); });
    EXPECT_LT(enqueued, 0.5);
    const double done = seconds([&] { comm.synchronize(s); });
    if (comm.rank() == 1) {
      EXPECT_GT(done, 0.3);
    }
    EXPECT_EQ(r.get(s), r.before());
  });
}

TEST_F(nccl_communicators, WaitUntilChangesNothing) {
  run_on_gpus(processes, {20s}, [](nccl_communicator& comm) {
    const gdn::cuda::stream s;
    ring r(comm);
    r.set(comm.rank(), s);
    r.turn(comm, s);
    comm.synchronize(s);
    MPI_Barrier(MPI_COMM_WORLD);
    if (comm.rank() == 0) std::this_thread::sleep_for(800ms);
    r.turn(comm, s);
    if (comm.rank() == 1) {
      EXPECT_EQ(comm.wait_until(s, std::chrono::steady_clock::now() + 100ms), comm_state::in_progress);
    }
    EXPECT_EQ(comm.state(), comm_state::ok);
    EXPECT_EQ(comm.wait_until(s, std::chrono::steady_clock::now() + 20s), comm_state::ok);
    EXPECT_EQ(r.get(s), r.before());
  });
}

TEST_F(nccl_communicators, TheDeadlineEndsWaitingAndMemoryIsFree) {
  run_on_gpus(processes, {1s}, [](nccl_communicator& comm) {
    const gdn::cuda::stream s;
    {
      ring r(comm);
      r.set(comm.rank(), s);
      r.turn(comm, s);
      comm.synchronize(s);
      MPI_Barrier(MPI_COMM_WORLD);
      if (comm.rank() == 1) {
        r.receive(comm, 0, s);
        const double waited = seconds([&] {
          EXPECT_EQ(text_of<comm_error>([&] { comm.synchronize(s); }),
                    "rank 1 waited 1000 ms for its stream, behind exchange 2");
        });
        EXPECT_LT(waited, 4);
        EXPECT_EQ(comm.state(), comm_state::failed);
        EXPECT_THAT(text_of<comm_error>([&] { r.turn(comm, s); }), HasSubstr("cannot exchange: its communicator has failed"));
      }
      MPI_Barrier(MPI_COMM_WORLD);  // until then rank 0 is there, and silent
    }  // freeing waits for the device
    EXPECT_EQ(cudaStreamSynchronize(s.get()), cudaSuccess);
  });
}

TEST_F(nccl_communicators, APeerThatDoesNotConnectEndsTheExchange) {
  run_on_gpus(processes, {1s}, [](nccl_communicator& comm) {
    const gdn::cuda::stream s;
    ring r(comm);
    if (comm.rank() == 1) {
      EXPECT_EQ(text_of<comm_error>([&] {
                  r.receive(comm, 0, s);
                  comm.synchronize(s);
                }).substr(0, 19),
                "rank 1 waited 1000 ");
    }
    MPI_Barrier(MPI_COMM_WORLD);
  });
}

TEST_F(nccl_communicators, ARankThatNeverComesEndsTheConstructor) {
  const ncclUniqueId id = common_id();
  if (process() == 0) {
    const double waited = seconds([&] {
      EXPECT_EQ(text_of<comm_error>([&] { nccl_communicator comm(id, 0, 2, {1s}); }),
                "rank 0 waited 1000 ms for the 2 ranks of the group, but not all of them came");
    });
    EXPECT_LT(waited, 5);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST_F(nccl_communicators, AbortFromAnotherThreadEndsWaiting) {
  run_on_gpus(processes, {}, [](nccl_communicator& comm) {
    const gdn::cuda::stream s;
    ring r(comm);
    r.set(comm.rank(), s);
    r.turn(comm, s);
    comm.synchronize(s);
    MPI_Barrier(MPI_COMM_WORLD);
    if (comm.rank() == 1) {
      r.receive(comm, 0, s);
      std::thread watchdog([&] {
        std::this_thread::sleep_for(300ms);
        comm.abort();
      });
      const std::string text = text_of<comm_error>([&] { comm.synchronize(s); });
      EXPECT_EQ(text, "rank 1 was aborted while it waited for its stream, behind exchange 2");
      EXPECT_EQ(comm.state(), comm_state::aborted);
      watchdog.join();
    }
    MPI_Barrier(MPI_COMM_WORLD);
  });
}

TEST_F(nccl_communicators, AnErrorOfTheHostDoesNotHangWhileMemoryIsFreed) {
  run_on_gpus(processes, {}, [](nccl_communicator& comm) {
    const gdn::cuda::stream s;
    const auto work = [&] {
      ring r(comm);
      const gdn::abort_guard guard(comm);
      r.set(comm.rank(), s);
      r.turn(comm, s);
      comm.synchronize(s);
      MPI_Barrier(MPI_COMM_WORLD);
      if (comm.rank() != 1) return;
      r.receive(comm, 0, s);  // never arrives
      throw std::runtime_error("something of the host");
    };
    if (comm.rank() == 1) {
      EXPECT_THROW(work(), std::runtime_error);
      EXPECT_EQ(comm.state(), comm_state::aborted);
    } else {
      work();
    }
  });
}

TEST_F(nccl_communicators, FinalizeGivesBackAndDestructionWaitsForNobody) {
  for (int i = 0; i < 2; ++i) {
    run_on_gpus(processes, {20s}, [&](nccl_communicator& made) {
      nccl_communicator comm = std::move(made);
      EXPECT_EQ(made.state(), comm_state::aborted);  // NOLINT: moved from
      EXPECT_EQ(made.size(), 0);
      const gdn::cuda::stream s;
      ring r(comm);
      r.set(comm.rank(), s);
      r.turn(comm, s);
      comm.synchronize(s);
      if (i == 0) {
        EXPECT_TRUE(comm.finalize(10s));
        EXPECT_TRUE(comm.finalize(10s));
        EXPECT_THAT(text_of<comm_error>([&] { r.turn(comm, s); }), HasSubstr("has been aborted"));
      }
      MPI_Barrier(MPI_COMM_WORLD);
      if (i == 1 && comm.rank() == 1) {
        r.receive(comm, 0, s);
        EXPECT_LT(seconds([&] { const nccl_communicator gone = std::move(comm); }), 3);
        EXPECT_EQ(cudaStreamSynchronize(s.get()), cudaSuccess);
      }
      MPI_Barrier(MPI_COMM_WORLD);
    });
  }
}

// A host that has a communicator of its own lends it.
TEST_F(nccl_communicators, ACommunicatorOfTheHostIsUsedAndLeftToIt) {
  const ncclUniqueId id = common_id();
  ncclComm_t host = nullptr;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  gdn::nccl::check(ncclCommInitRankConfig(&host, processes, id, process(), &config), "ncclCommInitRankConfig");
  const auto ready = [&] {
    ncclResult_t result = ncclInProgress;
    while (result == ncclInProgress) gdn::nccl::check(ncclCommGetAsyncError(host, &result), "ncclCommGetAsyncError");
    return result;
  };
  ASSERT_EQ(ready(), ncclSuccess);
  {
    const gdn::cuda::stream s;
    gdn::nccl::nccl_communicator_ref comm(host, {20s});
    EXPECT_EQ(comm.rank(), process());
    EXPECT_EQ(comm.size(), processes);
    gdn::cuda::device_block block({512});
    auto ws = block.workspace();
    const auto out = ws.take<int>(1), in = ws.take<int>(1);
    gdn::cuda::copy_to_device<int>(std::vector<int>{comm.rank()}, out, s);
    const int next = (comm.rank() + 1) % comm.size(), before = (comm.rank() + comm.size() - 1) % comm.size();
    const std::array sends = {gdn::send_op{out.data(), sizeof(int), next}};
    const std::array recvs = {gdn::recv_op{in.data(), sizeof(int), before}};
    comm.exchange(sends, recvs, s);
    comm.synchronize(s);
    EXPECT_EQ(gdn::cuda::copy_to_host(in, s)[0], before);
    MPI_Barrier(MPI_COMM_WORLD);
    if (comm.rank() == 1) comm.exchange({}, recvs, s);  // in vain
    comm.abort();
    EXPECT_EQ(comm.state(), comm_state::aborted);
    EXPECT_THROW(comm.exchange(sends, recvs, s), comm_error);
    EXPECT_EQ(cudaStreamSynchronize(s.get()), cudaSuccess);
  }
  static_cast<void>(ready());
  gdn::nccl::check(ncclCommAbort(host), "ncclCommAbort");
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST_F(nccl_communicators, RefusesWhatIsNoGroup) {
  const ncclUniqueId id = gdn::nccl::make_unique_id();
  EXPECT_EQ(text_of<comm_error>([&] { nccl_communicator comm(id, 2, 2); }), "there is no rank 2 of 2");
  EXPECT_EQ(text_of<comm_error>([&] { gdn::nccl::nccl_communicator_ref comm(nullptr); }),
            "gdn::nccl needs a communicator, not NULL");
  int devices = 0;
  ASSERT_EQ(cudaGetDeviceCount(&devices), cudaSuccess);
  EXPECT_THAT(text_of<comm_error>([&] { nccl_communicator::make_group(devices + 1); }),
              HasSubstr("NCCL needs a GPU for each rank of a process"));
}

}  // namespace
