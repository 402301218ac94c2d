// SPDX-License-Identifier: Apache-2.0
// Plans of batches that other implementations test: FLA's CP context, Cornstarch's run tables, attention-gym's
// fragments, and short ranks that none of them takes.
#include <plan/random_case.hpp>
#include <plan/simulator.hpp>

#include <gtest/gtest.h>

namespace {

using namespace gdn_test;
using cu = std::vector<index_t>;
using where = std::vector<std::vector<index_t>>;  // a segment as {begin, count, document, position, pieces}

where segments_of(const gdn::cp_plan& p) {
  where out;
  for (const gdn::segment& s : p.segments) out.push_back({s.begin, s.count, s.document, s.position, s.pieces});
  return out;
}

std::vector<gdn::cp_plan> plans_of(const gdn::sequence_layout auto& layout, const gdn::packing& pack,
                                   gdn::plan_options options = {gdn::strategy::in_place}, index_t width = 4) {
  gdn::plan_shape shape;
  shape.conv_width = width;
  std::vector<gdn::cp_plan> out;
  for (int r = 0; r < layout.world_size(); ++r) {
    out.push_back(gdn::plan_context_parallel(layout, pack, shape, 1, options, r));
  }
  return out;
}

gdn::packing documents(const cu& lengths, index_t rows) {
  return gdn::packing::from_cu_seqlens(lengths, {}, 1, rows);
}

TEST(fla_context, NeighboursOfTheMiddleRank) {  // cu [0, 5, 12] on 3 ranks of 4 rows
  const auto plans = plans_of(gdn::contiguous_layout{12, 3}, documents({0, 5, 12}, 12));
  const gdn::cp_plan& p = plans[1];
  // FLA's local cu_seqlens are [0, 1, 4]; the first continues from rank 0, the last goes on on rank 2.
  EXPECT_EQ(segments_of(p), (where{{0, 1, 0, 1, 2}, {1, 3, 1, 0, 2}}));
  // Of the 4 tokens before it (FLA's pre_num_conv_tokens), the last W - 1 = 3 are read.
  EXPECT_EQ(p.halo.exchange.recvs, (std::vector<gdn::run>{{0, 0, 3, 0}}));
  EXPECT_EQ(plans[0].halo.exchange.sends, (std::vector<gdn::run>{{1, 1, 3, 0}}));
  EXPECT_EQ(p.halo.exchange.sends, (std::vector<gdn::run>{{2, 1, 3, 0}}));
  EXPECT_EQ(p.halo.halo_of, (std::vector<index_t>{0, -1}));
  // One rank before (pre_num_ranks) and one behind (post_num_ranks).
  ASSERT_EQ(p.chain.rounds.size(), 1U);
  EXPECT_EQ(p.chain.rounds[0].exchange.recvs.size(), 1U);
  EXPECT_EQ(p.chain.rounds[0].exchange.recvs[0].peer, 0);
  EXPECT_EQ(p.chain.rounds[0].exchange.sends.size(), 1U);
  EXPECT_EQ(p.chain.rounds[0].exchange.sends[0].peer, 2);
  EXPECT_EQ(p.conv_segments[0].halo, 0);
  EXPECT_EQ(p.conv_segments[1].halo, -1);
}

TEST(fla_context, WorksWhereRanksDoNotDivideTheTokens) {  // FLA rejects these
  for (const auto& [rows, world] : {std::pair<index_t, int>{10, 3}, {14, 4}, {2, 3}}) {
    const auto plans = plans_of(gdn::contiguous_layout{rows, world}, gdn::packing::rows_of(1, rows));
    index_t held = 0;
    for (const gdn::cp_plan& p : plans) held += p.compute_rows;
    EXPECT_EQ(held, rows);
    EXPECT_EQ(plans.back().compute_rows, rows == 2 ? 0 : 3);
  }
}

TEST(fla_context, DocumentsThatEndBetweenRanksDoNotCross) {  // FLA's conv cases with 513 511, 514 510, 512 1 511
  const auto crossing = [](const cu& lengths) {
    return plans_of(gdn::contiguous_layout{1024, 2}, documents(lengths, 1024))[1].halo.exchange.rows_received(1);
  };
  EXPECT_EQ(crossing({0, 512, 1024}), 0);
  EXPECT_EQ(crossing({0, 512, 513, 1024}), 0);
  EXPECT_EQ(crossing({0, 511, 1024}), 1);  // one row of the second document is on rank 0
  EXPECT_EQ(crossing({0, 510, 1024}), 2);
  EXPECT_EQ(crossing({0, 513, 1024}), 3);
  EXPECT_EQ(crossing({0, 200, 513, 1024}), 3);
}

TEST(cornstarch_runs, HeadAndTailOfOneDocument) {  // offsets [0 1 6 7 | 2 3 4 5], full mask
  const auto plans = plans_of(gdn::zigzag_layout{8, 2}, gdn::packing::rows_of(1, 8));
  EXPECT_EQ(segments_of(plans[0]), (where{{0, 2, 0, 0, 3}, {2, 2, 0, 2, 3}}));
  EXPECT_EQ(segments_of(plans[1]), (where{{0, 4, 0, 1, 3}}));
  EXPECT_EQ(plans[0].first_rank(0), 0);
  EXPECT_EQ(plans[0].last_rank(0), 0);
}

TEST(cornstarch_runs, DocumentsAndPadding) {  // documents [0 0 0 0 1 1 1 -1]: runs [0,2), [2,4) < 0, [4,6), [6,7) < 2
  const auto pack = gdn::packing::from_mask(cu{1, 1, 1, 1, 2, 2, 2, 0}, 1, 8);
  const auto plans = plans_of(gdn::zigzag_layout{8, 2}, pack);
  EXPECT_EQ(segments_of(plans[0]), (where{{0, 2, 0, 0, 2}, {2, 1, 1, 1, 2}}));
  EXPECT_EQ(segments_of(plans[1]), (where{{0, 2, 0, 1, 2}, {2, 2, 1, 0, 2}}));
  EXPECT_EQ(plans[0].padding, (std::vector<gdn::run>{{0, 3, 1, 0}}));
  EXPECT_TRUE(plans[1].padding.empty());
  EXPECT_EQ(plans[0].caller_rows, 4);
  EXPECT_EQ(plans[0].compute_rows, 3);
}

TEST(cornstarch_runs, AnEmptyLaneIsAllPaddingAndTakesNoPart) {  // documents [0 0 -1 -1 -1 -1 -1 -1]
  const auto pack = gdn::packing::from_mask(cu{1, 1, 0, 0, 0, 0, 0, 0}, 1, 8);
  for (const gdn::strategy strategy : strategies) {
    const auto plans = plans_of(gdn::zigzag_layout{8, 2}, pack, {strategy, gdn::share::all_gather, true, true});
    const gdn::cp_plan& empty = plans[1];
    EXPECT_EQ(empty.compute_rows, 0);
    EXPECT_TRUE(empty.segments.empty() && empty.entering.empty() && empty.leaving.empty());
    EXPECT_EQ(empty.padding, (std::vector<gdn::run>{{1, 0, 4, 0}}));
    EXPECT_TRUE(empty.undo.empty() && empty.redo.empty() && empty.halo.exchange.empty());
    EXPECT_TRUE(empty.chain.rounds.empty() && empty.reverse_chain.rounds.empty());
    for (const gdn::cp_plan& p : plans) EXPECT_EQ(p.forward_traffic(1, 1, 1).total(), 0);
  }
}

TEST(cornstarch_runs, PrefixResetsAtDocuments) {  // transitions 2, extensions 1 .. 4, documents 0 0 1 1: 0 1 0 3
  const auto plans = plans_of(gdn::contiguous_layout{4, 4}, documents({0, 2, 4}, 4));
  std::vector<numbers> buffers;
  for (const gdn::cp_plan& p : plans) {
    numbers buffer(static_cast<std::size_t>(p.chain.elements));
    for (const auto& s : p.chain.published) at(buffer, s.bias) = number(static_cast<std::uint64_t>(p.rank + 1));
    buffers.push_back(buffer);
  }
  const auto sources = buffers;
  exchange(
      4, [&](int r) { return &plans[static_cast<std::size_t>(r)].chain.rounds.at(0).exchange; }, sources, buffers);
  std::vector<std::uint64_t> states;
  for (std::size_t r = 0; r < 4; ++r) {
    const gdn::chain_plan& chain = plans[r].chain;
    states.push_back(chain.folds.empty() ? 0 : at(buffers[r], chain.links[0].bias).value());
    EXPECT_LE(chain.links.size(), 1U);  // nothing folds more than the one piece before it: no transition is needed
    EXPECT_EQ(chain.published.size(), chain.folds.empty() ? 1U : 0U);
  }
  EXPECT_EQ(states, (std::vector<std::uint64_t>{0, 1, 0, 3}));
}

TEST(attention_gym, FragmentsOfThreeDocuments) {  // cu [0, 40, 232, 384], head and tail
  const std::vector<std::vector<std::pair<index_t, index_t>>> fragments = {{{0, 96}, {288, 384}},
                                                                           {{96, 192}, {192, 288}}};
  const auto plans = plans_of(gdn::from_ranges(fragments), documents({0, 40, 232, 384}, 384));
  EXPECT_EQ(segments_of(plans[0]), (where{{0, 40, 0, 0, 1}, {40, 56, 1, 0, 2}, {96, 96, 2, 1, 2}}));
  EXPECT_EQ(segments_of(plans[1]), (where{{0, 136, 1, 1, 2}, {136, 56, 2, 0, 2}}));
  const std::vector<gdn::published_summary> published = {{.segment = 1, .bias = 0}};  // document 1 starts on rank 0
  EXPECT_EQ(plans[0].chain.published, published);
  EXPECT_EQ(plans[1].chain.published, published);  // and document 2 on rank 1
  EXPECT_EQ(plans[0].longest_segment, 96);
  EXPECT_EQ(plans[0].chunks, 1 + 1 + 2);
}

TEST(short_ranks, HistoryComesFromAsManyRanksAsItTakes) {  // L = 1, W = 4: public ones mask or break (fla#774)
  const auto plans = plans_of(gdn::contiguous_layout{5, 5}, gdn::packing::rows_of(1, 5));
  EXPECT_EQ(plans[4].halo.exchange.recvs, (std::vector<gdn::run>{{1, 0, 1, 0}, {2, 1, 1, 0}, {3, 2, 1, 0}}));
  EXPECT_EQ(plans[1].halo.exchange.recvs, (std::vector<gdn::run>{{0, 2, 1, 0}}));  // two rows of zeros before it
  EXPECT_EQ(plans[0].halo.exchange.sends, (std::vector<gdn::run>{{1, 0, 1, 0}, {2, 0, 1, 0}, {3, 0, 1, 0}}));
}

TEST(short_ranks, InitialConvStatesPassOverShortPieces) {  // the state enters at rank 0, and reaches rank 2
  const auto plans = plans_of(gdn::contiguous_layout{3, 3}, gdn::packing::rows_of(1, 3),
                              {gdn::strategy::in_place, gdn::share::all_gather, true, true});
  EXPECT_EQ(plans[0].halo.state_rows, 4);
  // Source rows of rank 0: its token, then 4 rows of state; rank 2 reads the last of these and tokens 0, 1.
  EXPECT_EQ(plans[2].halo.halo_rows, 3);
  EXPECT_EQ(plans[2].halo.tail_rows, 4);
  EXPECT_EQ(plans[2].halo.exchange.rows_received(2), 3 + 3);  // history, and the final state but for its own token
  EXPECT_EQ(plans[1].halo.tail_rows, 0);
}

TEST(short_ranks, PlansOfEachWidthAndRankCountEqualTheWholeStream) {
  for (int world = 1; world <= 7; ++world) {
    for (index_t rows = 0; rows <= 3 * world; ++rows) {
      for (index_t width = 1; width <= 5; ++width) {
        const auto pack = gdn::packing::rows_of(2, rows);
        const auto plans = plans_of(gdn::contiguous_layout{rows, world}, pack,
                                    {gdn::strategy::in_place, gdn::share::relay, true, true}, width);
        const layer_inputs in = inputs_for(plans[0], 1);
        const auto table = gdn::batch_table(gdn::contiguous_layout{rows, world}.fragments(), rows, world, 2);
        EXPECT_TRUE(simulator(plans, pack, in).run(table) == sequential(in, pack.cu_seqlens));
      }
    }
  }
}

TEST(empty_documents, EnterAndLeaveWhereTheirNextTokenWouldLie) {
  const auto plans = plans_of(gdn::contiguous_layout{6, 3}, documents({0, 0, 2, 2, 5, 5, 6, 6}, 6));
  const std::vector<int> ranks = {0, 0, 1, 1, 2, 2, 2};  // and behind the last token, with that
  for (index_t n = 0; n < 7; ++n) {
    EXPECT_EQ(plans[0].first_rank(n), ranks[static_cast<std::size_t>(n)]) << n;
    EXPECT_EQ(plans[0].last_rank(n), n == 3 ? 2 : ranks[static_cast<std::size_t>(n)]) << n;
  }
  EXPECT_EQ(plans[1].empty_documents, (std::vector<gdn::run>{{1, 0, 1, 0}}));
  EXPECT_EQ(plans[2].entering, (std::vector<index_t>{4, 5, 6}));
  EXPECT_EQ(plans[2].leaving, (std::vector<index_t>{3, 4, 5, 6}));
  EXPECT_EQ(plans[2].empty_documents, (std::vector<gdn::run>{{2, 0, 1, 1}, {2, 2, 1, 3}}));
}

TEST(single_rank, ExchangesNothingAtAll) {
  for (const gdn::strategy strategy : strategies) {
    const auto pack = gdn::packing::from_mask(cu{0, 1, 1, 2, 0, 3}, 1, 6);
    const auto plans = plans_of(gdn::contiguous_layout{6, 1}, pack, {strategy, gdn::share::relay, false, false});
    EXPECT_TRUE(plans[0].halo.exchange.empty());
    EXPECT_TRUE(plans[0].chain.rounds.empty());
    EXPECT_FALSE(plans[0].undo_is_identity());  // padding is left out
    const auto full = plans_of(gdn::contiguous_layout{6, 1}, gdn::packing::rows_of(1, 6), {strategy});
    EXPECT_TRUE(full[0].undo_is_identity());
  }
}

}  // namespace
