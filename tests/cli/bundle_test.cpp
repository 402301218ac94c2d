// SPDX-License-Identifier: Apache-2.0
#include "run_layer/bundle.hpp"

#include <algorithm>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <gdn/plan/fragment.hpp>

#include "cli/sample.hpp"
#include "io/files.hpp"

namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace gdn_run;

class bundles : public ::testing::Test {
 protected:
  bundle load() {
    sample_.write(dir_.path("b"));
    return load_bundle(dir_.path("b"));
  }
  std::string refusal() {
    try {
      load();
    } catch (const gdn::metadata_error& e) {
      EXPECT_TRUE(std::string(e.what()).starts_with(dir_.path("b") + ": ")) << e.what();
      return e.what();
    }
    return "accepted";
  }
  gdn::fragment_table table(layout_kind layout, int ranks) {
    options o;
    o.layout = layout;
    o.ranks = ranks;
    const bundle b = load();
    gdn::fragment_table t = make_layout_table(o, b);
    std::sort(t.begin(), t.end(), [](const auto& x, const auto& y) { return x.begin < y.begin; });
    const auto found = gdn::validate_fragments(t, b.packing.rows(), ranks);
    EXPECT_FALSE(found) << found->text;
    return t;
  }
  std::string layout_refusal(layout_kind layout, int ranks) {
    try {
      table(layout, ranks);
    } catch (const gdn::metadata_error& e) {
      return e.what();
    }
    return "accepted";
  }

  gdn_test::temporary_directory dir_;
  gdn_test::sample sample_;
};

TEST_F(bundles, SmallestOneHasOneDocumentPerRow) {
  const bundle b = load();
  EXPECT_EQ(b.batch, 2);
  EXPECT_EQ(b.seq, 8);
  EXPECT_EQ(b.packing, gdn::packing::rows_of(2, 8));
  EXPECT_EQ(b.weights, gdn::weight_layout::split);
  EXPECT_EQ(b.peer, "nobody");
  EXPECT_EQ(b.initial_state, nullptr);
  EXPECT_EQ(b.grad_output, nullptr);
  EXPECT_EQ(b.decode_hidden_states, nullptr);
  EXPECT_TRUE(b.expected.empty() && b.seq_index.empty());
}

TEST_F(bundles, DocumentsOfAMaskAreCountedRowByRow) {
  sample_.integers("attention_mask", {2, 8}, {0, 1, 1, 5, 5, 5, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2});
  sample_.floats("initial_state", {3, 2, 2, 2});
  sample_.floats("expected.conv_state", {3, 8, 3});
  const bundle b = load();
  EXPECT_THAT(b.packing.cu_seqlens, ElementsAre(0, 2, 5, 13));
  ASSERT_EQ(b.expected.size(), 1U);
  EXPECT_EQ(b.expected[0].name, "conv_state");
}

TEST_F(bundles, PaddingRowIsAnEmptyDocumentUnderAZeroOneMaskOnly) {
  sample_.integers("attention_mask", {2, 8}, {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0});
  EXPECT_THAT(load().packing.cu_seqlens, ElementsAre(0, 0, 6));
  sample_.integers("attention_mask", {2, 8}, {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0});
  EXPECT_THAT(load().packing.cu_seqlens, ElementsAre(0, 3, 6));
}

TEST_F(bundles, EqualNeighboursOfCuSeqlensAreAnEmptyDocument) {
  sample_.floats("hidden_states", {1, 8, 4});
  sample_.integers("cu_seqlens", {4}, {0, 3, 3, 8});
  EXPECT_EQ(load().packing.documents(), 3);
}

TEST_F(bundles, ExpectedTensorsAreFoundInFixedOrder) {
  sample_.floats("grad_output", {2, 8, 4});
  sample_.floats("decode.hidden_states", {2, 3, 4});
  for (const char* name : {"expected.output", "expected.grad.hidden_states"}) sample_.floats(name, {2, 8, 4});
  sample_.floats("expected.decode.output", {2, 3, 4});
  sample_.floats("expected.grad.linear_attn.A_log", {2});
  sample_.floats("expected.grad.initial_state", {2, 2, 2, 2});
  sample_.floats("expected.something", {7});
  const bundle b = load();
  std::vector<std::string> names;
  for (const expected_tensor& e : b.expected) names.push_back(e.name);
  EXPECT_THAT(names, ElementsAre("output", "grad.hidden_states", "grad.linear_attn.A_log", "grad.initial_state",
                                 "decode.output"));
  EXPECT_TRUE(b.expects_gradient_of("initial_state"));
  EXPECT_FALSE(b.expects_gradient_of("initial_conv_state"));
}

TEST_F(bundles, GradientsOfTheOtherWeightLayoutAreRefused) {
  sample_.floats("grad_output", {2, 8, 4});
  sample_.floats("expected.grad.linear_attn.in_proj_ba.weight", {4, 4});
  EXPECT_THAT(refusal(), HasSubstr("'expected.grad.linear_attn.in_proj_ba.weight'"));
}

TEST_F(bundles, NoTokensToDecodeAreNoError) {
  sample_.floats("decode.hidden_states", {2, 0, 4});
  EXPECT_EQ(load().decode_tokens, 0);
}

TEST_F(bundles, PointersSurviveAMove) {
  bundle a = load();
  const bundle b = std::move(a);
  EXPECT_EQ(gdn::values_of<double>(*b.hidden_states)[0], 0.5);
  EXPECT_EQ(b.file.find("hidden_states"), b.hidden_states);
}

TEST_F(bundles, SamplesOfTheRepositoryLoad) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(GDN_TEST_DATA)) {
    if (entry.path().extension() != ".safetensors") continue;
    ++files;
    const bundle b = load_bundle(entry.path());
    std::size_t expected = 0;
    for (const gdn::tensor_entry& t : b.file.tensors()) expected += t.name.starts_with("expected.") ? 1 : 0;
    EXPECT_EQ(b.expected.size(), expected) << entry.path();
  }
  EXPECT_GT(files, 0);
}

// ---- layouts --------------------------------------------------------------------------------------------------------

using table_t = gdn::fragment_table;

TEST_F(bundles, RowsOfTheBatchFollowEachOtherOnEachRank) {
  EXPECT_EQ(table(layout_kind::contiguous, 3),
            (table_t{{0, 3, 0, 0}, {3, 3, 1, 0}, {6, 2, 2, 0}, {8, 3, 0, 3}, {11, 3, 1, 3}, {14, 2, 2, 2}}));
  EXPECT_EQ(table(layout_kind::zigzag, 2), (table_t{{0, 2, 0, 0},
                                                    {2, 2, 1, 0},
                                                    {4, 2, 1, 2},
                                                    {6, 2, 0, 2},
                                                    {8, 2, 0, 4},
                                                    {10, 2, 1, 4},
                                                    {12, 2, 1, 6},
                                                    {14, 2, 0, 6}}));
  EXPECT_EQ(table(layout_kind::interleaved, 3).size(), 16U);
}

TEST_F(bundles, RanksMayHoldNothing) {
  EXPECT_EQ(table(layout_kind::contiguous, 64).size(), 16U);
  EXPECT_EQ(table(layout_kind::interleaved, 64).size(), 16U);
}

TEST_F(bundles, SeqIndexIsTheLayoutOfEveryRow) {
  sample_.integers("seq_index", {2, 4}, {1, 0, 6, 7, 2, 3, 4, 5});
  EXPECT_EQ(table(layout_kind::seq_index, 2), (table_t{{0, 1, 0, 1},
                                                       {1, 1, 0, 0},
                                                       {2, 4, 1, 0},
                                                       {6, 2, 0, 2},
                                                       {8, 1, 0, 5},
                                                       {9, 1, 0, 4},
                                                       {10, 4, 1, 4},
                                                       {14, 2, 0, 6}}));
  EXPECT_THAT(layout_refusal(layout_kind::seq_index, 4), HasSubstr("seq_index"));
  EXPECT_THAT(layout_refusal(layout_kind::contiguous, 4), HasSubstr("accepted"));
}

TEST_F(bundles, SeqIndexMustBeThere) {
  EXPECT_THAT(layout_refusal(layout_kind::seq_index, 1), HasSubstr("seq_index"));
}

TEST_F(bundles, ZigzagNeedsWholeChunks) {
  EXPECT_THAT(layout_refusal(layout_kind::zigzag, 4), HasSubstr("accepted"));
  EXPECT_THAT(layout_refusal(layout_kind::zigzag, 3), HasSubstr("2 P = 6"));
  EXPECT_THAT(layout_refusal(layout_kind::zigzag, 8), HasSubstr("S = 8"));
}

TEST_F(bundles, ZigzagOfDocumentsDealsPaddingOut) {
  sample_.integers("attention_mask", {2, 8}, {0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3, 3, 0, 0});
  // Document 2 of the first row is 3 tokens long.
  EXPECT_THAT(layout_refusal(layout_kind::zigzag_documents, 2), HasSubstr("document 1"));
  sample_.integers("attention_mask", {2, 8}, {0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 3, 3, 3, 3, 0, 0});
  const table_t t = table(layout_kind::zigzag_documents, 2);
  EXPECT_THAT(table_t(t.begin() + 1, t.begin() + 5), ElementsAre(gdn::fragment{1, 1, 0, 0}, gdn::fragment{2, 1, 1, 0},
                                                                 gdn::fragment{3, 1, 1, 1}, gdn::fragment{4, 1, 0, 1}));
}

TEST_F(bundles, AStateThatNoMachineHoldsIsSeenBeforeTheWork) {
  options o;
  bundle b = load();
  EXPECT_FALSE(exceeds_memory(o, b));
  b.config.dims.key_dim = index_t{1} << 22;
  b.config.dims.value_dim = index_t{1} << 22;
  EXPECT_TRUE(exceeds_memory(o, b));
}

}  // namespace
