// SPDX-License-Identifier: Apache-2.0
// The delta rule under context parallelism, on FLA's, Cornstarch's and sglang's cases and on random ones.
#include <cp/cp_run.hpp>
#include <plan/random_case.hpp>

namespace gdn_test {
namespace {

struct fla_cp_row {
  std::string name;
  int world;
  index_t H, HV, D;
  std::vector<index_t> documents;
};
std::ostream& operator<<(std::ostream& out, const fla_cp_row& r) { return out << r.name; }

class fla_cp_rows : public testing::TestWithParam<fla_cp_row> {};

// bf16 against one GPU at 3e-3 in FLA; here fp32 at 1e-5 and fp64 at 1e-12 against one rank in fp64.
TEST_P(fla_cp_rows, RanksEqualOneRank) {
  const fla_cp_row& row = GetParam();
  index_t tokens = 0;
  for (const index_t n : row.documents) tokens += n;
  random_source random(1);
  const auto documents = static_cast<index_t>(row.documents.size());
  const rule_stream n = random_rule(random, tokens, documents, row.H, row.HV, row.D, row.D);
  stream_spread s = documents_over(row.documents, gdn::contiguous_layout{0, row.world});
  s.options = {gdn::strategy::in_place, shares[documents % 3], true, true};
  const rule_stream_answers one = run_rule<double>(n, s.on_one_rank());
  EXPECT_TRUE(near(run_rule<float>(n, s), one, 1e-5));
  s.options.share = row.world > 2 ? gdn::share::prefix_scan : gdn::share::relay;
  EXPECT_TRUE(near(run_rule<double>(n, s), one, 1e-12));
}
const auto name_of = [](const auto& row) { return row.param.name; };
INSTANTIATE_TEST_SUITE_P(
    table, fla_cp_rows,
    testing::Values(fla_cp_row{"P2_D64_docs3", 2, 4, 4, 64, {3000, 4000, 3240}},
                    fla_cp_row{"P2_D128_docs2", 2, 4, 4, 128, {5120, 5120}},
                    fla_cp_row{"P2_D128_docs7", 2, 4, 4, 128, {1000, 1500, 2000, 2500, 1240, 1000, 1000}},
                    fla_cp_row{"P4_D128_docs2", 4, 4, 4, 128, {7000, 3240}},
                    fla_cp_row{"P4_D128_one", 4, 4, 4, 128, {10240}},
                    // FLA has 65536 tokens here, which take 30 s in fp32.
                    fla_cp_row{"P8_D128_one", 8, 4, 4, 128, {8192}},
                    fla_cp_row{"P2_Hq2_H4_D64_docs3", 2, 2, 4, 64, {3000, 4000, 3240}},
                    fla_cp_row{"P2_Hq2_H8_D64_one", 2, 2, 8, 64, {10240}}),
    name_of);

// Cornstarch: T 8, H 2, K 16, V 12, documents 0 0 0 1 1 1 1 -1, uniform and head-tail.
TEST(cp_rule, CornstarchsDocumentsInUniformAndHeadTailOrder) {
  const auto pack = gdn::packing::from_mask(std::vector<index_t>{1, 1, 1, 2, 2, 2, 2, 0}, 1, 8);
  random_source random(2);
  const rule_stream n = random_rule(random, 7, 2, 2, 2, 16, 12);
  for (const bool head_tail : {false, true}) {
    for (const auto strategy : strategies) {
      for (const auto share : shares) {
        stream_spread s;
        s.world = 2;
        s.rows = head_tail ? gdn::zigzag_layout{8, 2}.fragments() : gdn::contiguous_layout{8, 2}.fragments();
        s.pack = pack;
        s.options = {strategy, share, true, true};
        EXPECT_TRUE(near(run_rule<double>(n, s), run_rule<double>(n, s.on_one_rank()), 1e-13));
        EXPECT_TRUE(near(run_rule<float>(n, s), run_rule<double>(n, s.on_one_rank()), 1e-5));
      }
    }
  }
}

// Cornstarch: documents 0 0 -1 x 6: the second rank has nothing, and all call the same functions.
TEST(cp_rule, AnEmptyLaneTakesPart) {
  random_source random(3);
  const rule_stream n = random_rule(random, 2, 1, 2, 2, 16, 12);
  stream_spread s;
  s.world = 2;
  s.rows = gdn::zigzag_layout{8, 2}.fragments();
  s.pack = gdn::packing::from_mask(std::vector<index_t>{1, 1, 0, 0, 0, 0, 0, 0}, 1, 8);
  s.options.initial_state = s.options.final_state = true;
  std::vector<message_counts> counts;
  EXPECT_TRUE(same_bits(run_rule<double>(n, s, &counts), run_rule<double>(n, s.on_one_rank())));
  for (const message_counts& c : counts) EXPECT_EQ(c, message_counts{});
}

// sglang: P = 8 with 5 tokens (empty shards) and 640; P = 4 with 1000 and 704, against running the shards one by one.
TEST(cp_rule, ShardsMayBeEmpty) {
  for (const index_t tokens : {5, 640}) {
    random_source random(4);
    const rule_stream n = random_rule(random, tokens, 1, 1, 2, 16, 16);
    for (const auto share : shares) {
      stream_spread s = documents_over({tokens}, gdn::contiguous_layout{0, 8});
      s.options = {gdn::strategy::in_place, share, true, true};
      EXPECT_TRUE(near(run_rule<double>(n, s), run_rule<double>(n, s.on_one_rank()), 1e-12)) << tokens;
    }
  }
}
TEST(cp_rule, ShardsEqualAChainOfCallsThatCarryTheState) {
  for (const index_t tokens : {1000, 704}) {
    random_source random(5);
    const rule_stream all = random_rule(random, tokens, 1, 2, 4, 16, 16);
    stream_spread s = documents_over({tokens}, gdn::contiguous_layout{0, 4});
    s.options = {gdn::strategy::in_place, gdn::share::relay, true, true};
    const rule_stream_answers ranks = run_rule<double>(all, s);
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
      const rule_stream_answers a = run_rule<double>(shard, one);
      state = a.final_;
      o.insert(o.end(), a.o.begin(), a.o.end());
    }
    EXPECT_LE(rms_error(ranks.o, o), 1e-13);
    EXPECT_LE(rms_error(ranks.final_, state), 1e-13);
  }
}

TEST(cp_rule, RandomStreamsWithStatesEqualOneRank) {
  for (std::uint64_t i = 0; i < cases(400) && !testing::Test::HasFailure(); ++i) {
    random_source random(i);
    const plan_case c = any_case(random);
    SCOPED_TRACE(testing::Message() << "case " << i << ": " << c);
    stream_spread s;
    s.world = c.world;
    s.rows = c.rows;
    s.pack = c.pack;
    s.options = {strategies[random.between(0, 1)], shares[random.between(0, 2)], random.coin(), random.coin()};
    s.chunk = random.between(1, 20);
    s.rule = random.coin() ? rule_kind::recurrent : rule_kind::chunked;
    const index_t Hk = random.between(1, 2);
    const rule_stream n = random_rule(random, c.pack.tokens(), c.pack.documents(), Hk, Hk * random.between(1, 4),
                                      random.between(1, 5), random.between(1, 5));
    EXPECT_TRUE(near(run_rule<double>(n, s), run_rule<double>(n, s.on_one_rank()), 1e-11));
  }
}

TEST(cp_rule, AHundredRunsGiveTheSameBits) {  // VeOmni
  random_source random(6);
  const rule_stream n = random_rule(random, 96, 3, 1, 2, 8, 8);
  for (const auto share : shares) {
    stream_spread s = documents_over({40, 1, 55}, gdn::zigzag_layout{0, 4});
    s.options = {gdn::strategy::in_place, share, true, true};
    s.threads = 2;
    const rule_stream_answers first = run_rule<double>(n, s);
    for (int i = 1; i < 34 && !testing::Test::HasFailure(); ++i) EXPECT_TRUE(same_bits(run_rule<double>(n, s), first)) << i;
  }
}

}  // namespace
}  // namespace gdn_test
