// SPDX-License-Identifier: Apache-2.0
#include <conformance/states.hpp>
#include <kokkos/setup.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_double, states_conformance, kokkos_setup<double>);
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_float, states_conformance, kokkos_setup<float>);
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_bfloat16, states_conformance, kokkos_setup<gdn::bfloat16>);
}  // namespace gdn_test
