// SPDX-License-Identifier: Apache-2.0
#include <cuda/layer_run.cuh>

template gdn_test::layer_result gdn_test::run_layer_on_device<gdn::bfloat16>(const layer_batch&, const layer_spread&);
