// SPDX-License-Identifier: Apache-2.0
// The convolution under context parallelism, on FLA's and Cornstarch's cases and on random ones.
#include <cp/cp_run.hpp>
#include <plan/random_case.hpp>

namespace gdn_test {
namespace {

/// The definition, document by document.
values convolution(const conv_numbers& n, const gdn::packing& pack, bool initial) {
  const index_t D = n.channels, W = n.width;
  values y(n.x.size());
  for (index_t d = 0; d < pack.documents(); ++d) {
    const index_t begin = pack.cu_seqlens[static_cast<std::size_t>(d)];
    for (index_t t = begin; t < pack.cu_seqlens[static_cast<std::size_t>(d) + 1]; ++t) {
      for (index_t c = 0; c < D; ++c) {
        double p = 0;
        for (index_t j = 0; j < W; ++j) {
          const index_t from = t - W + 1 + j;
          const double x = from >= begin ? n.x[static_cast<std::size_t>(from * D + c)]
                           : initial     ? n.initial[static_cast<std::size_t>((d * D + c) * W + W + from - begin)]
                                         : 0;
          p += n.w[static_cast<std::size_t>(c * W + j)] * x;
        }
        y[static_cast<std::size_t>(t * D + c)] = n.act == gdn::activation::silu ? p / (1 + std::exp(-p)) : p;
      }
    }
  }
  return y;
}

struct fla_conv {
  int world;
  std::vector<index_t> documents;
};
std::ostream& operator<<(std::ostream& out, const fla_conv& c) {
  return out << c.world << " ranks, documents " << testing::PrintToString(c.documents);
}
class fla_conv_cases : public testing::TestWithParam<fla_conv> {};

// fp32, x scaled by 100, D 128, W 4, T 1024, SiLU; without the bias that this layer does not have. FLA's limit: 1e-3.
TEST_P(fla_conv_cases, RanksEqualOneRank) {
  const auto& [world, documents] = GetParam();
  random_source random(1);
  const conv_numbers n = random_conv(random, 1024, static_cast<index_t>(documents.size()), 128, 4, 100);
  for (const auto strategy : strategies) {
    stream_spread s = documents_over(documents, gdn::contiguous_layout{0, world});
    s.options.strategy = strategy;
    const conv_answers one = run_conv<double>(n, s.on_one_rank());
    EXPECT_LE(relative_error(one.y, convolution(n, s.pack, false)), 1e-14);
    EXPECT_TRUE(near(run_conv<double>(n, s), one, 1e-14));
    EXPECT_TRUE(near(run_conv<float>(n, s), one, 1e-6));
    EXPECT_EQ(run_conv<float>(n, s).y, run_conv<float>(n, s.on_one_rank()).y) << "the same bits";
  }
  const stream_spread zigzag = documents_over(documents, gdn::zigzag_layout{0, world});
  EXPECT_TRUE(near(run_conv<float>(n, zigzag), run_conv<double>(n, zigzag.on_one_rank()), 1e-6));
}
INSTANTIATE_TEST_SUITE_P(two_ranks, fla_conv_cases,
                         testing::Values(fla_conv{2, {300, 400, 324}}, fla_conv{2, {512, 512}},
                                         fla_conv{2, {100, 150, 200, 250, 124, 100, 100}}, fla_conv{2, {513, 511}},
                                         fla_conv{2, {514, 510}}, fla_conv{2, {200, 313, 511}},
                                         fla_conv{2, {512, 1, 511}}));
INSTANTIATE_TEST_SUITE_P(four_ranks, fla_conv_cases,
                         testing::Values(fla_conv{4, {700, 324}}, fla_conv{4, {1024}}, fla_conv{4, {257, 255, 257, 255}},
                                         fla_conv{4, {257, 253, 257, 257}},
                                         fla_conv{4, {257, 1, 253, 257, 1, 253, 2}}));

TEST(cp_conv, CornstarchsRunsOfThreeChannelsAndWidthThree) {
  random_source random(2);
  for (const bool head_tail : {false, true}) {
    stream_spread s = head_tail ? documents_over({3, 4, 1}, gdn::zigzag_layout{0, 2})
                                : documents_over({3, 4, 1}, gdn::contiguous_layout{0, 2});
    const conv_numbers n = random_conv(random, 8, 3, 3, 3);
    EXPECT_TRUE(near(run_conv<double>(n, s), run_conv<double>(n, s.on_one_rank()), 1e-14));
    EXPECT_TRUE(near(run_conv<float>(n, s), run_conv<double>(n, s.on_one_rank()), 1e-6));
  }
}

TEST(cp_conv, RandomStreamsWithStatesEqualOneRank) {
  for (std::uint64_t i = 0; i < cases(400) && !testing::Test::HasFailure(); ++i) {
    random_source random(i);
    const plan_case c = any_case(random);
    SCOPED_TRACE(testing::Message() << "case " << i << ": " << c);
    stream_spread s;
    s.world = c.world;
    s.rows = c.rows;
    s.pack = c.pack;
    s.options = {strategies[random.between(0, 1)], shares[random.between(0, 2)], random.coin(), random.coin()};
    conv_numbers n = random_conv(random, c.pack.tokens(), c.pack.documents(), random.between(1, 5), c.shape.conv_width);
    if (random.coin()) n.act = gdn::activation::none;
    const conv_answers one = run_conv<double>(n, s.on_one_rank()), many = run_conv<double>(n, s);
    EXPECT_TRUE(near(many, one, 1e-13));
    EXPECT_LE(relative_error(one.y, convolution(n, s.pack, s.options.initial_state)), 1e-13);
    EXPECT_EQ(many.y, one.y) << "the same bits";
  }
}

TEST(cp_conv, ThePromisedWorkspaceIsEnoughForHistoryOfManyShortRanks) {
  random_source random(3);
  for (int world = 2; world <= 8; ++world) {
    for (index_t width = 2; width <= 6; ++width) {
      stream_spread s = documents_over({world}, gdn::contiguous_layout{0, world});  // one token per rank
      s.options.initial_state = s.options.final_state = true;
      const conv_numbers n = random_conv(random, world, 1, 3, width);
      EXPECT_TRUE(near(run_conv<double>(n, s), run_conv<double>(n, s.on_one_rank()), 1e-14)) << world << ' ' << width;
    }
  }
}

}  // namespace
}  // namespace gdn_test
