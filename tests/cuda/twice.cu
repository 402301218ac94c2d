// SPDX-License-Identifier: Apache-2.0
// One of two shared libraries of the same process; both include everything.

#include <vector>

#include <gdn/cuda/local.hpp>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/reduce.hpp>
#include <gdn/layer/serve.hpp>

#include <cuda/layer_step.cuh>

/// The results of a step; GDN_TEST_TWICE is another name in each library.
std::vector<float> GDN_TEST_TWICE() {
  return gdn_test::layer_step<gdn::bfloat16>(5).run();
}
