// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The Kokkos backend of one rank among several that share the machine's cores.

#include <algorithm>
#include <thread>

#include <Kokkos_Core.hpp>

#include <gdn/kokkos/backend.hpp>

#include "run_typed.hpp"

namespace gdn_run {

#if defined(KOKKOS_ENABLE_OPENMP)
using executor = Kokkos::OpenMP;
inline executor make_executor(int ranks) {
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  return executor(std::max(1, cores / ranks));
}
#else
using executor = Kokkos::Serial;
inline executor make_executor(int) { return executor(Kokkos::NewInstance{}); }
#endif

template <class T>
run_result run_kokkos(const options& o, const bundle& b, const gdn::fragment_table& layout) {
  Kokkos::ScopeGuard kokkos(Kokkos::InitializationSettings().set_disable_warnings(true));
  const auto rule = o.rule == rule_kind::chunked ? gdn::kokkos::rule::chunked : gdn::kokkos::rule::recurrent;
  const auto make_backend = [rule](int ranks) { return gdn::kokkos::backend<executor>(make_executor(ranks), rule); };
  return layer_run<T, decltype(make_backend)>(o, b, layout, make_backend).run();
}

}  // namespace gdn_run
