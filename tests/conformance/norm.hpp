// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every backend's norm_ops must do.

#include <cmath>
#include <concepts>
#include <cstdint>

#include <conformance/fixture.hpp>
#include <conformance/refusals.hpp>

namespace gdn_test {

inline constexpr double norm_eps = 1e-6;

template <class T>
struct norm_case {
  using A = gdn::accumulate_t<T>;
  host_tensor<T, 3> x, z, dy;
  host_tensor<A, 1> w;

  norm_case(random_source& random, index_t length, index_t heads, index_t dim)
      : x(random_tensor<T, 3>(random, {length, heads, dim}, 3)),
        z(random_tensor<T, 3>(random, {length, heads, dim}, 1, 3)),
        dy(random_tensor<T, 3>(random, {length, heads, dim}, 2)),
        w(random_tensor<A, 1>(random, {dim})) {}
  std::array<index_t, 3> extents() const { return {x.extent(0), x.extent(1), x.extent(2)}; }
  std::array<index_t, 2> vectors() const { return {x.extent(0), x.extent(1)}; }
};

template <class Subject>
class norm_conformance : public backend_fixture<Subject> {
 public:
  using fixture = backend_fixture<Subject>;

  template <class T>
  struct normalised {
    placed<Subject, T, 3> y;
    placed<Subject, gdn::accumulate_t<T>, 2> rstd;
  };
  template <class T>
  static normalised<T> blank(const norm_case<T>& c) {
    return {fixture::place(host_tensor<T, 3>(c.extents(), 1)),
            fixture::place(host_tensor<gdn::accumulate_t<T>, 2>(c.vectors(), 2))};
  }
  template <class B, class T>
  static normalised<T> l2norm(const B& be, const norm_case<T>& c) {
    auto out = blank(c);
    be.l2norm_forward(fixture::place(c.x).in(), norm_eps, out.y.out(), out.rstd.out(), Subject::stream());
    be.synchronize(Subject::stream());
    return out;
  }
  template <class B, class T>
  static normalised<T> gated_norm(const B& be, const norm_case<T>& c) {
    auto out = blank(c);
    be.gated_norm_forward(fixture::place(c.x).in(), fixture::place(c.z).in(), fixture::place(c.w).in(), norm_eps,
                          out.y.out(), out.rstd.out(), Subject::stream());
    be.synchronize(Subject::stream());
    return out;
  }
  template <class B, class T>
  static placed<Subject, T, 3> l2norm_gradient(const B& be, const norm_case<T>& c) {
    const auto forward = l2norm(be, c);
    auto dx = fixture::place(host_tensor<T, 3>(c.extents(), 2));
    be.l2norm_backward(fixture::place(c.dy).in(), forward.y.in(), forward.rstd.in(), dx.out(), Subject::stream());
    be.synchronize(Subject::stream());
    return dx;
  }
  template <class T>
  struct gated_gradient {
    placed<Subject, T, 3> dx, dz;
    placed<Subject, gdn::accumulate_t<T>, 1> dw;
  };
  /// dw starts from 1, since it is added to.
  template <class B, class T>
  static gated_gradient<T> gated_norm_gradient(const B& be, const norm_case<T>& c) {
    using A = gdn::accumulate_t<T>;
    const auto forward = gated_norm(be, c);
    host_tensor<A, 1> ones({c.x.extent(2)});
    ones.for_each([](A& v) { v = A(1); });
    host_tensor<T, 3> vectors(c.extents(), 1);
    gated_gradient<T> out{fixture::place(vectors), fixture::place(vectors), fixture::place(ones)};
    be.gated_norm_backward(fixture::place(c.dy).in(), fixture::place(c.x).in(), fixture::place(c.z).in(),
                           fixture::place(c.w).in(), forward.rstd.in(), out.dx.out(), out.dz.out(), out.dw.out(),
                           fixture::scratch(), Subject::stream());
    be.synchronize(Subject::stream());
    return out;
  }

  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static constexpr std::array<std::array<index_t, 3>, 6> all_extents = {
      {{1, 1, 1}, {0, 2, 3}, {70, 3, 128}, {5, 2, 17}, {3, 1, 300}, {2, 2, 700}}};
};
TYPED_TEST_SUITE_P(norm_conformance);

TYPED_TEST_P(norm_conformance, L2NormIsTheFormula) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; const auto& e : TestFixture::all_extents) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n++);
    const norm_case<T> c(random, e[0], e[1], e[2]);
    const auto got = TestFixture::l2norm(this->backend_, c);
    const auto got_rstd = got.rstd.fetch();
    host_tensor<double, 3> y(e), dx(e);
    host_tensor<double, 2> rstd({e[0], e[1]});
    for (index_t t = 0; t < e[0]; ++t) {
      for (index_t h = 0; h < e[1]; ++h) {
        double squares = norm_eps, along = 0;
        for (index_t i = 0; i < e[2]; ++i) squares += real(c.x(t, h, i)) * real(c.x(t, h, i));
        const double rho = rstd(t, h) = 1 / std::sqrt(squares);
        for (index_t i = 0; i < e[2]; ++i) y(t, h, i) = real(c.x(t, h, i)) * rho;
        for (index_t i = 0; i < e[2]; ++i) along += y(t, h, i) * real(c.dy(t, h, i));
        for (index_t i = 0; i < e[2]; ++i) dx(t, h, i) = rho * (real(c.dy(t, h, i)) - y(t, h, i) * along);
      }
    }
    EXPECT_TRUE(close(got.y.fetch(), y, tolerance<T>()));
    EXPECT_TRUE(close(got_rstd, rstd, tolerance<typename TestFixture::sum_type>()));
    // A vector of one element has a gradient of nearly zero, the difference of two equal numbers.
    if (e[2] > 1) {
      EXPECT_TRUE(close(TestFixture::l2norm_gradient(this->backend_, c).fetch(), dx, tolerance<T>(4)));
    }
  }
}

TYPED_TEST_P(norm_conformance, GatedNormIsTheFormula) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  for (std::uint64_t n = 0; const auto& e : TestFixture::all_extents) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n++);
    const norm_case<T> c(random, e[0], e[1], e[2]);
    const auto got = TestFixture::gated_norm(this->backend_, c);
    const auto gradient = TestFixture::gated_norm_gradient(this->backend_, c);
    host_tensor<double, 3> y(e), dx(e), dz(e);
    host_tensor<double, 2> rstd({e[0], e[1]});
    host_tensor<double, 1> dw({e[2]});
    dw.for_each([](double& v) { v = 1; });
    for (index_t t = 0; t < e[0]; ++t) {
      for (index_t h = 0; h < e[1]; ++h) {
        double squares = 0, along = 0;
        for (index_t i = 0; i < e[2]; ++i) squares += real(c.x(t, h, i)) * real(c.x(t, h, i));
        const double rho = rstd(t, h) = 1 / std::sqrt(squares / real(e[2]) + norm_eps);
        const auto d = [&](index_t i) {
          return real(c.dy(t, h, i)) * real(c.w(i)) * real(c.z(t, h, i)) * TestFixture::sigmoid(real(c.z(t, h, i)));
        };
        for (index_t i = 0; i < e[2]; ++i) along += real(c.x(t, h, i)) * rho * d(i) / real(e[2]);
        for (index_t i = 0; i < e[2]; ++i) {
          const double x = real(c.x(t, h, i)) * rho, z = real(c.z(t, h, i)), s = TestFixture::sigmoid(z);
          y(t, h, i) = real(c.w(i)) * x * z * s;
          dx(t, h, i) = rho * (d(i) - x * along);
          dz(t, h, i) = real(c.dy(t, h, i)) * real(c.w(i)) * x * s * (1 + z * (1 - s));
          dw(i) += real(c.dy(t, h, i)) * x * z * s;
        }
      }
    }
    EXPECT_TRUE(close(got.y.fetch(), y, tolerance<T>()));
    EXPECT_TRUE(close(got.rstd.fetch(), rstd, tolerance<A>()));
    if (e[2] > 1) {
      EXPECT_TRUE(close(gradient.dx.fetch(), dx, tolerance<T>(4)));
    }
    EXPECT_TRUE(close(gradient.dz.fetch(), dz, tolerance<T>()));
    EXPECT_TRUE(close(gradient.dw.fetch(), dw, tolerance<A>(e[0] * e[1])));
  }
}

TYPED_TEST_P(norm_conformance, GradientsAreDifferencesInDouble) {
  using T = typename TestFixture::value_type;
  if constexpr (std::same_as<T, double>) {
    random_source random(21);
    norm_case<double> c(random, 2, 3, 5);
    const auto l2_loss = [&] { return inner(TestFixture::l2norm(this->backend_, c).y.fetch(), c.dy); };
    EXPECT_TRUE(close(TestFixture::l2norm_gradient(this->backend_, c).fetch(), this->differences(c.x, l2_loss),
                      difference_tolerance));
    const auto loss = [&] { return inner(TestFixture::gated_norm(this->backend_, c).y.fetch(), c.dy); };
    const auto got = TestFixture::gated_norm_gradient(this->backend_, c);
    EXPECT_TRUE(close(got.dx.fetch(), this->differences(c.x, loss), difference_tolerance));
    EXPECT_TRUE(close(got.dz.fetch(), this->differences(c.z, loss), difference_tolerance));
    auto dw = this->differences(c.w, loss);
    dw.for_each([](double& v) { v += 1; });
    EXPECT_TRUE(close(got.dw.fetch(), dw, difference_tolerance));
  }
}

/// Padded tokens are rows of zeros.
TYPED_TEST_P(norm_conformance, ZeroRowsGiveZerosAndFiniteGradients) {
  using T = typename TestFixture::value_type;
  random_source random(2);
  norm_case<T> c(random, 2, 1, 16);
  c.x.for_each([](T& v) { v = T{}; });
  const host_tensor<T, 3> zeros(c.extents());
  EXPECT_TRUE(same_bits(TestFixture::l2norm(this->backend_, c).y.fetch(), zeros));
  EXPECT_TRUE(same_bits(TestFixture::gated_norm(this->backend_, c).y.fetch(), zeros));
  auto dx = TestFixture::l2norm_gradient(this->backend_, c).fetch();
  dx.for_each([](T& v) { EXPECT_TRUE(std::isfinite(real(v))); });
  auto d_o = TestFixture::gated_norm_gradient(this->backend_, c).dx.fetch();
  d_o.for_each([](T& v) { EXPECT_TRUE(std::isfinite(real(v))); });
}

template <class Fixture, class B>
recorder run_norms(const B& be) {
  recorder record;
  random_source random(9);
  for (const index_t dim : {128, 300}) {
    const norm_case<typename Fixture::value_type> c(random, 150, 3, dim);
    const auto l2 = Fixture::l2norm(be, c);
    const auto gated = Fixture::gated_norm(be, c);
    const auto gradient = Fixture::gated_norm_gradient(be, c);
    record(l2.y);
    record(l2.rstd);
    record(Fixture::l2norm_gradient(be, c));
    record(gated.y);
    record(gradient.dx);
    record(gradient.dz);
    record(gradient.dw);
  }
  return record;
}
TYPED_TEST_P(norm_conformance, ThreadCountChangesNoBit) {
  TestFixture::expect_same_on_variants([](const auto& be) { return run_norms<TestFixture>(be); });
}
TYPED_TEST_P(norm_conformance, ConcurrentCallsChangeNoBit) {
  TestFixture::expect_same_in_threads([](const auto& be) { return run_norms<TestFixture>(be); });
}

TYPED_TEST_P(norm_conformance, RefusesWhatDoesNotFit) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  const auto& be = this->backend_;
  random_source random(22);
  const norm_case<T> c(random, 3, 2, 8);
  const auto x = this->place(c.x), z = this->place(c.z), dy = this->place(c.dy);
  const auto w = this->place(c.w);
  auto y = this->place(c.x), dx = this->place(c.x), dz = this->place(c.x);
  auto rstd = this->place(host_tensor<A, 2>(c.vectors(), 1));
  auto dw = this->place(host_tensor<A, 1>({8}));
  const auto wait = [&] { be.synchronize(this->stream_); };
  const auto l2 = [&](auto in, auto out, auto scales) {
    be.l2norm_forward(in, norm_eps, out, scales, this->stream_);
    wait();
  };
  expect_wrong_operands_refused(l2, operand{"x", x.in()}, operand{"y", y.out()}, operand{"rstd", rstd.out()});
  const auto l2_backward = [&](auto... operands) {
    be.l2norm_backward(operands..., this->stream_);
    wait();
  };
  expect_wrong_operands_refused(l2_backward, operand{"dy", dy.in()}, operand{"y", y.in()}, operand{"rstd", rstd.in()},
                                operand{"dx", dx.out()});
  const auto gated = [&](auto in, auto gates, auto weights, auto out, auto scales) {
    be.gated_norm_forward(in, gates, weights, norm_eps, out, scales, this->stream_);
    wait();
  };
  expect_wrong_operands_refused(gated, operand{"o", x.in()}, operand{"z", z.in()}, operand{"w", w.in()},
                                operand{"y", y.out()}, operand{"rstd", rstd.out()});
  const auto gated_backward = [&](auto... operands) {
    be.gated_norm_backward(operands..., TestFixture::scratch(), this->stream_);
    wait();
  };
  expect_wrong_operands_refused(gated_backward, operand{"dy", dy.in()}, operand{"o", x.in()}, operand{"z", z.in()},
                                operand{"w", w.in()}, operand{"rstd", rstd.in()}, operand{"d_o", dx.out()},
                                operand{"dz", dz.out()}, operand{"dw", dw.out()});
}

REGISTER_TYPED_TEST_SUITE_P(norm_conformance, L2NormIsTheFormula, GatedNormIsTheFormula,
                            GradientsAreDifferencesInDouble, ZeroRowsGiveZerosAndFiniteGradients,
                            ThreadCountChangesNoBit, ConcurrentCallsChangeNoBit, RefusesWhatDoesNotFit);

}  // namespace gdn_test
