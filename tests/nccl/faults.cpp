// SPDX-License-Identifier: Apache-2.0
// Loaded ahead of NCCL (LD_PRELOAD) into one process it lets something happen there at its n-th receive, or, if n is 0,
// where it makes a communicator:
//   GDN_FAULT="N WHAT"   WHAT is kill, stop, exit, sleep or error
// This is what NCCL's profiling interface is for: ncclRecv is replaced and calls pncclRecv.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <nccl.h>
#include <unistd.h>

namespace {

/// Whether the fault of call number `n` is an error to be returned.
bool strikes(int n) {
  int when = 0;
  char what[16] = "";
  const char* text = std::getenv("GDN_FAULT");
  if (text == nullptr || std::sscanf(text, "%d %15s", &when, what) != 2 || n != when) return false;
  if (std::strcmp(what, "kill") == 0) raise(SIGKILL);
  if (std::strcmp(what, "stop") == 0) raise(SIGSTOP);
  if (std::strcmp(what, "exit") == 0) _exit(0);
  if (std::strcmp(what, "sleep") == 0) sleep(100);
  return std::strcmp(what, "error") == 0;
}

}  // namespace

extern "C" ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                                 cudaStream_t stream) {
  static int calls = 0;
  return strikes(++calls) ? ncclSystemError : pncclRecv(data, count, type, peer, comm, stream);
}

extern "C" ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                               ncclConfig_t* config) {
  return strikes(0) ? ncclSystemError : pncclCommInitRankConfig(comm, ranks, id, rank, config);
}
