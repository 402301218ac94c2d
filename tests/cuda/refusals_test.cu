// SPDX-License-Identifier: Apache-2.0
// Heads of other sizes are refused by name, by every call of the rule that comes first and by the layer.

#include <functional>
#include <string>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <gdn/cuda/backend.cuh>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/requirements.hpp>
#include <gdn/layer/serve.hpp>

namespace gdn_test {
namespace {

using gdn::index_t;
using memory = gdn::device_memory;

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const gdn::backend_error& e) {
    return e.what();
  }
  return "accepted";
}

constexpr std::pair<index_t, index_t> wrong[] = {{24, 64}, {272, 64}, {64, 5}, {64, 264}};

/// No tensor is given: what is wrong is found before one is looked at.
TEST(CudaHeads, OfOtherSizesAreRefusedBeforeAnythingElse) {
  const gdn::cuda::backend be;
  const gdn::cuda::stream s;
  for (const auto& [K, V] : wrong) {
    const auto names_it = testing::HasSubstr("is " + std::to_string(K == 64 ? V : K) + "; the CUDA backend takes multiples of 16");
    gdn::delta_rule_problem<float, memory> p;
    p.key_dim = K;
    p.value_dim = V;
    EXPECT_THAT(refusal([&] { be.delta_rule_prepared(p); }), names_it);
    EXPECT_THAT(refusal([&] { be.delta_rule_scratch(p); }), names_it);
    EXPECT_THAT(refusal([&] { be.delta_rule_prepare(p, {}, {}, s); }), names_it);
    gdn::states_ref<float, memory> states;
    states.extent_[2] = K;
    states.extent_[3] = V;
    EXPECT_THAT(refusal([&] { be.delta_rule_step<float, float>(1, {}, states, {}, {}, s); }), names_it);
  }
}

TEST(CudaHeads, OfOtherSizesHaveNoRequirements) {
  const gdn::cuda::backend be;
  for (const auto& [K, V] : wrong) {
    const auto names_it = testing::HasSubstr("is " + std::to_string(K == 64 ? V : K) + "; the CUDA backend takes multiples of 16");
    const gdn::layer_dims d{.hidden = 16, .key_heads = 1, .value_heads = 1, .key_dim = K, .value_dim = V};
    gdn::resident_plan<memory> plan;
    plan.host = gdn::plan_layer(d, gdn::contiguous_layout{4, 1}, gdn::packing::rows_of(1, 4), {}, 0);
    EXPECT_THAT(refusal([&] { gdn::requirements<float>(be, d, plan, gdn::keep_policy::everything); }), names_it);
    EXPECT_THAT(refusal([&] { gdn::decode_requirement<float>(be, d, 1); }), names_it);
    gdn::resident_serving<memory> batch;
    batch.host = gdn::plan_serving(std::vector<gdn::sequence>{{0, 1, 0, true}}, 1, 1, d);
    EXPECT_THAT(refusal([&] { gdn::serve_requirement<float>(be, d, batch); }), names_it);
  }
}

}  // namespace
}  // namespace gdn_test
