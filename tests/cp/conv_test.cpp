// SPDX-License-Identifier: Apache-2.0
#include <cp/conv_suite.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_double, cp_conv, on_host<double>);
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_float, cp_conv, on_host<float>);
}  // namespace gdn_test
