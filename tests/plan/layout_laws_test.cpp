// SPDX-License-Identifier: Apache-2.0
#include <plan/random_case.hpp>

#include <gtest/gtest.h>

#include <set>

namespace {

using namespace gdn_test;

std::vector<random_layout> all_layouts(random_source& random) {
  std::vector<random_layout> out;
  const index_t rows = random.between(0, 60);
  const int world = static_cast<int>(random.between(1, 8));
  out.push_back({"contiguous", explicit_of(gdn::contiguous_layout{rows, world})});
  out.push_back({"zigzag", explicit_of(gdn::zigzag_layout{rows / (2 * world) * 2 * world, world})});
  out.push_back({"interleaved", explicit_of(gdn::interleaved_layout{rows, world})});
  out.push_back({"positions", random_positions(random, rows, world)});
  out.push_back({"ranges", random_ranges(random, rows, world)});
  out.push_back({"block-cyclic", block_cyclic(rows, random.between(1, 4), world)});
  const plan_case c = per_document_case(random, world);
  out.push_back({"per document", {c.rows, c.pack.rows(), c.world}});
  return out;
}

template <class Law>
void for_random_layouts(std::uint64_t n, Law law) {
  for (std::uint64_t i = 0; i < cases(n) && !testing::Test::HasFailure(); ++i) {
    random_source random(i);
    for (const auto& [name, layout] : all_layouts(random)) {
      SCOPED_TRACE(testing::Message() << "case " << i << ", GDN_SEED=" << seed() << ": " << name << ", " << layout.rows
                                      << " rows on " << layout.world << " ranks");
      law(layout, random);
    }
  }
}

TEST(layouts, TablesArePartitionsOfTheRows) {
  for_random_layouts(600, [](const gdn::explicit_layout& layout, random_source&) {
    const auto table = layout.fragments();
    EXPECT_FALSE(gdn::validate_fragments(table, layout.size(), layout.world_size()));
    std::vector<int> owners(static_cast<std::size_t>(layout.size()));
    index_t held = 0;
    for (int r = 0; r < layout.world_size(); ++r) {
      const auto mine = gdn::positions(layout, r);
      EXPECT_EQ(static_cast<index_t>(mine.size()), gdn::local_rows(table, r));
      held += gdn::local_rows(table, r);
      for (const index_t p : mine) ++owners.at(static_cast<std::size_t>(p));
    }
    EXPECT_EQ(held, layout.size());
    EXPECT_EQ(std::count(owners.begin(), owners.end(), 1), layout.size());
  });
}

TEST(layouts, PositionsOfAllRanksRebuildTheTable) {
  for_random_layouts(300, [](const gdn::explicit_layout& layout, random_source&) {
    std::vector<std::vector<index_t>> of_rank;
    for (int r = 0; r < layout.world_size(); ++r) of_rank.push_back(gdn::positions(layout, r));
    const gdn::explicit_layout again = gdn::from_positions(of_rank);
    EXPECT_EQ(again.fragments(), gdn::merge_neighbours(layout.fragments()));
    EXPECT_EQ(again.size(), layout.size());
    EXPECT_EQ(again.world_size(), layout.world_size());
  });
}

TEST(layouts, FragmentOfFindsTheFragmentOfEachRow) {
  for_random_layouts(100, [](const gdn::explicit_layout& layout, random_source&) {
    const auto table = layout.fragments();
    for (std::size_t i = 0; i < table.size(); ++i) {
      EXPECT_EQ(gdn::fragment_of(table, table[i].begin), i);
      EXPECT_EQ(gdn::fragment_of(table, table[i].end() - 1), i);
    }
    EXPECT_EQ(gdn::fragment_of(table, -1), table.size());
    EXPECT_EQ(gdn::fragment_of(table, layout.size()), table.size());
  });
}

TEST(layouts, MergingNeighboursKeepsThePlaceOfEachRow) {
  for_random_layouts(200, [](const gdn::explicit_layout& layout, random_source&) {
    const gdn::explicit_layout merged{gdn::merge_neighbours(layout.table), layout.rows, layout.world};
    EXPECT_FALSE(gdn::validate_fragments(merged.table, merged.rows, merged.world));
    for (int r = 0; r < layout.world; ++r) EXPECT_EQ(gdn::positions(merged, r), gdn::positions(layout, r));
  });
}

TEST(layouts, BatchRowsLieBehindEachOther) {
  for_random_layouts(200, [](const gdn::explicit_layout& layout, random_source& random) {
    const index_t batch = random.between(0, 3);
    const gdn::explicit_layout all{gdn::batch_table(layout.table, layout.rows, layout.world, batch),
                                   batch * layout.rows, layout.world};
    EXPECT_FALSE(gdn::validate_fragments(all.table, all.rows, all.world));
    for (int r = 0; r < layout.world; ++r) {
      std::vector<index_t> want;
      for (index_t b = 0; b < batch; ++b) {
        for (const index_t p : gdn::positions(layout, r)) want.push_back(b * layout.rows + p);
      }
      EXPECT_EQ(gdn::positions(all, r), want);
    }
  });
}

TEST(layouts, ContiguousRanksDifferByAtMostOneRow) {
  for (int world = 1; world <= 8; ++world) {
    for (index_t rows = 0; rows <= 40; ++rows) {
      const gdn::contiguous_layout layout{rows, world};
      index_t next = 0;
      for (int r = 0; r < world; ++r) {
        const auto mine = gdn::positions(layout, r);
        EXPECT_EQ(static_cast<index_t>(mine.size()), rows / world + (r < rows % world ? 1 : 0));
        for (const index_t p : mine) EXPECT_EQ(p, next++);
      }
    }
  }
}

TEST(layouts, ZigzagIsPerDocumentZigzagOfOneDocument) {
  for (int world = 1; world <= 8; ++world) {
    for (index_t chunk = 0; chunk <= 3; ++chunk) {
      const index_t rows = 2 * world * chunk;
      const std::pair<index_t, index_t> document{0, rows};
      EXPECT_EQ(gdn::per_document_zigzag({&document, 1}, rows, world).fragments(),
                (gdn::zigzag_layout{rows, world}.fragments()));
    }
  }
}

TEST(layouts, AreRegularValues) {
  const gdn::zigzag_layout a{16, 2};
  gdn::zigzag_layout b = a;
  EXPECT_EQ(a, b);
  b.rows = 32;
  EXPECT_NE(a, b);
  static_assert(gdn::zigzag_layout{8, 2}.fragments().size() == 4);
  static_assert(gdn::contiguous_layout{10, 3}.fragments()[0].count == 4);
}

}  // namespace
