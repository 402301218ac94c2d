// SPDX-License-Identifier: Apache-2.0
#include <gdn/comm/self.hpp>

#include <gtest/gtest.h>

#include <array>
#include <string>
#include <thread>

namespace {

constexpr gdn::host_stream stream;

TEST(self_communicator, CopiesItsMessages) {
  gdn::self_communicator comm;
  const std::array<int, 4> from = {1, 2, 3, 4};
  std::array<int, 4> to = {};
  const std::array sends = {gdn::send_op{&from[0], 2 * sizeof(int), 0}, gdn::send_op{&from[2], 2 * sizeof(int), 0}};
  const std::array recvs = {gdn::recv_op{&to[2], 2 * sizeof(int), 0}, gdn::recv_op{&to[0], 2 * sizeof(int), 0}};
  comm.exchange(sends, recvs, stream);
  EXPECT_EQ(to, (std::array{3, 4, 1, 2}));
}

/// The text of the comm_error; afterwards the communicator must stay failed.
std::string failure_of(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs) {
  gdn::self_communicator comm;
  std::string text = "no comm_error";
  try {
    comm.exchange(sends, recvs, stream);
  } catch (const gdn::comm_error& e) {
    text = e.what();
  }
  EXPECT_EQ(comm.state(), gdn::comm_state::failed);
  EXPECT_THROW(comm.exchange({}, {}, stream), gdn::comm_error);
  return text;
}

TEST(self_communicator, RefusesMessagesThatDoNotMatch) {
  int a = 0, b = 0;
  const std::array send = {gdn::send_op{&a, sizeof a, 0}}, to_other = {gdn::send_op{&a, sizeof a, 1}};
  const std::array recv = {gdn::recv_op{&b, sizeof b, 0}}, shorter = {gdn::recv_op{&b, 2, 0}};
  const std::array from_other = {gdn::recv_op{&b, sizeof b, -1}};
  EXPECT_EQ(failure_of(send, {}), "rank 0 sends itself 1 messages but receives 0");
  EXPECT_EQ(failure_of({}, recv), "rank 0 sends itself 0 messages but receives 1");
  EXPECT_EQ(failure_of(send, shorter), "rank 0 sends itself 4 bytes but receives 2");
  EXPECT_EQ(failure_of(to_other, recv), "a group of one has no rank 1");
  EXPECT_EQ(failure_of(send, from_other), "a group of one has no rank -1");
}

TEST(self_communicator, MayBeAbortedFromAnotherThread) {
  gdn::self_communicator comm;
  std::thread([&] { comm.abort(); }).join();
  EXPECT_EQ(comm.state(), gdn::comm_state::aborted);
  EXPECT_THROW(comm.exchange({}, {}, stream), gdn::comm_error);
  EXPECT_EQ(comm.state(), gdn::comm_state::aborted);
}

}  // namespace
