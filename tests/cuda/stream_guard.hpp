// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Watches the CUDA runtime: work may go to one stream only, nothing may be allocated or waited for.

#include <string>
#include <vector>

#include <cuda_runtime_api.h>

namespace gdn_test {

/// stream_guard.cpp defines the runtime's functions anew for this program: they note what breaks the rule, then do what
/// they are for. cuBLASLt has a runtime of its own; what it enqueues is seen by capturing (stream_test.cu).
class stream_guard {
 public:
  explicit stream_guard(cudaStream_t only);
  ~stream_guard();
  stream_guard(const stream_guard&) = delete;
  stream_guard& operator=(const stream_guard&) = delete;

  /// Calls that broke the rule, by name.
  std::vector<std::string> violations() const;
  /// Kernels, copies and fills that kept it.
  int enqueued() const;
};

}  // namespace gdn_test
