// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Every NCCL return value is looked at: a failure becomes a comm_error that names the call.

#include <source_location>
#include <string>
#include <string_view>

#include <nccl.h>

#include <gdn/core/error.hpp>

namespace gdn {
inline namespace v0 {
namespace nccl {

/// NCCL's text of the code, and of the last error that it logged in this process.
inline std::string text_of(ncclResult_t status) {
  std::string out = ncclGetErrorString(status);
  const char* last = ncclGetLastError(nullptr);
  if (last != nullptr && *last != 0) out += std::string(" - ") + last;
  while (out.ends_with('\n')) out.pop_back();
  return out;
}

/// `ncclInProgress` is what a non-blocking call says when all is well so far.
/// @throws comm_error with NCCL's text of the error
inline void check(ncclResult_t status, std::string_view call,
                  std::source_location where = std::source_location::current()) {
  if (status == ncclSuccess || status == ncclInProgress) [[likely]] return;
  throw comm_error(say(call, "failed:", text_of(status)), where);
}

}  // namespace nccl
}  // namespace v0
}  // namespace gdn
