// SPDX-License-Identifier: Apache-2.0
#include <gdn/layer/reduce.hpp>
#include <gdn/layer/serve.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <support/errors.hpp>

namespace {

using gdn::index_t;
using gdn::metadata_error;
using gdn::sequence;
using gdn_test::text_of;

constexpr gdn::layer_dims dims{.hidden = 3, .key_heads = 1, .value_heads = 2, .key_dim = 2, .value_dim = 3};

gdn::serving_plan plan(const std::vector<sequence>& sequences, index_t tokens = 10, index_t slots = 4) {
  return gdn::plan_serving(sequences, tokens, slots, dims);
}
/// What both twins say.
std::string finding(const std::vector<sequence>& sequences, index_t tokens = 10, index_t slots = 4) {
  const auto found = gdn::validate_sequences(sequences, tokens, slots);
  const std::string text = text_of<metadata_error>([&] { plan(sequences, tokens, slots); });
  EXPECT_EQ(found ? gdn_test::plain(found->text) : "no error", text);
  return text;
}

TEST(plan_serving, OrdersDocumentsByTheirRows) {
  const auto p = plan({{6, 2, 3, false}, {0, 4, 1, true}, {9, 1, -1, true}, {4, 0, 0, true}, {5, 0, 2, false}});
  EXPECT_EQ(p.reads, (std::vector<std::int32_t>{-1, 3}));
  EXPECT_EQ(p.writes, (std::vector<std::int32_t>{1, 3}));
  EXPECT_EQ(p.clears, (std::vector<std::int32_t>{0}));
  EXPECT_EQ(p.stream.cu_seqlens, (std::vector<index_t>{0, 4, 6}));
  EXPECT_EQ(p.stream.compute_rows, 6);
  EXPECT_FALSE(p.steps);
}

TEST(plan_serving, TakesStepsWhereEverySequenceHasOneRow) {
  const auto p = plan({{1, 1, 3, false}, {0, 1, 1, true}, {2, 8, -1, true}, {0, 0, 0, true}});
  EXPECT_TRUE(p.steps);
  EXPECT_EQ(p.writes, (std::vector<std::int32_t>{1, 3}));
  EXPECT_EQ(p.clears, (std::vector<std::int32_t>{0, 1}));  // a fresh slot starts from zero
  EXPECT_FALSE(p.stream.undo_is_identity());
  EXPECT_TRUE(plan({{0, 1, 3, false}, {1, 1, 1, true}}, 2).stream.undo_is_identity());
  EXPECT_FALSE(plan({{0, 1, 3, false}, {1, 2, 1, true}}, 3).steps);
}

TEST(plan_serving, AcceptsNothing) {
  EXPECT_EQ(plan({}).stream.compute_rows, 0);
  EXPECT_EQ(plan({}, 0, 0).stream.compute_rows, 0);
  EXPECT_EQ(plan({{10, 0, 1, false}, {0, 10, -1, false}}).stream.compute_rows, 0);
}

TEST(plan_serving, RejectsASlotThatIsNamedTwice) {
  EXPECT_EQ(finding({{0, 1, 3, false}, {1, 1, 0, false}, {2, 2, 3, true}}),
            "slot 3 is named twice, by sequences 0 and 2");
  EXPECT_EQ(finding({{0, 0, 2, true}, {1, 1, 2, false}}), "slot 2 is named twice, by sequences 0 and 1");
  EXPECT_EQ(finding({{0, 1, -1, false}, {1, 1, -1, false}}), "no error");
}

TEST(plan_serving, RejectsSlotsOutsideThePool) {
  EXPECT_EQ(finding({{0, 1, 4, false}}), "sequence 0 names slot 4; slots of this pool are 0 to 3, and -1 skips");
  EXPECT_EQ(finding({{0, 1, 0, false}, {1, 1, -2, false}}),
            "sequence 1 names slot -2; slots of this pool are 0 to 3, and -1 skips");
  EXPECT_EQ(finding({}, 1, -1), "a pool cannot have -1 slots; their number must lie in 0 to 2147483648");
}

TEST(plan_serving, RejectsRowsOutsideTheCall) {
  constexpr index_t huge = std::numeric_limits<index_t>::max();
  EXPECT_EQ(finding({{8, 3, 0, false}}), "sequence 0 has 3 rows from row 8 on; the call has 10");
  EXPECT_EQ(finding({{11, 0, 0, false}}), "sequence 0 has 0 rows from row 11 on; the call has 10");
  EXPECT_EQ(finding({{-1, 3, 0, false}}), "sequence 0 has 3 rows from row -1 on; the call has 10");
  EXPECT_EQ(finding({{3, -1, 0, false}}), "sequence 0 has -1 rows from row 3 on; the call has 10");
  EXPECT_EQ(finding({{1, huge, -1, false}}), "sequence 0 has 9223372036854775807 rows from row 1 on; the call has 10");
  EXPECT_EQ(finding({}, -1), "a call cannot have -1 rows");
}

TEST(plan_serving, RejectsRowsThatTwoSequencesHave) {
  EXPECT_EQ(finding({{4, 3, 0, false}, {0, 2, 1, false}, {2, 3, 2, false}}),
            "sequences 0 and 2 overlap: both have row 4");
  EXPECT_EQ(finding({{0, 10, -1, false}, {3, 1, 1, false}}), "sequences 0 and 1 overlap: both have row 3");
  EXPECT_EQ(finding({{0, 4, 0, false}, {2, 0, 1, false}, {4, 6, 2, false}}), "no error");
}

TEST(plan_serving, RejectsALayerThatCannotBe) {
  gdn::layer_dims d = dims;
  d.value_heads = 0;
  EXPECT_EQ(text_of<metadata_error>([&] { gdn::plan_serving({}, 1, 1, d); }),
            "linear_num_value_heads is 0; it must lie in 1 to 16777216");
}

TEST(validate_delivery_slots, NamesTheRule) {
  const auto finding_of = [](const std::vector<std::int32_t>& slots, index_t arriving) {
    const auto found = gdn::validate_delivery_slots(slots, arriving, 4);
    return found ? gdn_test::plain(found->text) : "";
  };
  EXPECT_EQ(finding_of({0, 3, -1, -1}, 4), "");
  EXPECT_EQ(finding_of({0, 3}, 3), "2 slots are given, but 3 documents arrive at this rank");
  EXPECT_EQ(finding_of({0, 4}, 2),
            "arriving document 1 goes to slot 4; slots of this pool are 0 to 3, and -1 drops it");
  EXPECT_EQ(finding_of({2, 1, 2}, 3), "slot 2 is named twice");
}

}  // namespace
