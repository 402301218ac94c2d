// SPDX-License-Identifier: Apache-2.0
// Every gradient of the layer against central differences of its outputs, in double.
#include <cmath>

#include <plan/random_case.hpp>
#include <support/layer_reference.hpp>

namespace gdn_test {
namespace {

constexpr gdn::layer_dims dims{.hidden = 4, .key_heads = 1, .value_heads = 2, .key_dim = 3, .value_dim = 4, .conv_width = 3};
constexpr gdn::plan_options with_states{.initial_state = true, .final_state = true};

/// Two rows of 12 tokens: three documents with padding between them, and one document that fills its row.
layer_batch packed_batch() {
  random_source random(11);
  std::vector<index_t> mask = {1, 1, 1, 1, 1, 2, 0, 3, 3, 3, 3, 0};
  mask.insert(mask.end(), 12, 1);
  return random_batch(random, dims, gdn::packing::from_mask(mask, 2, 12));
}

/// d loss / d v[i] for every i, where v is a part of the batch.
values differences(layer_batch& batch, values& v, layer_spread spread) {
  constexpr double step = 1e-4;
  spread.keep = gdn::keep_policy::nothing;
  values out;
  for (double& e : v) {
    const double old = e;
    if (std::isnan(old)) {  // padding has no gradient
      out.push_back(0);
      continue;
    }
    // Of fourth order, so that neither the step nor rounding shows.
    const auto at = [&](double by) {
      e = old + by * step;
      return loss_of(batch, run_layer<double>(batch, spread));
    };
    const double near_by = at(1) - at(-1), far = at(2) - at(-2);
    e = old;
    out.push_back((8 * near_by - far) / (12 * step));
  }
  return out;
}

void expect_gradients(const layer_spread& spread) {
  layer_batch b = packed_batch();
  const layer_result r = run_layer<double>(b, spread);
  const auto check = [&](const values& gradient, values& of, std::string_view name) {
    EXPECT_LE(relative_error(gradient, differences(b, of, spread)), 1e-9) << name;
  };
  for (std::size_t i = 0; i < 9; ++i) check(r.gradients[i], b.parameters[i], parameter_names[i]);
  check(r.dx, b.x, "x");
  if (spread.options.initial_state) {
    check(r.d_initial, b.initial, "initial state");
    check(r.d_initial_conv, b.initial_conv, "initial conv state");
  }
}

TEST(layer_gradients, AreDifferencesOnOneRank) { expect_gradients(on_one_rank(packed_batch(), with_states)); }

TEST(layer_gradients, AreDifferencesByTheTokenRecurrence) {
  layer_spread s = on_one_rank(packed_batch(), with_states);
  s.rule = rule_kind::recurrent;
  expect_gradients(s);
}

TEST(layer_gradients, AreDifferencesOnThreeRanksZigzagResharded) {
  layer_spread s = spread_over(gdn::zigzag_layout{12, 3}, packed_batch(), with_states);
  s.options.strategy = gdn::strategy::reshard;
  s.chunk = 2;
  expect_gradients(s);
}

TEST(layer_gradients, AreDifferencesOnThreeRanksZigzagInPlace) {
  layer_spread s = spread_over(gdn::zigzag_layout{12, 3}, packed_batch(), with_states);
  s.options.strategy = gdn::strategy::in_place;
  s.options.share = gdn::share::prefix_scan;
  s.keep = gdn::keep_policy::recompute;
  expect_gradients(s);
}

TEST(layer_gradients, OfStatesThatAreNotGivenAreZero) {
  // Without gradients of final states the same as with zeros; without initial states the same as from zeros.
  layer_batch b = packed_batch();
  std::fill(b.initial.begin(), b.initial.end(), 0);
  std::fill(b.initial_conv.begin(), b.initial_conv.end(), 0);
  std::fill(b.d_final.begin(), b.d_final.end(), 0);
  std::fill(b.d_final_conv.begin(), b.d_final_conv.end(), 0);
  for (const int world : {1, 3}) {
    const layer_result with = run_layer<double>(b, spread_over(gdn::zigzag_layout{12, world}, b, with_states));
    const layer_result without = run_layer<double>(b, spread_over(gdn::zigzag_layout{12, world}, b));
    EXPECT_LE(relative_error(without.y, with.y), 1e-15);
    EXPECT_LE(relative_error(without.dx, with.dx), 1e-14);
    for (std::size_t i = 0; i < 9; ++i) EXPECT_LE(relative_error(without.gradients[i], with.gradients[i]), 1e-14);
  }
}

}  // namespace
}  // namespace gdn_test
