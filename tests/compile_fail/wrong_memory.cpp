// SPDX-License-Identifier: Apache-2.0
// expect: the tensor lives in another memory
#include <gdn/core/tensor.hpp>

#ifdef GDN_CONTROL
using memory = gdn::host_memory;
#else
using memory = gdn::device_memory;
#endif

void f(gdn::tensor_ref<float, 2, memory> x) {
  gdn::as_tensor<const float, 2, gdn::host_memory>(x);
}
