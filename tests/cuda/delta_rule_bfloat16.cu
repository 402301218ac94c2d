// SPDX-License-Identifier: Apache-2.0
#include <conformance/delta_rule.hpp>
#include <cuda/setup.cuh>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, delta_rule_conformance, cuda_setup<gdn::bfloat16>);
}  // namespace gdn_test
