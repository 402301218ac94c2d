// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  gdn-run's ranks as threads or processes that share the machine's cores, computing with Kokkos.

#include <algorithm>
#include <cstddef>
#include <span>
#include <thread>
#include <vector>

#include <Kokkos_Core.hpp>

#include <gdn/core/storage.hpp>
#include <gdn/kokkos/backend.hpp>

#include "host_ranks.hpp"
#include "run_typed.hpp"

namespace gdn_run {

class kokkos_platform {
 public:
#if defined(KOKKOS_ENABLE_OPENMP)
  using executor = Kokkos::OpenMP;
#else
  using executor = Kokkos::Serial;
#endif
  using memory = gdn::host_memory;
  using communicator = host_communicator;

  explicit kokkos_platform(const options& o)
      : options_(o),
        rule_(o.rule == rule_kind::chunked ? gdn::kokkos::rule::chunked : gdn::kokkos::rule::recurrent) {}

  template <class F>
  void run_ranks(F&& f) const {
    run_host_ranks(options_, f);
  }

  gdn::host_stream make_stream() const { return {}; }
  gdn::kokkos::backend<executor> make_backend(int ranks) const {
#if defined(KOKKOS_ENABLE_OPENMP)
    const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
    return gdn::kokkos::backend<executor>(executor(std::max(1, cores / ranks)), rule_);
#else
    static_cast<void>(ranks);
    return gdn::kokkos::backend<executor>(executor(Kokkos::NewInstance{}), rule_);
#endif
  }
  host_block block(gdn::memory_requirement need, std::byte fill) const { return host_block(need, fill); }
  template <class E, int R>
  void put(std::span<const E> from, const gdn::tensor_ref<E, R>& to, gdn::host_stream) const {
    std::copy(from.begin(), from.end(), to.data());
  }
  template <class E, int R>
  std::vector<E> get(const gdn::tensor_ref<E, R>& from, gdn::host_stream) const {
    return {from.data(), from.data() + from.size()};
  }

 private:
  const options& options_;
  gdn::kokkos::rule rule_;
};

template <class T>
run_result run_kokkos(const options& o, const bundle& b, const gdn::fragment_table& layout) {
  const Kokkos::ScopeGuard kokkos(Kokkos::InitializationSettings().set_disable_warnings(true));
  const kokkos_platform platform(o);
  return layer_run<T, kokkos_platform>(o, b, layout, platform).run();
}

}  // namespace gdn_run
