// SPDX-License-Identifier: Apache-2.0
#include <serving/serve_suite.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_double, serving, double);
}  // namespace gdn_test
