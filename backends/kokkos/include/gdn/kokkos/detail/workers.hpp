// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Independent items of uneven cost, shared out among the threads of an executor, each with its own scratch.

#include <atomic>

#include <Kokkos_Core.hpp>

#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

/// Threads that for_each_item_with_scratch may use at once: the number of scratch areas to provide.
template <class Exec>
index_t worker_count(const Exec& exec) {
  return exec.concurrency();
}

/// f(item, worker) for every item in [0, items), each once, in any order; no two calls have one `worker` at the same
/// time. Results must not depend on which worker computes an item, so they do not depend on the number of threads.
template <class Exec, class F>
void for_each_item_with_scratch(const Exec& exec, index_t items, const F& f) {
  if (items == 0) return;
  std::atomic<index_t> next{0};
  const index_t workers = worker_count(exec);
  Kokkos::parallel_for("gdn::items", Kokkos::RangePolicy<Exec, Kokkos::IndexType<index_t>>(exec, 0, workers),
                       [&](index_t worker) {
                         for (index_t i = next.fetch_add(1); i < items; i = next.fetch_add(1)) f(i, worker);
                       });
  exec.fence("gdn::items");
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
