// SPDX-License-Identifier: Apache-2.0
// expect: the tensor has another number of axes
#include <gdn/core/tensor.hpp>

#ifdef GDN_CONTROL
constexpr int axes = 2;
#else
constexpr int axes = 3;
#endif

void f(gdn::tensor_ref<float, axes> x) {
  gdn::as_tensor<const float, 2, gdn::host_memory>(x);
}
