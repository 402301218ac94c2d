// SPDX-License-Identifier: Apache-2.0
#include <conformance/delta_rule.hpp>
#include <kokkos/delta_rule_setup.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_chunked_float, delta_rule_conformance, kokkos_setup<float>);
}  // namespace gdn_test
