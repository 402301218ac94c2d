// SPDX-License-Identifier: Apache-2.0
// expect: a tensor that is written must have mutable elements
#include <gdn/core/tensor.hpp>

#ifdef GDN_CONTROL
using element = float;
#else
using element = const float;
#endif

void f(gdn::tensor_ref<element, 2> y) {
  gdn::as_tensor<float, 2, gdn::host_memory>(y);
}
