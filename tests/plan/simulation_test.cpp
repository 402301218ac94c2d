// SPDX-License-Identifier: Apache-2.0
#include <plan/random_case.hpp>
#include <plan/simulator.hpp>

#include <gtest/gtest.h>

namespace {

using namespace gdn_test;

layer_outputs expected_outputs(const layer_inputs& in, const gdn::packing& pack) {
  layer_outputs out = sequential(in, pack.cu_seqlens);
  for (std::size_t n = 0; n < out.ht.size(); ++n) {  // nobody asked for these
    if (!in.final_) out.ht[n] = out.conv_t[n] = {};
    if (!in.initial) out.dh0[n] = out.d_conv0[n] = {};
  }
  return out;
}

void expect_equal(const layer_outputs& want, const layer_outputs& have) {
  EXPECT_TRUE(want.y == have.y) << "outputs";
  EXPECT_TRUE(want.ht == have.ht) << "final states";
  EXPECT_TRUE(want.conv_t == have.conv_t) << "final conv states";
  EXPECT_TRUE(want.dx == have.dx) << "gradients of the inputs";
  EXPECT_TRUE(want.dh0 == have.dh0) << "gradients of the initial states";
  EXPECT_TRUE(want.d_conv0 == have.d_conv0) << "gradients of the initial conv states";
}

void run_case(std::uint64_t n, gdn::strategy strategy) {
  random_source random(n);
  const plan_case c = any_case(random);
  for (const gdn::share share : shares) {
    const gdn::plan_options options{strategy, share, random.coin(), random.coin()};
    const auto plans = c.plans(options);
    const layer_inputs in = inputs_for(plans[0], n);
    SCOPED_TRACE(testing::Message() << "case " << n << ": " << c << ", share " << static_cast<int>(share)
                                    << (in.initial ? ", initial" : "") << (in.final_ ? ", final" : ""));
    try {
      expect_equal(expected_outputs(in, c.pack), simulator(plans, c.pack, in).run(c.rows));
    } catch (const std::exception& e) {
      ADD_FAILURE() << e.what();
    }
  }
}

TEST(cp_plan_simulation, ReshardedRanksEqualTheWholeStream) {
  for (std::uint64_t n = 0; n < cases(4000) && !HasFailure(); ++n) run_case(n, gdn::strategy::reshard);
}

TEST(cp_plan_simulation, RanksInPlaceEqualTheWholeStream) {
  for (std::uint64_t n = 0; n < cases(4000) && !HasFailure(); ++n) run_case(n, gdn::strategy::in_place);
}

}  // namespace
