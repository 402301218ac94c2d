// SPDX-License-Identifier: Apache-2.0
#include <plan/random_case.hpp>

#include <gtest/gtest.h>

#include <map>

namespace {

using namespace gdn_test;

template <class Law>
void for_random_plans(std::uint64_t n, Law law) {
  for (std::uint64_t i = 0; i < cases(n) && !testing::Test::HasFailure(); ++i) {
    random_source random(i);
    const plan_case c = any_case(random);
    for (const gdn::strategy strategy : strategies) {
      for (const gdn::share share : shares) {
        SCOPED_TRACE(testing::Message() << "case " << i << ": " << c << ", strategy " << static_cast<int>(strategy)
                                        << ", share " << static_cast<int>(share));
        law(c, c.plans({strategy, share, random.coin(), random.coin()}));
      }
    }
  }
}

TEST(cp_plan, EachComputeRowIsInExactlyOneSegment) {
  for_random_plans(600, [](const plan_case& c, const std::vector<gdn::cp_plan>& plans) {
    std::map<index_t, index_t> tokens_of_document;
    index_t rows = 0;
    for (const gdn::cp_plan& p : plans) {
      ASSERT_EQ(p.segments.size(), p.rule_segments.size());
      ASSERT_EQ(p.segments.size(), p.conv_segments.size());
      index_t next = 0, chunk = 0, longest = 0;
      for (std::size_t i = 0; i < p.segments.size(); ++i) {
        const gdn::segment& s = p.segments[i];
        EXPECT_EQ(s.begin, next);
        EXPECT_GT(s.count, 0);
        next += s.count;
        tokens_of_document[s.document] += s.count;
        EXPECT_EQ(p.rule_segments[i].begin, s.begin);
        EXPECT_EQ(p.rule_segments[i].count, s.count);
        EXPECT_EQ(p.conv_segments[i].begin, s.begin);
        EXPECT_EQ(p.conv_segments[i].count, s.count);
        EXPECT_EQ(p.rule_segments[i].chunk_begin, chunk);
        chunk += (s.count + p.shape.chunk - 1) / p.shape.chunk;
        longest = std::max(longest, s.count);
      }
      EXPECT_EQ(next, p.compute_rows);
      EXPECT_EQ(chunk, p.chunks);
      EXPECT_EQ(longest, p.longest_segment);
      rows += next;
    }
    EXPECT_EQ(rows, c.pack.tokens());
    for (index_t n = 0; n < c.pack.documents(); ++n) {
      const auto at = static_cast<std::size_t>(n);
      EXPECT_EQ(tokens_of_document[n], c.pack.cu_seqlens[at + 1] - c.pack.cu_seqlens[at]);
    }
  });
}

TEST(cp_plan, PiecesOfADocumentAreNumberedThroughAllRanks) {
  for_random_plans(300, [](const plan_case&, const std::vector<gdn::cp_plan>& plans) {
    std::map<index_t, std::map<index_t, int>> pieces;  // document -> position -> rank
    std::map<index_t, index_t> announced;
    for (const gdn::cp_plan& p : plans) {
      for (const gdn::segment& s : p.segments) {
        EXPECT_TRUE(pieces[s.document].emplace(s.position, p.rank).second);
        EXPECT_TRUE(announced.emplace(s.document, s.pieces).second || announced[s.document] == s.pieces);
      }
    }
    for (const auto& [document, positions] : pieces) {
      EXPECT_EQ(static_cast<index_t>(positions.size()), announced[document]);
      EXPECT_EQ(positions.rbegin()->first + 1, announced[document]);
      EXPECT_EQ(positions.begin()->second, plans[0].first_rank(document));
      EXPECT_EQ(positions.rbegin()->second, plans[0].last_rank(document));
    }
  });
}

TEST(cp_plan, EachDocumentEntersAndLeavesOnOneRank) {
  for_random_plans(300, [](const plan_case& c, const std::vector<gdn::cp_plan>& plans) {
    std::vector<index_t> enters, leaves;
    for (const gdn::cp_plan& p : plans) {
      EXPECT_TRUE(std::is_sorted(p.entering.begin(), p.entering.end()));
      EXPECT_TRUE(std::is_sorted(p.leaving.begin(), p.leaving.end()));
      for (const index_t n : p.entering) EXPECT_EQ(p.first_rank(n), p.rank);
      for (const index_t n : p.leaving) EXPECT_EQ(p.last_rank(n), p.rank);
      enters.insert(enters.end(), p.entering.begin(), p.entering.end());
      leaves.insert(leaves.end(), p.leaving.begin(), p.leaving.end());
    }
    std::sort(enters.begin(), enters.end());
    std::sort(leaves.begin(), leaves.end());
    EXPECT_EQ(static_cast<index_t>(enters.size()), c.pack.documents());
    EXPECT_TRUE(std::adjacent_find(enters.begin(), enters.end()) == enters.end());
    EXPECT_EQ(enters, leaves);
  });
}

/// What `list` holds for each peer.
std::map<int, index_t> rows_by_peer(const std::vector<gdn::run>& list) {
  std::map<int, index_t> out;
  for (const gdn::run& r : list) out[r.peer] += r.count;
  return out;
}

/// For every pair of ranks: what one sends is what the other receives.
template <class PlanOf>
void expect_matched(const std::vector<gdn::cp_plan>& plans, const char* name, PlanOf plan_of) {
  for (std::size_t r = 0; r < plans.size(); ++r) {
    for (std::size_t q = 0; q < plans.size(); ++q) {
      const index_t sent = rows_by_peer(plan_of(plans[r]).sends)[static_cast<int>(q)];
      const index_t received = rows_by_peer(plan_of(plans[q]).recvs)[static_cast<int>(r)];
      EXPECT_EQ(sent, received) << name << ", from rank " << r << " to rank " << q;
    }
  }
}

TEST(cp_plan, WhatRanksSendIsWhatTheirPeersReceive) {
  for_random_plans(300, [](const plan_case&, const std::vector<gdn::cp_plan>& plans) {
    expect_matched(plans, "undo", [](const gdn::cp_plan& p) { return p.undo; });
    expect_matched(plans, "redo", [](const gdn::cp_plan& p) { return p.redo; });
    expect_matched(plans, "halo", [](const gdn::cp_plan& p) { return p.halo.exchange; });
    std::size_t rounds = 0;
    for (const gdn::cp_plan& p : plans) {
      rounds = std::max({rounds, p.chain.rounds.size(), p.reverse_chain.rounds.size()});
    }
    for (std::size_t k = 0; k < rounds; ++k) {
      for (const auto chain : {&gdn::cp_plan::chain, &gdn::cp_plan::reverse_chain}) {
        expect_matched(plans, "chain", [&](const gdn::cp_plan& p) {
          const auto& all = (p.*chain).rounds;
          return k < all.size() ? all[k].exchange : gdn::exchange_plan{};
        });
      }
    }
  });
}

TEST(cp_plan, EachCallersRowIsATokenOrPadding) {
  for_random_plans(300, [](const plan_case&, const std::vector<gdn::cp_plan>& plans) {
    for (const gdn::cp_plan& p : plans) {
      std::vector<int> times(static_cast<std::size_t>(p.caller_rows));
      for (const auto* list : {&p.undo.sends, &p.padding}) {
        for (const gdn::run& r : *list) {
          for (index_t i = 0; i < r.count; ++i) ++times.at(static_cast<std::size_t>(r.local + i));
        }
      }
      EXPECT_EQ(std::count(times.begin(), times.end(), 1), p.caller_rows);
    }
  });
}

TEST(cp_plan, ReshardingKeepsEachRanksNumberOfTokens) {
  for_random_plans(200, [](const plan_case&, const std::vector<gdn::cp_plan>& plans) {
    for (const gdn::cp_plan& p : plans) {
      index_t held = p.caller_rows;
      for (const gdn::run& r : p.padding) held -= r.count;
      EXPECT_EQ(p.compute_rows, held);
      EXPECT_FALSE(gdn::validate_fragments(p.table, p.tokens, p.world));
    }
  });
}

TEST(cp_plan, InPlaceMovesNoActivationBetweenRanks) {
  for_random_plans(200, [](const plan_case&, const std::vector<gdn::cp_plan>& plans) {
    for (const gdn::cp_plan& p : plans) {
      if (p.strategy == gdn::strategy::in_place) {
        EXPECT_EQ(p.forward_traffic(1, 1, 1).activations, 0);
        EXPECT_EQ(p.backward_traffic(1, 1, 1).activations, 0);
      }
    }
  });
}

TEST(cp_plan, AllRanksAgreeOnTheDigestAndTheTable) {
  for_random_plans(200, [](const plan_case&, const std::vector<gdn::cp_plan>& plans) {
    for (const gdn::cp_plan& p : plans) {
      EXPECT_EQ(p.digest(), plans[0].digest());
      EXPECT_EQ(p.table, plans[0].table);
      EXPECT_EQ(p.strategy, plans[0].strategy);
    }
  });
}

}  // namespace
