// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The Kokkos backend as the conformance suites want it.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include <Kokkos_Core.hpp>

#include <gdn/kokkos/backend.hpp>

namespace gdn_test {

/// The host backend takes nothing from it.
inline gdn::workspace<gdn::host_memory>& no_scratch() {
  thread_local gdn::workspace<gdn::host_memory> none;
  return none;
}

template <class T>
struct kokkos_setup {
  using backend_type = gdn::kokkos::backend<>;
  using value_type = T;

  static backend_type make() { return backend_type(); }
  static gdn::host_stream stream() { return {}; }
  static auto& scratch() { return no_scratch(); }

  template <class U>
  class array {
   public:
    explicit array(std::size_t n) : elements_(n) {}
    U* data() const { return const_cast<U*>(elements_.data()); }
    void poison() { std::memset(static_cast<void*>(elements_.data()), 0xff, elements_.size() * sizeof(U)); }
    void upload(const U* from) { std::copy_n(from, elements_.size(), elements_.data()); }
    void download(U* to) const { std::copy_n(elements_.data(), elements_.size(), to); }

   private:
    std::vector<U> elements_;
  };

  template <class F>
  static void for_each_variant(F&& f) {
#ifdef KOKKOS_ENABLE_SERIAL
    f(gdn::kokkos::backend(Kokkos::Serial(Kokkos::NewInstance{})), "Serial");
#endif
#ifdef KOKKOS_ENABLE_OPENMP
    f(gdn::kokkos::backend(Kokkos::OpenMP(1)), "OpenMP with 1 thread");
    f(gdn::kokkos::backend(Kokkos::OpenMP(2)), "OpenMP with 2 threads");
    f(gdn::kokkos::backend(Kokkos::OpenMP(3)), "OpenMP with 3 threads");
#endif
  }
  static auto make_private() {
#ifdef KOKKOS_ENABLE_OPENMP
    return gdn::kokkos::backend(Kokkos::OpenMP(2));
#else
    return gdn::kokkos::backend(Kokkos::Serial(Kokkos::NewInstance{}));
#endif
  }
};

}  // namespace gdn_test
