// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A group of one on the device: its messages to itself are copies, which a graph may hold.

#include <cstddef>

#include <cuda_runtime_api.h>

#include <gdn/comm/self.hpp>
#include <gdn/cuda/error.hpp>
#include <gdn/cuda/stream.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

namespace detail {

inline void copy_on_device(void* to, const void* from, std::size_t bytes, stream_ref s) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, s.get()), "cudaMemcpyAsync");
}

}  // namespace detail

/// The only rank. An exchange is enqueued on its stream, allocates and waits for nothing, and may be captured.
class self_communicator : public gdn::detail::group_of_one<device_memory, stream_ref, detail::copy_on_device> {};
static_assert(communicator<self_communicator>);

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
