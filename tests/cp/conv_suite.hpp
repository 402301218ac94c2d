// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The convolution under context parallelism, on FLA's and Cornstarch's cases and on random ones.
///
/// A Subject has a value_type, and conv(numbers, spread), which runs in it.

#include <cp/random_stream.hpp>

namespace gdn_test {

/// Of rms(error) / rms(reference): a few roundings of sums of W products, and one where a number is stored; the sum over
/// all tokens in dw is in accumulate_t or better.
template <class T>
inline constexpr double conv_limit = sizeof(T) == 2 ? epsilon<T> / 2 : sizeof(T) == 4 ? 1e-6 : 1e-14;

/// The definition, document by document.
inline values convolution(const conv_numbers& n, const gdn::packing& pack, bool initial) {
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
inline const std::vector<fla_conv> fla_conv_cases = {{2, {300, 400, 324}},
                                                     {2, {512, 512}},
                                                     {2, {100, 150, 200, 250, 124, 100, 100}},
                                                     {2, {513, 511}},
                                                     {2, {514, 510}},
                                                     {2, {200, 313, 511}},
                                                     {2, {512, 1, 511}},
                                                     {4, {700, 324}},
                                                     {4, {1024}},
                                                     {4, {257, 255, 257, 255}},
                                                     {4, {257, 253, 257, 257}},
                                                     {4, {257, 1, 253, 257, 1, 253, 2}}};

template <class Subject>
class cp_conv : public testing::Test {
 public:
  using T = typename Subject::value_type;
  /// Ranks give what one rank gives in double; and y to the bit what one gives in their own type.
  static void expect_one_rank(const conv_numbers& n, const stream_spread& s, double factor = 1) {
    const conv_answers one = reference<T>(n, s), many = Subject::conv(n, s);
    testing::AssertionResult is_near = near(many, one, factor * conv_limit<T>);
    if (!is_near && sizeof(T) == 2) is_near = near(many, one, 4 * moved_by_roundings(rounded<T>(n), s, one));
    EXPECT_TRUE(is_near);
    EXPECT_LE(relative_error(one.y, convolution(rounded<T>(n), s.pack, s.options.initial_state)), 1e-13);
    EXPECT_EQ(many.y, Subject::conv(n, s.on_one_rank()).y) << "the same bits";
  }
  /// What a random half of a rounding of every input moves most: gradients of tokens and of final states may cancel.
  static double moved_by_roundings(conv_numbers n, const stream_spread& s, const conv_answers& one) {
    random_source random(0);
    std::uniform_real_distribution<double> half(-0.5, 0.5);
    for (values* v : {&n.x, &n.dy, &n.w, &n.initial, &n.d_final}) {
      for (double& x : *v) x *= 1 + epsilon<T> * half(random.engine());
    }
    const conv_answers other = run_conv<double, host_ranks>(n, s.on_one_rank());
    return std::max({rms_error(other.y, one.y), rms_error(other.dx, one.dx), rms_error(other.dw, one.dw),
                     rms_error(other.final_, one.final_), rms_error(other.d_initial, one.d_initial)});
  }
};
TYPED_TEST_SUITE_P(cp_conv);

// x scaled by 100, D 128, W 4, T 1024, SiLU; without the bias that this layer does not have. FLA's limit: 1e-3 in fp32.
TYPED_TEST_P(cp_conv, FlasCasesEqualOneRank) {
  for (const auto& [world, documents] : fla_conv_cases) {
    SCOPED_TRACE(testing::Message() << world << " ranks, documents " << testing::PrintToString(documents));
    random_source random(1);
    const conv_numbers n = random_conv(random, 1024, static_cast<index_t>(documents.size()), 128, 4, 100);
    for (const auto strategy : strategies) {
      stream_spread s = documents_over(documents, gdn::contiguous_layout{0, world});
      s.options.strategy = strategy;
      this->expect_one_rank(n, s);
    }
    this->expect_one_rank(n, documents_over(documents, gdn::zigzag_layout{0, world}));
  }
}

TYPED_TEST_P(cp_conv, CornstarchsRunsOfThreeChannelsAndWidthThree) {
  random_source random(2);
  for (const bool head_tail : {false, true}) {
    const stream_spread s = head_tail ? documents_over({3, 4, 1}, gdn::zigzag_layout{0, 2})
                                      : documents_over({3, 4, 1}, gdn::contiguous_layout{0, 2});
    this->expect_one_rank(random_conv(random, 8, 3, 3, 3), s);
  }
}

TYPED_TEST_P(cp_conv, RandomStreamsWithStatesEqualOneRank) {
  for (std::uint64_t i = 0; i < cases(400) && !testing::Test::HasFailure(); ++i) {
    random_source random(i);
    const plan_case c = any_case(random);
    SCOPED_TRACE(testing::Message() << "case " << i << ": " << c);
    const stream_spread s = random_spread(c, random);
    conv_numbers n = random_conv(random, c.pack.tokens(), c.pack.documents(), random.between(1, 5), c.shape.conv_width);
    if (random.coin()) n.act = gdn::activation::none;
    this->expect_one_rank(n, s, of_few_numbers<typename TestFixture::T>);
  }
}

TYPED_TEST_P(cp_conv, ThePromisedWorkspaceIsEnoughForHistoryOfManyShortRanks) {
  random_source random(3);
  for (int world = 2; world <= 8; ++world) {
    for (index_t width = 2; width <= 6; ++width) {
      SCOPED_TRACE(testing::Message() << world << " ranks, width " << width);
      stream_spread s = documents_over({world}, gdn::contiguous_layout{0, world});  // one token per rank
      s.options.initial_state = s.options.final_state = true;
      this->expect_one_rank(random_conv(random, world, 1, 3, width), s, of_few_numbers<typename TestFixture::T>);
    }
  }
}

REGISTER_TYPED_TEST_SUITE_P(cp_conv, FlasCasesEqualOneRank, CornstarchsRunsOfThreeChannelsAndWidthThree,
                            RandomStreamsWithStatesEqualOneRank,
                            ThePromisedWorkspaceIsEnoughForHistoryOfManyShortRanks);

}  // namespace gdn_test
