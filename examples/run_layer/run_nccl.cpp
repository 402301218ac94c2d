// SPDX-License-Identifier: Apache-2.0
// gdn-run's ranks over NCCL: threads of this process with a GPU each, or one process of an MPI job.
#if defined(GDN_RUN_NCCL)

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>

#include <cuda_runtime_api.h>

#include <gdn/comm/threads.hpp>
#include <gdn/cuda/error.hpp>
#include <gdn/nccl/communicator.hpp>

#include "device_ranks.hpp"
#include "job.hpp"

namespace gdn_run {
namespace {

using gdn::nccl::nccl_communicator;
using std::chrono::milliseconds;

int count_devices() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) return 0;
  gdn::cuda::check(status, "cudaGetDeviceCount");
  return devices;
}

/// The id that rank 0 makes, on all processes of the job.
ncclUniqueId agree_on_id(bool root) {
  ncclUniqueId id{};
  std::exception_ptr failure;  // the others wait for something
  try {
    if (root) id = gdn::nccl::make_unique_id();
  } catch (...) {
    failure = std::current_exception();
  }
  broadcast(std::as_writable_bytes(std::span(&id, 1)));
  if (failure) std::rethrow_exception(failure);
  return id;
}

}  // namespace

void expects_devices(const options& o) {
  const int devices = count_devices();
  if (o.ranks > devices) {
    throw usage_error(gdn::say("--ranks is", o.ranks) + gdn::say("; --comm nccl needs a GPU for each rank, here are", devices) +
                      ". Under mpirun, processes may share one");
  }
}

void choose_device(const options& o) {
  if (!o.processes) return;
  const int devices = count_devices();
  gdn::expects<gdn::backend_error>(devices > 0, "this process sees no GPU");
  gdn::cuda::check(cudaSetDevice(place_in_job().on_machine % devices), "cudaSetDevice");
}

void run_nccl_ranks(const options& o, const std::function<void(device_communicator&)>& f) {
  const auto on_rank = [&f](nccl_communicator& comm) {
    gdn::cuda::check(cudaSetDevice(comm.device()), "cudaSetDevice");
    device_communicator mine(comm);
    f(mine);
  };
  const milliseconds deadline = patience(o);
  if (!o.processes) return gdn::run_on_threads<nccl_communicator>(o.ranks, on_rank, deadline);
  const job_place place = place_in_job();
  const ncclUniqueId id = agree_on_id(place.rank == 0);
  std::optional<nccl_communicator> comm;
  try {
    comm.emplace(id, place.rank, place.size, gdn::nccl::options{deadline});
    on_rank(*comm);
    comm->finalize(deadline);
  } catch (const gdn::comm_error&) {
    if (comm && comm->waited_in_vain()) note_consequence();
    throw;
  }
}

}  // namespace gdn_run

#endif
