// SPDX-License-Identifier: Apache-2.0
#include <conformance/norm.hpp>
#include <kokkos/setup.hpp>

namespace gdn_test {
INSTANTIATE_TYPED_TEST_SUITE_P(kokkos_float, norm_conformance, kokkos_setup<float>);
}  // namespace gdn_test
