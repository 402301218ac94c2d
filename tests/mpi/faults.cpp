// SPDX-License-Identifier: Apache-2.0
// Loaded ahead of MPI (LD_PRELOAD) into one process it lets something happen there at its n-th receive:
//   GDN_FAULT="N WHAT"   WHAT is kill, stop, exit, sleep, throw or error
// This is what MPI's profiling interface is for: MPI_Irecv is replaced and calls PMPI_Irecv.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include <mpi.h>
#include <unistd.h>

extern "C" int MPI_Irecv(void* buffer, int count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
                         MPI_Request* request) {
  static int calls = 0;
  int when = 0;
  char what[16] = "";
  const char* text = std::getenv("GDN_FAULT");
  if (text == nullptr || std::sscanf(text, "%d %15s", &when, what) != 2 || ++calls != when) what[0] = 0;
  if (std::strcmp(what, "kill") == 0) raise(SIGKILL);
  if (std::strcmp(what, "stop") == 0) raise(SIGSTOP);
  if (std::strcmp(what, "exit") == 0) _exit(0);
  if (std::strcmp(what, "sleep") == 0) sleep(100);
  if (std::strcmp(what, "throw") == 0) throw std::bad_alloc();
  if (std::strcmp(what, "error") == 0) return MPI_ERR_OTHER;
  return PMPI_Irecv(buffer, count, type, source, tag, comm, request);
}
