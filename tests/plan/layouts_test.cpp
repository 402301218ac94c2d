// SPDX-License-Identifier: Apache-2.0
// Layouts and their undo, on the examples of NeMo (test_cp_linear_attn), Megatron and attention-gym.
#include <gdn/plan/exchange.hpp>
#include <gdn/plan/layouts.hpp>

#include <gtest/gtest.h>

#include <support/errors.hpp>

namespace {

using namespace gdn_test;
using gdn::fragment_table;
using gdn::index_t;
using gdn::metadata_error;
using rows = std::vector<index_t>;
using ranges = std::vector<std::vector<std::pair<index_t, index_t>>>;

TEST(zigzag, HoldsTheChunksRAndTwoPMinusOneMinusR) {
  EXPECT_EQ(gdn::zigzag_local_positions(4, 2, 0), (rows{0, 1, 6, 7}));
  EXPECT_EQ(gdn::zigzag_local_positions(4, 2, 1), (rows{2, 3, 4, 5}));
  EXPECT_EQ(gdn::positions(gdn::zigzag_layout{12, 3}, 1), (rows{2, 3, 8, 9}));
  EXPECT_EQ(gdn::positions(gdn::zigzag_layout{6, 1}, 0), (rows{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(gdn::zigzag_local_positions(0, 2, 1), rows{});
}

TEST(zigzag, RejectsOddLocalLengths) {
  EXPECT_EQ(text_of<metadata_error>([] { gdn::zigzag_local_positions(5, 2, 0); }),
            "zigzag needs an even local length, has 5");
  EXPECT_EQ(text_of<metadata_error>([] {
              gdn::zigzag_layout{10, 2}.fragments();
            }),
            "zigzag needs a multiple of 2 P = 4 rows, has 10");
  EXPECT_EQ(text_of<metadata_error>([] { gdn::zigzag_local_positions(4, 2, 2); }), "there is no rank 2 of 2");
}

TEST(contiguous, DealsOutWhatDoesNotDivide) {  // FLA rejects all three
  const auto lengths = [](index_t n, int world) {
    rows out;
    for (int r = 0; r < world; ++r) out.push_back(gdn::local_rows(gdn::contiguous_layout{n, world}.fragments(), r));
    return out;
  };
  EXPECT_EQ(lengths(10, 3), (rows{4, 3, 3}));
  EXPECT_EQ(lengths(14, 4), (rows{4, 4, 3, 3}));
  EXPECT_EQ(lengths(2, 3), (rows{1, 1, 0}));
}

TEST(interleaved, GivesTokenTToRankTModP) {
  EXPECT_EQ(gdn::positions(gdn::interleaved_layout{7, 3}, 0), (rows{0, 3, 6}));
  EXPECT_EQ(gdn::positions(gdn::interleaved_layout{7, 3}, 2), (rows{2, 5}));
  EXPECT_EQ(text_of<metadata_error>([] {
              gdn::interleaved_layout{7, 0}.fragments();
            }),
            "a layout cannot have 7 rows on 0 ranks");
}

TEST(undo, BringsZigzagToNaturalOrder) {
  const std::vector<rows> zigzag = {{0, 1, 6, 7}, {2, 3, 4, 5}};
  const auto layout = gdn::from_positions(zigzag);
  EXPECT_EQ(layout.fragments(), (fragment_table{{0, 2, 0, 0}, {2, 4, 1, 0}, {6, 2, 0, 2}}));
  const auto first = gdn::undo_load_balancing(layout, 0);
  EXPECT_EQ(first.sends, (std::vector<gdn::run>{{0, 0, 2, 0}, {1, 2, 2, 0}}));  // keeps 0 1, gives 6 7
  EXPECT_EQ(first.recvs, (std::vector<gdn::run>{{0, 0, 2, 0}, {1, 2, 2, 0}}));  // gets 2 3
  const auto second = gdn::undo_load_balancing(layout, 1);
  EXPECT_EQ(second.sends, (std::vector<gdn::run>{{0, 0, 2, 0}, {1, 2, 2, 0}}));  // gives 2 3, keeps 4 5
  EXPECT_EQ(second.recvs, (std::vector<gdn::run>{{0, 2, 2, 0}, {1, 0, 2, 0}}));  // gets 6 7 behind 4 5
  EXPECT_EQ(gdn::redo_load_balancing(layout, 1), second.inverse());
}

TEST(from_positions, RejectsWhatIsNotDense) {
  const std::vector<rows> sparse = {{0, 2, 4, 8}, {1, 3, 5, 9}};
  EXPECT_EQ(text_of<metadata_error>([&] { gdn::from_positions(sparse); }),
            "rank 0 holds position 8 at local row 3; positions must cover 0 to 7 densely");
  const std::vector<rows> twice = {{0, 1}, {2, 1}};
  EXPECT_EQ(text_of<metadata_error>([&] { gdn::from_positions(twice); }), "position 1 is held twice, by ranks 0 and 1");
  const std::vector<rows> negative = {{0}, {-1}};
  EXPECT_EQ(text_of<metadata_error>([&] { gdn::from_positions(negative); }),
            "rank 1 holds position -1 at local row 0; positions must cover 0 to 1 densely");
}

TEST(from_positions, TakesRanksWithoutRows) {
  const std::vector<rows> some = {{}, {1, 0}, {}};
  const auto layout = gdn::from_positions(some);
  EXPECT_EQ(layout.fragments(), (fragment_table{{0, 1, 1, 1}, {1, 1, 1, 0}}));
  EXPECT_EQ(layout.world_size(), 3);
  EXPECT_EQ(gdn::undo_load_balancing(layout, 0), gdn::exchange_plan{});
}

TEST(from_ranges, TakesAnyFragmentsThatCoverTheRows) {  // attention-gym
  const ranges zigzag = {{{0, 96}, {288, 384}}, {{96, 192}, {192, 288}}};
  const auto layout = gdn::from_ranges(zigzag);
  EXPECT_EQ(layout.size(), 384);
  EXPECT_EQ(gdn::merge_neighbours(layout.fragments()),
            (fragment_table{{0, 96, 0, 0}, {96, 192, 1, 0}, {288, 96, 0, 96}}));
  const ranges uneven = {{{5, 7}}, {}, {{0, 5}, {7, 8}}};
  EXPECT_EQ(gdn::positions(gdn::from_ranges(uneven), 2), (rows{0, 1, 2, 3, 4, 7}));
}

TEST(from_ranges, RejectsOverlapsGapsAndEmptyRanges) {
  const auto says = [](const ranges& of_rank) { return text_of<metadata_error>([&] { gdn::from_ranges(of_rank); }); };
  EXPECT_EQ(says({{{0, 96}}, {{90, 192}}}), "row 90 is covered twice, by fragment 1 and one before it");
  EXPECT_EQ(says({{{0, 96}}, {{100, 192}}}), "no fragment covers row 96 (fragment 1 begins at 100)");
  EXPECT_EQ(says({{{0, 96}}, {{96, 96}}}), "rank 1 has the range 96 to 96; ranges hold at least one row");
  EXPECT_EQ(says({{{0, 96}}, {{100, 96}}}), "rank 1 has the range 100 to 96; ranges hold at least one row");
  EXPECT_EQ(says({{{-4, 96}}}), "rank 0 has the range -4 to 96; ranges hold at least one row");
  EXPECT_EQ(says({{{3, 96}}}), "no fragment covers row 0 (fragment 0 begins at 3)");
}

TEST(per_document_zigzag,
     GivesEachRankTwoChunksOfEachDocument) {  // cu [0, 8, 12], P = 2 as Transformer Engine deals it
  const std::vector<std::pair<index_t, index_t>> documents = {{0, 8}, {8, 8}, {8, 12}};
  const auto layout = gdn::per_document_zigzag(documents, 12, 2);
  EXPECT_EQ(gdn::positions(layout, 0), (rows{0, 1, 6, 7, 8, 11}));
  EXPECT_EQ(gdn::positions(layout, 1), (rows{2, 3, 4, 5, 9, 10}));
}

TEST(per_document_zigzag, DealsOutPaddingBehindTheDocuments) {
  const std::vector<std::pair<index_t, index_t>> documents = {{1, 5}};
  const auto layout = gdn::per_document_zigzag(documents, 8, 2);
  EXPECT_EQ(gdn::positions(layout, 0), (rows{1, 4, 0, 5, 6}));
  EXPECT_EQ(gdn::positions(layout, 1), (rows{2, 3, 7}));
}

TEST(per_document_zigzag, RejectsWhatItCannotSplit) {
  const auto says = [](std::vector<std::pair<index_t, index_t>> documents) {
    return text_of<metadata_error>([&] { gdn::per_document_zigzag(documents, 12, 2); });
  };
  EXPECT_EQ(says({{0, 4}, {4, 10}}), "document 1 has 6 rows; zigzag per document needs a multiple of 2 P = 4");
  EXPECT_EQ(says({{0, 4}, {3, 7}}),
            "document 1 covers rows 3 to 7 which do not follow the document before or leave the 12 rows");
  EXPECT_EQ(says({{0, 16}}),
            "document 0 covers rows 0 to 16 which do not follow the document before or leave the 12 rows");
}

}  // namespace
