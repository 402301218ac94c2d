// SPDX-License-Identifier: Apache-2.0
// Validators and the functions that throw agree, also on garbage; what is accepted obeys the laws.
#include <plan/random_case.hpp>

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <set>

#include <support/errors.hpp>

namespace {

using namespace gdn_test;
using gdn::metadata_error;

/// f() throws exactly what the validator found, and nothing else.
template <class F>
void expect_twins(const std::optional<gdn::diagnostic>& found, F&& f) {
  try {
    f();
    EXPECT_FALSE(found) << "only the validator finds: " << found->text;
  } catch (const metadata_error& e) {
    ASSERT_TRUE(found) << "only the throwing function finds: " << e.what();
    EXPECT_EQ(found->text, e.what());
    EXPECT_FALSE(found->text.empty());
  }
}

/// A number that is mostly small, now and then negative or as large as they get.
index_t wild(random_source& random, index_t small) {
  switch (random.between(0, 11)) {
    case 0:
      return -random.between(1, 3);
    case 1:
      return random.coin() ? std::numeric_limits<index_t>::max() : std::numeric_limits<index_t>::min();
    case 2:
      return random.between(0, std::numeric_limits<index_t>::max());
    default:
      return random.between(0, small);
  }
}

struct counts {
  std::uint64_t accepted = 0, rejected = 0;
  void add(bool ok) { ++(ok ? accepted : rejected); }
  ~counts() {  // a loop that only sees one of the two proves little
    EXPECT_GT(accepted, 50U);
    EXPECT_GT(rejected, 50U);
  }
};

TEST(validate_mask, AgreesWithFromMaskOnGarbage) {
  counts seen;
  for (std::uint64_t n = 0; n < cases(20000) && !HasFailure(); ++n) {
    random_source random(n);
    index_t batch = random.between(0, 3), row_length = random.between(0, 6);
    std::vector<index_t> mask = random_mask(random, batch, row_length);
    for (index_t& id : mask) {
      if (random.coin(12)) id = wild(random, 4);
    }
    if (random.coin(20) && row_length > 0) batch = wild(random, 3);  // any number of empty rows is right
    if (random.coin(20) && batch < 4) row_length = wild(random, 3);
    if (random.coin(20)) mask.push_back(0);
    SCOPED_TRACE(testing::Message() << "case " << n << ", GDN_SEED=" << seed());
    const auto found = gdn::validate_mask(mask, batch, row_length);
    seen.add(!found);
    expect_twins(found, [&] {
      const gdn::packing p = gdn::packing::from_mask(mask, batch, row_length);
      EXPECT_FALSE(gdn::validate_packing(p));
      EXPECT_EQ(p.tokens(), static_cast<index_t>(mask.size()) - std::count(mask.begin(), mask.end(), 0));
      for (const index_t i : p.indices()) EXPECT_NE(mask.at(static_cast<std::size_t>(i)), 0);
    });
  }
}

TEST(validate_cu_seqlens, AgreesWithFromCuSeqlensOnGarbage) {
  counts seen;
  for (std::uint64_t n = 0; n < cases(20000) && !HasFailure(); ++n) {
    random_source random(n);
    const index_t rows = random.between(1, 12);
    std::vector<index_t> cu = cumulative(random.lengths(rows, random.between(1, 5)));
    for (index_t& c : cu) {
      if (random.coin(15)) c = wild(random, rows);
    }
    if (random.coin(10)) cu.pop_back();
    if (random.coin(10)) cu.erase(cu.begin());
    SCOPED_TRACE(testing::Message() << "case " << n << ", GDN_SEED=" << seed());
    // Without indices a stream that ends at 0 is one of padding only.
    const index_t total = !cu.empty() && cu.back() == 0 ? 0 : rows;
    const auto found = gdn::validate_cu_seqlens(cu, total);
    seen.add(!found);
    expect_twins(found, [&] {
      const gdn::packing p = gdn::packing::from_cu_seqlens(cu, {}, 1, rows);
      EXPECT_FALSE(gdn::validate_packing(p));
      EXPECT_EQ(p.cu_seqlens, cu);
    });
  }
}

TEST(validate_positions, AgreesWithFromPositionsOnGarbage) {
  counts seen;
  for (std::uint64_t n = 0; n < cases(20000) && !HasFailure(); ++n) {
    random_source random(n);
    const int world = static_cast<int>(random.between(1, 5));
    std::vector<std::vector<index_t>> of_rank;
    const gdn::explicit_layout layout = random_positions(random, random.between(0, 12), world);
    for (int r = 0; r < world; ++r) of_rank.push_back(gdn::positions(layout, r));
    for (auto& positions : of_rank) {
      for (index_t& p : positions) {
        if (random.coin(15)) p = wild(random, 12);
      }
      if (random.coin(15)) positions.push_back(wild(random, 12));
    }
    SCOPED_TRACE(testing::Message() << "case " << n << ", GDN_SEED=" << seed());
    const auto found = gdn::validate_positions(of_rank);
    seen.add(!found);
    expect_twins(found, [&] {
      const gdn::explicit_layout again = gdn::from_positions(of_rank);
      EXPECT_FALSE(gdn::validate_fragments(again.table, again.rows, again.world));
      for (int r = 0; r < world; ++r) EXPECT_EQ(gdn::positions(again, r), of_rank[static_cast<std::size_t>(r)]);
    });
  }
}

/// The definition, row by row; only for small numbers.
bool is_partition(const gdn::fragment_table& table, index_t total, int world) {
  std::map<index_t, int> global;
  std::map<int, std::set<index_t>> local;
  index_t before = -1;
  for (const gdn::fragment& f : table) {
    if (f.count < 1 || f.count > total || f.begin < 0 || f.begin > total || f.local < 0 || f.local > total)
      return false;
    if (f.rank < 0 || f.rank >= world || f.begin <= before) return false;
    before = f.begin;
    for (index_t i = 0; i < f.count; ++i) {
      ++global[f.begin + i];
      if (!local[f.rank].insert(f.local + i).second) return false;
    }
  }
  for (index_t i = 0; i < total; ++i) {
    if (global[i] != 1) return false;
  }
  for (const auto& [rank, rows] : local) {
    if (*rows.rbegin() + 1 != static_cast<index_t>(rows.size())) return false;
  }
  return static_cast<index_t>(global.size()) == total;
}

TEST(validate_fragments, AcceptsExactlyThePartitions) {
  counts seen;
  for (std::uint64_t n = 0; n < cases(40000) && !HasFailure(); ++n) {
    random_source random(n);
    const int world = static_cast<int>(random.between(1, 4));
    index_t total = random.between(0, 10);
    gdn::fragment_table table = random_ranges(random, total, world).table;
    for (gdn::fragment& f : table) {
      if (random.coin(20)) f.begin = wild(random, total);
      if (random.coin(20)) f.count = wild(random, total);
      if (random.coin(20)) f.local = wild(random, total);
      if (random.coin(20)) f.rank = static_cast<int>(random.between(-1, world));
    }
    if (random.coin(20)) total += random.between(-1, 1);
    if (random.coin(20) && table.size() > 1) std::swap(table[0], table[1]);
    SCOPED_TRACE(testing::Message() << "case " << n << ", GDN_SEED=" << seed());
    const auto found = gdn::validate_fragments(table, total, world);
    seen.add(!found);
    EXPECT_EQ(!found, total >= 0 && is_partition(table, total, world)) << (found ? found->text : "accepted");
    if (total < 0) continue;
    const gdn::packing pack = gdn::packing::rows_of(1, total);
    expect_twins(found, [&] { gdn::plan_context_parallel(table, pack, {}, 1, {}, world, 0); });
  }
}

TEST(validate_fragments, NamesTheValueThePlaceAndTheRule) {
  const auto says = [](const gdn::fragment_table& table, index_t total, int world) {
    const auto found = gdn::validate_fragments(table, total, world);
    return found ? plain(found->text) : "nothing";
  };
  EXPECT_EQ(says({}, 0, 1), "nothing");
  EXPECT_EQ(says({}, 0, 0), "a layout needs at least one rank, has 0");
  EXPECT_EQ(says({}, -1, 1), "a layout cannot have -1 rows");
  EXPECT_EQ(says({}, 4, 1), "the fragments cover 0 rows, the sequence has 4");
  EXPECT_EQ(says({{0, 0, 0, 0}}, 4, 1), "fragment 0 holds 0 rows; at least 1 is needed");
  EXPECT_EQ(says({{0, 4, 1, 0}}, 4, 1), "fragment 0 is on rank 1 of 1 ranks");
  EXPECT_EQ(says({{-2, 4, 0, 0}}, 4, 1), "fragment 0 begins at row -2; rows begin at 0");
  EXPECT_EQ(says({{0, 2, 0, 0}, {3, 1, 0, 2}}, 4, 1), "no fragment covers row 2 (fragment 1 begins at 3)");
  EXPECT_EQ(says({{0, 2, 0, 0}, {1, 3, 0, 2}}, 4, 1), "row 1 is covered twice, by fragment 1 and one before it");
  EXPECT_EQ(says({{0, 5, 0, 0}}, 4, 1), "fragment 0 holds 5 rows from row 0 on, the sequence has 4");
  EXPECT_EQ(says({{0, 4, 0, -1}}, 4, 1), "fragment 0 lies at local row -1");
  EXPECT_EQ(says({{0, 2, 0, 0}, {2, 2, 0, 3}}, 4, 1), "rank 0 has no fragment at local row 2");
  EXPECT_EQ(says({{0, 2, 0, 0}, {2, 2, 0, 1}}, 4, 1), "rank 0 has two fragments at local row 1");
}

TEST(validate_packing, FindsWhatTheFunctionsThatMakeOneNeverDo) {
  const auto says = [](const gdn::packing& p) {
    const auto found = gdn::validate_packing(p);
    EXPECT_EQ(found.has_value(), text_of<metadata_error>([&] {
                                   gdn::plan_context_parallel(gdn::contiguous_layout{p.row_length, 1}, p, {}, 1, {}, 0);
                                 }) != "no error");
    return found ? plain(found->text) : "nothing";
  };
  EXPECT_EQ(says({1, 4, {{0, 0, 2}, {3, 2, 1}}, {0, 3}}), "nothing");
  EXPECT_EQ(says({1, 4, {{0, 0, 4}}, {0, 3}}), "cu_seqlens must end at 4, ends at 3");
  EXPECT_EQ(says({1, 4, {{0, 0, 4}}, {}}), "cu_seqlens is empty; it must start at 0");
  EXPECT_EQ(says({1, 4, {{0, 0, 2}, {2, 2, 1}}, {0, 3}}),
            "run 1 has 1 rows from row 2 on; runs must ascend within 4 rows without touching");
  EXPECT_EQ(says({1, 4, {{3, 0, 2}}, {0, 2}}),
            "run 0 has 2 rows from row 3 on; runs must ascend within 4 rows without touching");
  EXPECT_EQ(says({1, 4, {{0, 1, 2}}, {0, 2}}), "run 0 begins at token 1, must begin at 0");
  EXPECT_EQ(says({-1, 4, {}, {0}}), "a batch cannot have -1 rows of 4");
}

TEST(plan_context_parallel, RejectsArgumentsThatDoNotFit) {
  const gdn::packing pack = gdn::packing::rows_of(2, 8);
  const auto says = [&](const gdn::sequence_layout auto& layout, int rank, gdn::plan_shape shape = {}) {
    return text_of<metadata_error>([&] { gdn::plan_context_parallel(layout, pack, shape, 1, {}, rank); });
  };
  EXPECT_EQ(says(gdn::contiguous_layout{7, 2}, 0), "the layout is for rows of 7 tokens, the batch has rows of 8");
  EXPECT_EQ(says(gdn::contiguous_layout{8, 2}, 2), "there is no rank 2 of 2");
  EXPECT_EQ(says(gdn::contiguous_layout{8, 2}, -1), "there is no rank -1 of 2");
  EXPECT_EQ(says(gdn::contiguous_layout{8, 0}, 0), "a layout needs at least one rank, has 0");
  EXPECT_EQ(says(gdn::zigzag_layout{8, 3}, 0), "zigzag needs a multiple of 2 P = 6 rows, has 8");
  gdn::plan_shape shape;
  shape.conv_width = 0;
  EXPECT_EQ(says(gdn::contiguous_layout{8, 2}, 0, shape), "conv width 0 and chunk 64 must be at least 1");
  shape = {.conv_width = 4, .summary = {}, .chunk = 0};
  EXPECT_EQ(says(gdn::contiguous_layout{8, 2}, 0, shape), "conv width 4 and chunk 0 must be at least 1");
}

}  // namespace
