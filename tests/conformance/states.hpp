// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every backend's state_ops and pool_steps must do.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include <gdn/concepts/state_pool.hpp>
#include <gdn/core/storage.hpp>

#include <conformance/fixture.hpp>
#include <conformance/refusals.hpp>

namespace gdn_test {

/// A pool of states: either order of its axes, with gaps everywhere, all multiples of `gap`.
template <class S>
class strided_states {
 public:
  strided_states(random_source& random, index_t slots, index_t H, index_t K, index_t V, bool key_last, index_t gap = 1)
      : shape_(layout(random, slots, H, K, V, key_last, gap)),
        elements_(static_cast<std::size_t>(slots * shape_.stride_[0] + 1), static_cast<S>(std::nanf(""))) {
    std::uniform_real_distribution<float> value(-1, 1);
    for_each(
        [&](index_t n, index_t h, index_t k, index_t v) { at(n, h, k, v) = static_cast<S>(value(random.engine())); });
  }
  S& at(index_t n, index_t h, index_t k, index_t v) { return over(elements_.data())(n, h, k, v); }
  std::vector<S>& elements() { return elements_; }
  template <class F>
  void for_each(F&& f) const {
    for (index_t n = 0; n < shape_.extent(0); ++n) {
      for (index_t h = 0; h < shape_.extent(1); ++h) {
        for (index_t k = 0; k < shape_.extent(2); ++k) {
          for (index_t v = 0; v < shape_.extent(3); ++v) f(n, h, k, v);
        }
      }
    }
  }
  template <class M = gdn::host_memory, class P>
  gdn::tensor_ref<P, 4, M> over(P* data) const {
    gdn::tensor_ref<P, 4, M> t;
    t.data_ = data;
    std::copy_n(shape_.extent_, 4, t.extent_);
    std::copy_n(shape_.stride_, 4, t.stride_);
    return t;
  }
  /// Equal bytes, gaps included.
  bool operator==(const strided_states& other) const {
    return elements_.size() == other.elements_.size() &&
           std::memcmp(elements_.data(), other.elements_.data(), elements_.size() * sizeof(S)) == 0;
  }

 private:
  static gdn::tensor_ref<S, 4> layout(random_source& random, index_t slots, index_t H, index_t K, index_t V,
                                      bool key_last, index_t gap) {
    gdn::tensor_ref<S, 4> t;
    const index_t extents[] = {slots, H, K, V};
    std::copy_n(extents, 4, t.extent_);
    t.stride_[key_last ? 2 : 3] = 1;
    const index_t row = (key_last ? K : V) + gap * random.between(0, 2);
    t.stride_[key_last ? 3 : 2] = row;
    t.stride_[1] = row * (key_last ? V : K) + gap * random.between(0, 3);
    t.stride_[0] = t.stride_[1] * H + gap * random.between(0, 5);
    return t;
  }

  gdn::tensor_ref<S, 4> shape_;
  std::vector<S> elements_;
};

/// The same in the memory of a backend.
template <class Subject, class S>
class placed_pool {
 public:
  using memory = typename Subject::backend_type::memory_type;

  explicit placed_pool(strided_states<S> host) : host_(std::move(host)), array_(host_.elements().size()) {
    array_.upload(host_.elements().data());
  }
  gdn::tensor_ref<S, 4, memory> out() { return host_.template over<memory>(array_.data()); }
  gdn::tensor_ref<const S, 4, memory> in() { return out(); }
  strided_states<S> fetch() const {
    strided_states<S> t = host_;
    array_.download(t.elements().data());
    return t;
  }

 private:
  strided_states<S> host_;
  typename Subject::template array<S> array_;
};

template <class Subject>
class states_conformance : public backend_fixture<Subject> {
 public:
  /// f(S{}) for each type in which a pool may keep the recurrent states of a layer.
  template <class F>
  static void for_each_state_type(F&& f) {
    f(typename backend_fixture<Subject>::sum_type{});
    f(gdn::bfloat16{});
  }
  template <class S, class A>
  void check_moves(std::uint64_t n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    const index_t slots = random.between(1, 9), H = random.between(1, 4);
    const index_t gap = n % 2 == 0 ? 1 : 8;  // a backend may move eight elements at once
    const index_t K = random.between(1, 70), V = gap * random.between(1, 72 / gap);
    const bool key_last = random.coin();
    strided_states<S> host(random, slots, H, K, V, key_last, gap);
    placed_pool<Subject, S> pool(host);
    std::vector<std::int32_t> names;
    for (const index_t slot : random.permutation(slots)) {
      if (!random.coin(3)) names.push_back(random.coin(4) ? -1 : static_cast<std::int32_t>(slot));
    }
    const auto count = static_cast<index_t>(names.size());
    const auto table = this->place_table(names);

    auto loaded = this->place(host_tensor<A, 4>({count, H, K, V}));
    this->backend_.load_states(pool.in(), table.in(), loaded.out(), this->stream_);
    this->backend_.synchronize(this->stream_);
    const auto got = loaded.fetch();
    index_t wrong = 0;
    for (index_t i = 0; i < count; ++i) {
      const std::int32_t slot = names[static_cast<std::size_t>(i)];
      for (index_t e = 0; e < H * K * V; ++e) {
        const index_t h = e / (K * V), k = e / V % K, v = e % V;
        const double want = slot < 0 ? 0 : real(host.at(slot, h, k, v));
        wrong += real(got(i, h, k, v)) != want ? 1 : 0;
      }
    }
    EXPECT_EQ(wrong, 0) << "elements loaded";

    strided_states<S> want = host;
    const auto values = random_tensor<A, 4>(random, {count, H, K, V});
    for (index_t i = 0; i < count; ++i) {
      const std::int32_t slot = names[static_cast<std::size_t>(i)];
      for (index_t e = 0; slot >= 0 && e < H * K * V; ++e) {
        const index_t h = e / (K * V), k = e / V % K, v = e % V;
        want.at(slot, h, k, v) = static_cast<S>(values(i, h, k, v));
      }
    }
    this->backend_.store_states(this->place(values).in(), table.in(), pool.out(), this->stream_);
    this->backend_.synchronize(this->stream_);
    EXPECT_TRUE(pool.fetch() == want) << "stored";

    for (const std::int32_t slot : names) {
      want.for_each([&](index_t m, index_t h, index_t k, index_t v) {
        if (m == slot) want.at(m, h, k, v) = static_cast<S>(0.0F);
      });
    }
    gdn::tensor_ref<const A, 4, typename Subject::backend_type::memory_type> nothing;
    this->backend_.store_states(nothing, table.in(), pool.out(), this->stream_);
    this->backend_.synchronize(this->stream_);
    EXPECT_TRUE(pool.fetch() == want) << "cleared";
  }
};
TYPED_TEST_SUITE_P(states_conformance);

TYPED_TEST_P(states_conformance, LoadAndStoreMoveSlotsOfAnyStrides) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  for (std::uint64_t n = 0; n < 40; ++n) {
    TestFixture::for_each_state_type([&]<class S>(S) { this->template check_moves<S, A>(n); });
    this->template check_moves<T, T>(n);
  }
}

/// One step on pools of both orders and types against the recurrence in double.
TYPED_TEST_P(states_conformance, StepOnAPoolIsTheRecurrence) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  TestFixture::for_each_state_type([&]<class S>(S) {
    for (std::uint64_t n = 0; n < 20; ++n) {
      SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
      random_source random(n);
      const index_t slots = random.between(1, 5), Hk = random.between(1, 2), Hv = Hk * random.between(1, 3);
      const index_t K = TestFixture::head_size(random.between(1, 70));
      const index_t V = TestFixture::head_size(random.between(1, 70));
      strided_states<S> want(random, slots, Hv, K, V, n % 2 == 1, n % 4 < 2 ? 1 : 8);
      placed_pool<TypeParam, S> pool(want);
      std::vector<std::int32_t> names = {-1};
      for (const index_t slot : random.permutation(slots)) {
        if (random.coin()) names.push_back(static_cast<std::int32_t>(slot));
      }
      const auto rows = static_cast<index_t>(names.size());
      auto q = random_tensor<T, 3>(random, {rows, Hk, K}, 0, 1 / std::sqrt(static_cast<double>(K)));
      auto k = random_tensor<T, 3>(random, {rows, Hk, K}, 0, 1 / std::sqrt(static_cast<double>(K)));
      auto v = random_tensor<T, 3>(random, {rows, Hv, V});
      auto g = random_tensor<A, 2>(random, {rows, Hv});
      g.for_each([](A& value) { value = -std::abs(value); });
      auto beta = random_tensor<T, 2>(random, {rows, Hv});
      const double scale = 0.5;

      host_tensor<double, 3> want_o({rows, Hv, V});
      double worst = 0;  // of the states, in units of their type's rounding
      std::vector<double> exact;
      for (index_t i = 0; i < rows; ++i) {
        const std::int32_t slot = names[static_cast<std::size_t>(i)];
        for (index_t h = 0; slot >= 0 && h < Hv; ++h) {
          const index_t hk = h / (Hv / Hk);
          for (index_t c = 0; c < V; ++c) {
            const double a = std::exp(real(g(i, h)));
            double sk = 0;
            for (index_t r = 0; r < K; ++r) sk += a * real(want.at(slot, h, r, c)) * real(k(i, hk, r));
            const double u = real(beta(i, h)) * (real(v(i, h, c)) - sk);
            for (index_t r = 0; r < K; ++r) {
              const double next = a * real(want.at(slot, h, r, c)) + real(k(i, hk, r)) * u;
              want_o(i, h, c) += scale * real(q(i, hk, r)) * next;
              exact.push_back(next);
            }
          }
        }
      }
      auto o = this->place(host_tensor<T, 3>({rows, Hv, V}));
      const auto pq = this->place(q), pk = this->place(k), pv = this->place(v);
      const auto pg = this->place(g);
      const auto pbeta = this->place(beta);
      const auto table = this->place_table(names);
      gdn::delta_rule_inputs<T, typename TypeParam::backend_type::memory_type> in{pq.in(), pk.in(), pv.in(), pg.in(),
                                                                                  pbeta.in()};
      this->backend_.delta_rule_step(static_cast<A>(scale), in, pool.out(), table.in(), o.out(), this->stream_);
      this->backend_.synchronize(this->stream_);
      auto got = pool.fetch();
      std::size_t next = 0;
      for (index_t i = 0; i < rows; ++i) {
        const std::int32_t slot = names[static_cast<std::size_t>(i)];
        for (index_t h = 0; slot >= 0 && h < Hv; ++h) {
          for (index_t c = 0; c < V; ++c) {
            for (index_t r = 0; r < K; ++r) {
              const double error = std::abs(real(got.at(slot, h, r, c)) - exact[next]);
              worst = std::max(worst, error / (std::abs(exact[next]) * epsilon<S> / 2 + 20 * epsilon<A>));
              ++next;
              want.at(slot, h, r, c) = got.at(slot, h, r, c);
            }
          }
        }
      }
      EXPECT_LE(worst, 1) << "one rounding of each state";
      EXPECT_TRUE(got == want) << "slots that are not named";
      EXPECT_TRUE(close(o.fetch(), want_o, tolerance<T>(4)));
    }
  });
}

/// Slots that are outside the pool, or twice in a table, are for backends to see that can read it.
TYPED_TEST_P(states_conformance, RefusesWhatDoesNotFit) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  const auto& be = this->backend_;
  random_source random(3);
  const index_t Hk = 2, Hv = 4, K = TestFixture::head_size(4), V = TestFixture::head_size(3);
  placed_pool<TypeParam, A> pool(strided_states<A>(random, 5, Hv, K, V, false));
  const auto slots = this->place_table(std::vector<std::int32_t>{3, -1, 0});
  auto states = this->place(random_tensor<A, 4>(random, {3, Hv, K, V}));
  auto no_rows = pool.out();  // neither rows nor columns are arrays
  no_rows.stride_[2] = no_rows.stride_[3] = 0;

  const auto load = [&](auto... operands) {
    be.load_states(operands..., this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(load, operand{"the pool", pool.in(), 14U, false}, operand{"slots", slots.in()},
                                operand{"the states", states.out()});
  EXPECT_THROW(load(no_rows, slots.in(), states.out()), gdn::shape_error);
  const auto store = [&](auto... operands) {
    be.store_states(operands..., this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(store, operand{"the states", states.in(), 15U, true, false},
                                operand{"slots", slots.in()}, operand{"the pool", pool.out(), 14U, false});
  EXPECT_THROW(store(states.in(), slots.in(), no_rows), gdn::shape_error);

  const auto q = this->place(random_tensor<T, 3>(random, {3, Hk, K})),
             k = this->place(random_tensor<T, 3>(random, {3, Hk, K}));
  const auto v = this->place(random_tensor<T, 3>(random, {3, Hv, V}));
  const auto g = this->place(host_tensor<A, 2>({3, Hv}));
  const auto beta = this->place(host_tensor<T, 2>({3, Hv}));
  auto o = this->place(host_tensor<T, 3>({3, Hv, V}));
  const auto step = [&](auto in_q, auto in_k, auto in_v, auto in_g, auto in_beta, auto in_states, auto in_slots,
                        auto out) {
    const gdn::delta_rule_inputs<T, typename TypeParam::backend_type::memory_type> in{in_q, in_k, in_v, in_g, in_beta};
    be.delta_rule_step(A(1), in, in_states, in_slots, out, this->stream_);
    be.synchronize(this->stream_);
  };
  expect_wrong_operands_refused(step, operand{"q", q.in()}, operand{"k", k.in()}, operand{"v", v.in()},
                                operand{"g", g.in(), 3U, false}, operand{"beta", beta.in(), 3U, false},
                                operand{"states", pool.out(), 2U, false}, operand{"slots", slots.in()},
                                operand{"o", o.out()});
  EXPECT_THROW(step(q.in(), k.in(), v.in(), g.in(), beta.in(), no_rows, slots.in(), o.out()), gdn::shape_error);
  const auto three = [](const auto& t) { return gdn::slice(t, 1, 0, 3); };  // value heads; no multiple of two
  EXPECT_THROW(step(q.in(), k.in(), three(v.in()), three(g.in()), three(beta.in()), three(pool.out()), slots.in(),
                    three(o.out())),
               gdn::shape_error);
}

REGISTER_TYPED_TEST_SUITE_P(states_conformance, LoadAndStoreMoveSlotsOfAnyStrides, StepOnAPoolIsTheRecurrence,
                            RefusesWhatDoesNotFit);

}  // namespace gdn_test
