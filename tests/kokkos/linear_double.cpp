// SPDX-License-Identifier: Apache-2.0
#include <conformance/linear.hpp>
#include <kokkos/setup.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_double, linear_conformance, kokkos_setup<double>);
}  // namespace gdn_test
