// SPDX-License-Identifier: Apache-2.0
#include <gdn/core/storage.hpp>
#include <serving/serve_suite.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_bfloat16, serving, gdn::bfloat16);
}  // namespace gdn_test
