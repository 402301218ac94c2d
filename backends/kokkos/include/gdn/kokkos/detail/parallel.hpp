// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  How work is spread over an execution space so that no bit depends on the number of its threads.

#include <algorithm>
#include <concepts>

#include <Kokkos_Core.hpp>

#include <gdn/core/tensor.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// A tensor that is only read. It takes no part in deduction, so mutable tensors convert to it.
template <class T, int Rank>
using in_ref = tensor_ref<const std::type_identity_t<T>, Rank, host_memory>;
/// For arguments of any type, which have to be deduced.
template <class T, int Rank>
tensor_ref<const T, Rank> read_only(const tensor_ref<T, Rank>& t) noexcept {
  return t;
}
/// A tensor that is written and takes no part in deduction.
template <class T, int Rank>
using out_ref = tensor_ref<std::type_identity_t<T>, Rank, host_memory>;

/// [begin, begin + count)
struct range {
  index_t begin = 0;
  index_t count = 0;
  constexpr index_t end() const noexcept { return begin + count; }
};

/// How many blocks of `block` cover n.
constexpr index_t blocks_of(index_t n, index_t block) noexcept {
  return (n + block - 1) / block;
}

/// Block i of [0, n); the last one may be shorter.
constexpr range block_at(index_t i, index_t block, index_t n) noexcept {
  return {i * block, std::min(block, n - i * block)};
}

/// Piece i when [0, n) is cut into `pieces` of about one size; pieces may be empty.
constexpr range piece_at(index_t i, index_t pieces, index_t n) noexcept {
  const index_t begin = n / pieces * i + std::min(i, n % pieces);
  return {begin, n / pieces + (i < n % pieces ? 1 : 0)};
}

/// Runs body(i) for every i in [0, items) and waits for this execution space instance, for no other.
///
/// Items run in any order and on any thread. What an item computes must therefore be fixed by the sizes of the problem
/// alone, and items must write different elements. `body` must not throw.
template <class Exec, class Body>
void for_each_item(const Exec& exec, index_t items, const Body& body) {
  using policy = Kokkos::RangePolicy<Exec, Kokkos::Schedule<Kokkos::Dynamic>, Kokkos::IndexType<index_t>>;
  if (items <= 0) return;
  // Items are large and of unequal size, so threads fetch them one by one. Names this short need no memory.
  Kokkos::parallel_for("gdn", policy(exec, 0, items, Kokkos::ChunkSize(1)), body);
  exec.fence("gdn");
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
