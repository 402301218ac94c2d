// SPDX-License-Identifier: Apache-2.0
#include <gdn/plan/packing.hpp>

#include <gtest/gtest.h>

#include <support/errors.hpp>

namespace {

using namespace gdn_test;
using gdn::index_t;
using gdn::metadata_error;
using gdn::packing;
using numbers = std::vector<index_t>;
using document_rows = std::vector<std::pair<index_t, index_t>>;

TEST(packing_from_mask, ReadsNemosExample) {
  const numbers mask = {1, 1, 2, 2, 2, 0, 1, 2, 2, 3, 3, 3};
  const packing p = packing::from_mask(mask, 2, 6);
  EXPECT_EQ(p.indices(), (numbers{0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11}));
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 2, 5, 6, 8, 11}));
  EXPECT_EQ(p.documents(), 5);
  EXPECT_EQ(p.tokens(), 11);
  EXPECT_FALSE(p.dense());
  EXPECT_EQ(p.runs, (std::vector<gdn::token_run>{{0, 0, 5}, {6, 5, 6}}));
}

TEST(packing_from_mask, ReadsNemosBlock) {  // one row, two documents
  const packing p = packing::from_mask(numbers{1, 1, 2, 2, 2}, 1, 5);
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 2, 5}));
  EXPECT_TRUE(p.dense());
}

TEST(packing_from_mask, SkipsPaddingInsteadOfMakingADocumentOfIt) {  // NeMo's blockdiag: cu [0, 2, 3, 8]
  const packing p = packing::from_mask(numbers{1, 1, 2, 0, 0, 0, 0, 0}, 1, 8);
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 2, 3}));
  EXPECT_EQ(p.indices(), (numbers{0, 1, 2}));
}

TEST(packing_from_mask, NeverJoinsDocumentsOfTwoRows) {  // row 0 ends, and row 1 begins, with document 1
  const packing p = packing::from_mask(numbers{1, 1, 1, 1, 2, 2}, 2, 3);
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 3, 4, 6}));
}

TEST(packing_from_mask, TakesZeroOneMasks) {
  const numbers mask = {0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0};
  const packing p = packing::from_mask(mask, 3, 4);
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 2, 5, 5}));  // a row of padding is an empty document
  EXPECT_EQ(p.indices(), (numbers{2, 3, 4, 5, 6}));
  EXPECT_EQ(p.document_rows(), (document_rows{{2, 4}, {4, 7}, {7, 7}}));
}

TEST(packing_from_mask, TakesRowsOfPaddingOnly) {
  EXPECT_EQ(packing::from_mask(numbers{0, 0, 0, 0}, 2, 2).cu_seqlens, (numbers{0, 0, 0}));
  const packing p = packing::from_mask(numbers{0, 0, 1, 2}, 2, 2);  // with ids there is a document per id
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 1, 2}));
  EXPECT_EQ(packing::from_mask({}, 0, 5).documents(), 0);
  EXPECT_EQ(packing::from_mask({}, 2, 0).cu_seqlens, (numbers{0, 0, 0}));
}

TEST(packing_from_mask, TakesIdsThatSkipNumbersAndPaddingBetweenDocuments) {
  const packing p = packing::from_mask(numbers{2, 2, 0, 5, 0, 9, 9}, 1, 7);
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 2, 3, 5}));
  EXPECT_EQ(p.document_rows(), (document_rows{{0, 2}, {3, 4}, {5, 7}}));
}

TEST(packing_from_mask, OneDocumentWithoutPaddingEqualsRows) {
  EXPECT_EQ(packing::from_mask(numbers(6, 1), 2, 3), packing::rows_of(2, 3));
}

TEST(packing_from_mask, NamesTheFirstPositionThatBreaksARule) {
  const auto says = [](const numbers& mask, index_t batch, index_t row_length) {
    return text_of<metadata_error>([&] { packing::from_mask(mask, batch, row_length); });
  };
  EXPECT_EQ(says({1, 1, 2, 1, 2, 1}, 2, 3), "mask row 1 position 2 is 1 after 2; ids must not descend");
  EXPECT_EQ(says({1, 0, 1, 2}, 1, 4), "mask row 0 position 2: document 1 comes in two pieces");
  EXPECT_EQ(says({1, 0, 1, 1}, 1, 4), "mask row 0 position 2: document 1 comes in two pieces");
  EXPECT_EQ(says({1, -1}, 1, 2), "mask row 0 position 1 is -1; ids must not be negative");
  EXPECT_EQ(says({1, 1}, 1, 3), "the mask has 2 entries, the batch 1 x 3");
  EXPECT_EQ(says({1, 1}, -1, -2), "the mask has 2 entries, the batch -1 x -2");
}

TEST(packing_from_cu_seqlens, ReadsNemosExampleWithIndices) {
  const numbers indices = {0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11};
  const packing p = packing::from_cu_seqlens(numbers{0, 2, 5, 6, 8, 11}, indices, 2, 6);
  EXPECT_EQ(p, packing::from_mask(numbers{1, 1, 2, 2, 2, 0, 1, 2, 2, 3, 3, 3}, 2, 6));
  EXPECT_EQ(p.indices(), indices);
}

TEST(packing_from_cu_seqlens, TakesEmptyDocumentsAnywhere) {
  const packing p = packing::from_cu_seqlens(numbers{0, 0, 3, 3, 3, 4, 4}, {}, 1, 4);
  EXPECT_EQ(p.documents(), 6);
  EXPECT_EQ(p.document_rows(), (document_rows{{0, 0}, {0, 3}, {3, 3}, {3, 3}, {3, 4}, {4, 4}}));
  const packing none = packing::from_cu_seqlens(numbers{0}, {}, 1, 4);  // all is padding
  EXPECT_EQ(none.tokens(), 0);
  EXPECT_TRUE(none.runs.empty());
}

TEST(packing_from_cu_seqlens, RejectsLengthsThatDoNotAddUp) {  // the original shifts documents by the padding
  const auto says = [](const numbers& cu, const numbers& indices) {
    return text_of<metadata_error>([&] { packing::from_cu_seqlens(cu, indices, 2, 6); });
  };
  EXPECT_EQ(says({0, 2, 5, 6, 8, 11}, {}), "cu_seqlens must end at 12, ends at 11");
  EXPECT_EQ(says({0, 2, 3}, {0, 1, 2, 3}), "cu_seqlens must end at 4, ends at 3");
  EXPECT_EQ(says({1, 12}, {}), "cu_seqlens[0] must be 0, is 1");
  EXPECT_EQ(says({0, 7, 5, 12}, {}), "cu_seqlens must not decrease, but position 2 is 5 after 7");
  EXPECT_EQ(says({}, {}), "cu_seqlens is empty; it must start at 0");
  EXPECT_EQ(says({0, 2}, {3, 3}), "indices must ascend within 0 to 11, but position 1 is 3 after 3");
  EXPECT_EQ(says({0, 2}, {3, 12}), "indices must ascend within 0 to 11, but position 1 is 12 after 3");
  EXPECT_EQ(says({0, 2}, {-1, 12}), "indices must ascend within 0 to 11, but position 0 is -1 after -1");
  EXPECT_EQ(text_of<metadata_error>([] {
              packing::from_cu_seqlens(numbers{0, 6}, {}, -2, -3);
            }),
            "a batch cannot have -2 rows of -3");
}

TEST(packing_from_lengths, IsRightPadding) {
  const packing p = packing::from_lengths(numbers{3, 0, 4, 2}, 4);
  EXPECT_EQ(p, packing::from_mask(numbers{1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0}, 4, 4));
  EXPECT_EQ(text_of<metadata_error>([] {
              packing::from_lengths(numbers{3, 5}, 4);
            }),
            "row 1 has length 5; lengths must lie in 0 to 4");
  EXPECT_EQ(text_of<metadata_error>([] { packing::from_lengths(numbers{-1}, 4); }),
            "row 0 has length -1; lengths must lie in 0 to 4");
}

TEST(packing_rows_of, HasADocumentPerRow) {
  const packing p = packing::rows_of(3, 4);
  EXPECT_EQ(p.cu_seqlens, (numbers{0, 4, 8, 12}));
  EXPECT_TRUE(p.dense());
  EXPECT_EQ(packing::rows_of(2, 0).cu_seqlens, (numbers{0, 0, 0}));
  EXPECT_EQ(packing::rows_of(0, 4).documents(), 0);
  EXPECT_THROW(packing::rows_of(-1, 4), metadata_error);
}

TEST(packing_document_rows, RejectsDocumentsWithPaddingInside) {
  const packing p = packing::from_cu_seqlens(numbers{0, 2, 4}, numbers{0, 1, 2, 4}, 1, 5);
  EXPECT_EQ(text_of<metadata_error>([&] { p.document_rows(); }),
            "document 1 is interrupted by padding; it must be one piece here");
}

}  // namespace
