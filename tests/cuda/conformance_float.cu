// SPDX-License-Identifier: Apache-2.0
#include <conformance/conv1d.hpp>
#include <conformance/gate.hpp>
#include <conformance/linear.hpp>
#include <conformance/norm.hpp>
#include <conformance/rows.hpp>
#include <cuda/setup.cuh>

namespace gdn_test {

using cuda_float = cuda_setup<float>;
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float, rows_conformance, cuda_float);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float, linear_conformance, cuda_float);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float, conv1d_conformance, cuda_float);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float, gate_conformance, cuda_float);
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float, norm_conformance, cuda_float);

}  // namespace gdn_test
