// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Device memory for tests: elements by value, and blocks of exactly the promised size between guards.

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include <gdn/cuda/memory.hpp>

namespace gdn_test {

/// Elements on the device.
template <class U>
class device_array {
 public:
  device_array(const std::vector<U>& from, gdn::cuda::stream_ref s)
      : n_(static_cast<gdn::index_t>(from.size())), block_({from.size() * sizeof(U) + 256}), stream_(s) {
    gdn::cuda::copy_to_device<U>(from, flat(), s);
  }
  /// As many NaN, to be written.
  device_array(gdn::index_t n, gdn::cuda::stream_ref s)
      : device_array(std::vector<U>(static_cast<std::size_t>(n),
                                    static_cast<U>(std::numeric_limits<double>::quiet_NaN())), s) {}
  U* data() const { return static_cast<U*>(block_.data()); }
  std::vector<U> fetch() const { return gdn::cuda::copy_to_host(flat(), stream_); }

 private:
  gdn::tensor_ref<U, 1, gdn::device_memory> flat() const { return gdn::make_tensor<gdn::device_memory>(data(), n_); }
  gdn::index_t n_;
  gdn::cuda::device_block block_;
  gdn::cuda::stream_ref stream_;
};

/// Every byte is 0xff: a read of what was not written is NaN. Writes beyond the block hit a guard.
class poisoned_device_block {
 public:
  poisoned_device_block(gdn::memory_requirement need, gdn::cuda::stream_ref s)
      : block_({need.bytes + 2 * guard}), bytes_(need.bytes), stream_(s) {
    fill(block_.data(), guard_byte, block_.bytes());
    poison();
  }
  void poison() { fill(data(), 0xff, bytes_); }
  gdn::workspace<gdn::device_memory> workspace() const { return {data(), bytes_}; }

  /// Once the stream's work is done.
  bool guards_hold() const {
    const auto holds = [&](std::size_t at) {
      const auto bytes = gdn::make_tensor<gdn::device_memory>(static_cast<std::byte*>(block_.data()) + at, gdn::index_t{guard});
      const std::vector<std::byte> found = gdn::cuda::copy_to_host(bytes, stream_);
      return std::all_of(found.begin(), found.end(), [](std::byte b) { return b == std::byte{guard_byte}; });
    };
    return holds(0) && holds(guard + bytes_);
  }

 private:
  static constexpr std::size_t guard = 256;  // as cudaMalloc aligns
  static constexpr int guard_byte = 0x5a;
  void* data() const { return static_cast<std::byte*>(block_.data()) + guard; }
  void fill(void* p, int byte, std::size_t n) {
    gdn::cuda::check(cudaMemsetAsync(p, byte, n, stream_.get()), "cudaMemsetAsync");
  }

  gdn::cuda::device_block block_;
  std::size_t bytes_;
  gdn::cuda::stream_ref stream_;
};

}  // namespace gdn_test
