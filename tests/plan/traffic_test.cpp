// SPDX-License-Identifier: Apache-2.0
// How much the plans move: nothing that nobody reads.
#include <plan/random_case.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <support/errors.hpp>

namespace {

using namespace gdn_test;
using testing::HasSubstr;
using testing::Not;

gdn::plan_shape shape_of(index_t heads, index_t k, index_t v) {
  gdn::plan_shape shape;
  shape.summary = {heads, k, v};
  return shape;
}

std::vector<gdn::cp_plan> plans_of(const gdn::sequence_layout auto& layout, const gdn::packing& pack,
                                   const gdn::plan_options& options, const gdn::plan_shape& shape = {}) {
  std::vector<gdn::cp_plan> out;
  for (int r = 0; r < layout.world_size(); ++r) {
    out.push_back(gdn::plan_context_parallel(layout, pack, shape, 10, options, r));
  }
  return out;
}

TEST(traffic, DocumentsWithinRanksSendNothing) {
  const auto pack = gdn::packing::from_cu_seqlens(std::vector<index_t>{0, 1, 4, 8, 8, 11, 12, 16}, {}, 1, 16);
  for (const gdn::strategy strategy : strategies) {
    for (const gdn::share share : shares) {
      for (const bool states : {false, true}) {
        for (const gdn::cp_plan& p : plans_of(gdn::contiguous_layout{16, 4}, pack, {strategy, share, states, states})) {
          EXPECT_EQ(p.forward_traffic(1, 1, 1), gdn::traffic{});
          EXPECT_EQ(p.backward_traffic(1, 1, 1), gdn::traffic{});
          EXPECT_TRUE(p.chain.published.empty() && p.chain.rounds.empty() && p.chain.folds.empty());
          EXPECT_TRUE(p.reverse_chain.published.empty() && p.reverse_chain.rounds.empty());
          for (const gdn::run& r : p.halo.exchange.sends) EXPECT_EQ(r.peer, p.rank);  // to its own conv states only
        }
      }
    }
  }
}

TEST(traffic, DocumentsDealtOutToRanksSendNothingInPlace) {
  const std::vector<std::vector<std::pair<index_t, index_t>>> of_rank = {{{8, 12}, {0, 4}}, {}, {{12, 16}, {4, 8}}};
  const auto pack = gdn::packing::from_cu_seqlens(std::vector<index_t>{0, 4, 8, 12, 16}, {}, 1, 16);
  for (const gdn::cp_plan& p : plans_of(gdn::from_ranges(of_rank), pack, {gdn::strategy::in_place})) {
    EXPECT_EQ(p.forward_traffic(1, 1, 1).total(), 0);
    EXPECT_EQ(p.backward_traffic(1, 1, 1).total(), 0);
  }
}

TEST(traffic, ContiguousRanksMoveNoActivations) {
  for (const gdn::strategy strategy : strategies) {
    for (const gdn::cp_plan& p : plans_of(gdn::contiguous_layout{32, 4}, gdn::packing::rows_of(1, 32), {strategy})) {
      EXPECT_TRUE(p.undo_is_identity());
      EXPECT_EQ(p.forward_traffic(5, 2, 4).activations, 0);
      EXPECT_EQ(p.forward_traffic(5, 2, 4).halo, p.rank == 0 ? 0 : 3 * 10 * 2);
    }
  }
}

TEST(traffic, ZigzagReshardsAtMostTwiceTheLocalRows) {
  for (int world = 1; world <= 8; ++world) {
    const index_t rows = 6 * world;
    for (const gdn::cp_plan& p :
         plans_of(gdn::zigzag_layout{rows, world}, gdn::packing::rows_of(1, rows), {gdn::strategy::reshard})) {
      EXPECT_LE(p.forward_traffic(1, 1, 1).activations, 2 * p.compute_rows);
    }
  }
}

TEST(traffic, ZigzagInPlaceMovesNoActivationsButMoreSummaries) {
  const gdn::zigzag_layout layout{64, 4};
  const auto pack = gdn::packing::rows_of(1, 64);
  const auto here = plans_of(layout, pack, {gdn::strategy::in_place});
  const auto there = plans_of(layout, pack, {gdn::strategy::reshard});
  index_t state_here = 0, state_there = 0;
  for (std::size_t r = 0; r < 4; ++r) {
    EXPECT_EQ(here[r].forward_traffic(1, 1, 1).activations, 0);
    EXPECT_GT(there[r].forward_traffic(1, 1, 1).activations, 0);
    state_here += here[r].forward_traffic(1, 1, 1).state;
    state_there += there[r].forward_traffic(1, 1, 1).state;
  }
  EXPECT_GT(state_here, state_there);
}

TEST(state_chain, OnlyWhatCrossesIsPublished) {
  const gdn::summary_shape s{2, 3, 5};
  for (const gdn::share share : shares) {
    const auto plans = plans_of(gdn::contiguous_layout{9, 3}, gdn::packing::rows_of(1, 9),
                                {gdn::strategy::in_place, share}, shape_of(2, 3, 5));
    for (const bool reverse : {false, true}) {
      const auto chain = [&](std::size_t r) { return reverse ? plans[2 - r].reverse_chain : plans[r].chain; };
      ASSERT_EQ(chain(0).published.size(), 1U);  // the first: its state, and no transition
      EXPECT_EQ(chain(0).published[0].transition, -1);
      EXPECT_EQ(chain(0).published_elements, s.bias());
      EXPECT_TRUE(chain(0).folds.empty());
      ASSERT_EQ(chain(1).published.size(), 1U);  // one between: both
      EXPECT_EQ(chain(1).published[0].transition, s.bias());
      EXPECT_EQ(chain(1).published_elements, s.bias() + s.transition());
      EXPECT_TRUE(chain(2).published.empty());  // the last: nothing
      EXPECT_EQ(chain(2).folds.size(), 1U);
    }
    EXPECT_EQ(plans[1].reverse_chain.published[0].own_transition, plans[1].chain.published[0].transition);
    EXPECT_EQ(plans[2].reverse_chain.published[0].own_transition, -1);
  }
}

/// Elements that all ranks together receive for one document over `world` ranks.
index_t elements(int world, gdn::share share, const gdn::plan_shape& shape, bool reverse = false) {
  index_t sum = 0;
  for (const gdn::cp_plan& p : plans_of(gdn::contiguous_layout{4 * world, world}, gdn::packing::rows_of(1, 4 * world),
                                        {gdn::strategy::in_place, share}, shape)) {
    sum += (reverse ? p.reverse_chain : p.chain).elements_received(p.rank);
  }
  return sum;
}

TEST(state_chain, RelayMovesLessThanPrefixScanLessThanAllGather) {
  for (const auto& shape : {shape_of(1, 1, 1), shape_of(32, 128, 128), shape_of(2, 3, 64)}) {
    for (int world = 5; world <= 16; ++world) {  // with 4 ranks the last two are equal
      const index_t relay = elements(world, gdn::share::relay, shape);
      const index_t scan = elements(world, gdn::share::prefix_scan, shape);
      const index_t gather = elements(world, gdn::share::all_gather, shape);
      EXPECT_LT(relay, scan) << world;
      EXPECT_LT(scan, gather) << world;
    }
  }
}

TEST(state_chain, EightRanksMoveWhatTheAlgebraSays) {
  const gdn::plan_shape shape = shape_of(1, 2, 3);
  const index_t e = 6, m = 4;
  for (const bool reverse : {false, true}) {
    EXPECT_EQ(elements(8, gdn::share::relay, shape, reverse), 7 * e);
    EXPECT_EQ(elements(8, gdn::share::all_gather, shape, reverse), 28 * e + 21 * m);  // rank p folds 0 .. p - 1
    // Rounds of reach 0, 1, 2, 4: a piece with reach p is complete, and has no transition.
    EXPECT_EQ(elements(8, gdn::share::prefix_scan, shape, reverse), (7 + 6 + 5 + 3) * e + (6 + 5 + 3 + 0) * m);
  }
}

TEST(state_chain, NumberOfRoundsIsOneLogarithmicOrLinear) {
  for (int world = 2; world <= 17; ++world) {
    const auto rounds = [&](gdn::share share) {
      std::size_t most = 0;
      for (const auto& p : plans_of(gdn::contiguous_layout{world, world}, gdn::packing::rows_of(1, world),
                                    {gdn::strategy::in_place, share})) {
        most = std::max(most, p.chain.rounds.size());
      }
      return static_cast<int>(most);
    };
    int log2 = 0;
    while ((1 << log2) < world - 1) ++log2;
    EXPECT_EQ(rounds(gdn::share::all_gather), 1);
    EXPECT_EQ(rounds(gdn::share::prefix_scan), 1 + log2);
    EXPECT_EQ(rounds(gdn::share::relay), world - 1);
  }
}

TEST(state_chain, PrefixScanMemoryDoesNotGrowWithTheNumberOfRanks) {
  const auto most = [](int world, gdn::share share) {
    index_t out = 0;
    for (const auto& p : plans_of(gdn::contiguous_layout{world, world}, gdn::packing::rows_of(1, world),
                                  {gdn::strategy::in_place, share}, shape_of(1, 4, 4))) {
      out = std::max(out, p.chain.elements);
    }
    return out;
  };
  EXPECT_EQ(most(32, gdn::share::prefix_scan), most(5, gdn::share::prefix_scan));
  EXPECT_EQ(most(32, gdn::share::relay), most(5, gdn::share::relay));
  EXPECT_GT(most(32, gdn::share::all_gather), most(5, gdn::share::all_gather));
}

TEST(state_chain, AllRowsOfABatchShareOneMessage) {
  const auto one = plans_of(gdn::contiguous_layout{8, 2}, gdn::packing::rows_of(1, 8), {gdn::strategy::in_place});
  const auto five = plans_of(gdn::contiguous_layout{8, 2}, gdn::packing::rows_of(5, 8), {gdn::strategy::in_place});
  ASSERT_EQ(five[1].chain.rounds.size(), 1U);
  EXPECT_EQ(five[1].chain.rounds[0].exchange.recvs.size(), one[1].chain.rounds[0].exchange.recvs.size());
  EXPECT_EQ(five[1].chain.elements_received(1), 5 * one[1].chain.elements_received(1));
}

/// Ranks in turn hold `rows` rows each.
gdn::explicit_layout dealt(index_t rows, int world, index_t total) {
  std::vector<std::vector<std::pair<index_t, index_t>>> of_rank(static_cast<std::size_t>(world));
  for (index_t at = 0; at < total; at += rows) {
    of_rank[static_cast<std::size_t>(at / rows % world)].emplace_back(at, std::min(total, at + rows));
  }
  return gdn::from_ranges(of_rank);
}

TEST(strategy, AtMostTwoPiecesOfADocumentPerRankStayInPlaceWhateverTheSizes) {
  const auto shape = shape_of(32, 128, 128);  // hid 0: moving rows would cost nothing
  const auto one = gdn::packing::rows_of(1, 64);
  const auto three = gdn::packing::from_cu_seqlens(std::vector<index_t>{0, 16, 48, 64}, {}, 1, 64);
  const auto stays = [&](const gdn::sequence_layout auto& layout, const gdn::packing& pack) {
    for (const gdn::share share : shares) {
      for (const gdn::cp_plan& p : plans_of(layout, pack, {gdn::strategy::in_place, share}, shape)) {
        EXPECT_EQ(p.strategy, gdn::strategy::in_place);
        EXPECT_EQ(p.forward_traffic(1, 1, 1).activations + p.backward_traffic(1, 1, 1).activations, 0);
        EXPECT_THAT(p.describe(), Not(HasSubstr("not in-place")));
      }
    }
  };
  for (const gdn::packing& pack : {one, three}) {
    stays(gdn::contiguous_layout{64, 4}, pack);
    stays(gdn::zigzag_layout{64, 4}, pack);
    stays(gdn::per_document_zigzag(pack.document_rows(), 64, 4), pack);
  }
  // Interleaved, too, where documents are short.
  stays(gdn::interleaved_layout{24, 4},
        gdn::packing::from_cu_seqlens(std::vector<index_t>{0, 8, 16, 24}, {}, 1, 24));
}

TEST(strategy, ManyPiecesAreReshardedWhereThatMovesLessAndDescribeSaysSo) {
  const auto strategy_of = [](const gdn::sequence_layout auto& layout, gdn::plan_shape shape, index_t hidden) {
    shape.hidden = hidden;
    const auto pack = gdn::packing::rows_of(1, layout.size());
    const auto plans = plans_of(layout, pack, {gdn::strategy::in_place}, shape);
    for (const gdn::cp_plan& p : plans) {
      EXPECT_EQ(p.strategy, plans[0].strategy);
      EXPECT_EQ(p.describe().find("strategy reshard, not in-place: summaries of so many pieces would be more than the "
                                  "rows") != std::string::npos,
                p.strategy == gdn::strategy::reshard);
    }
    return plans[0].strategy;
  };
  const auto wide = shape_of(32, 128, 128), narrow = shape_of(1, 2, 2);
  for (const index_t rows : {1, 2, 16}) {
    EXPECT_EQ(strategy_of(dealt(rows, 8, 512), wide, 2048), gdn::strategy::reshard) << rows;
    EXPECT_EQ(strategy_of(dealt(rows, 8, 512), narrow, 2048), gdn::strategy::in_place) << rows;
  }
  // Three pieces of 4,096 rows on each of eight ranks: rows of 2,048 elements cost more than 23 states.
  EXPECT_EQ(strategy_of(dealt(4096, 8, 3 * 8 * 4096), shape_of(8, 64, 64), 2048), gdn::strategy::in_place);
}

TEST(strategy, InPlaceNeverMovesMoreThanReshardingByMuch) {
  // Elements that all ranks receive; a prediction may count messages to oneself, and rows of history in full.
  for (std::uint64_t n = 0; n < cases(300) && !HasFailure(); ++n) {
    random_source random(n);
    plan_case c = any_case(random);
    c.shape.hidden = random.between(1, 40);
    const gdn::share share = random.coin() ? gdn::share::all_gather : gdn::share::relay;
    SCOPED_TRACE(testing::Message() << "case " << n << ": " << c);
    const auto received = [&](gdn::strategy s) {
      index_t sum = 0;
      for (const gdn::cp_plan& p : c.plans({s, share})) {
        const gdn::traffic t = p.forward_traffic(c.shape.hidden, 1, 1);
        sum += t.activations + t.state;
      }
      return sum;
    };
    index_t most = 0;  // pieces of a document on one rank
    for (const gdn::cp_plan& p : c.plans({gdn::strategy::in_place, share})) {
      std::vector<index_t> pieces(static_cast<std::size_t>(p.documents()), 0);
      for (const gdn::segment& s : p.segments) {
        most = std::max(most, ++pieces[static_cast<std::size_t>(s.document)]);
      }
    }
    if (most > 2) {
      EXPECT_LE(received(gdn::strategy::in_place),
                received(gdn::strategy::reshard) + c.world * c.pack.documents() * 5 * 3);
    }
  }
}

TEST(strategy, WhatAChainIsPredictedToMoveIsWhatItMoves) {
  for (std::uint64_t n = 0; n < cases(300) && !HasFailure(); ++n) {
    random_source random(n);
    plan_case c = any_case(random);
    c.shape.hidden = 1000;
    SCOPED_TRACE(testing::Message() << "case " << n << ": " << c);
    for (const gdn::share share : shares) {
      const auto plans = c.plans({gdn::strategy::in_place, share});
      double predicted = 0, received = 0;
      gdn::detail::chain_predictor chain(c.shape.summary, share, c.world);
      gdn::detail::for_each_chain(plans[0].table, plans[0].cu_seqlens,
                                  [&](std::span<const int> ranks) { predicted += chain.elements(ranks); });
      for (const gdn::cp_plan& p : plans) received += static_cast<double>(p.chain.elements_received(p.rank));
      if (share == gdn::share::prefix_scan) {
        EXPECT_GE(predicted, received);
      } else {
        EXPECT_EQ(predicted, received);
      }
    }
  }
}

TEST(describe, NamesWhatIsExchanged) {
  const auto plans = plans_of(gdn::zigzag_layout{16, 2}, gdn::packing::rows_of(1, 16),
                              {gdn::strategy::in_place, gdn::share::relay}, shape_of(1, 2, 3));
  EXPECT_EQ(plain(plans[1].describe()),
            "rank 1 of 2: 8 of 16 tokens in 1 segments of 1 documents\n"
            "strategy in-place, share relay\n"
            "receives 0 + 0 rows of activations, 3 rows of history, 6 + 6 elements of summaries in 2 rounds\n");
}

}  // namespace
