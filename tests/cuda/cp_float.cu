// SPDX-License-Identifier: Apache-2.0
#include <cuda/cp_device.cuh>

namespace gdn_test {
template conv_answers run_conv_on_device<float>(const conv_numbers&, const stream_spread&);
template rule_stream_answers run_rule_on_device<float>(const rule_stream&, const stream_spread&, std::vector<message_counts>*);
}  // namespace gdn_test
