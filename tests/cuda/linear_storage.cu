// SPDX-License-Identifier: Apache-2.0
#include <conformance/linear.hpp>
#include <cuda/setup.cuh>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, linear_conformance, cuda_setup<gdn::bfloat16>);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float16, linear_conformance, cuda_setup<gdn::float16>);
}  // namespace gdn_test
