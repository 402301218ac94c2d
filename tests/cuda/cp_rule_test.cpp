// SPDX-License-Identifier: Apache-2.0
#include <cp/rule_suite.hpp>
#include <cuda/cp_device.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float, cp_rule, on_device<float>);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, cp_rule, on_device<gdn::bfloat16>);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float16, cp_rule, on_device<gdn::float16>);
}  // namespace gdn_test
