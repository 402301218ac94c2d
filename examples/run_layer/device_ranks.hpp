// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Ranks over device memory, threads that share a GPU or ranks of NCCL, behind one type: each type of the layer is
/// compiled once for both.

#include <functional>

#include <gdn/comm/any.hpp>
#include <gdn/cuda/stream.hpp>

#include "options.hpp"

namespace gdn_run {

using device_communicator = gdn::any_communicator<gdn::device_memory, gdn::cuda::stream_ref>;

/// Makes the GPU of this process current: under an MPI launcher one after the other in turn on each machine.
void choose_device(const options& o);

/// Runs f on every rank that `--comm` puts into this process, with the rank's GPU current.
/// @throws what f threw
void run_device_ranks(const options& o, const std::function<void(device_communicator&)>& f);

/// The same for `--comm nccl`.
void run_nccl_ranks(const options& o, const std::function<void(device_communicator&)>& f);

}  // namespace gdn_run
