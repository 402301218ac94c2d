// SPDX-License-Identifier: Apache-2.0
// More than linear_ops asks: a row has the same bits alone, in any batch and on any rank.

#include <cstdint>

#include <gtest/gtest.h>

#include <kokkos/setup.hpp>
#include <support/host_tensor.hpp>

namespace gdn_test {
namespace {

template <class T>
void expect_rows_alone_as_together() {
  const gdn::kokkos::backend<> be;
  for (std::uint64_t n = 0; n < 12; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    const index_t length = random.between(1, 300), in = random.between(1, 200), out = random.between(1, 260);
    const auto x = random_tensor<T, 2>(random, {length, in}), w = random_tensor<T, 2>(random, {out, in});
    const auto dy = random_tensor<T, 2>(random, {length, out});
    host_tensor<T, 2> y({length, out}), dx({length, in}), y_parts = y, dx_parts = dx;
    be.linear_forward(x.ref(), w.ref(), y.ref(), no_scratch(), {});
    be.linear_backward_input(dy.ref(), w.ref(), dx.ref(), true, no_scratch(), {});
    index_t begin = 0;
    for (const index_t count : random.lengths(length, 7)) {
      be.linear_forward(rows(x.ref(), begin, count), w.ref(), rows(y_parts.ref(), begin, count), no_scratch(), {});
      be.linear_backward_input(rows(dy.ref(), begin, count), w.ref(), rows(dx_parts.ref(), begin, count), true,
                               no_scratch(), {});
      begin += count;
    }
    EXPECT_TRUE(same_bits(y_parts, y));
    EXPECT_TRUE(same_bits(dx_parts, dx));
  }
}
TEST(KokkosLinear, CuttingRowsChangesNoBitInFloat) {
  expect_rows_alone_as_together<float>();
}
TEST(KokkosLinear, CuttingRowsChangesNoBitInDouble) {
  expect_rows_alone_as_together<double>();
}

/// 200000 rows of ones that a float would add up to within 1 in 50000 at best.
TEST(KokkosLinear, WeightGradientsOfManyRowsStayAccurate) {
  const index_t length = 200003;
  host_tensor<float, 2> dy({length, 2}), x({length, 3}), dw({2, 3});
  dy.for_each([](float& v) { v = 0.1F; });
  x.for_each([](float& v) { v = 0.3F; });
  gdn::kokkos::backend<>().linear_backward_weight(dy.ref(), x.ref(), dw.ref(), no_scratch(), {});
  const double want = double(length) * double(0.1F) * double(0.3F);
  dw.for_each([&](float& v) { EXPECT_NEAR(double(v), want, 1e-6 * want); });
}

TEST(KokkosLinear, NarrowedAndStridedTensorsAreRead) {
  random_source random(1);
  const auto wide = random_tensor<double, 2>(random, {9, 30}), w = random_tensor<double, 2>(random, {6, 10});
  host_tensor<double, 2> y({9, 20}), want({9, 6});
  gdn::kokkos::backend<>().linear_forward(columns(wide.ref(), 5, 10), w.ref(), columns(y.ref(), 3, 6), no_scratch(),
                                          {});
  for (index_t t = 0; t < 9; ++t) {
    for (index_t o = 0; o < 6; ++o) {
      for (index_t i = 0; i < 10; ++i) want(t, o) += wide(t, 5 + i) * w(o, i);
    }
    for (index_t o = 0; o < 20; ++o) EXPECT_NEAR(y(t, o), o < 3 || o >= 9 ? 0 : want(t, o - 3), 1e-14);
  }
}

}  // namespace
}  // namespace gdn_test
