// SPDX-License-Identifier: Apache-2.0
// expect: deleted|implicitly-deleted
// A rank has one end of its group: it moves, but is not copied.
#include <utility>

#include <gdn/comm/threads.hpp>

void f(gdn::thread_communicator& comm) {
#ifdef GDN_CONTROL
  gdn::thread_communicator mine = std::move(comm);
#else
  gdn::thread_communicator mine = comm;
#endif
}
