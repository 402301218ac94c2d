// SPDX-License-Identifier: Apache-2.0
// Layers in bf16: what is rounded (unit q and k, beta, the normed output, y, dx, conv states), and nothing else.
#include <cmath>

#include <gtest/gtest.h>

#include <layer/random_layer.hpp>
#include <support/layer_reference.hpp>

namespace {

using namespace gdn_test;
using gdn::bfloat16;

double rounded(double v) { return static_cast<double>(static_cast<bfloat16>(v)); }
void round_all(values& v) {
  for (double& e : v) e = rounded(e);
}

/// A case whose weights and input bf16 holds, so that double computes with the same ones.
layer_case held_by_bf16(random_source& random) {
  layer_case c = random_layer_case(random, 8, 16);
  layer_batch& b = c.batch;
  for (const parameter p : {in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, conv1d, out_proj}) round_all(b.parameters[p]);
  for (values* v : {&b.x, &b.dy, &b.initial_conv, &b.d_final_conv}) round_all(*v);
  return c;
}

/// The share of cases with f(case) true, of so many.
template <class F>
double share_of_cases(std::uint64_t count, F&& f) {
  double held = 0, all = 0;
  for (std::uint64_t n = 0; n < cases(count); ++n) {
    random_source random(n);
    const layer_case c = held_by_bf16(random);
    if (c.batch.pack.tokens() == 0) continue;
    held += f(random, c) ? 1 : 0;
    all += 1;
  }
  return held / all;
}

// A value next to a tie is rounded one way in float and the other in double now and then, which moves a result by about
// 1e-3; so a share of the cases is asked for. One more rounding, or one less, moves all of them.
TEST(sixteen_bit_layer, RoundsUnitKeysAndBetaAndNoStateOrGate) {
  EXPECT_GE(share_of_cases(120, [](random_source&, const layer_case& c) {
              layer_spread s = c.spread;
              s.options.final_state = true;
              s.keep = gdn::keep_policy::nothing;
              const layer_result want = layer_by_formulas(c.batch, s.options.initial_state, rounded);
              return rms_error(run_layer<bfloat16>(c.batch, s).final_, want.final_) <= 2e-5;
            }),
            0.75);
}

TEST(sixteen_bit_layer, RoundsTheNormedOutputOnceAndTheOutputOnce) {
  double same = 0, all = 0, largest = 0;
  share_of_cases(60, [&](random_source&, const layer_case& c) {
    layer_spread s = c.spread;
    s.keep = gdn::keep_policy::nothing;
    const values want = layer_by_formulas(c.batch, s.options.initial_state, rounded).y;
    const values got = run_layer<bfloat16>(c.batch, s).y;
    for (std::size_t i = 0; i < want.size(); ++i) {
      same += got[i] == rounded(want[i]) ? 1 : 0;
      all += 1;
      largest = std::max(largest, std::abs(got[i] - want[i]) / (std::abs(want[i]) + 0.1));
    }
    return true;
  });
  EXPECT_GE(same, 0.95 * all);
  EXPECT_LE(largest, 0.1);
}

TEST(sixteen_bit_layer, ConvStatesAreProjectionsRoundedOnce) {
  double same = 0, all = 0;
  share_of_cases(60, [&](random_source&, const layer_case& c) {
    layer_spread s = c.spread;
    s.options.final_state = true;
    s.keep = gdn::keep_policy::nothing;
    const values want = layer_by_formulas(c.batch, s.options.initial_state, rounded).final_conv;
    const values got = run_layer<bfloat16>(c.batch, s).final_conv;
    for (std::size_t i = 0; i < want.size(); ++i) same += got[i] == rounded(want[i]) ? 1 : 0, all += 1;
    return true;
  });
  EXPECT_GE(same, 0.995 * all);
}

// Backward is linear in what arrives. Gradients that were rounded on their way would miss that by about 2e-3.
TEST(sixteen_bit_layer, RoundsNoGradientOnItsWay) {
  EXPECT_GE(share_of_cases(80, [](random_source& random, const layer_case& c) {
              const auto eighths = [&](values& v) {  // their sums are exact in bf16
                for (double& e : v) e = std::isnan(e) ? e : static_cast<double>(random.between(-8, 8)) / 8;
              };
              layer_batch one = c.batch, two = c.batch, both = c.batch;
              for (const auto part : {&layer_batch::dy, &layer_batch::d_final, &layer_batch::d_final_conv}) {
                eighths(one.*part);
                eighths(two.*part);
                for (std::size_t i = 0; i < (both.*part).size(); ++i) (both.*part)[i] = (one.*part)[i] + (two.*part)[i];
              }
              layer_result sum = run_layer<bfloat16>(one, c.spread);
              const layer_result more = run_layer<bfloat16>(two, c.spread), want = run_layer<bfloat16>(both, c.spread);
              bool linear = true;
              const auto compare = [&](values a, const values& b, const values& ab) {
                for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
                linear = linear && rms_error(a, ab) <= 5e-5;
              };
              for (std::size_t p = 0; p < 9; ++p) compare(sum.gradients[p], more.gradients[p], want.gradients[p]);
              compare(sum.d_initial, more.d_initial, want.d_initial);
              return linear;
            }),
            0.9);
}

// Ranks exchange history, summaries and their gradients in float: only what is rounded at the very end differs.
TEST(sixteen_bit_layer, ManyRanksEqualOneRank) {
  share_of_cases(120, [](random_source&, const layer_case& c) {
    SCOPED_TRACE(testing::Message() << c);
    const layer_spread one = on_one_rank(c.batch, {.initial_state = c.spread.options.initial_state,
                                                   .final_state = c.spread.options.final_state});
    const auto result = near_rms(run_layer<bfloat16>(c.batch, c.spread), run_layer<bfloat16>(c.batch, one), 1e-3);
    EXPECT_TRUE(result);
    return static_cast<bool>(result);
  });
}

TEST(sixteen_bit_layer, BytesAreThoseOfThePlan) {
  share_of_cases(60, [](random_source&, const layer_case& c) {
    const layer_result r = run_layer<bfloat16>(c.batch, c.spread);
    for (std::size_t rank = 0; rank < r.forward_plan.size(); ++rank) {
      SCOPED_TRACE(testing::Message() << c << "\nrank " << rank);
      EXPECT_EQ(r.forward_messages[rank].bytes_received, r.forward_plan[rank].total());
      EXPECT_EQ(r.backward_messages[rank].bytes_received, r.backward_plan[rank].total());
    }
    return true;
  });
}

TEST(sixteen_bit_layer, RecomputedTapesThreadsAndLateMessagesChangeNoBit) {
  share_of_cases(40, [](random_source&, const layer_case& c) {
    SCOPED_TRACE(testing::Message() << c);
    layer_spread all = c.spread, few = c.spread;
    all.keep = gdn::keep_policy::everything;
    few.keep = gdn::keep_policy::recompute;
    few.threads = 2;
    few.late = true;
    few.backward_runs = 2;
    const auto result = same_bits(run_layer<bfloat16>(c.batch, few), run_layer<bfloat16>(c.batch, all));
    EXPECT_TRUE(result);
    return static_cast<bool>(result);
  });
}

}  // namespace
