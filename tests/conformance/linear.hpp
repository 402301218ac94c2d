// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every backend's linear_ops must do.

#include <array>
#include <cstdint>
#include <limits>

#include <conformance/fixture.hpp>
#include <conformance/refusals.hpp>

namespace gdn_test {

template <class Subject>
class linear_conformance : public backend_fixture<Subject> {
 public:
  struct sizes {
    index_t length, in, out;
  };
  /// Ones, odd sizes, and both sides of the sizes of tiles.
  static constexpr std::array<sizes, 8> all_sizes = {
      {{1, 1, 1}, {3, 5, 7}, {0, 4, 4}, {65, 129, 97}, {257, 64, 193}, {4, 300, 1}, {300, 1, 20}, {130, 33, 400}}};

  template <class T>
  static host_tensor<double, 2> product(const host_tensor<T, 2>& x, const host_tensor<T, 2>& w) {  // x w^T
    host_tensor<double, 2> y({x.extent(0), w.extent(0)});
    for (index_t t = 0; t < y.extent(0); ++t) {
      for (index_t o = 0; o < y.extent(1); ++o) {
        for (index_t i = 0; i < x.extent(1); ++i) y(t, o) += real(x(t, i)) * real(w(o, i));
      }
    }
    return y;
  }
};
TYPED_TEST_SUITE_P(linear_conformance);

TYPED_TEST_P(linear_conformance, ForwardIsXTimesTransposedWeight) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; const auto& z : TestFixture::all_sizes) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n++);
    const auto x = random_tensor<T, 2>(random, {z.length, z.in}, 3), w = random_tensor<T, 2>(random, {z.out, z.in}, 2);
    auto y = this->place(random_tensor<T, 2>(random, {z.length, z.out}, 5));
    this->backend_.linear_forward(this->place(x).in(), this->place(w).in(), y.out(), TestFixture::scratch(),
                                  this->stream_);
    this->backend_.synchronize(this->stream_);
    EXPECT_TRUE(close(y.fetch(), TestFixture::product(x, w), tolerance<T>(z.in)));
  }
}

TYPED_TEST_P(linear_conformance, BackwardInputIsDyTimesWeightWrittenOrAdded) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; const auto& z : TestFixture::all_sizes) {
    for (const bool add : {false, true}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n << ", add " << add);
      random_source random(n);
      const auto dy = random_tensor<T, 2>(random, {z.length, z.out}, 1);
      const auto w = random_tensor<T, 2>(random, {z.out, z.in}, 4),
                 dx0 = random_tensor<T, 2>(random, {z.length, z.in}, 2);
      auto dx = this->place(dx0);
      this->backend_.linear_backward_input(this->place(dy).in(), this->place(w).in(), dx.out(), add,
                                           TestFixture::scratch(), this->stream_);
      this->backend_.synchronize(this->stream_);
      host_tensor<double, 2> want({z.length, z.in});
      for (index_t t = 0; t < z.length; ++t) {
        for (index_t i = 0; i < z.in; ++i) {
          want(t, i) = add ? real(dx0(t, i)) : 0.0;
          for (index_t o = 0; o < z.out; ++o) want(t, i) += real(dy(t, o)) * real(w(o, i));
        }
      }
      EXPECT_TRUE(close(dx.fetch(), want, tolerance<T>(z.out)));
    }
    ++n;
  }
}

TYPED_TEST_P(linear_conformance, BackwardWeightAddsTransposedDyTimesX) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  for (std::uint64_t n = 0; const auto& z : TestFixture::all_sizes) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n++);
    const auto dy = random_tensor<T, 2>(random, {z.length, z.out}, 1),
               x = random_tensor<T, 2>(random, {z.length, z.in}, 2);
    const auto dw0 = random_tensor<A, 2>(random, {z.out, z.in}, 3);
    auto dw = this->place(dw0);
    this->backend_.linear_backward_weight(this->place(dy).in(), this->place(x).in(), dw.out(), TestFixture::scratch(),
                                          this->stream_);
    this->backend_.synchronize(this->stream_);
    auto want = converted<double>(dw0);
    for (index_t t = 0; t < z.length; ++t) {
      for (index_t o = 0; o < z.out; ++o) {
        for (index_t i = 0; i < z.in; ++i) want(o, i) += real(dy(t, o)) * real(x(t, i));
      }
    }
    EXPECT_TRUE(close(dw.fetch(), want, tolerance<A>(z.length)));
  }
}

TYPED_TEST_P(linear_conformance, OverwritesNaNAndReadsNoOtherRow) {
  using T = typename TestFixture::value_type;
  random_source random(0);
  const index_t length = 70, in = 40, out = 200, bad = 33;
  auto x = random_tensor<T, 2>(random, {length, in});
  const auto w = random_tensor<T, 2>(random, {out, in}), dy = random_tensor<T, 2>(random, {length, out});
  const auto run = [&](double fill) {
    host_tensor<T, 2> y0({length, out}), dx0({length, in});
    y0.for_each([&](T& v) { v = static_cast<T>(fill); });
    dx0.for_each([&](T& v) { v = static_cast<T>(fill); });
    auto y = this->place(y0), dx = this->place(dx0);
    this->backend_.linear_forward(this->place(x).in(), this->place(w).in(), y.out(), TestFixture::scratch(),
                                  this->stream_);
    this->backend_.linear_backward_input(this->place(dy).in(), this->place(w).in(), dx.out(), false,
                                         TestFixture::scratch(), this->stream_);
    this->backend_.synchronize(this->stream_);
    EXPECT_FALSE(std::isnan(real(dx.fetch()(0, 0))));
    return y.fetch();
  };
  const auto clean = run(0);
  for (index_t i = 0; i < in; ++i) x(bad, i) = static_cast<T>(std::numeric_limits<double>::quiet_NaN());
  auto dirty = run(std::numeric_limits<double>::quiet_NaN());
  for (index_t o = 0; o < out; ++o) {
    EXPECT_TRUE(std::isnan(real(dirty(bad, o))));
    dirty(bad, o) = clean(bad, o);
  }
  EXPECT_TRUE(same_bits(dirty, clean));
}

/// Large enough for every way that a library may split a product.
template <class Fixture, class B>
recorder run_linear(const B& be) {
  using T = typename Fixture::value_type;
  using A = typename Fixture::sum_type;
  recorder record;
  random_source random(7);
  for (const auto& z : {typename Fixture::sizes{300, 260, 400}, typename Fixture::sizes{37, 65, 9}}) {
    const auto s = Fixture::subject::stream();
    const auto x = Fixture::place(random_tensor<T, 2>(random, {z.length, z.in}));
    const auto w = Fixture::place(random_tensor<T, 2>(random, {z.out, z.in}));
    const auto dy = Fixture::place(random_tensor<T, 2>(random, {z.length, z.out}));
    auto y = Fixture::place(host_tensor<T, 2>({z.length, z.out})),
         dx = Fixture::place(host_tensor<T, 2>({z.length, z.in}));
    auto dw = Fixture::place(host_tensor<A, 2>({z.out, z.in}));
    be.linear_forward(x.in(), w.in(), y.out(), Fixture::scratch(), s);
    be.linear_backward_input(dy.in(), w.in(), dx.out(), false, Fixture::scratch(), s);
    be.linear_backward_weight(dy.in(), x.in(), dw.out(), Fixture::scratch(), s);
    be.synchronize(s);
    record(y);
    record(dx);
    record(dw);
  }
  return record;
}
TYPED_TEST_P(linear_conformance, ThreadCountChangesNoBit) {
  TestFixture::expect_same_on_variants([](const auto& be) { return run_linear<TestFixture>(be); });
}
TYPED_TEST_P(linear_conformance, ConcurrentCallsChangeNoBit) {
  TestFixture::expect_same_in_threads([](const auto& be) { return run_linear<TestFixture>(be); });
}

TYPED_TEST_P(linear_conformance, RefusesWhatDoesNotFit) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  const auto& be = this->backend_;
  random_source random(1);
  auto x = this->place(random_tensor<T, 2>(random, {3, 4}, 1)), y = this->place(random_tensor<T, 2>(random, {3, 5}, 2));
  const auto w = this->place(random_tensor<T, 2>(random, {5, 4}));
  auto dw = this->place(random_tensor<A, 2>(random, {5, 4}));
  const auto forward = [&](auto... operands) {
    be.linear_forward(operands..., TestFixture::scratch(), this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(forward, operand{"x", x.in()}, operand{"w", w.in()}, operand{"y", y.out()});
  const auto backward_input = [&](auto... operands) {
    be.linear_backward_input(operands..., false, TestFixture::scratch(), this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(backward_input, operand{"dy", y.in()}, operand{"w", w.in()}, operand{"dx", x.out()});
  const auto backward_weight = [&](auto... operands) {
    be.linear_backward_weight(operands..., TestFixture::scratch(), this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(backward_weight, operand{"dy", y.in()}, operand{"x", x.in()}, operand{"dw", dw.out()});
}

REGISTER_TYPED_TEST_SUITE_P(linear_conformance, ForwardIsXTimesTransposedWeight,
                            BackwardInputIsDyTimesWeightWrittenOrAdded, BackwardWeightAddsTransposedDyTimesX,
                            OverwritesNaNAndReadsNoOtherRow, ThreadCountChangesNoBit, ConcurrentCallsChangeNoBit,
                            RefusesWhatDoesNotFit);

}  // namespace gdn_test
