// SPDX-License-Identifier: Apache-2.0
#include <conformance/rows.hpp>
#include <kokkos/setup.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_double, rows_conformance, kokkos_setup<double>);
}  // namespace gdn_test
