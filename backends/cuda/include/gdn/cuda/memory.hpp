// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A block of device memory for programs that have no allocator of their own.

#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include <gdn/core/workspace.hpp>
#include <gdn/cuda/error.hpp>
#include <gdn/cuda/stream.hpp>

namespace gdn {
inline namespace v0 {
namespace cuda {

/// Owns bytes of the current device; cudaMalloc aligns them to 256. The library itself never allocates.
class device_block {
 public:
  explicit device_block(memory_requirement need) : bytes_(need.bytes) {
    if (bytes_ > 0) check(cudaMalloc(&data_, bytes_), "cudaMalloc");
  }
  device_block(device_block&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  device_block& operator=(device_block&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~device_block() { static_cast<void>(cudaFree(data_)); }

  gdn::workspace<device_memory> workspace() const { return {data_, bytes_}; }
  void* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Host elements to a contiguous device tensor, ordered on the stream; returns when `from` may be changed again.
template <class T, int R>
void copy_to_device(std::span<const std::type_identity_t<T>> from, const tensor_ref<T, R, device_memory>& to,
                    stream_ref s) {
  expects<shape_error>(static_cast<index_t>(from.size()) == to.size() && is_contiguous(to), "a tensor of", to.size(),
                       "elements cannot take", from.size());
  if (from.empty()) return;
  check(cudaMemcpyAsync(to.data(), from.data(), from.size_bytes(), cudaMemcpyHostToDevice, s.get()), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(s.get()), "cudaStreamSynchronize");
}

/// The elements of a contiguous device tensor, once the stream's work is done.
template <class T, int R>
std::vector<std::remove_const_t<T>> copy_to_host(const tensor_ref<T, R, device_memory>& from, stream_ref s) {
  expects<shape_error>(is_contiguous(from), "only a contiguous tensor is copied to the host");
  std::vector<std::remove_const_t<T>> out(static_cast<std::size_t>(from.size()));
  if (!out.empty()) {
    check(cudaMemcpyAsync(out.data(), from.data(), out.size() * sizeof(T), cudaMemcpyDeviceToHost, s.get()),
          "cudaMemcpyAsync");
  }
  check(cudaStreamSynchronize(s.get()), "cudaStreamSynchronize");
  return out;
}

}  // namespace cuda
}  // namespace v0
}  // namespace gdn
