// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  An exception that passes by ends the communicator before it ends the memory that messages use.

#include <exception>

#include <gdn/concepts/communicator.hpp>

namespace gdn {
inline namespace v0 {

/// Aborts `comm` when its scope is left by an exception. It stands *behind* the memory of the scope: that is freed after
/// the guard has ended what is under way. Without it freeing device memory waits for a kernel that may wait for a peer.
template <communicator Comm>
class abort_guard {
 public:
  explicit abort_guard(Comm& comm) noexcept : comm_(comm), before_(std::uncaught_exceptions()) {}
  abort_guard(const abort_guard&) = delete;
  abort_guard& operator=(const abort_guard&) = delete;
  ~abort_guard() {
    if (std::uncaught_exceptions() > before_) comm_.abort();
  }

 private:
  Comm& comm_;
  int before_;
};

}  // namespace v0
}  // namespace gdn
