// SPDX-License-Identifier: Apache-2.0
#include <cp/rule_suite.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_double, cp_rule, on_host<double>);
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_float, cp_rule, on_host<float>);
}  // namespace gdn_test
