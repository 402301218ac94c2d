// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  stream_ref: a CUDA stream that the caller names and owns.

#include <cstddef>

#include <cuda_runtime_api.h>

#include <gdn/core/stream.hpp>
#include <gdn/cuda/error.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// Work on one stream is ordered. There is no default: neither 0 nor nullptr makes a stream_ref, so the legacy default
/// stream is used only by a caller who says so (cudaStreamLegacy).
class stream_ref {
 public:
  stream_ref() = delete;
  stream_ref(int) = delete;
  stream_ref(std::nullptr_t) = delete;
  // NOLINTNEXTLINE(google-explicit-constructor): a stream is a stream
  constexpr stream_ref(cudaStream_t stream) noexcept : stream_(stream) {}

  constexpr cudaStream_t get() const noexcept { return stream_; }
  constexpr bool operator==(const stream_ref&) const = default;

 private:
  cudaStream_t stream_;
};
static_assert(stream_handle<stream_ref>);

/// A stream of the current device that ends with its scope; it does not synchronise with the legacy default stream.
class stream {
 public:
  stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  stream(const stream&) = delete;
  stream& operator=(const stream&) = delete;
  ~stream() { static_cast<void>(cudaStreamDestroy(stream_)); }

  // NOLINTNEXTLINE(google-explicit-constructor): an owner is used as what it owns
  operator stream_ref() const noexcept { return stream_ref(stream_); }
  cudaStream_t get() const noexcept { return stream_; }
  void synchronize() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
