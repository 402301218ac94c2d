// SPDX-License-Identifier: Apache-2.0
// A peer process is killed, stops, leaves or never comes; no launcher ends the other one. This program starts itself as
// two processes, by fork and exec.
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gdn/cuda/memory.hpp>
#include <gdn/nccl/communicator.hpp>
#include <support/deadline.hpp>

namespace {

using namespace std::chrono_literals;
using gdn::nccl::nccl_communicator;
using testing::HasSubstr;

std::string hex_of(const ncclUniqueId& id) {
  std::string out;
  for (const char c : id.internal) {
    std::array<char, 3> digits{};
    std::snprintf(digits.data(), digits.size(), "%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
    out += digits.data();
  }
  return out;
}
ncclUniqueId id_of(const std::string& hex) {
  ncclUniqueId id{};
  for (std::size_t i = 0; i < sizeof id.internal; ++i) {
    id.internal[i] = static_cast<char>(std::strtol(hex.substr(2 * i, 2).c_str(), nullptr, 16));
  }
  return id;
}

/// One rank of two, in a process of its own: three exchanges, at the second of which rank 1 does `what`.
/// @return 0, or 3 for a comm_error, whose text goes to standard output
int run_child(int rank, const ncclUniqueId& id, const std::string& what, int milliseconds) {
  if (what == "absent" && rank == 1) return 0;
  int devices = 0;
  gdn::cuda::check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  gdn::cuda::check(cudaSetDevice(rank % devices), "cudaSetDevice");
  auto begin = std::chrono::steady_clock::now();
  try {
    nccl_communicator comm(id, rank, 2, {std::chrono::milliseconds(milliseconds)});
    const gdn::cuda::stream s;
    const gdn::cuda::device_block block({1 << 20});
    for (int n = 1; n <= 3; ++n) {
      begin = std::chrono::steady_clock::now();
      if (n == 2 && rank == 1) {
        std::this_thread::sleep_for(300ms);  // rank 0 waits for it
        if (what == "kill") raise(SIGKILL);
        if (what == "stop") raise(SIGSTOP);
        if (what == "silent") std::this_thread::sleep_for(60s);
        if (what == "leave") return 0;
      }
      const std::array sends = {gdn::send_op{block.data(), 1 << 19, 1 - rank}};
      const std::array recvs = {gdn::recv_op{static_cast<char*>(block.data()) + (1 << 19), 1 << 19, 1 - rank}};
      comm.exchange(sends, recvs, s);
      comm.synchronize(s);
    }
    return comm.finalize(10s) ? 0 : 4;
  } catch (const gdn::comm_error& e) {
    const std::chrono::duration<double, std::milli> waited = std::chrono::steady_clock::now() - begin;
    std::printf("%.0f ms: %s\n", waited.count(), e.what());
    std::fflush(stdout);
    return 3;
  }
}

struct ended {
  int code = -1;
  double seconds = 0;
  std::string text;
};

/// Rank 0 of a pair whose rank 1 does `what`.
ended survivor(const std::string& what, int deadline_ms) {
  const std::string hex = hex_of(gdn::nccl::make_unique_id());
  const std::string deadline = std::to_string(deadline_ms);
  std::array<int, 2> pipe_ends{};
  EXPECT_EQ(pipe2(pipe_ends.data(), O_CLOEXEC), 0);  // its end is that of rank 0
  std::array<pid_t, 2> children{};
  const auto begin = std::chrono::steady_clock::now();
  for (int rank = 0; rank < 2; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      if (rank == 0) dup2(pipe_ends[1], STDOUT_FILENO);
      setenv("NCCL_HOSTID", rank == 0 ? "first" : "second", 0);  // they may share a GPU
      setenv("NCCL_SOCKET_IFNAME", "lo", 0);
      for (const char* off : {"NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"}) setenv(off, "1", 0);
      execl("/proc/self/exe", "lost_peer", "--child", std::to_string(rank).c_str(), hex.c_str(), what.c_str(),
            deadline.c_str(), nullptr);
      _exit(127);
    }
    children[static_cast<std::size_t>(rank)] = child;
  }
  close(pipe_ends[1]);
  ended out;
  std::array<char, 4096> buffer{};
  for (ssize_t n = 0; (n = read(pipe_ends[0], buffer.data(), buffer.size())) > 0;) {
    out.text.append(buffer.data(), static_cast<std::size_t>(n));
  }
  close(pipe_ends[0]);
  int status = 0;
  waitpid(children[0], &status, 0);
  out.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  kill(children[1], SIGKILL);
  waitpid(children[1], &status, 0);
  std::printf("%s: code %d after %.1f s, %s\n", what.c_str(), out.code, out.seconds, out.text.c_str());
  return out;
}

class lost_peer : public testing::Test {
 protected:
  gdn_test::deadline deadline_{120s};
};

TEST_F(lost_peer, NoneIsLost) {
  const ended e = survivor("nothing", 30000);
  EXPECT_EQ(e.code, 0) << e.text;
}

// NCCL sees the connection break long before the deadline.
TEST_F(lost_peer, AKilledPeerIsSeenBeforeTheDeadline) {
  const ended e = survivor("kill", 40000);
  EXPECT_EQ(e.code, 3);
  EXPECT_LT(e.seconds, 35);
  EXPECT_THAT(e.text, HasSubstr("failed while it waited for its stream, behind exchange 2"));
}

TEST_F(lost_peer, APeerThatStopsOrSaysNothingEndsTheWaitAtTheDeadline) {
  for (const char* what : {"stop", "silent"}) {
    const ended e = survivor(what, 6000);
    EXPECT_EQ(e.code, 3);
    EXPECT_THAT(e.text, HasSubstr("rank 0 waited 6000 ms for its stream, behind exchange 2"));
    EXPECT_LT(e.seconds, 25);
  }
}

TEST_F(lost_peer, APeerThatLeavesEndsTheWait) {
  const ended e = survivor("leave", 8000);
  EXPECT_EQ(e.code, 3);
  EXPECT_THAT(e.text, HasSubstr("behind exchange 2"));
}

TEST_F(lost_peer, APeerThatNeverComesEndsTheConstructor) {
  const ended e = survivor("absent", 3000);
  EXPECT_EQ(e.code, 3);
  EXPECT_THAT(e.text, HasSubstr("rank 0 waited 3000 ms for the 2 ranks of the group, but not all of them came"));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 6 && std::strcmp(argv[1], "--child") == 0) {
    return run_child(std::atoi(argv[2]), id_of(argv[3]), argv[4], std::atoi(argv[5]));
  }
  testing::InitGoogleTest(&argc, argv);
  int devices = 0;
  // Asked of a child: this process must not have started CUDA when it forks.
  const pid_t child = fork();
  if (child == 0) _exit(cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  if (!testing::GTEST_FLAG(list_tests) && status != 0) {
    std::puts("[  SKIPPED ] no CUDA device");
    return 0;
  }
  return RUN_ALL_TESTS();
}
