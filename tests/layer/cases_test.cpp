// SPDX-License-Identifier: Apache-2.0
// Batches that are easily got wrong, by name: short ranks, documents at boundaries, extreme gates, nothing at all.
#include <plan/random_case.hpp>
#include <support/layer_reference.hpp>

namespace gdn_test {
namespace {

constexpr gdn::layer_dims dims{.hidden = 5, .key_heads = 1, .value_heads = 3, .key_dim = 4, .value_dim = 3, .conv_width = 4};

layer_batch batch_of(gdn::packing pack, gdn::layer_dims d = dims) {
  random_source random(21);
  return random_batch(random, d, std::move(pack));
}
gdn::packing documents(const std::vector<index_t>& lengths) {
  const auto cu = cumulative(lengths);
  return gdn::packing::from_cu_seqlens(cu, {}, 1, cu.back());
}

/// Both strategies, all ways to share, with and without states, by both rules, equal one rank and the formulas.
void expect_one_rank(const layer_batch& batch, const layer_spread& given, double limit = 1e-10) {
  for (const bool states : {false, true}) {
    const layer_spread reference = on_one_rank(batch, {.initial_state = states, .final_state = states});
    const layer_result one = run_layer<double>(batch, reference);
    const layer_result formulas = layer_by_formulas(batch, states);
    EXPECT_LE(relative_error(one.y, formulas.y), limit);
    if (states) {
      EXPECT_LE(relative_error(one.final_, formulas.final_), limit);
      EXPECT_LE(relative_error(one.final_conv, formulas.final_conv), limit);
    }
    for (const auto strategy : strategies) {
      for (const auto share : shares) {
        for (const auto rule : {rule_kind::chunked, rule_kind::recurrent}) {
          layer_spread s = given;
          s.options = {strategy, share, states, states};
          s.rule = rule;
          s.chunk = rule == rule_kind::chunked ? 3 : 64;
          SCOPED_TRACE(describe(s));
          EXPECT_TRUE(near(run_layer<double>(batch, s), one, limit));
        }
      }
    }
  }
}

TEST(layer_cases, RanksShorterThanTheWindow) {  // L in 1 .. 3, W = 4, over 3 to 6 ranks
  for (const index_t L : {1, 2, 3}) {
    for (const int world : {3, 4, 6}) {
      const layer_batch b = batch_of(gdn::packing::rows_of(2, L * world));
      expect_one_rank(b, spread_over(gdn::contiguous_layout{L * world, world}, b));
      if (L == 2) expect_one_rank(b, spread_over(gdn::zigzag_layout{L * world, world}, b));
    }
  }
}

TEST(layer_cases, DocumentsOfOneTokenAtEveryBoundary) {
  constexpr index_t L = 5;
  for (const int where : {0, 1, 2}) {  // the last token of a rank, the first of the next, or both
    std::vector<index_t> mask;
    index_t id = 1;
    for (index_t t = 0; t < 4 * L; ++t) {
      const bool last = t % L == L - 1, first = t % L == 0;
      const bool alone = (last && where != 1) || (first && where != 0);
      if (alone) ++id;
      mask.push_back(id);
      if (alone) ++id;
    }
    const layer_batch b = batch_of(gdn::packing::from_mask(mask, 1, 4 * L));
    expect_one_rank(b, spread_over(gdn::contiguous_layout{4 * L, 4}, b));
  }
  const layer_batch ones = batch_of(documents(std::vector<index_t>(8, 1)));
  expect_one_rank(ones, spread_over(gdn::zigzag_layout{8, 2}, ones));
}

TEST(layer_cases, DocumentsWithoutTokens) {
  const layer_batch b = batch_of(documents({0, 5, 0, 0, 7, 4, 0}));
  for (const int world : {1, 2, 4}) expect_one_rank(b, spread_over(gdn::contiguous_layout{16, world}, b));
  expect_one_rank(b, spread_over(gdn::zigzag_layout{16, 4}, b));
  // Their states pass through unchanged, and so do the gradients.
  const layer_result r = run_layer<double>(b, spread_over(gdn::zigzag_layout{16, 4}, b, {.initial_state = true, .final_state = true}));
  for (const index_t n : {0, 2, 3, 6}) {
    EXPECT_EQ(entries<double>(r.final_, {n}, b.state_size()), entries<double>(b.initial, {n}, b.state_size()));
    EXPECT_EQ(entries<double>(r.final_conv, {n}, b.conv_size()), entries<double>(b.initial_conv, {n}, b.conv_size()));
    EXPECT_EQ(entries<double>(r.d_initial, {n}, b.state_size()), entries<double>(b.d_final, {n}, b.state_size()));
    EXPECT_EQ(entries<double>(r.d_initial_conv, {n}, b.conv_size()), entries<double>(b.d_final_conv, {n}, b.conv_size()));
  }
}

TEST(layer_cases, RanksWithoutRows) {
  const layer_batch b = batch_of(documents({2, 3}));
  expect_one_rank(b, spread_over(gdn::contiguous_layout{5, 8}, b));
  const std::vector<std::vector<std::pair<index_t, index_t>>> ranges = {{}, {{3, 5}}, {}, {{0, 3}}};
  expect_one_rank(b, spread_over(gdn::from_ranges(ranges), b));
}

TEST(layer_cases, RanksWithPaddingOnly) {
  std::vector<index_t> mask(16, 0);
  for (const std::size_t i : {0U, 1U, 2U, 9U, 10U}) mask[i] = i < 3 ? 1 : 2;
  const layer_batch b = batch_of(gdn::packing::from_mask(mask, 1, 16));
  for (const int world : {2, 4, 8}) {
    expect_one_rank(b, spread_over(gdn::contiguous_layout{16, world}, b));
    expect_one_rank(b, spread_over(gdn::zigzag_layout{16, world}, b));
  }
}

TEST(layer_cases, BatchesOfPaddingOnly) {
  for (const bool as_mask : {false, true}) {
    const std::vector<index_t> zeros(24, 0);
    const layer_batch b = batch_of(as_mask ? gdn::packing::from_mask(zeros, 3, 8)
                                           : gdn::packing::from_lengths(std::vector<index_t>{0, 0, 0}, 8));
    for (const int world : {1, 4}) {
      const layer_spread s = spread_over(gdn::zigzag_layout{8, world}, b, {.initial_state = true, .final_state = true});
      const layer_result r = run_layer<double>(b, s);
      EXPECT_EQ(r.y, values(24 * 5, 0));
      EXPECT_EQ(r.dx, values(24 * 5, 0));
      EXPECT_EQ(r.final_, b.initial);
      EXPECT_EQ(r.d_initial, b.d_final);
      for (const values& g : r.gradients) EXPECT_EQ(g, values(g.size(), 0));
    }
  }
}

TEST(layer_cases, BatchesOfNothing) {
  const layer_batch b = batch_of(gdn::packing::rows_of(0, 8));
  const layer_result r = run_layer<double>(b, spread_over(gdn::contiguous_layout{8, 2}, b));
  EXPECT_TRUE(r.y.empty() && r.dx.empty());
}

TEST(layer_cases, RowsWithOtherDocumentsAndPaddingEach) {  // B = 3
  const std::vector<index_t> mask = {0, 1, 1, 1, 2, 2, 0, 3, 3, 3, 3, 3,   //
                                     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,   //
                                     2, 0, 4, 4, 0, 0, 0, 0, 0, 0, 5, 0};
  const layer_batch b = batch_of(gdn::packing::from_mask(mask, 3, 12));
  for (const int world : {2, 3, 6}) {
    expect_one_rank(b, spread_over(gdn::zigzag_layout{12, world}, b));
    expect_one_rank(b, spread_over(gdn::contiguous_layout{12, world}, b));
    expect_one_rank(b, spread_over(gdn::interleaved_layout{12, world}, b));
  }
}

TEST(layer_cases, OddNumbersOfRanksAndHeads) {  // P in 3, 5, 6, 7; R = 3; K != V
  for (const int world : {3, 5, 6, 7}) {
    const layer_batch b = batch_of(documents({3, 20, 19}));
    expect_one_rank(b, spread_over(gdn::contiguous_layout{42, world}, b));
    const layer_batch z = batch_of(documents({4 * world - 3, 3}));
    expect_one_rank(z, spread_over(gdn::zigzag_layout{4 * world, world}, z));
  }
}

TEST(layer_cases, GatesThatKeepOrForgetEverything) {
  for (const double log_rate : {-1e4, 0.0}) {
    layer_batch b = batch_of(documents({11, 13}));
    // a = 0, so g = -exp(A_log) softplus(dt_bias): 0 in all bits, or -60.
    std::fill(b.parameters[in_proj_a].begin(), b.parameters[in_proj_a].end(), 0);
    std::fill(b.parameters[A_log].begin(), b.parameters[A_log].end(), log_rate);
    std::fill(b.parameters[dt_bias].begin(), b.parameters[dt_bias].end(), 60);
    expect_one_rank(b, spread_over(gdn::zigzag_layout{24, 3}, b));
    expect_one_rank(b, spread_over(gdn::contiguous_layout{24, 4}, b));
  }
}

TEST(layer_cases, BetasOfZeroAndOne) {
  for (const double b_logit : {-800.0, 800.0}) {
    layer_batch b = batch_of(documents({11, 13}));
    // b = +-800 |x|: sigmoid is 0 or 1 in all bits.
    std::fill(b.parameters[in_proj_b].begin(), b.parameters[in_proj_b].end(), 0);
    for (std::size_t i = 0; i < b.parameters[in_proj_b].size(); i += 5) b.parameters[in_proj_b][i] = b_logit;
    for (std::size_t i = 0; i < b.x.size(); i += 5) b.x[i] = 1 + std::abs(b.x[i]);
    expect_one_rank(b, spread_over(gdn::zigzag_layout{24, 3}, b));
  }
}

TEST(layer_cases, HeadsOfOneElement) {  // their norms are rounding, so outputs alone are compared
  gdn::layer_dims d = dims;
  d.key_dim = d.value_dim = 1;
  const layer_batch b = batch_of(documents({9, 15}), d);
  const layer_result one = run_layer<double>(b, on_one_rank(b));
  EXPECT_LE(relative_error(run_layer<double>(b, spread_over(gdn::zigzag_layout{24, 4}, b)).y, one.y), 1e-10);
}

TEST(layer_cases, WindowsOfOneTokenAndOfMoreThanAllTokens) {
  for (const index_t width : {1, 2, 9}) {
    gdn::layer_dims d = dims;
    d.conv_width = width;
    const layer_batch b = batch_of(documents({5, 3}), d);
    expect_one_rank(b, spread_over(gdn::contiguous_layout{8, 4}, b));
    expect_one_rank(b, spread_over(gdn::zigzag_layout{8, 2}, b));
  }
}

TEST(layer_cases, PaddedAndPackedBatchesAreTheSame) {  // right padding, left padding, packed in one row, row by row
  const std::vector<index_t> lengths = {7, 1, 12, 3};
  const layer_batch packed = batch_of(documents(lengths));
  const layer_result want = run_layer<double>(packed, on_one_rank(packed, {.final_state = true}));
  for (const bool left : {false, true}) {
    std::vector<index_t> mask;
    for (const index_t n : lengths) {
      for (index_t t = 0; t < 12; ++t) mask.push_back((left ? t >= 12 - n : t < n) ? 1 : 0);
    }
    layer_batch padded = batch_of(gdn::packing::from_mask(mask, 4, 12));
    padded.parameters = packed.parameters;
    padded.d_final = packed.d_final;
    padded.d_final_conv = packed.d_final_conv;
    const auto rows = padded.pack.indices();
    for (std::size_t t = 0; t < rows.size(); ++t) {
      for (std::size_t i = 0; i < 5; ++i) {
        padded.x[static_cast<std::size_t>(rows[t]) * 5 + i] = packed.x[t * 5 + i];
        padded.dy[static_cast<std::size_t>(rows[t]) * 5 + i] = packed.dy[t * 5 + i];
      }
    }
    for (const int world : {1, 3}) {
      layer_result got = run_layer<double>(padded, spread_over(gdn::zigzag_layout{12, world}, padded, {.final_state = true}));
      const values y = std::exchange(got.y, {}), dx = std::exchange(got.dx, {});
      for (const index_t row : rows) {
        got.y.insert(got.y.end(), y.begin() + row * 5, y.begin() + row * 5 + 5);
        got.dx.insert(got.dx.end(), dx.begin() + row * 5, dx.begin() + row * 5 + 5);
      }
      EXPECT_TRUE(near(got, want, 1e-12)) << world << " ranks, left " << left;
    }
  }
}

}  // namespace
}  // namespace gdn_test
