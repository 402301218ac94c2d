// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The delta rule under context parallelism, on FLA's, Cornstarch's and sglang's cases and on random ones.
///
/// A Subject has a value_type, and rule(numbers, spread, counts), which runs in it; head_size(n) as conformance/fixture.hpp
/// has it.

#include <cp/random_stream.hpp>

namespace gdn_test {

/// Of rms(error) / rms(reference). FLA allows 3e-3 in bf16 against one GPU in bf16; here the reference is double.
template <class T>
inline constexpr double cp_rule_limit = sizeof(T) == 2 ? epsilon<T> : sizeof(T) == 4 ? 1e-5 : 1e-12;

struct fla_cp_row {
  int world;
  index_t H, HV, D;
  std::vector<index_t> documents;
};
inline const std::vector<fla_cp_row> fla_cp_rows = {
    {2, 4, 4, 64, {3000, 4000, 3240}},
    {2, 4, 4, 128, {5120, 5120}},
    {2, 4, 4, 128, {1000, 1500, 2000, 2500, 1240, 1000, 1000}},
    {4, 4, 4, 128, {7000, 3240}},
    {4, 4, 4, 128, {10240}},
    {8, 4, 4, 128, {8192}},  // FLA has 65536 tokens here, which take 30 s on a host
    {2, 2, 4, 64, {3000, 4000, 3240}},
    {2, 2, 8, 64, {10240}}};

template <class Subject>
class cp_rule : public testing::Test {
 public:
  using T = typename Subject::value_type;
  static index_t head_size(index_t n) {
    if constexpr (requires { Subject::head_size(n); }) {
      return Subject::head_size(n);
    } else {
      return n;
    }
  }
  static void expect_one_rank(const rule_stream& n, const stream_spread& s, double factor = 1) {
    EXPECT_TRUE(near(Subject::rule(n, s), reference<T>(n, s), factor * cp_rule_limit<T>));
  }
};
TYPED_TEST_SUITE_P(cp_rule);

TYPED_TEST_P(cp_rule, FlasRowsEqualOneRank) {
  for (const fla_cp_row& row : fla_cp_rows) {
    SCOPED_TRACE(testing::Message() << row.world << " ranks, heads " << row.H << '/' << row.HV << " of " << row.D
                                    << ", documents " << testing::PrintToString(row.documents));
    index_t tokens = 0;
    for (const index_t n : row.documents) tokens += n;
    random_source random(1);
    const auto documents = static_cast<index_t>(row.documents.size());
    const rule_stream n = random_rule(random, tokens, documents, row.H, row.HV, row.D, row.D);
    stream_spread s = documents_over(row.documents, gdn::contiguous_layout{0, row.world});
    s.options = {gdn::strategy::in_place, shares[(documents + row.world) % 3], true, true};
    this->expect_one_rank(n, s);
  }
}

// Cornstarch: T 8, H 2, K 16, V 12, documents 0 0 0 1 1 1 1 -1, uniform and head-tail.
TYPED_TEST_P(cp_rule, CornstarchsDocumentsInUniformAndHeadTailOrder) {
  const auto pack = gdn::packing::from_mask(std::vector<index_t>{1, 1, 1, 2, 2, 2, 2, 0}, 1, 8);
  random_source random(2);
  const rule_stream n = random_rule(random, 7, 2, 2, 2, 16, this->head_size(12));
  for (const bool head_tail : {false, true}) {
    for (const auto strategy : strategies) {
      for (const auto share : shares) {
        stream_spread s;
        s.world = 2;
        s.rows = head_tail ? gdn::zigzag_layout{8, 2}.fragments() : gdn::contiguous_layout{8, 2}.fragments();
        s.pack = pack;
        s.options = {strategy, share, true, true};
        this->expect_one_rank(n, s);
      }
    }
  }
}

// Cornstarch: documents 0 0 -1 x 6: the second rank has nothing, and all call the same functions.
TYPED_TEST_P(cp_rule, AnEmptyLaneTakesPart) {
  random_source random(3);
  const rule_stream n = random_rule(random, 2, 1, 2, 2, 16, this->head_size(12));
  stream_spread s;
  s.world = 2;
  s.rows = gdn::zigzag_layout{8, 2}.fragments();
  s.pack = gdn::packing::from_mask(std::vector<index_t>{1, 1, 0, 0, 0, 0, 0, 0}, 1, 8);
  s.options.initial_state = s.options.final_state = true;
  std::vector<message_counts> counts;
  EXPECT_TRUE(same_bits(TypeParam::rule(n, s, &counts), TypeParam::rule(n, s.on_one_rank())));
  EXPECT_EQ(counts.size(), 2U);
  for (const message_counts& c : counts) EXPECT_EQ(c, message_counts{});
}

// sglang: P = 8 with 5 tokens (empty shards) and 640; P = 4 with 1000 and 704, against running the shards one by one.
TYPED_TEST_P(cp_rule, ShardsMayBeEmpty) {
  for (const index_t tokens : {5, 640}) {
    random_source random(4);
    const rule_stream n = random_rule(random, tokens, 1, 1, 2, 16, 16);
    for (const auto share : shares) {
      SCOPED_TRACE(testing::Message() << tokens << " tokens");
      stream_spread s = documents_over({tokens}, gdn::contiguous_layout{0, 8});
      s.options = {gdn::strategy::in_place, share, true, true};
      this->expect_one_rank(n, s);
    }
  }
}

TYPED_TEST_P(cp_rule, ShardsEqualAChainOfCallsThatCarryTheState) {
  for (const index_t tokens : {1000, 704}) {
    random_source random(5);
    const rule_stream all = random_rule(random, tokens, 1, 2, 4, 16, 16);
    stream_spread s = documents_over({tokens}, gdn::contiguous_layout{0, 4});
    s.options = {gdn::strategy::in_place, gdn::share::relay, true, true};
    const rule_stream_answers ranks = TypeParam::rule(all, s);
    values state = all.initial, o;
    for (index_t r = 0; r < 4; ++r) {
      const index_t n = tokens / 4;
      const auto cut = [&](const values& v) {
        const auto width = static_cast<index_t>(v.size()) / tokens;
        return values(v.begin() + r * n * width, v.begin() + (r + 1) * n * width);
      };
      const rule_stream shard{all.key_heads, all.value_heads, all.K, all.V, cut(all.q), cut(all.k),
                              cut(all.v),    cut(all.d_o),    cut(all.g), cut(all.beta), state, all.d_final};
      stream_spread one = documents_over({n}, gdn::contiguous_layout{0, 1});
      one.options = s.options;
      const rule_stream_answers a = TypeParam::rule(shard, one);
      state = a.final_;
      o.insert(o.end(), a.o.begin(), a.o.end());
    }
    const double limit = cp_rule_limit<typename TypeParam::value_type> / 10;  // nearly the same operations
    EXPECT_LE(rms_error(ranks.o, o), limit);
    EXPECT_LE(rms_error(ranks.final_, state), limit);
  }
}

TYPED_TEST_P(cp_rule, RandomStreamsWithStatesEqualOneRank) {
  for (std::uint64_t i = 0; i < cases(400) && !testing::Test::HasFailure(); ++i) {
    random_source random(i);
    const plan_case c = any_case(random);
    SCOPED_TRACE(testing::Message() << "case " << i << ": " << c);
    stream_spread s = random_spread(c, random);
    s.chunk = random.coin(3) ? 64 : random.between(1, 20);
    s.rule = random.coin() ? rule_kind::recurrent : rule_kind::chunked;
    const index_t Hk = random.between(1, 2), Hv = Hk * random.between(1, 4);
    const index_t K = this->head_size(random.between(1, 5)), V = this->head_size(random.between(1, 5));
    this->expect_one_rank(random_rule(random, c.pack.tokens(), c.pack.documents(), Hk, Hv, K, V), s,
                          of_few_numbers<typename TestFixture::T>);
  }
}

TYPED_TEST_P(cp_rule, AHundredRunsGiveTheSameBits) {  // VeOmni
  random_source random(6);
  const rule_stream n = random_rule(random, 96, 3, 1, 2, this->head_size(8), this->head_size(8));
  for (const auto share : shares) {
    stream_spread s = documents_over({40, 1, 55}, gdn::zigzag_layout{0, 4});
    s.options = {gdn::strategy::in_place, share, true, true};
    s.threads = 2;
    const rule_stream_answers first = TypeParam::rule(n, s);
    for (int i = 1; i < 34 && !testing::Test::HasFailure(); ++i) EXPECT_TRUE(same_bits(TypeParam::rule(n, s), first)) << i;
  }
}

REGISTER_TYPED_TEST_SUITE_P(cp_rule, FlasRowsEqualOneRank, CornstarchsDocumentsInUniformAndHeadTailOrder,
                            AnEmptyLaneTakesPart, ShardsMayBeEmpty, ShardsEqualAChainOfCallsThatCarryTheState,
                            RandomStreamsWithStatesEqualOneRank, AHundredRunsGiveTheSameBits);

}  // namespace gdn_test
