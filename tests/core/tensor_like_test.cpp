// SPDX-License-Identifier: Apache-2.0
// A user's own view types at the boundary: as they are, or through tensor_traits.
#include <gdn/concepts/communicator.hpp>
#include <gdn/core/tensor.hpp>

#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <span>
#include <vector>

namespace user {

/// Has all that a tensor_view needs, with extents of other types than gdn's.
struct column_major {
  using element_type = double;
  using memory_type = gdn::host_memory;
  static constexpr std::size_t rank() { return 2; }
  double* data() const { return values; }
  int extent(int axis) const { return axis == 0 ? rows : columns; }
  unsigned stride(int axis) const { return axis == 0 ? 1U : static_cast<unsigned>(rows); }
  double* values;
  int rows, columns;
};

/// Knows nothing of gdn, and owns its elements.
class matrix {
 public:
  matrix(int rows, int columns) : rows_(rows), columns_(columns), values_(static_cast<std::size_t>(rows * columns)) {}
  float* begin() { return values_.data(); }
  const float* begin() const { return values_.data(); }
  int rows() const { return rows_; }
  int columns() const { return columns_; }

 private:
  int rows_, columns_;
  std::vector<float> values_;
};

/// Shared handles whose elements are mutable through a const object, like those of deep-learning frameworks.
struct array {
  std::shared_ptr<int[]> values;
  int size;
};

/// Memory of an accelerator of the user's own.
struct fpga_memory {
  static constexpr bool host_accessible = false;
};

}  // namespace user

template <>
struct gdn::tensor_traits<user::matrix> {
  static auto ref(const user::matrix& m) { return make_tensor(m.begin(), m.rows(), m.columns()); }
};
template <>
struct gdn::tensor_traits<user::array> {
  static auto ref(const user::array& a) { return make_tensor(a.values.get(), a.size); }
};

namespace {

static_assert(gdn::tensor_view<user::column_major> && gdn::mutable_tensor_view<user::column_major>);
static_assert(!gdn::tensor_view<user::matrix> && gdn::tensor_like<user::matrix> && gdn::tensor_like<user::matrix&>);
static_assert(gdn::tensor_like<const user::array&>);
static_assert(gdn::memory_kind<user::fpga_memory>);

TEST(tensor_like, AViewOfTheUserIsReadAsItIs) {
  std::array<double, 6> values = {1, 2, 3, 4, 5, 6};
  const user::column_major view{values.data(), 2, 3};
  const auto t = gdn::canonical(view);
  static_assert(std::is_same_v<decltype(t), const gdn::tensor_ref<double, 2>>);
  EXPECT_EQ(t(1, 0), 2);
  EXPECT_EQ(t(0, 2), 5);
  EXPECT_EQ(t.stride(1), 2);
  const auto input = gdn::as_tensor<const double, 2, gdn::host_memory>(view);
  EXPECT_EQ(input(1, 2), 6);
}

TEST(tensor_like, ATypeThatCannotBeEditedComesThroughTraits) {
  user::matrix m(2, 2);
  m.begin()[3] = 7;
  const auto t = gdn::as_tensor<const float, 2, gdn::host_memory>(m);
  EXPECT_EQ(t(1, 1), 7);
  EXPECT_EQ(t.data(), m.begin());
}

TEST(tensor_like, AHandleGivesMutableElements) {
  const user::array a{std::shared_ptr<int[]>(new int[3]{1, 2, 3}), 3};
  gdn::as_tensor<int, 1, gdn::host_memory>(a)(2) = 9;
  EXPECT_EQ(a.values[2], 9);
}

TEST(tensor_like, ATensorRefIsItself) {
  int values[4] = {};
  const auto t = gdn::make_tensor<user::fpga_memory>(values, 2, 2);
  const auto same = gdn::as_tensor<int, 2, user::fpga_memory>(t);
  EXPECT_EQ(same.data(), t.data());
  EXPECT_EQ(same.extent(1), 2);
}

// ---- what is no tensor ----------------------------------------------------------------------------------------------

struct without_memory {
  using element_type = float;
  static constexpr int rank() { return 1; }
  float* data() const;
  int extent(int) const;
  int stride(int) const;
};
struct without_strides {
  using element_type = float;
  using memory_type = gdn::host_memory;
  static constexpr int rank() { return 1; }
  float* data() const;
  int extent(int) const;
};
struct with_other_pointer {  // data() of another type than its elements
  using element_type = float;
  using memory_type = gdn::host_memory;
  static constexpr int rank() { return 1; }
  void* data() const;
  int extent(int) const;
  int stride(int) const;
};
struct with_rank_of_object {  // known only at run time
  using element_type = float;
  using memory_type = gdn::host_memory;
  int rank() const;
  float* data() const;
  int extent(int) const;
  int stride(int) const;
};
struct with_rank_of_run_time : with_rank_of_object {
  static int rank() { return 1; }
};
struct with_memory_that_says_nothing : without_memory {
  using memory_type = int;
  int stride(int) const;
};
struct not_copyable : user::column_major {
  not_copyable(const not_copyable&) = delete;
};
struct traits_of_no_view {};
}  // namespace

template <>
struct gdn::tensor_traits<traits_of_no_view> {
  static int* ref(const traits_of_no_view&);
};

namespace {

static_assert(!gdn::tensor_view<without_memory> && !gdn::tensor_view<without_strides>);
static_assert(!gdn::tensor_view<with_other_pointer> && !gdn::tensor_view<with_rank_of_object>);
static_assert(!gdn::tensor_view<with_rank_of_run_time>);
static_assert(!gdn::tensor_view<with_memory_that_says_nothing> && !gdn::tensor_view<not_copyable>);
static_assert(!gdn::tensor_view<float*> && !gdn::tensor_like<float*> && !gdn::tensor_like<int>);
static_assert(!gdn::tensor_like<std::vector<float>> && !gdn::tensor_like<std::span<float>>);
static_assert(!gdn::tensor_like<traits_of_no_view>);
static_assert(!gdn::mutable_tensor_view<gdn::tensor_ref<const float, 1>>);

}  // namespace
