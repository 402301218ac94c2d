// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every backend's gate_ops must do.

#include <cmath>
#include <concepts>
#include <cstdint>

#include <conformance/fixture.hpp>
#include <conformance/refusals.hpp>

namespace gdn_test {

/// The values that gates read, and the gradients that reach them.
template <class T>
struct gate_case {
  using A = gdn::accumulate_t<T>;
  host_tensor<T, 2> a, b;
  host_tensor<A, 1> a_log, dt_bias;
  host_tensor<A, 2> dg, dbeta;

  gate_case(random_source& random, index_t length, index_t heads)
      : a(random_tensor<T, 2>(random, {length, heads}, 3, 3)),
        b(random_tensor<T, 2>(random, {length, heads}, 1, 3)),
        a_log(random_tensor<A, 1>(random, {heads})),
        dt_bias(random_tensor<A, 1>(random, {heads})),
        dg(random_tensor<A, 2>(random, {length, heads}, 2)),
        dbeta(random_tensor<A, 2>(random, {length, heads})) {}
  index_t length() const { return a.extent(0); }
  index_t heads() const { return a.extent(1); }
};

template <class Subject>
class gate_conformance : public backend_fixture<Subject> {
 public:
  using fixture = backend_fixture<Subject>;

  template <class T>
  struct outputs {
    placed<Subject, gdn::accumulate_t<T>, 2> g;
    placed<Subject, T, 2> beta;
  };

  template <class B, class T>
  static auto forward(const B& be, const gate_case<T>& c) {
    using A = gdn::accumulate_t<T>;
    const auto s = Subject::stream();
    outputs<T> out{fixture::place(host_tensor<A, 2>({c.length(), c.heads()}, 1)),
                   fixture::place(host_tensor<T, 2>({c.length(), c.heads()}, 2))};
    be.gates_forward(fixture::place(c.a).in(), fixture::place(c.b).in(), fixture::place(c.a_log).in(),
                     fixture::place(c.dt_bias).in(), out.g.out(), out.beta.out(), s);
    be.synchronize(s);
    return out;
  }

  template <class T>
  struct gradients {
    placed<Subject, T, 2> da, db;
    placed<Subject, gdn::accumulate_t<T>, 1> d_a_log, d_dt_bias;
  };
  /// The parameters' gradients start from 1, since they are added to.
  template <class B, class T>
  static auto backward(const B& be, const gate_case<T>& c) {
    using A = gdn::accumulate_t<T>;
    const auto s = Subject::stream();
    host_tensor<A, 1> ones({c.heads()});
    ones.for_each([](A& v) { v = A(1); });
    host_tensor<T, 2> rows({c.length(), c.heads()}, 1);
    gradients<T> out{fixture::place(rows), fixture::place(rows), fixture::place(ones), fixture::place(ones)};
    be.gates_backward(fixture::place(c.dg).in(), fixture::place(c.dbeta).in(), fixture::place(c.a).in(),
                      fixture::place(c.b).in(), fixture::place(c.a_log).in(), fixture::place(c.dt_bias).in(),
                      out.da.out(), out.db.out(), out.d_a_log.out(), out.d_dt_bias.out(), fixture::scratch(), s);
    be.synchronize(s);
    return out;
  }

  static double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
};
TYPED_TEST_SUITE_P(gate_conformance);

TYPED_TEST_P(gate_conformance, ForwardIsTheFormula) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0;
       const auto& [length, heads] : {std::pair<index_t, index_t>{1, 1}, {0, 3}, {130, 5}, {67, 64}, {3, 130}}) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n++);
    const gate_case<T> c(random, length, heads);
    const auto got = TestFixture::forward(this->backend_, c);
    host_tensor<double, 2> g({length, heads}), beta({length, heads});
    for (index_t t = 0; t < length; ++t) {
      for (index_t h = 0; h < heads; ++h) {
        g(t, h) = -std::exp(real(c.a_log(h))) * TestFixture::softplus(real(c.a(t, h)) + real(c.dt_bias(h)));
        beta(t, h) = TestFixture::sigmoid(real(c.b(t, h)));
      }
    }
    EXPECT_TRUE(close(got.g.fetch(), g, tolerance<typename TestFixture::sum_type>()));
    EXPECT_TRUE(close(got.beta.fetch(), beta, tolerance<T>()));
  }
}

TYPED_TEST_P(gate_conformance, BackwardIsTheFormulaAndAddsToParameters) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  for (std::uint64_t n = 0;
       const auto& [length, heads] : {std::pair<index_t, index_t>{1, 1}, {0, 3}, {130, 5}, {67, 64}, {3, 130}}) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n++);
    const gate_case<T> c(random, length, heads);
    const auto got = TestFixture::backward(this->backend_, c);
    host_tensor<double, 2> da({length, heads}), db({length, heads});
    host_tensor<double, 1> d_a_log({heads}), d_dt_bias({heads});
    for (index_t h = 0; h < heads; ++h) {
      d_a_log(h) = d_dt_bias(h) = 1;
      for (index_t t = 0; t < length; ++t) {
        const double x = real(c.a(t, h)) + real(c.dt_bias(h)), rate = -std::exp(real(c.a_log(h)));
        const double beta = TestFixture::sigmoid(real(c.b(t, h)));
        da(t, h) = real(c.dg(t, h)) * rate * TestFixture::sigmoid(x);
        db(t, h) = real(c.dbeta(t, h)) * beta * (1 - beta);
        d_a_log(h) += real(c.dg(t, h)) * rate * TestFixture::softplus(x);
        d_dt_bias(h) += da(t, h);
      }
    }
    EXPECT_TRUE(close(got.da.fetch(), da, tolerance<T>()));
    EXPECT_TRUE(close(got.db.fetch(), db, tolerance<T>()));
    EXPECT_TRUE(close(got.d_a_log.fetch(), d_a_log, tolerance<A>(length)));
    EXPECT_TRUE(close(got.d_dt_bias.fetch(), d_dt_bias, tolerance<A>(length)));
  }
}

TYPED_TEST_P(gate_conformance, GradientsAreDifferencesInDouble) {
  using T = typename TestFixture::value_type;
  if constexpr (std::same_as<T, double>) {
    random_source random(11);
    gate_case<double> c(random, 4, 3);
    const auto loss = [&] {
      const auto out = TestFixture::forward(this->backend_, c);
      return inner(out.g.fetch(), c.dg) + inner(out.beta.fetch(), c.dbeta);
    };
    const auto got = TestFixture::backward(this->backend_, c);
    EXPECT_TRUE(close(got.da.fetch(), this->differences(c.a, loss), difference_tolerance));
    EXPECT_TRUE(close(got.db.fetch(), this->differences(c.b, loss), difference_tolerance));
    auto d_a_log = this->differences(c.a_log, loss), d_dt_bias = this->differences(c.dt_bias, loss);
    d_a_log.for_each([](double& v) { v += 1; });
    d_dt_bias.for_each([](double& v) { v += 1; });
    EXPECT_TRUE(close(got.d_a_log.fetch(), d_a_log, difference_tolerance));
    EXPECT_TRUE(close(got.d_dt_bias.fetch(), d_dt_bias, difference_tolerance));
  }
}

TYPED_TEST_P(gate_conformance, ExtremeInputsGiveNumbers) {
  using T = typename TestFixture::value_type;
  random_source random(0);
  gate_case<T> c(random, 1, 6);
  const double values[] = {-6e4, -200, -20, 20, 200, 6e4};
  for (index_t h = 0; h < 6; ++h) {
    c.a(0, h) = c.b(0, h) = static_cast<T>(values[h]);
    c.dt_bias(h) = c.a_log(h) = 0;
  }
  const auto out = TestFixture::forward(this->backend_, c);
  const auto g = out.g.fetch();
  const auto beta = out.beta.fetch();
  const auto back = TestFixture::backward(this->backend_, c);
  const auto da = back.da.fetch(), db = back.db.fetch();
  for (index_t h = 0; h < 6; ++h) {
    EXPECT_NEAR(real(g(0, h)), -TestFixture::softplus(real(c.a(0, h))), 1e-6 * std::abs(values[h]));
    EXPECT_NEAR(real(beta(0, h)), values[h] < 0 ? 0 : 1, 1e-8);
    EXPECT_TRUE(std::isfinite(real(da(0, h))) && std::isfinite(real(db(0, h))));
  }
}

template <class Fixture, class B>
recorder run_gates(const B& be) {
  recorder record;
  random_source random(5);
  const gate_case<typename Fixture::value_type> c(random, 1000, 37);
  const auto out = Fixture::forward(be, c);
  record(out.g);
  record(out.beta);
  const auto gradients = Fixture::backward(be, c);
  record(gradients.da);
  record(gradients.db);
  record(gradients.d_a_log);
  record(gradients.d_dt_bias);
  return record;
}
TYPED_TEST_P(gate_conformance, ThreadCountChangesNoBit) {
  TestFixture::expect_same_on_variants([](const auto& be) { return run_gates<TestFixture>(be); });
}
TYPED_TEST_P(gate_conformance, ConcurrentCallsChangeNoBit) {
  TestFixture::expect_same_in_threads([](const auto& be) { return run_gates<TestFixture>(be); });
}

TYPED_TEST_P(gate_conformance, RefusesWhatDoesNotFit) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  const auto& be = this->backend_;
  random_source random(12);
  const gate_case<T> c(random, 3, 2);
  const auto a = this->place(c.a), b = this->place(c.b);
  const auto a_log = this->place(c.a_log), dt_bias = this->place(c.dt_bias);
  const auto dg = this->place(c.dg), dbeta = this->place(c.dbeta);
  auto g = this->place(c.dg);
  auto beta = this->place(c.b), da = this->place(c.a), db = this->place(c.b);
  auto d_a_log = this->place(host_tensor<A, 1>({2})), d_dt_bias = this->place(host_tensor<A, 1>({2}));
  const auto forward = [&](auto... operands) {
    be.gates_forward(operands..., this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(forward, operand{"a", a.in()}, operand{"b", b.in()}, operand{"A_log", a_log.in()},
                                operand{"dt_bias", dt_bias.in()}, operand{"g", g.out()}, operand{"beta", beta.out()});
  const auto backward = [&](auto... operands) {
    be.gates_backward(operands..., TestFixture::scratch(), this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(backward, operand{"dg", dg.in()}, operand{"dbeta", dbeta.in()}, operand{"a", a.in()},
                                operand{"b", b.in()}, operand{"A_log", a_log.in()}, operand{"dt_bias", dt_bias.in()},
                                operand{"da", da.out()}, operand{"db", db.out()}, operand{"dA_log", d_a_log.out()},
                                operand{"d_dt_bias", d_dt_bias.out()});
}

REGISTER_TYPED_TEST_SUITE_P(gate_conformance, ForwardIsTheFormula, BackwardIsTheFormulaAndAddsToParameters,
                            GradientsAreDifferencesInDouble, ExtremeInputsGiveNumbers, ThreadCountChangesNoBit,
                            ConcurrentCallsChangeNoBit, RefusesWhatDoesNotFit);

}  // namespace gdn_test
