// SPDX-License-Identifier: Apache-2.0
// Kokkos Views of every layout are tensors.

#include <concepts>
#include <utility>

#include <gtest/gtest.h>

#include <gdn/kokkos/kokkos.hpp>

namespace {

using host = Kokkos::HostSpace;

template <class View>
void expect_same_elements(const View& v) {
  const auto t = gdn::canonical(v);
  static_assert(std::same_as<decltype(t), const gdn::tensor_ref<typename View::value_type, 2>>);
  ASSERT_EQ(t.extent(0), 3);
  ASSERT_EQ(t.extent(1), 4);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 4; ++j) EXPECT_EQ(&t(i, j), &v(i, j));
  }
}

TEST(KokkosView, AnyLayoutIsATensorOverTheSameElements) {
  expect_same_elements(Kokkos::View<float**, Kokkos::LayoutRight, host>("right", 3, 4));
  expect_same_elements(Kokkos::View<double**, Kokkos::LayoutLeft, host>("left", 3, 4));
  expect_same_elements(Kokkos::View<float**, Kokkos::LayoutStride, host>("stride", Kokkos::LayoutStride(3, 40, 4, 7)));
  const Kokkos::View<float***, Kokkos::LayoutRight, host> cube("cube", 3, 2, 4);
  expect_same_elements(Kokkos::subview(cube, Kokkos::ALL, 1, Kokkos::ALL));
  expect_same_elements(Kokkos::View<float**, host>("default", 3, 4));
  expect_same_elements(Kokkos::View<const float**, host>(Kokkos::View<float**, host>("const", 3, 4)));
}

TEST(KokkosView, UnmanagedAndStaticExtentsCount) {
  float data[12] = {};
  const Kokkos::View<float* [4], Kokkos::LayoutRight, host, Kokkos::MemoryTraits<Kokkos::Unmanaged>> v(data, 3);
  expect_same_elements(v);
  const Kokkos::View<int*****, host> deep("deep", 2, 3, 1, 2, 2);
  const auto t = gdn::canonical(deep);
  static_assert(decltype(t)::rank() == 5);
  EXPECT_EQ(&t(1, 2, 0, 1, 1), &deep(1, 2, 0, 1, 1));
}

TEST(KokkosView, ConstnessIsInTheElement) {
  using view = Kokkos::View<float*, host>;
  using const_view = Kokkos::View<const float*, host>;
  static_assert(gdn::tensor_like<view> && gdn::tensor_like<const_view> && gdn::tensor_like<const view&>);
  static_assert(!gdn::tensor_like<Kokkos::View<float, host>>);  // a tensor has an axis
  static_assert(!std::is_const_v<typename decltype(gdn::canonical(std::declval<view>()))::element_type>);
  static_assert(std::is_const_v<typename decltype(gdn::canonical(std::declval<const_view>()))::element_type>);
  const view v("v", 2);
  v(1) = 3;
  EXPECT_EQ((gdn::as_tensor<const float, 1, gdn::host_memory>(v)(1)), 3);
}

TEST(KokkosView, OperationsTakeRowsOfAViewAndRefuseColumns) {
  const gdn::kokkos::backend<> be;
  const Kokkos::View<float**, Kokkos::LayoutRight, host> right("right", 3, 4);
  const Kokkos::View<float**, Kokkos::LayoutLeft, host> left("left", 3, 4);
  Kokkos::deep_copy(Kokkos::DefaultHostExecutionSpace(), right, 5.0F);
  be.fill_zero(gdn::canonical(Kokkos::subview(right, Kokkos::pair(0, 3), Kokkos::pair(1, 3))), {});
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 4; ++j) EXPECT_EQ(right(i, j), j == 1 || j == 2 ? 0.0F : 5.0F);
  }
  EXPECT_THROW(be.fill_zero(gdn::canonical(left), {}), gdn::shape_error);
}

}  // namespace
