// SPDX-License-Identifier: Apache-2.0
#include <plan/random_case.hpp>

#include <gtest/gtest.h>

#include <map>

namespace {

using namespace gdn_test;

/// Messages of all ranks as lists of rows, in the order in which they are sent; checked against what is received.
/// Moves rows the way a transport would: by message and place in it.
std::vector<std::vector<index_t>> carry_out(const std::vector<gdn::exchange_plan>& plans,
                                            const std::vector<std::vector<index_t>>& from,
                                            const std::vector<std::size_t>& sizes) {
  std::map<std::pair<int, int>, std::vector<index_t>> messages;
  for (std::size_t r = 0; r < plans.size(); ++r) {
    for (const gdn::run& s : plans[r].sends) {
      auto& message = messages[{static_cast<int>(r), s.peer}];
      EXPECT_EQ(s.packed, static_cast<index_t>(message.size()));
      for (index_t i = 0; i < s.count; ++i) message.push_back(from[r].at(static_cast<std::size_t>(s.local + i)));
    }
  }
  std::vector<std::vector<index_t>> to;
  for (std::size_t r = 0; r < plans.size(); ++r) {
    to.emplace_back(sizes[r], -1);
    std::map<int, index_t> taken;
    for (const gdn::run& v : plans[r].recvs) {
      const auto& message = messages[{v.peer, static_cast<int>(r)}];
      EXPECT_EQ(v.packed, taken[v.peer]);
      taken[v.peer] += v.count;
      for (index_t i = 0; i < v.count; ++i) {
        index_t& row = to[r].at(static_cast<std::size_t>(v.local + i));
        EXPECT_EQ(row, -1) << "a row is written twice";
        row = message.at(static_cast<std::size_t>(v.packed + i));
      }
    }
    for (const auto& [peer, rows] : taken) {
      auto& message = messages[{peer, static_cast<int>(r)}];
      EXPECT_EQ(rows, static_cast<index_t>(message.size())) << "from " << peer << " to " << r;
      message.clear();
    }
  }
  for (const auto& [pair, message] : messages) EXPECT_TRUE(message.empty()) << pair.first << " to " << pair.second;
  return to;
}

struct two_layouts {
  gdn::explicit_layout a, b;
};
two_layouts any_two(random_source& random) {
  const int world = static_cast<int>(random.between(1, 8));
  const gdn::explicit_layout a = any_layout(random, random.between(0, 60), world).layout;
  gdn::explicit_layout b = random_ranges(random, a.rows, world);
  if (random.coin()) b = random_positions(random, a.rows, world);
  return {a, b};
}

std::vector<std::vector<index_t>> rows_of(const gdn::explicit_layout& layout) {
  std::vector<std::vector<index_t>> out;
  for (int r = 0; r < layout.world; ++r) out.push_back(gdn::positions(layout, r));
  return out;
}
std::vector<std::size_t> sizes_of(const std::vector<std::vector<index_t>>& rows) {
  std::vector<std::size_t> out;
  for (const auto& r : rows) out.push_back(r.size());
  return out;
}

TEST(exchange_plan, BringsEachRowToItsPlaceInTheOtherLayout) {
  for (std::uint64_t n = 0; n < cases(3000) && !HasFailure(); ++n) {
    random_source random(n);
    const auto [a, b] = any_two(random);
    SCOPED_TRACE(testing::Message() << "case " << n << ", GDN_SEED=" << seed());
    std::vector<gdn::exchange_plan> there, back;
    for (int r = 0; r < a.world; ++r) {
      there.push_back(gdn::plan_exchange(a.table, b.table, r));
      back.push_back(gdn::plan_exchange(b.table, a.table, r));
      EXPECT_EQ(back.back(), there.back().inverse());
    }
    const auto in_a = rows_of(a), in_b = rows_of(b);
    EXPECT_EQ(carry_out(there, in_a, sizes_of(in_b)), in_b);
    EXPECT_EQ(carry_out(back, carry_out(there, in_a, sizes_of(in_b)), sizes_of(in_a)), in_a);
  }
}

TEST(exchange_plan, UndoThenRedoIsIdentity) {
  for (std::uint64_t n = 0; n < cases(2000) && !HasFailure(); ++n) {
    random_source random(n);
    const auto layout = any_two(random).a;
    std::vector<gdn::exchange_plan> undo, redo;
    for (int r = 0; r < layout.world; ++r) {
      undo.push_back(gdn::undo_load_balancing(layout, r));
      redo.push_back(gdn::redo_load_balancing(layout, r));
    }
    const auto rows = rows_of(layout);
    const auto natural = carry_out(undo, rows, sizes_of(rows));
    index_t next = 0;
    for (const auto& of_rank : natural) {
      for (const index_t row : of_rank) EXPECT_EQ(row, next++);
    }
    EXPECT_EQ(carry_out(redo, natural, sizes_of(rows)), rows);
  }
}

TEST(exchange_plan, FromALayoutToItselfIsIdentity) {
  for (std::uint64_t n = 0; n < cases(500) && !HasFailure(); ++n) {
    random_source random(n);
    const auto layout = any_two(random).a;
    for (int r = 0; r < layout.world; ++r) {
      const auto plan = gdn::plan_exchange(layout.table, layout.table, r);
      EXPECT_EQ(plan.rows_received(r), 0);
      EXPECT_EQ(plan.sends, plan.recvs);
      for (const gdn::run& s : plan.sends) EXPECT_EQ(s.peer, r);
    }
    const gdn::contiguous_layout contiguous{layout.rows, layout.world};
    for (int r = 0; r < layout.world; ++r) {
      const auto table = contiguous.fragments();
      EXPECT_TRUE(gdn::plan_exchange(table, table, r).is_identity(r, gdn::local_rows(table, r)));
    }
  }
}

TEST(exchange_plan, IsNoIdentityWhereARowMovesWithinItsRank) {
  const gdn::fragment_table from = {{0, 2, 0, 0}, {2, 2, 0, 2}}, to = {{0, 2, 0, 2}, {2, 2, 0, 0}};
  const auto plan = gdn::plan_exchange(from, to, 0);
  EXPECT_FALSE(plan.is_identity(0, 4));
  EXPECT_EQ(plan.rows_received(0), 0);
  EXPECT_FALSE(gdn::exchange_plan{}.is_identity(0, 4));
  EXPECT_TRUE(gdn::exchange_plan{}.is_identity(0, 0));
}

TEST(exchange_plan, ZigzagUndoIsAtMostTwoMessagesEachWayAndEachIsOneRun) {
  for (int world = 2; world <= 8; ++world) {
    const index_t chunk = 3;
    const gdn::zigzag_layout layout{2 * world * chunk, world};
    for (int r = 0; r < world; ++r) {
      const auto plan = gdn::undo_load_balancing(layout, r);
      for (const bool sends : {true, false}) {
        const auto& list = sends ? plan.sends : plan.recvs;
        // With an odd number of ranks, chunks P - 1 and P go from the last rank to the middle one as one.
        const bool joined = world % 2 == 1 && r == (sends ? world - 1 : world / 2);
        ASSERT_EQ(list.size(), joined ? 1U : 2U);
        EXPECT_TRUE(joined || list[0].peer != list[1].peer);
        for (const gdn::run& m : list) EXPECT_EQ(m.count, joined ? 2 * chunk : chunk);
      }
    }
  }
}

TEST(exchange_plan, MessagesAreSortedByPeerAndNeighboursAreJoined) {
  for (std::uint64_t n = 0; n < cases(500) && !HasFailure(); ++n) {
    random_source random(n);
    const auto [a, b] = any_two(random);
    for (int r = 0; r < a.world; ++r) {
      const auto plan = gdn::plan_exchange(a.table, b.table, r);
      for (const auto& list : {plan.sends, plan.recvs}) {
        for (std::size_t i = 1; i < list.size(); ++i) {
          const gdn::run &x = list[i - 1], &y = list[i];
          EXPECT_LE(x.peer, y.peer);
          if (x.peer == y.peer) {
            EXPECT_EQ(y.packed, x.packed + x.count);
            EXPECT_NE(y.local, x.local + x.count);
          } else {
            EXPECT_EQ(y.packed, 0);
          }
        }
      }
    }
  }
}

TEST(exchange_plan, IsConstexpr) {
  constexpr auto peers = [](int rank) constexpr {
    const auto plan = gdn::undo_load_balancing(gdn::zigzag_layout{8, 2}, rank);
    return std::pair{plan.sends[1].peer, plan.rows_received(rank)};
  };
  static_assert(peers(0) == std::pair{1, gdn::index_t{2}});
}

}  // namespace
