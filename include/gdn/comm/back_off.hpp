// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What a thread does between two looks at something that others bring about.

#include <chrono>
#include <thread>

namespace gdn {
inline namespace v0 {
namespace detail {

/// At once first, then other threads get the core, then this one sleeps.
class back_off {
 public:
  void reset() { looks_ = 0; }
  void operator()() {
    if (++looks_ < 32) return;
    if (looks_ < 512) return std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(looks_ < 4096 ? 50 : 500));
  }

 private:
  int looks_ = 0;
};

}  // namespace detail
}  // namespace v0
}  // namespace gdn
