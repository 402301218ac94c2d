// SPDX-License-Identifier: Apache-2.0
#include <conformance/conv1d.hpp>
#include <cuda/setup.cuh>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(cuda_float, conv1d_conformance, cuda_setup<float>);
}  // namespace gdn_test
