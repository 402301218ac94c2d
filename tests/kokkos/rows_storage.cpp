// SPDX-License-Identifier: Apache-2.0
#include <gdn/core/storage.hpp>
#include <conformance/rows.hpp>
#include <kokkos/setup.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_bfloat16, rows_conformance, kokkos_setup<gdn::bfloat16>);
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_float16, rows_conformance, kokkos_setup<gdn::float16>);
}  // namespace gdn_test
