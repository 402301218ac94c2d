// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The recurrent rule of the Kokkos backend as the conformance suite wants it.

#include <kokkos/setup.hpp>

namespace gdn_test {

template <class T>
struct recurrent_setup : kokkos_setup<T> {
  using backend_type = typename kokkos_setup<T>::backend_type;
  static constexpr auto rule = gdn::kokkos::rule::recurrent;

  static backend_type make() { return backend_type(rule); }
  template <class F>
  static void for_each_variant(F&& f) {
    kokkos_setup<T>::for_each_variant([&](const auto& be, const std::string& name) {
      f(gdn::kokkos::backend(be.instance(), rule), name);
    });
  }
  static auto make_private() { return gdn::kokkos::backend(kokkos_setup<T>::make_private().instance(), rule); }
};

}  // namespace gdn_test
