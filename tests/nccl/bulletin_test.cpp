// SPDX-License-Identifier: Apache-2.0
// What threads of one process tell each other beside NCCL. Needs no GPU.
#include <vector>

#include <gtest/gtest.h>

#include <gdn/nccl/detail/bulletin.hpp>

namespace {

using gdn::comm_state;
using gdn::nccl::detail::bulletin;

constexpr comm_state left = comm_state::in_progress;

/// One message from a to b, of which each side may have posted its part.
void message(bulletin& b, int from, int to, bool sent, bool received) {
  const std::vector<gdn::send_op> sends = {{nullptr, 4, to}};
  const std::vector<gdn::recv_op> recvs = {{nullptr, 4, from}};
  if (sent) b.post(from, sends, {});
  if (received) b.post(to, {}, recvs);
}

TEST(Bulletin, NobodyIsMissedWhoIsHere) {
  bulletin b(3);
  message(b, 0, 1, true, false);
  for (int r = 0; r < 3; ++r) EXPECT_EQ(b.missing(r), -1);
  EXPECT_EQ(b.first_failed(), -1);
}

TEST(Bulletin, OneWhoLeftIsMissedForWhatItOwes) {
  bulletin b(3);
  message(b, 0, 1, true, true);
  message(b, 1, 2, false, true);
  message(b, 2, 1, true, false);
  message(b, 2, 0, true, true);
  b.leave(1, left);
  EXPECT_EQ(b.missing(0), -1);  // its message was taken
  EXPECT_EQ(b.missing(2), 1);
  bulletin c(2);
  message(c, 0, 1, true, false);
  c.leave(1, left);
  EXPECT_EQ(c.missing(0), 1);  // who would take it?
  EXPECT_EQ(c.missing(1), -1);
}

TEST(Bulletin, OneWhoFailedIsMissedByAllItTalkedWith) {
  for (const comm_state how : {comm_state::failed, comm_state::aborted}) {
    bulletin b(4);
    message(b, 0, 1, true, true);
    message(b, 2, 1, true, true);
    b.leave(1, how);
    EXPECT_EQ(b.missing(0), 1);
    EXPECT_EQ(b.missing(2), 1);
    EXPECT_EQ(b.missing(3), -1);
    EXPECT_EQ(b.first_failed(), how == comm_state::failed ? 1 : -1);
  }
}

TEST(Bulletin, TheFirstFailureAndTheFirstEndingCount) {
  bulletin b(3);
  b.leave(2, comm_state::failed);
  b.leave(0, comm_state::failed);
  EXPECT_EQ(b.first_failed(), 2);
  bulletin c(2);
  message(c, 0, 1, true, true);
  c.leave(1, left);
  c.leave(1, comm_state::aborted);
  EXPECT_EQ(c.missing(0), -1);
}

}  // namespace
