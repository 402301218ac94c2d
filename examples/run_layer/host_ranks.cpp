// SPDX-License-Identifier: Apache-2.0
#include "host_ranks.hpp"

#include <gdn/comm/threads.hpp>

#include "job.hpp"

namespace gdn_run {

void run_host_ranks(const options& o, const std::function<void(host_communicator&)>& f) {
  if (o.comm == comm_kind::mpi) return run_mpi_rank(o, f);
  gdn::run_on_threads(o.ranks, [&f](gdn::thread_communicator& comm) {
    host_communicator_of<gdn::thread_communicator> mine(comm);
    f(mine);
  });
}

}  // namespace gdn_run
