// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  An event that orders streams; it takes no time stamps.

#include <utility>

#include <cuda_runtime_api.h>

#include <gdn/cuda/error.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

class event {
 public:
  event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  event(event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  event& operator=(event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~event() {
    if (event_ != nullptr) static_cast<void>(cudaEventDestroy(event_));
  }
  cudaEvent_t get() const noexcept { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
