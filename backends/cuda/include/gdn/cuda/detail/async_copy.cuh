// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Copies from global to shared memory that a thread starts, goes on, and waits for in groups.

#include <cstdint>

#include <gdn/cuda/detail/vector.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

/// 16 bytes; zeros if not `valid`.
__device__ inline void copy_async(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
/// One pack, of 4, 8 or 16 bytes.
template <class T, int N>
__device__ void copy_async(raw_pack<T, N>& to, const T* from) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(&to))),
      "l"(from), "n"(sizeof(to))
      : "memory");
}
/// Ends a group: the copies since the last one, none included.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// All groups but the last `Pending` have arrived, for this thread to read.
template <int Pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
