// SPDX-License-Identifier: Apache-2.0
#if defined(GDN_RUN_CUDA)

#include "device_ranks.hpp"

#include <gdn/comm/threads.hpp>
#include <gdn/core/error.hpp>
#include <gdn/cuda/local.hpp>

namespace gdn_run {

void run_device_ranks(const options& o, const std::function<void(device_communicator&)>& f) {
  if (o.comm == comm_kind::nccl) return run_nccl_ranks(o, f);
  gdn::run_on_threads<gdn::cuda::local_communicator>(o.ranks, [&f](gdn::cuda::local_communicator& comm) {
    device_communicator mine(comm);
    f(mine);
  });
}

#if !defined(GDN_RUN_NCCL)
void choose_device(const options&) {}
void run_nccl_ranks(const options&, const std::function<void(device_communicator&)>&) {
  throw gdn::comm_error("this gdn-run was built without NCCL");
}
#endif

}  // namespace gdn_run

#endif
