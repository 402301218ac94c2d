// SPDX-License-Identifier: Apache-2.0
#include <conformance/conv1d.hpp>
#include <conformance/gate.hpp>
#include <conformance/linear.hpp>
#include <conformance/norm.hpp>
#include <conformance/rows.hpp>
#include <cuda/setup.cuh>

namespace gdn_test {

using cuda_bfloat16 = cuda_setup<gdn::bfloat16>;
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, rows_conformance, cuda_bfloat16);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, linear_conformance, cuda_bfloat16);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, conv1d_conformance, cuda_bfloat16);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, gate_conformance, cuda_bfloat16);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_bfloat16, norm_conformance, cuda_bfloat16);

}  // namespace gdn_test
