// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Every CUDA return value is looked at: a failure becomes a backend_error that names the call.

#include <source_location>
#include <string_view>

#include <cuda_runtime_api.h>

#include <gdn/core/error.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// @throws backend_error with CUDA's name and text of the error
inline void check(cudaError_t status, std::string_view call,
                  std::source_location where = std::source_location::current()) {
  if (status == cudaSuccess) [[likely]] return;
  throw backend_error(say(call, "failed:", cudaGetErrorName(status), "-", cudaGetErrorString(status)), where);
}

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
