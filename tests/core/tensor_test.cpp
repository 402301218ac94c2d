// SPDX-License-Identifier: Apache-2.0
#include <gdn/core/tensor.hpp>

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include <support/errors.hpp>

namespace {

using namespace gdn_test;
using gdn::index_t;
using gdn::make_tensor;
using gdn::shape_error;
using gdn::tensor_ref;

class tensor : public testing::Test {
 protected:
  tensor() { std::iota(data_, data_ + 24, 0); }
  int data_[24];
};

TEST_F(tensor, OfAPointerAndExtentsIsRowMajor) {
  const auto t = make_tensor(data_, 2, 3, 4);
  static_assert(std::is_same_v<decltype(t), const tensor_ref<int, 3, gdn::host_memory>>);
  EXPECT_EQ(t.size(), 24);
  EXPECT_EQ((std::vector{t.extent(0), t.extent(1), t.extent(2)}), (std::vector<index_t>{2, 3, 4}));
  EXPECT_EQ((std::vector{t.stride(0), t.stride(1), t.stride(2)}), (std::vector<index_t>{12, 4, 1}));
  int next = 0;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 3; ++j) {
      for (int k = 0; k < 4; ++k) EXPECT_EQ(t(i, j, k), next++);
    }
  }
  EXPECT_TRUE(is_contiguous(t));
}

TEST_F(tensor, ConstnessIsThatOfTheElements) {
  const auto t = make_tensor(data_, 4, 6);
  t(1, 2) = 99;  // a const view of mutable elements
  EXPECT_EQ(data_[8], 99);
  const tensor_ref<const int, 2> c = t;
  EXPECT_EQ(c(1, 2), 99);
  EXPECT_EQ(c.data(), t.data());
  EXPECT_EQ(c.stride(0), 6);
  static_assert(std::is_same_v<decltype(c(0, 0)), const int&>);
  static_assert(!std::is_convertible_v<tensor_ref<const int, 2>, tensor_ref<int, 2>>);
  static_assert(!std::is_convertible_v<tensor_ref<int, 2>, tensor_ref<const long, 2>>);
  static_assert(!std::is_convertible_v<tensor_ref<int, 2>, tensor_ref<const int, 3>>);
  static_assert(!std::is_convertible_v<tensor_ref<int, 2>, tensor_ref<const int, 2, gdn::device_memory>>);
}

TEST_F(tensor, RowsAreAPieceOfTheFirstAxis) {
  const auto t = gdn::rows(make_tensor(data_, 6, 4), 2, 3);
  EXPECT_EQ(t.extent(0), 3);
  EXPECT_EQ(t(0, 0), 8);
  EXPECT_EQ(t(2, 3), 19);
  EXPECT_TRUE(is_contiguous(t));
  EXPECT_EQ(gdn::rows(t, 3, 0).size(), 0);
}

TEST_F(tensor, ColumnsAreAPieceOfTheLastAxis) {
  const auto t = gdn::columns(make_tensor(data_, 6, 4), 1, 2);
  EXPECT_EQ(t.extent(1), 2);
  EXPECT_EQ(t(0, 0), 1);
  EXPECT_EQ(t(5, 1), 22);
  EXPECT_EQ(t.stride(0), 4);
  EXPECT_FALSE(is_contiguous(t));
  EXPECT_EQ(gdn::columns(make_tensor(data_, 24), 5, 2)(1), 6);
}

TEST_F(tensor, ColumnsBecomeHeadsWithoutMoving) {
  // q | k of 2 heads of 3 each, in rows of 12
  const auto k = gdn::split_columns(gdn::columns(make_tensor(data_, 2, 12), 6, 6), 2, 3);
  EXPECT_EQ(k.extent(1), 2);
  EXPECT_EQ(k.extent(2), 3);
  EXPECT_EQ(k(0, 0, 0), 6);
  EXPECT_EQ(k(0, 1, 2), 11);
  EXPECT_EQ(k(1, 1, 0), 21);
  EXPECT_EQ(k.stride(0), 12);
  EXPECT_EQ(k.stride(1), 3);
}

TEST_F(tensor, ViewsOfNothingStayWithoutData) {  // as while a workspace measures
  const auto none = make_tensor(static_cast<int*>(nullptr), 4, 6);
  EXPECT_EQ(gdn::rows(none, 2, 1).data(), nullptr);
  EXPECT_EQ(gdn::columns(none, 2, 1).data(), nullptr);
  EXPECT_EQ(gdn::split_columns(none, 2, 3).data(), nullptr);
}

TEST_F(tensor, ReshapeKeepsElementsInOrder) {
  const auto t = gdn::reshape(make_tensor(data_, 6, 4), 2, 12);
  EXPECT_EQ(t(1, 11), 23);
  EXPECT_EQ(gdn::reshape(t, 24)(7), 7);
  EXPECT_EQ(text_of<shape_error>([&] { gdn::reshape(t, 5, 5); }), "reshape keeps the number of elements: 24 became 25");
  EXPECT_EQ(text_of<shape_error>([&] { gdn::reshape(gdn::columns(t, 0, 6), 12); }),
            "reshape needs a contiguous tensor");
}

TEST_F(tensor, IsContiguousWhateverTheStrideOfAnAxisOfOne) {
  tensor_ref<int, 3> t = make_tensor(data_, 1, 3, 1);
  t.stride_[0] = 1000;
  t.stride_[2] = 77;
  EXPECT_TRUE(is_contiguous(t));
  t.stride_[1] = 2;
  EXPECT_FALSE(is_contiguous(t));
  t.extent_[0] = 0;  // no elements, no gaps
  EXPECT_TRUE(is_contiguous(t));
}

TEST_F(tensor, NegativeStridesAndZeroStridesAreViewsToo) {
  tensor_ref<int, 1> back = make_tensor(data_, 24);
  back.data_ += 23;
  back.stride_[0] = -1;
  EXPECT_EQ(back(0), 23);
  EXPECT_EQ(back(23), 0);
  EXPECT_EQ(gdn::rows(back, 4, 2)(0), 19);
  tensor_ref<int, 2> broadcast = make_tensor(data_, 5, 4);
  broadcast.stride_[0] = 0;
  EXPECT_EQ(broadcast(4, 3), 3);
  EXPECT_FALSE(is_contiguous(broadcast));
}

TEST_F(tensor, ExpectsShapeNamesTheTensorTheAxisAndTheExtents) {
  const auto t = make_tensor(data_, 4, 6);
  EXPECT_NO_THROW(gdn::expects_shape(t, "x", {4, 6}));
  EXPECT_EQ(text_of<shape_error>([&] { gdn::expects_shape(t, "x", {4, 5}); }), "x axis 1 must be 5 is 6");
  const auto none = make_tensor(static_cast<int*>(nullptr), 4, 6);
  EXPECT_EQ(text_of<shape_error>([&] { gdn::expects_shape(none, "x", {4, 6}); }), "x has no data");
  EXPECT_NO_THROW(gdn::expects_shape(make_tensor(static_cast<int*>(nullptr), 0, 6), "x", {0, 6}));
}

TEST_F(tensor, MayBeAConstant) {
  static constexpr int values[6] = {1, 2, 3, 4, 5, 6};
  constexpr auto t = make_tensor(values, 2, 3);
  static_assert(t(1, 2) == 6 && t.size() == 6 && t.stride(0) == 3);
  static_assert(is_contiguous(t) && gdn::split_columns(t, 3, 1)(1, 1, 0) == 5 && gdn::reshape(t, 6)(5) == 6);
}

TEST_F(tensor, OfOtherMemoryIsCarriedButNotFollowed) {
  int somewhere[15] = {};
  const auto t = make_tensor<gdn::device_memory>(somewhere, 3, 5);
  static_assert(std::is_same_v<decltype(t)::memory_type, gdn::device_memory>);
  EXPECT_EQ(gdn::rows(t, 2, 1).data(), somewhere + 10);
}

}  // namespace
