// SPDX-License-Identifier: Apache-2.0
// expect: the tensor has another type
#include <gdn/core/tensor.hpp>

#ifdef GDN_CONTROL
using element = float;
#else
using element = double;
#endif

void f(gdn::tensor_ref<element, 2> x) {
  gdn::as_tensor<const float, 2, gdn::host_memory>(x);
}
