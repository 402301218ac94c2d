// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every backend's conv_ops must do.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <vector>

#include <conformance/fixture.hpp>
#include <conformance/refusals.hpp>

namespace gdn_test {

/// Random segments over `length` rows, some empty, some shorter than the window, some with a halo. Rows of the halo
/// buffer that no segment names hold NaN. Between rows are gaps, all multiples of `gap`: with gaps of four, and a
/// number of channels that four divides, a backend may move several channels at once.
template <class T>
struct conv_case {
  using A = gdn::accumulate_t<T>;
  std::vector<gdn::conv_segment> segments;
  host_tensor<T, 2> x, halo, w, dy;
  gdn::activation act;
  index_t gap;

  conv_case(random_source& random, index_t length, index_t dim, index_t width, gdn::activation a, index_t unit = 1)
      : x(random_tensor<T, 2>(random, {length, dim}, 2 * unit)),
        w(random_tensor<T, 2>(random, {dim, width}, 1)),
        dy(random_tensor<T, 2>(random, {length, dim}, 5 * unit)),
        act(a),
        gap(unit) {
    index_t begin = 0, next_halo = 1;
    for (const index_t count : random.lengths(length, random.between(1, 6))) {
      gdn::conv_segment s{begin, count, -1};
      if (random.coin()) {
        s.halo = next_halo;
        next_halo += width - 1 + random.between(0, 1);
      }
      segments.push_back(s);
      begin += count;
    }
    halo = host_tensor<T, 2>({next_halo + 1, dim}, gap);
    halo.for_each([](T& v) { v = static_cast<T>(std::numeric_limits<double>::quiet_NaN()); });
    const auto values = random_tensor<T, 2>(random, {next_halo + 1, dim});
    for (const auto& s : segments) {
      for (index_t i = 0; s.halo >= 0 && i < width - 1; ++i) {
        for (index_t c = 0; c < dim; ++c) halo(s.halo + i, c) = values(s.halo + i, c);
      }
    }
  }
  index_t width() const { return w.extent(1); }
  index_t dim() const { return w.extent(0); }
  index_t length() const { return x.extent(0); }

  /// Row `i` of a segment's input as the convolution sees it.
  double input(const gdn::conv_segment& s, index_t i, index_t c) const {
    if (i >= 0) return real(x(s.begin + i, c));
    return s.halo < 0 ? 0.0 : real(halo(s.halo + width() - 1 + i, c));
  }
  double p(const gdn::conv_segment& s, index_t i, index_t c) const {
    double sum = 0;
    for (index_t j = 0; j < width(); ++j) sum += real(w(c, j)) * input(s, i - width() + 1 + j, c);
    return sum;
  }
};

template <class Subject>
class conv1d_conformance : public backend_fixture<Subject> {
 public:
  using fixture = backend_fixture<Subject>;

  template <class B, class T>
  static placed<Subject, T, 2> forward(const B& be, const conv_case<T>& c) {
    auto y = fixture::place(unwritten<T>(c.length(), c.dim(), c.gap));
    be.causal_conv1d_forward(fixture::place_table(c.segments).in(), fixture::place(c.x).in(),
                             fixture::place(c.halo).in(), fixture::place(c.w).in(), c.act, y.out(), Subject::stream());
    be.synchronize(Subject::stream());
    return y;
  }
  template <class T>
  struct gradients {
    placed<Subject, T, 2> dx, dhalo;
    placed<Subject, gdn::accumulate_t<T>, 2> dw;
  };
  /// dw starts from 1, since it is added to; dhalo from NaN, since rows that a segment names are written.
  template <class B, class T>
  static gradients<T> backward(const B& be, const conv_case<T>& c) {
    using A = gdn::accumulate_t<T>;
    host_tensor<A, 2> ones({c.dim(), c.width()}, 2);
    ones.for_each([](A& v) { v = A(1); });
    gradients<T> out{fixture::place(unwritten<T>(c.length(), c.dim(), 4 * c.gap)),
                     fixture::place(unwritten<T>(c.halo.extent(0), c.dim(), 3 * c.gap)), fixture::place(ones)};
    be.causal_conv1d_backward(fixture::place_table(c.segments).in(), fixture::place(c.x).in(),
                              fixture::place(c.halo).in(), fixture::place(c.w).in(), c.act, fixture::place(c.dy).in(),
                              out.dx.out(), out.dhalo.out(), out.dw.out(), fixture::scratch(), Subject::stream());
    be.synchronize(Subject::stream());
    return out;
  }

  template <class T>
  static host_tensor<T, 2> unwritten(index_t rows, index_t columns, index_t padding) {
    host_tensor<T, 2> t({rows, columns}, padding);
    t.for_each([](T& v) { v = static_cast<T>(std::numeric_limits<double>::quiet_NaN()); });
    return t;
  }
  /// Rows that no segment names must still hold NaN; they become zero for the comparison.
  template <class T>
  static host_tensor<T, 2> named_rows(const conv_case<T>& c, host_tensor<T, 2> dhalo) {
    for (index_t i = 0; i < dhalo.extent(0); ++i) {
      const bool named = std::any_of(c.segments.begin(), c.segments.end(), [&](const auto& s) {
        return s.halo >= 0 && s.halo <= i && i < s.halo + c.width() - 1;
      });
      for (index_t j = 0; j < dhalo.extent(1) && !named; ++j) {
        EXPECT_TRUE(std::isnan(real(dhalo(i, j)))) << "row " << i << " of dhalo is named by no segment";
        dhalo(i, j) = T{};
      }
    }
    return dhalo;
  }

  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  struct sizes {
    index_t length, dim, width;
  };
  /// Every second time round with gaps of four.
  static index_t gap_of(std::uint64_t n) { return n / all_sizes.size() % 2 == 0 ? 1 : 4; }
  static constexpr std::array<sizes, 9> all_sizes = {
      {{1, 1, 1}, {20, 3, 4}, {2, 5, 4}, {300, 136, 4}, {7, 4, 2}, {9, 132, 3}, {40, 2, 33}, {0, 8, 4}, {5, 2, 70}}};
};
TYPED_TEST_SUITE_P(conv1d_conformance);

TYPED_TEST_P(conv1d_conformance, ForwardIsTheFormulaOverSegmentsAndHalos) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; n < 10 * TestFixture::all_sizes.size(); ++n) {
    const auto z = TestFixture::all_sizes[n % TestFixture::all_sizes.size()];
    for (const auto act : {gdn::activation::none, gdn::activation::silu}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n << ", activation " << int(act));
      random_source random(n);
      const conv_case<T> c(random, z.length, z.dim, z.width, act, TestFixture::gap_of(n));
      host_tensor<double, 2> want({z.length, z.dim});
      for (const auto& s : c.segments) {
        for (index_t i = 0; i < s.count; ++i) {
          for (index_t d = 0; d < z.dim; ++d) {
            const double p = c.p(s, i, d);
            want(s.begin + i, d) = act == gdn::activation::silu ? p * TestFixture::sigmoid(p) : p;
          }
        }
      }
      EXPECT_TRUE(close(TestFixture::forward(this->backend_, c).fetch(), want, tolerance<T>(z.width)));
    }
  }
}

TYPED_TEST_P(conv1d_conformance, BackwardIsTheFormulaOverSegmentsAndHalos) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  for (std::uint64_t n = 0; n < 10 * TestFixture::all_sizes.size(); ++n) {
    const auto z = TestFixture::all_sizes[n % TestFixture::all_sizes.size()];
    for (const auto act : {gdn::activation::none, gdn::activation::silu}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n << ", activation " << int(act));
      random_source random(n);
      const conv_case<T> c(random, z.length, z.dim, z.width, act, TestFixture::gap_of(n));
      host_tensor<double, 2> dx({z.length, z.dim}), dhalo({c.halo.extent(0), z.dim}), dw({z.dim, z.width});
      dw.for_each([](double& v) { v = 1; });
      for (const auto& s : c.segments) {
        for (index_t i = 0; i < s.count; ++i) {
          for (index_t d = 0; d < z.dim; ++d) {
            const double p = c.p(s, i, d), g = TestFixture::sigmoid(p);
            const double dp = real(c.dy(s.begin + i, d)) * (act == gdn::activation::silu ? g * (1 + p * (1 - g)) : 1);
            for (index_t j = 0; j < z.width; ++j) {
              const index_t from = i - z.width + 1 + j;
              dw(d, j) += dp * c.input(s, from, d);
              if (from >= 0) {
                dx(s.begin + from, d) += real(c.w(d, j)) * dp;
              } else if (s.halo >= 0) {
                dhalo(s.halo + z.width - 1 + from, d) += real(c.w(d, j)) * dp;
              }
            }
          }
        }
      }
      const auto got = TestFixture::backward(this->backend_, c);
      EXPECT_TRUE(close(got.dx.fetch(), dx, tolerance<T>(z.width)));
      EXPECT_TRUE(close(TestFixture::named_rows(c, got.dhalo.fetch()), dhalo, tolerance<T>(z.width)));
      EXPECT_TRUE(close(got.dw.fetch(), dw, tolerance<A>(z.length)));
    }
  }
}

TYPED_TEST_P(conv1d_conformance, GradientsAreDifferencesInDouble) {
  using T = typename TestFixture::value_type;
  if constexpr (std::same_as<T, double>) {
    for (std::uint64_t n = 0; n < 6; ++n) {
      SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
      random_source random(n);
      conv_case<double> c(random, 9, 2, 4, gdn::activation::silu);
      const auto loss = [&] { return inner(TestFixture::forward(this->backend_, c).fetch(), c.dy); };
      const auto got = TestFixture::backward(this->backend_, c);
      EXPECT_TRUE(close(got.dx.fetch(), this->differences(c.x, loss), difference_tolerance));
      EXPECT_TRUE(
          close(TestFixture::named_rows(c, got.dhalo.fetch()), this->differences(c.halo, loss), difference_tolerance));
      auto dw = this->differences(c.w, loss);
      dw.for_each([](double& v) { v += 1; });
      EXPECT_TRUE(close(got.dw.fetch(), dw, difference_tolerance));
    }
  }
}

/// A document cut in two, the later part with the earlier rows as halo, is the whole document to the last bit.
TYPED_TEST_P(conv1d_conformance, SplitAnywhereEqualsWhole) {
  using T = typename TestFixture::value_type;
  for (const index_t width : {1, 2, 4, 7}) {
    random_source random(static_cast<std::uint64_t>(width));
    conv_case<T> whole(random, 12, 5, width, gdn::activation::silu);
    whole.segments = {{0, 12, -1}};
    const auto want = TestFixture::forward(this->backend_, whole).fetch();
    const auto want_back = TestFixture::backward(this->backend_, whole);
    for (index_t cut = 0; cut <= 12; ++cut) {
      SCOPED_TRACE(testing::Message() << "width " << width << ", cut " << cut);
      conv_case<T> parts = whole;
      parts.segments = {{0, cut, -1}, {cut, 12 - cut, 0}};
      parts.halo = host_tensor<T, 2>({width - 1, 5});
      for (index_t i = std::max<index_t>(0, width - 1 - cut); i < width - 1; ++i) {
        for (index_t d = 0; d < 5; ++d) parts.halo(i, d) = whole.x(cut - (width - 1) + i, d);
      }
      EXPECT_TRUE(same_bits(TestFixture::forward(this->backend_, parts).fetch(), want));
      // What arrives at the halo belongs to the rows it was copied from.
      const auto back = TestFixture::backward(this->backend_, parts);
      auto dx = back.dx.fetch();
      const auto dhalo = back.dhalo.fetch();
      for (index_t i = std::max<index_t>(0, width - 1 - cut); i < width - 1; ++i) {
        for (index_t d = 0; d < 5; ++d) {
          T& target = dx(cut - (width - 1) + i, d);
          target = static_cast<T>(real(target) + real(dhalo(i, d)));
        }
      }
      EXPECT_TRUE(close(dx, converted<double>(want_back.dx.fetch()), tolerance<T>(width)));
      EXPECT_TRUE(close(back.dw.fetch(), converted<double>(want_back.dw.fetch()),
                        tolerance<typename TestFixture::sum_type>(12)));
    }
  }
}

TYPED_TEST_P(conv1d_conformance, NaNStaysInItsSegment) {
  using T = typename TestFixture::value_type;
  random_source random(4);
  conv_case<T> c(random, 30, 6, 4, gdn::activation::silu);
  c.segments = {{0, 10, -1}, {10, 2, -1}, {12, 18, -1}};
  const auto y = TestFixture::forward(this->backend_, c).fetch(),
             dx = TestFixture::backward(this->backend_, c).dx.fetch();
  for (index_t i = 10; i < 12; ++i) {
    for (index_t d = 0; d < 6; ++d) c.x(i, d) = c.dy(i, d) = static_cast<T>(std::numeric_limits<double>::quiet_NaN());
  }
  auto dirty_y = TestFixture::forward(this->backend_, c).fetch(),
       dirty_dx = TestFixture::backward(this->backend_, c).dx.fetch();
  for (index_t i = 10; i < 12; ++i) {
    for (index_t d = 0; d < 6; ++d) {
      EXPECT_TRUE(std::isnan(real(dirty_y(i, d))));
      dirty_y(i, d) = y(i, d);
      dirty_dx(i, d) = dx(i, d);
    }
  }
  EXPECT_TRUE(same_bits(dirty_y, y));
  EXPECT_TRUE(same_bits(dirty_dx, dx));
}

/// Token by token through a cache is the whole document to the last bit; slot -1 touches nothing.
TYPED_TEST_P(conv1d_conformance, StepsEqualTheWholeSequence) {
  using T = typename TestFixture::value_type;
  for (const index_t width : {1, 2, 4}) {
    for (const auto act : {gdn::activation::none, gdn::activation::silu}) {
      SCOPED_TRACE(testing::Message() << "width " << width << ", activation " << int(act));
      random_source random(static_cast<std::uint64_t>(width));
      const index_t length = 6, dim = 300;
      conv_case<T> c(random, length, dim, width, act);
      c.segments = {{0, length, -1}};
      const auto want = TestFixture::forward(this->backend_, c).fetch();
      // Three sequences in four slots: the one that is followed stands in slot 2, the middle one is skipped.
      host_tensor<T, 3> cache({4, dim, width}, 1);
      const auto other = random_tensor<T, 3>(random, {4, dim, width});
      for (index_t d = 0; d < dim; ++d) {
        for (index_t j = 0; j < width; ++j) cache(1, d, j) = other(1, d, j);
      }
      auto states = this->place(cache);
      const auto slots = this->place_table(std::vector<std::int32_t>{2, -1, 0});
      for (index_t t = 0; t < length; ++t) {
        host_tensor<T, 2> x({3, dim}, 2);
        for (index_t d = 0; d < dim; ++d) {
          x(0, d) = c.x(t, d);
          x(1, d) = static_cast<T>(std::numeric_limits<double>::quiet_NaN());
        }
        auto y = this->place(TestFixture::template unwritten<T>(3, dim, 1));
        this->backend_.causal_conv1d_step(this->place(x).in(), states.out(), slots.in(), this->place(c.w).in(), act,
                                          y.out(), this->stream_);
        this->backend_.synchronize(this->stream_);
        const auto got = y.fetch();
        for (index_t d = 0; d < dim; ++d) {
          EXPECT_EQ(real(got(0, d)), real(want(t, d)));
          EXPECT_EQ(real(got(1, d)), 0);
        }
      }
      const auto left = states.fetch();
      for (index_t d = 0; d < dim; ++d) {
        for (index_t j = 0; j < width; ++j) {
          EXPECT_EQ(real(left(2, d, j)), real(c.x(length - width + j, d)));
          EXPECT_EQ(real(left(1, d, j)), real(cache(1, d, j)));
        }
      }
      EXPECT_TRUE(left.padding_is_unused());
    }
  }
}

template <class Fixture, class B>
recorder run_conv(const B& be) {
  recorder record;
  for (const index_t width : {4, 40}) {
    random_source random(13);
    const conv_case<typename Fixture::value_type> c(random, 300, 200, width, gdn::activation::silu);
    record(Fixture::forward(be, c));
    const auto back = Fixture::backward(be, c);
    record(back.dx);
    record(back.dhalo);
    record(back.dw);
  }
  return record;
}
TYPED_TEST_P(conv1d_conformance, ThreadCountChangesNoBit) {
  TestFixture::expect_same_on_variants([](const auto& be) { return run_conv<TestFixture>(be); });
}
TYPED_TEST_P(conv1d_conformance, ConcurrentCallsChangeNoBit) {
  TestFixture::expect_same_in_threads([](const auto& be) { return run_conv<TestFixture>(be); });
}

TYPED_TEST_P(conv1d_conformance, RefusesWhatDoesNotFit) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  const auto& be = this->backend_;
  random_source random(8);
  conv_case<T> c(random, 6, 4, 3, gdn::activation::silu);
  c.segments = {{0, 4, -1}, {4, 2, 0}};
  const auto segments = this->place_table(c.segments);
  const auto x = this->place(c.x), halo = this->place(c.halo), w = this->place(c.w), dy = this->place(c.dy);
  auto y = this->place(c.dy), dx = this->place(c.x), dhalo = this->place(c.halo);
  auto dw = this->place(host_tensor<A, 2>({4, 3}));
  const auto forward = [&](auto in_segments, auto in, auto in_halo, auto taps, auto to) {
    be.causal_conv1d_forward(in_segments, in, in_halo, taps, c.act, to, this->stream_);
    be.synchronize(this->stream_);
  };
  const operand table{"segments", segments.in(), 0U};
  const operand of_halo{"halo", halo.in(), 2U};
  expect_wrong_operands_refused(forward, table, operand{"x", x.in()}, of_halo, operand{"w", w.in(), 1U, false},
                                operand{"y", y.out()});
  EXPECT_THROW(forward(rows(segments.in(), 0, 0), x.in(), halo.in(), w.in(), y.out()), gdn::shape_error);
  EXPECT_THROW(forward(segments.in(), x.in(), halo.in(), columns(w.in(), 0, 0), y.out()), gdn::shape_error);

  const auto backward = [&](auto in_segments, auto in, auto in_halo, auto taps, auto d_out, auto d_in, auto d_halo,
                            auto d_taps) {
    be.causal_conv1d_backward(in_segments, in, in_halo, taps, c.act, d_out, d_in, d_halo, d_taps,
                              TestFixture::scratch(), this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(backward, table, operand{"x", x.in()}, of_halo, operand{"w", w.in(), 3U, false},
                                operand{"dy", dy.in()}, operand{"dx", dx.out()}, operand{"dhalo", dhalo.out()},
                                operand{"dw", dw.out()});

  const auto token = this->place(random_tensor<T, 2>(random, {3, 4}));
  auto states = this->place(random_tensor<T, 3>(random, {3, 4, 3}));
  auto out = this->place(host_tensor<T, 2>({3, 4}));
  const auto slots = this->place_table(std::vector<std::int32_t>{2, -1, 0});
  const auto step = [&](auto in, auto pool, auto in_slots, auto taps, auto to) {
    be.causal_conv1d_step(in, pool, in_slots, taps, c.act, to, this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(step, operand{"x", token.in()}, operand{"states", states.out(), 6U, false},
                                operand{"slots", slots.in()}, operand{"w", w.in(), 3U, false}, operand{"y", out.out()});
}

REGISTER_TYPED_TEST_SUITE_P(conv1d_conformance, ForwardIsTheFormulaOverSegmentsAndHalos,
                            BackwardIsTheFormulaOverSegmentsAndHalos, GradientsAreDifferencesInDouble,
                            SplitAnywhereEqualsWhole, NaNStaysInItsSegment, StepsEqualTheWholeSequence,
                            ThreadCountChangesNoBit, ConcurrentCallsChangeNoBit, RefusesWhatDoesNotFit);

}  // namespace gdn_test
