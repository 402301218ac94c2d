// SPDX-License-Identifier: Apache-2.0
// Threads that share a GPU: messages are ordered by events on the streams, not by waiting.

#include <vector>

#include <gtest/gtest.h>

#include <gdn/comm/threads.hpp>
#include <gdn/cuda/local.hpp>
#include <gdn/cuda/memory.hpp>
#include <gdn/cuda/self.hpp>

namespace gdn_test {
namespace {

using gdn::index_t;
using gdn::cuda::local_communicator;

TEST(LocalCommunicator, MessagesArriveInOrderOverManyRounds) {
  constexpr int ranks = 4;
  constexpr index_t n = 1000;
  gdn::run_on_threads<local_communicator>(ranks, [](local_communicator& comm) {
    const gdn::cuda::stream s;
    gdn::cuda::device_block memory({std::size_t{1} << 20});
    auto ws = memory.workspace();
    const auto mine = ws.take<int>(n);
    const auto theirs = ws.take<int>(n);
    const int next = (comm.rank() + 1) % comm.size();
    const int before = (comm.rank() + comm.size() - 1) % comm.size();
    gdn::cuda::copy_to_device<int>(std::vector<int>(n, comm.rank()), mine, s);
    for (int round = 0; round < 50; ++round) {  // a token travels: what arrives is sent on
      const std::vector<gdn::send_op> sends = {{mine.data(), n * sizeof(int), next}};
      const std::vector<gdn::recv_op> recvs = {{theirs.data(), n * sizeof(int), before}};
      comm.exchange(sends, recvs, s);
      gdn::cuda::check(cudaMemcpyAsync(mine.data(), theirs.data(), n * sizeof(int), cudaMemcpyDeviceToDevice, s.get()),
                       "cudaMemcpyAsync");
    }
    const int want = ((comm.rank() - 50) % ranks + ranks) % ranks;
    EXPECT_EQ(gdn::cuda::copy_to_host(mine, s), std::vector<int>(n, want));
  });
}

TEST(LocalCommunicator, RefusesToBeCaptured) {
  auto group = local_communicator::make_group(1);
  const gdn::cuda::stream s;
  gdn::cuda::check(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  EXPECT_THROW(group[0].exchange({}, {}, s), gdn::comm_error);
  cudaGraph_t graph = nullptr;
  gdn::cuda::check(cudaStreamEndCapture(s.get(), &graph), "cudaStreamEndCapture");
  gdn::cuda::check(cudaGraphDestroy(graph), "cudaGraphDestroy");
}

TEST(LocalCommunicator, ARankThatLeavesEndsTheOthersWaiting) {
  EXPECT_THROW(gdn::run_on_threads<local_communicator>(2,
                                                       [](local_communicator& comm) {
                                                         if (comm.rank() == 1) return;
                                                         const gdn::cuda::stream s;
                                                         gdn::cuda::device_block memory({256});
                                                         const std::vector<gdn::recv_op> recvs = {{memory.data(), 4, 1}};
                                                         comm.exchange({}, recvs, s);
                                                       }),
               gdn::comm_error);
}

TEST(CudaSelfCommunicator, CopiesItsMessagesAndRefusesOthers) {
  gdn::cuda::self_communicator self;
  const gdn::cuda::stream s;
  gdn::cuda::device_block memory({512});
  auto ws = memory.workspace();
  const auto from = ws.take<int>(4), to = ws.take<int>(4);
  const std::vector<int> numbers = {1, 2, 3, 4};
  gdn::cuda::copy_to_device<int>(numbers, from, s);
  const std::vector<gdn::send_op> sends = {{from.data(), 16, 0}};
  const std::vector<gdn::recv_op> recvs = {{to.data(), 16, 0}}, shorter = {{to.data(), 8, 0}};
  self.exchange(sends, recvs, s);
  EXPECT_EQ(gdn::cuda::copy_to_host(to, s), numbers);
  EXPECT_THROW(self.exchange(sends, shorter, s), gdn::comm_error);
  EXPECT_EQ(self.state(), gdn::comm_state::failed);
  EXPECT_THROW(self.exchange(sends, recvs, s), gdn::comm_error) << "a communicator that failed stays failed";
}

}  // namespace
}  // namespace gdn_test
