// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Memory of exactly the size that was promised, full of NaN, between guards.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include <gdn/core/workspace.hpp>

namespace gdn_test {

/// Every byte is 0xff, which is NaN in every floating type and -1 in every integer: a read of what was not written
/// shows. Writes beyond the block hit a guard.
class poisoned_block {
 public:
  explicit poisoned_block(gdn::memory_requirement need)
      : bytes_(need.bytes), data_(static_cast<std::byte*>(::operator new(bytes_ + 2 * guard, alignment))) {
    std::fill_n(data_.get(), bytes_ + 2 * guard, guard_byte);
    poison();
  }
  void poison() { std::fill_n(data(), bytes_, std::byte{0xff}); }
  std::byte* data() const { return data_.get() + guard; }
  std::size_t bytes() const { return bytes_; }
  gdn::workspace<gdn::host_memory> workspace() const { return {data(), bytes_}; }

  bool guards_hold() const {
    const auto is_guard = [](std::byte b) { return b == guard_byte; };
    return std::all_of(data_.get(), data_.get() + guard, is_guard) &&
           std::all_of(data() + bytes_, data() + bytes_ + guard, is_guard);
  }

 private:
  static constexpr std::align_val_t alignment{gdn::workspace<gdn::host_memory>::alignment};
  static constexpr std::size_t guard = 256;
  static constexpr std::byte guard_byte{0x5a};
  struct release {
    void operator()(std::byte* p) const { ::operator delete(p, alignment); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, release> data_;
};

}  // namespace gdn_test
