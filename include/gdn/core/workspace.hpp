// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Caller-owned memory, handed out front to back; the same code measures how much it will need.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <gdn/core/error.hpp>
#include <gdn/core/tensor.hpp>

namespace gdn {
inline namespace v0 {

/// Bytes that a caller must provide, at this alignment.
struct memory_requirement {
  std::size_t bytes = 0;
  std::size_t alignment = 256;
  constexpr bool operator==(const memory_requirement&) const = default;
};

/// A block of caller memory from which tensors are taken in order. A default-constructed one has no memory and
/// *measures*: `take` returns views without data and `peak()` says how much a real one needs. What carves a block
/// and what predicts its size is therefore one piece of code.
///
/// Everything taken after `mark()` is free again after `release(mark)`; nothing is ever destroyed, so only trivially
/// copyable elements fit. Contents are unspecified.
template <memory_kind Memory>
class workspace {
 public:
  using memory_type = Memory;
  static constexpr std::size_t alignment = 256;

  /// Measures only.
  constexpr workspace() = default;
  /// @param begin aligned to 256 bytes; must stay valid until the stream has passed the last use
  workspace(void* begin, std::size_t bytes) : begin_(static_cast<std::byte*>(begin)), bytes_(bytes) {
    expects<workspace_error>(begin != nullptr || bytes == 0, "a workspace of", bytes, "bytes has no memory");
    expects<workspace_error>(reinterpret_cast<std::uintptr_t>(begin) % alignment == 0,
                             "a workspace must be aligned to", alignment, "bytes");
    real_ = true;
  }

  constexpr bool measuring() const noexcept { return !real_; }

  /// The next `extents` elements of T, row-major. @throws shape_error if an extent is negative
  template <class T, class... N>
  tensor_ref<T, static_cast<int>(sizeof...(N)), Memory> take(N... extents) {
    static_assert(std::is_trivially_copyable_v<T>);
    (expects<shape_error>(extents >= 0, "a tensor of a workspace cannot have extent", extents), ...);
    auto t = make_tensor<Memory>(static_cast<T*>(nullptr), extents...);
    const std::size_t need = static_cast<std::size_t>(t.size()) * sizeof(T);
    const std::size_t after = used_ + (need + alignment - 1) / alignment * alignment;
    if (real_) {
      expects<workspace_error>(after <= bytes_, "the workspace has", bytes_, "bytes, and", after,
                               "or more are needed; ask requirements()");
      t.data_ = reinterpret_cast<T*>(begin_ + used_);
    }
    used_ = after;
    peak_ = std::max(peak_, used_);
    return t;
  }

  struct mark_type {
    std::size_t used = 0;
  };
  constexpr mark_type mark() const noexcept { return {used_}; }
  constexpr void release(mark_type m) noexcept { used_ = m.used; }

  /// The largest number of bytes that was in use at once.
  constexpr memory_requirement peak() const noexcept { return {peak_, alignment}; }
  constexpr std::size_t used() const noexcept { return used_; }

 private:
  std::byte* begin_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
  bool real_ = false;
};

/// Frees what was taken from a workspace within a scope.
template <memory_kind Memory>
class scoped_mark {
 public:
  explicit scoped_mark(workspace<Memory>& ws) : ws_(ws), mark_(ws.mark()) {}
  scoped_mark(const scoped_mark&) = delete;
  scoped_mark& operator=(const scoped_mark&) = delete;
  ~scoped_mark() { ws_.release(mark_); }

 private:
  workspace<Memory>& ws_;
  typename workspace<Memory>::mark_type mark_;
};

}  // namespace v0
}  // namespace gdn
