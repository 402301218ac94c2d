// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every backend's gated_delta_rule must do.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gdn/core/storage.hpp>

#include <conformance/fixture.hpp>
#include <support/errors.hpp>
#include <support/rule_reference.hpp>

namespace gdn_test {

/// rms(error) / rms(reference), for every output and gradient of the rule on well-conditioned inputs. Rounding a tensor
/// to 16 bits moves it by 0.22 eps of its size. On matrix units up to 14 roundings lie on the way to a gradient (X, T, P,
/// S, dS, W, D, dD, dW, dX, X^T dX, E, dP and itself), which makes 0.22 sqrt(14) = 0.82 eps where they are independent.
template <class T>
inline constexpr double rule_limit = sizeof(T) == 2 ? epsilon<T> : sizeof(T) == 4 ? 2e-6 : 1e-13;

/// In 16 bits, what is badly conditioned may be off by so many times what one rounding of each input moves exact results.
inline constexpr double rule_roundings = 4;

/// Keys that nearly agree make gradients cancel, so that roundings weigh more.
template <class T>
inline constexpr double cancelling_limit = (sizeof(T) == 2 ? 1 : 5) * rule_limit<T>;

/// What a type cannot tell from zero where it is stored: of e^-20, float16 holds nothing.
template <class T>
inline constexpr double rule_underflow = 0;
template <>
inline constexpr double rule_underflow<gdn::float16> = 0x1p-24;

/// Inputs of a call, as a backend stores them.
template <class T>
struct rule_case {
  using A = gdn::accumulate_t<T>;
  index_t chunk = 64;
  double scale = 1;
  std::vector<gdn::rule_segment> segments;
  host_tensor<T, 3> q, k, v, d_o;
  host_tensor<A, 2> g;
  host_tensor<T, 2> beta;
  host_tensor<A, 4> h0, dht;
  index_t final_places = 0, initial_places = 0;  // of ht and dh0

  index_t tokens() const { return q.extent(0); }
  index_t key_heads() const { return q.extent(1); }
  index_t value_heads() const { return v.extent(1); }
  index_t K() const { return q.extent(2); }
  index_t V() const { return v.extent(2); }
  index_t bias() const { return value_heads() * K() * V(); }
  index_t transition() const { return value_heads() * K() * K(); }

  /// The numbers that are stored: references start from the rounded ones.
  rule_numbers numbers() const {
    return {segments,
            static_cast<double>(static_cast<A>(scale)),
            converted<double>(q),
            converted<double>(k),
            converted<double>(v),
            converted<double>(d_o),
            converted<double>(g),
            converted<double>(beta),
            converted<double>(h0),
            converted<double>(dht)};
  }

  /// Cuts the rows anew. States: all segments have one, none has, or (`mixed`) random ones in random places.
  enum class states { none, all, mixed };
  void cut(const std::vector<index_t>& lengths, states which, random_source& random) {
    segments.clear();
    index_t begin = 0, chunks = 0;
    std::vector<index_t> places = random.permutation(static_cast<index_t>(lengths.size()));
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const auto place = [&] {
        const bool given = which == states::all || (which == states::mixed && random.coin());
        return given ? static_cast<std::int32_t>(places[i]) : -1;
      };
      gdn::rule_segment s{begin, lengths[i], chunks, place(), place(), -1, place()};
      s.dh0 = s.h0;
      segments.push_back(s);
      begin += lengths[i];
      chunks += (lengths[i] + chunk - 1) / chunk;
    }
    const auto n = static_cast<index_t>(lengths.size());
    h0 = random_tensor<A, 4>(random, {n, value_heads(), K(), V()}, 0, 0.5);
    dht = random_tensor<A, 4>(random, {n, value_heads(), K(), V()}, 0, 0.5);
    final_places = initial_places = n;
  }
};

struct rule_sizes {
  index_t tokens, key_heads, value_heads, K, V;
};

enum class key_kind { random, correlated, identical };
enum class gate_kind { moderate, none, strong, extinct, mixed };
enum class beta_kind { moderate, zero, one, mixed };

/// One segment over all tokens. `correlated` keys have a cosine of 0.9 with a common one.
template <class T>
rule_case<T> random_rule_case(random_source& random, const rule_sizes& z, index_t chunk = 64,
                              key_kind keys = key_kind::random, gate_kind gates = gate_kind::moderate,
                              beta_kind betas = beta_kind::moderate) {
  using A = gdn::accumulate_t<T>;
  rule_case<T> c;
  c.chunk = chunk;
  c.scale = 1 / std::sqrt(static_cast<double>(z.K));
  const auto normal = [&] { return std::normal_distribution<double>()(random.engine()); };
  const auto unit = [&](auto& t) {
    for (index_t i = 0; i < t.extent(0); ++i) {
      for (index_t h = 0; h < t.extent(1); ++h) {
        double sum = 1e-6;
        for (index_t j = 0; j < t.extent(2); ++j) sum += t(i, h, j) * t(i, h, j);
        for (index_t j = 0; j < t.extent(2); ++j) t(i, h, j) /= std::sqrt(sum);
      }
    }
  };
  host_tensor<double, 3> q({z.tokens, z.key_heads, z.K}), k = q, common({1, z.key_heads, z.K});
  q.for_each([&](double& v) { v = normal(); });
  k.for_each([&](double& v) { v = normal(); });
  common.for_each([&](double& v) { v = normal(); });
  unit(q);
  unit(k);
  unit(common);
  for (index_t i = 0; i < z.tokens; ++i) {
    for (index_t h = 0; h < z.key_heads; ++h) {
      for (index_t j = 0; j < z.K; ++j) {
        if (keys == key_kind::correlated) k(i, h, j) = 0.9 * common(0, h, j) + std::sqrt(1 - 0.81) * k(i, h, j);
        if (keys == key_kind::identical) k(i, h, j) = common(0, h, j);
      }
    }
  }
  unit(k);
  c.q = converted<T>(q);
  c.k = converted<T>(k);
  host_tensor<double, 3> v({z.tokens, z.value_heads, z.V}), d_o = v;
  v.for_each([&](double& x) { x = normal(); });
  d_o.for_each([&](double& x) { x = normal(); });
  c.v = converted<T>(v);
  c.d_o = converted<T>(d_o);
  host_tensor<double, 2> g({z.tokens, z.value_heads}), beta = g;
  g.for_each([&](double& x) {
    const auto kind = gates == gate_kind::mixed ? static_cast<gate_kind>(random.between(0, 3)) : gates;
    switch (kind) {
      case gate_kind::none: x = 0; break;
      case gate_kind::strong: x = -20; break;
      case gate_kind::extinct: x = -60; break;
      default: x = -std::log1p(std::exp(-2 - normal()));  // logsigmoid
    }
  });
  beta.for_each([&](double& x) {
    const auto kind = betas == beta_kind::mixed ? static_cast<beta_kind>(random.between(0, 2)) : betas;
    x = kind == beta_kind::zero ? 0 : kind == beta_kind::one ? 1 : 1 / (1 + std::exp(-normal()));
  });
  c.g = converted<A>(g);
  c.beta = converted<T>(beta);
  c.cut({z.tokens}, rule_case<T>::states::all, random);
  return c;
}

/// Outputs of a backend, on the host.
template <class T>
struct rule_outputs {
  using A = gdn::accumulate_t<T>;
  host_tensor<T, 3> o, dq, dk, dv;
  host_tensor<A, 2> dg, dbeta;
  host_tensor<A, 4> ht, dh0;
};

/// rms(got - want) / rms(want), skipping what is NaN in both; infinite where only one is.
template <class T, int R>
double rms_distance(const host_tensor<T, R>& got, const host_tensor<double, R>& want) {
  double error = 0, size = 0;
  for (index_t n = 0; n < want.size(); ++n) {
    const double a = real(got.at(n)), b = want.at(n);
    if (std::isnan(a) && std::isnan(b)) continue;
    if (!std::isfinite(a) || !std::isfinite(b)) return std::numeric_limits<double>::infinity();
    error += (a - b) * (a - b);
    size += b * b;
  }
  return error == 0 ? 0 : std::sqrt(error / size);
}

/// The largest error; NaN counts as none where both have it, else as infinite.
template <class T, int R>
double largest_distance(const host_tensor<T, R>& got, const host_tensor<double, R>& want) {
  double largest = 0;
  for (index_t n = 0; n < want.size(); ++n) {
    const double a = real(got.at(n)), b = want.at(n);
    if (std::isnan(a) && std::isnan(b)) continue;
    if (!std::isfinite(a) || !std::isfinite(b)) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(a - b));
  }
  return largest;
}

/// rms distances by the name of the tensor.
using rule_distances = std::map<std::string, double>;

/// How far exact results go if every input that matrix units read is moved by a random half of a rounding to T or less.
template <class T>
rule_distances moved_by_roundings(const rule_numbers& n, const rule_answers& want) {
  rule_distances moved;
  random_source random(0);
  std::uniform_real_distribution<double> half(-0.5, 0.5);
  for (int run = 0; run < 3; ++run) {
    rule_numbers m = n;
    const auto shake = [&](auto& t) { t.for_each([&](double& x) { x *= 1 + epsilon<T> * half(random.engine()); }); };
    for (auto* t : {&m.q, &m.k, &m.v, &m.d_o}) shake(*t);
    for (auto* t : {&m.h0, &m.dht}) shake(*t);
    shake(m.beta);
    const rule_answers other = by_recurrence(m);
    const auto note = [&](const char* name, const auto& a, const auto& b) {
      moved[name] = std::max(moved[name], rms_distance(a, b));
    };
    note("o", other.o, want.o);
    note("ht", other.ht, want.ht);
    note("dq", other.dq, want.dq);
    note("dk", other.dk, want.dk);
    note("dv", other.dv, want.dv);
    note("dg", other.dg, want.dg);
    note("dbeta", other.dbeta, want.dbeta);
    note("dh0", other.dh0, want.dh0);
  }
  return moved;
}

/// @param absolute errors up to this pass, however small the reference (FLA's metric has 1e-6)
/// @param moved    raises the limit of a tensor to rule_roundings times this
template <class T>
testing::AssertionResult near(const rule_outputs<T>& got, const rule_answers& want, double limit, double absolute = 0,
                              rule_distances moved = {}) {
  testing::AssertionResult failure = testing::AssertionFailure();
  bool ok = true;
  const auto check = [&](const char* name, const auto& a, const auto& b) {
    const double error = rms_distance(a, b), most = std::max(limit, rule_roundings * moved[name]);
    if (error <= most || largest_distance(a, b) <= absolute) return;
    ok = false;
    failure << "\n  rms error of " << name << " is " << error << " of its size, limit " << most;
  };
  check("o", got.o, want.o);
  check("ht", got.ht, want.ht);
  check("dq", got.dq, want.dq);
  check("dk", got.dk, want.dk);
  check("dv", got.dv, want.dv);
  check("dg", got.dg, want.dg);
  check("dbeta", got.dbeta, want.dbeta);
  check("dh0", got.dh0, want.dh0);
  return ok ? testing::AssertionSuccess() : failure;
}

/// A case in the memory of a backend. Everything that is to be written, and all scratch, holds NaN.
template <class Subject>
class placed_rule {
 public:
  using T = typename Subject::value_type;
  using A = gdn::accumulate_t<T>;
  using backend_type = typename Subject::backend_type;
  using memory = typename backend_type::memory_type;
  template <class U, int R>
  using tensor = placed<Subject, U, R>;

  template <class B>
  placed_rule(const B& be, const rule_case<T>& c)
      : c_(c),
        table_(as_table(c.segments)),
        q_(c.q),
        k_(c.k),
        v_(c.v),
        d_o_(c.d_o),
        g_(c.g),
        beta_(c.beta),
        h0_(c.h0),
        dht_(c.dht),
        o_(nan<T, 3>({c.tokens(), c.value_heads(), c.V()})),
        dq_(nan<T, 3>({c.tokens(), c.key_heads(), c.K()})),
        dk_(nan<T, 3>({c.tokens(), c.key_heads(), c.K()})),
        dv_(nan<T, 3>({c.tokens(), c.value_heads(), c.V()})),
        dg_(nan<A, 2>({c.tokens(), c.value_heads()})),
        dbeta_(nan<A, 2>({c.tokens(), c.value_heads()})),
        ht_(nan<A, 4>({c.final_places, c.value_heads(), c.K(), c.V()})),
        dh0_(nan<A, 4>({c.initial_places, c.value_heads(), c.K(), c.V()})),
        prepared_(nan<A, 1>({be.delta_rule_prepared(problem())})),
        scratch_bytes_(be.delta_rule_scratch(problem()).bytes),
        scratch_(scratch_bytes_ + 256) {}

  gdn::delta_rule_problem<T, memory> problem() const {
    gdn::delta_rule_problem<T, memory> p;
    p.tokens = c_.tokens();
    p.key_heads = c_.key_heads();
    p.value_heads = c_.value_heads();
    p.key_dim = c_.K();
    p.value_dim = c_.V();
    p.chunk = c_.chunk;
    for (const gdn::rule_segment& s : c_.segments) {
      p.chunks += (s.count + c_.chunk - 1) / c_.chunk;
      p.longest = std::max(p.longest, s.count);
    }
    p.scale = static_cast<A>(c_.scale);
    p.segments = table_.in();
    return p;
  }
  gdn::delta_rule_inputs<T, memory> in() const { return {q_.in(), k_.in(), v_.in(), g_.in(), beta_.in()}; }

  /// Scratch of exactly the promised size, poisoned anew.
  gdn::workspace<memory> scratch(std::size_t less = 0) {
    scratch_.poison();
    const auto at = reinterpret_cast<std::uintptr_t>(scratch_.data());
    return {scratch_.data() + (256 - at % 256) % 256, scratch_bytes_ - less};
  }

  template <class B>
  void prepare(const B& be) {
    be.delta_rule_prepare(problem(), in(), prepared_.out(), Subject::stream());
  }
  template <class B>
  void forward(const B& be) {
    auto ws = scratch();
    be.delta_rule_forward(problem(), in(), prepared_.out(), h0_.in(), o_.out(), ht_.out(), ws, Subject::stream());
    be.synchronize(Subject::stream());
  }
  template <class B>
  void summarise(const B& be, const std::vector<gdn::published_summary>& published, tensor<A, 1>& summaries) {
    const auto table = as_table(published);
    auto ws = scratch();
    be.delta_rule_summarise(problem(), in(), prepared_.out(), table.in(), h0_.in(), summaries.out(), ws,
                            Subject::stream());
    be.synchronize(Subject::stream());
  }
  template <class B>
  void summarise_gradient(const B& be, const std::vector<gdn::published_summary>& published, const tensor<A, 1>& own,
                          tensor<A, 1>& summaries) {
    const auto table = as_table(published);
    auto ws = scratch();
    be.delta_rule_summarise_gradient(problem(), in(), prepared_.out(), d_o_.in(), dht_.in(), table.in(), own.in(),
                                     summaries.out(), ws, Subject::stream());
    be.synchronize(Subject::stream());
  }
  template <class B>
  void backward(const B& be) {
    auto ws = scratch();
    be.delta_rule_backward(problem(), in(), prepared_.out(), h0_.in(), d_o_.in(), dht_.in(),
                           {dq_.out(), dk_.out(), dv_.out(), dg_.out(), dbeta_.out()}, dh0_.out(), ws,
                           Subject::stream());
    be.synchronize(Subject::stream());
  }
  /// Folds chains of links into states before (or gradients behind) segments.
  template <class B>
  void fold(const B& be, const std::vector<gdn::fold_item>& items, const std::vector<gdn::fold_link>& links,
            const tensor<A, 1>& summaries, bool gradients = false) {
    const auto item_table = as_table(items);
    const auto link_table = as_table(links);
    be.fold(c_.value_heads(), c_.K(), c_.V(), item_table.in(), link_table.in(), summaries.in(),
            gradients ? dht_.out() : h0_.out(), Subject::stream());
    be.synchronize(Subject::stream());
  }

  rule_outputs<T> fetch() const {
    return {o_.fetch(), dq_.fetch(), dk_.fetch(), dv_.fetch(), dg_.fetch(), dbeta_.fetch(), ht_.fetch(), dh0_.fetch()};
  }
  void record(recorder& r) const {
    for (const auto* t : {&o_, &dq_, &dk_, &dv_}) r(*t);
    for (const auto* t : {&dg_, &dbeta_}) r(*t);
    for (const auto* t : {&ht_, &dh0_}) r(*t);
  }
  bool inputs_unchanged() const {
    return bool(same_bits(q_.fetch(), c_.q)) && bool(same_bits(k_.fetch(), c_.k)) && bool(same_bits(v_.fetch(), c_.v)) &&
           bool(same_bits(d_o_.fetch(), c_.d_o)) && bool(same_bits(g_.fetch(), c_.g)) &&
           bool(same_bits(beta_.fetch(), c_.beta)) && bool(same_bits(h0_.fetch(), c_.h0)) &&
           bool(same_bits(dht_.fetch(), c_.dht));
  }

  template <class U, int R>
  static tensor<U, R> nan(const std::array<index_t, R>& extents) {
    host_tensor<U, R> t(extents);
    t.for_each([](U& v) { v = static_cast<U>(std::numeric_limits<double>::quiet_NaN()); });
    return tensor<U, R>(std::move(t));
  }
  template <class U>
  static tensor<U, 1> as_table(const std::vector<U>& v) {
    return backend_fixture<Subject>::place_table(v);
  }

 private:
  rule_case<T> c_;
  tensor<gdn::rule_segment, 1> table_;
  tensor<T, 3> q_, k_, v_, d_o_;
  tensor<A, 2> g_;
  tensor<T, 2> beta_;
  tensor<A, 4> h0_, dht_;
  tensor<T, 3> o_, dq_, dk_, dv_;
  tensor<A, 2> dg_, dbeta_;
  tensor<A, 4> ht_, dh0_;
  tensor<A, 1> prepared_;
  std::size_t scratch_bytes_;
  typename Subject::template array<std::byte> scratch_;
};

template <class Subject, class B>
rule_outputs<typename Subject::value_type> run_rule(const B& be, const rule_case<typename Subject::value_type>& c,
                                                    bool backward = true) {
  placed_rule<Subject> run(be, c);
  run.prepare(be);
  run.forward(be);
  if (backward) run.backward(be);
  EXPECT_TRUE(run.inputs_unchanged());
  return run.fetch();
}

template <class Subject>
class delta_rule_conformance : public backend_fixture<Subject> {
 public:
  using typename backend_fixture<Subject>::value_type;
  using typename backend_fixture<Subject>::sum_type;
  static constexpr double limit = rule_limit<value_type>;

  rule_outputs<value_type> run(const rule_case<value_type>& c) const { return run_rule<Subject>(this->backend_, c); }

  /// The token recurrence's results; how badly a case is conditioned is looked at where it matters.
  void expect_recurrence(const rule_case<value_type>& c, double most = limit) const {
    const rule_answers want = by_recurrence(c.numbers());
    const rule_outputs<value_type> got = run(c);
    testing::AssertionResult is_near = near(got, want, most, rule_underflow<value_type>);
    if (!is_near && sizeof(value_type) == 2) {
      is_near = near(got, want, most, rule_underflow<value_type>, moved_by_roundings<value_type>(c.numbers(), want));
    }
    EXPECT_TRUE(is_near);
  }

  /// Pieces of one document as segments of one call: states are computed by summaries and folds alone.
  void expect_pieces_equal_whole(const rule_case<value_type>& whole, const std::vector<index_t>& lengths) {
    using T = value_type;
    using A = sum_type;
    const auto m = static_cast<std::int32_t>(lengths.size());
    const rule_outputs<T> want = run(whole);
    rule_case<T> c = whole;
    random_source unused(0);
    c.cut(lengths, rule_case<T>::states::none, unused);
    // Place 0 is the given state (or gradient); place p that of piece p, folded.
    const auto place_first = [&](host_tensor<A, 4>& to, const host_tensor<A, 4>& from) {
      to.for_each([](A& v) { v = static_cast<A>(std::numeric_limits<double>::quiet_NaN()); });
      for (index_t n = 0; n < from.size(); ++n) to.at(n) = from.at(n);
    };
    place_first(c.h0, whole.h0);
    place_first(c.dht, whole.dht);
    c.final_places = c.initial_places = 1;
    for (std::int32_t p = 0; p < m; ++p) {
      gdn::rule_segment& s = c.segments[static_cast<std::size_t>(p)];
      s.h0 = p;
      s.dh0 = p == 0 ? 0 : -1;
      s.ht = p == m - 1 ? 0 : -1;
      s.dht = m - 1 - p;
    }
    placed_rule<Subject> run(this->backend_, c);
    run.prepare(this->backend_);
    const index_t size = c.bias() + c.transition();
    auto summaries = placed_rule<Subject>::template nan<A, 1>({m * size});
    auto back = placed_rule<Subject>::template nan<A, 1>({m * size});
    std::vector<gdn::published_summary> published, published_back;
    std::vector<gdn::fold_item> folds;
    std::vector<gdn::fold_link> links;
    for (std::int32_t p = 0; p + 1 < m; ++p) {
      const index_t at = p * size;
      published.push_back({p, p == 0 ? 0 : -1, at, p == 0 ? -1 : at + c.bias(), -1});
      const std::int32_t segment = m - 1 - p;  // the chain of gradients begins at the last
      published_back.push_back({segment, p == 0 ? 0 : -1, at, p == 0 ? -1 : at + c.bias(), segment * size + c.bias()});
    }
    for (std::int32_t p = 1; p < m; ++p) {
      folds.push_back({static_cast<index_t>(links.size()), p, p});
      for (std::int32_t i = 0; i < p; ++i) links.push_back({i * size, i == 0 ? -1 : i * size + c.bias()});
    }
    run.summarise(this->backend_, published, summaries);
    run.fold(this->backend_, folds, links, summaries);
    run.forward(this->backend_);
    run.summarise_gradient(this->backend_, published_back, summaries, back);
    run.fold(this->backend_, folds, links, back, true);
    run.backward(this->backend_);
    const rule_outputs<T> got = run.fetch();
    rule_answers expected{converted<double>(want.o),  converted<double>(want.dq), converted<double>(want.dk),
                          converted<double>(want.dv), converted<double>(want.dg), converted<double>(want.dbeta),
                          converted<double>(want.ht), converted<double>(want.dh0)};
    EXPECT_TRUE(near(got, expected, limit)) << testing::PrintToString(lengths);
  }
};
TYPED_TEST_SUITE_P(delta_rule_conformance);

TYPED_TEST_P(delta_rule_conformance, ForwardAndBackwardAreTheTokenRecurrence) {
  using T = typename TestFixture::value_type;
  const std::pair<index_t, index_t> sizes[] = {{8, 8}, {16, 5}, {5, 16}, {32, 32}, {2, 3}};
  std::uint64_t n = 0;
  for (const index_t length : {1, 15, 63, 64, 65, 127, 200}) {
    for (const index_t chunk : {1, 16, 32, 64}) {
      for (const index_t ratio : {1, 2, 3, 4}) {
        const index_t K = TestFixture::head_size(sizes[n % 5].first), V = TestFixture::head_size(sizes[n % 5].second);
        SCOPED_TRACE(testing::Message() << "seed " << seed() << ", length " << length << ", chunk " << chunk
                                        << ", ratio " << ratio << ", K " << K << ", V " << V);
        random_source random(n++);
        const index_t Hk = random.between(1, 2);
        auto c = random_rule_case<T>(random, {length, Hk, Hk * ratio, K, V}, chunk);
        if (random.coin()) c.cut({length}, rule_case<T>::states::none, random);
        this->expect_recurrence(c);
      }
    }
  }
}

TYPED_TEST_P(delta_rule_conformance, GatesAndBetasMayTakeTheirExtremes) {
  using T = typename TestFixture::value_type;
  std::uint64_t n = 0;
  for (const auto gates : {gate_kind::none, gate_kind::strong, gate_kind::extinct, gate_kind::mixed}) {
    for (const auto betas : {beta_kind::zero, beta_kind::one, beta_kind::mixed}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed() << ", gates " << int(gates) << ", betas " << int(betas));
      random_source random(n++);
      const auto c = random_rule_case<T>(random, {150, 1, 3, 16, TestFixture::head_size(12)}, 64, key_kind::random,
                                         gates, betas);
      this->expect_recurrence(c);
    }
  }
}

TYPED_TEST_P(delta_rule_conformance, KeysMayBeCorrelatedOrIdentical) {
  using T = typename TestFixture::value_type;
  std::uint64_t n = 0;
  for (const auto keys : {key_kind::correlated, key_kind::identical}) {
    for (const auto gates : {gate_kind::moderate, gate_kind::none}) {
      for (const auto betas : {beta_kind::moderate, beta_kind::one}) {
        SCOPED_TRACE(testing::Message() << "seed " << seed() << ", keys " << int(keys) << ", gates " << int(gates)
                                        << ", betas " << int(betas));
        random_source random(n++);
        const auto c = random_rule_case<T>(random, {200, 2, 2, 32, 32}, 64, keys, gates, betas);
        this->expect_recurrence(c, cancelling_limit<T>);
      }
    }
  }
}

TYPED_TEST_P(delta_rule_conformance, SegmentsDoNotKnowEachOther) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; n < 10; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    std::vector<index_t> lengths;
    for (index_t i = random.between(2, 12); i > 0; --i) lengths.push_back(random.between(1, 90));
    index_t total = 0;
    for (const index_t l : lengths) total += l;
    auto c = random_rule_case<T>(random, {total, 1, 2, TestFixture::head_size(8), TestFixture::head_size(6)},
                                 index_t{1} << random.between(0, 6));
    c.cut(lengths, rule_case<T>::states::mixed, random);
    const rule_outputs<T> all = this->run(c);
    EXPECT_TRUE(near(all, by_recurrence(c.numbers()), this->limit));
    for (const gdn::rule_segment& s : c.segments) {  // each on its own: the same bits
      const auto rows = [&]<class U, int R>(const host_tensor<U, R>& t) {
        std::array<index_t, R> extents;
        for (int i = 0; i < R; ++i) extents[static_cast<std::size_t>(i)] = i == 0 ? s.count : t.extent(i);
        host_tensor<U, R> out(extents);
        const index_t row = t.extent(0) == 0 ? 0 : t.size() / t.extent(0);
        for (index_t i = 0; i < out.size(); ++i) out.at(i) = t.at(s.begin * row + i);
        return out;
      };
      rule_case<T> one = c;
      one.q = rows(c.q);
      one.k = rows(c.k);
      one.v = rows(c.v);
      one.d_o = rows(c.d_o);
      one.g = rows(c.g);
      one.beta = rows(c.beta);
      one.segments = {{0, s.count, 0, s.h0, s.ht, s.dh0, s.dht}};
      const rule_outputs<T> alone = this->run(one);
      EXPECT_TRUE(same_bits(alone.o, rows(all.o)) && same_bits(alone.dq, rows(all.dq)) &&
                  same_bits(alone.dk, rows(all.dk)) && same_bits(alone.dv, rows(all.dv)) &&
                  same_bits(alone.dg, rows(all.dg)) && same_bits(alone.dbeta, rows(all.dbeta)));
      for (index_t i = 0; i < c.bias(); ++i) {
        if (s.ht >= 0) {
          EXPECT_EQ(alone.ht.at(s.ht * c.bias() + i), all.ht.at(s.ht * c.bias() + i));
        }
        if (s.dh0 >= 0) {
          EXPECT_EQ(alone.dh0.at(s.dh0 * c.bias() + i), all.dh0.at(s.dh0 * c.bias() + i));
        }
      }
    }
  }
}

TYPED_TEST_P(delta_rule_conformance, SplitAnywhereEqualsWhole) {
  using T = typename TestFixture::value_type;
  random_source random(0);
  const index_t K = TestFixture::head_size(8);
  const auto shorter = random_rule_case<T>(random, {40, 1, 2, K, TestFixture::head_size(6)}, 16);
  for (index_t at = 1; at < 40 && !this->HasFailure(); ++at) this->expect_pieces_equal_whole(shorter, {at, 40 - at});
  const auto longer = random_rule_case<T>(random, {130, 2, 2, K, 16}, 64);
  for (const index_t at : {1, 2, 63, 64, 65, 100, 128, 129}) this->expect_pieces_equal_whole(longer, {at, 130 - at});
}

TYPED_TEST_P(delta_rule_conformance, SplitInSeveralPiecesEqualsWhole) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; n < 20 && !this->HasFailure(); ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    const index_t tokens = random.between(8, 200), Hk = random.between(1, 2);
    const index_t Hv = Hk * random.between(1, 3);
    const index_t K = TestFixture::head_size(random.between(2, 12)), V = TestFixture::head_size(random.between(2, 12));
    const auto c = random_rule_case<T>(random, {tokens, Hk, Hv, K, V}, index_t{1} << random.between(0, 6));
    std::vector<index_t> lengths;
    for (const index_t l : random.lengths(tokens, random.between(3, 7))) {
      if (l > 0) lengths.push_back(l);
    }
    if (lengths.size() > 1) this->expect_pieces_equal_whole(c, lengths);
  }
}

// Cornstarch: 5 tokens, 2 heads, K 3, V 4 (or what the backend takes): S' = M S + E, and dS = M^T dS' + F.
TYPED_TEST_P(delta_rule_conformance, ASummaryActsLikeItsTokens) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  random_source random(5);
  const index_t K = TestFixture::head_size(3), V = TestFixture::head_size(4);
  auto c = random_rule_case<T>(random, {5, 2, 2, K, V});
  const rule_answers want = by_recurrence(c.numbers());
  auto published = placed_rule<TypeParam>::template nan<A, 1>({c.bias() + c.transition()});
  auto back = placed_rule<TypeParam>::template nan<A, 1>({c.bias() + c.transition()});
  placed_rule<TypeParam> run(this->backend_, c);
  run.prepare(this->backend_);
  run.summarise(this->backend_, {{0, -1, 0, c.bias(), -1}}, published);
  run.summarise_gradient(this->backend_, {{0, -1, 0, c.bias(), c.bias()}}, published, back);
  const auto there = published.fetch(), here = back.fetch();
  host_tensor<A, 4> after({1, 2, K, V}), before({1, 2, K, V});
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < K; ++i) {
      for (index_t j = 0; j < V; ++j) {
        double s = real(there.at((h * K + i) * V + j)), d = real(here.at((h * K + i) * V + j));
        for (index_t l = 0; l < K; ++l) {
          const double m = real(there.at(c.bias() + (h * K + i) * K + l));
          EXPECT_EQ(m, real(here.at(c.bias() + (h * K + l) * K + i))) << "M^T is M transposed";
          s += m * real(c.h0(0, h, l, j));
          d += real(here.at(c.bias() + (h * K + i) * K + l)) * real(c.dht(0, h, l, j));
        }
        after(0, h, i, j) = static_cast<A>(s);
        before(0, h, i, j) = static_cast<A>(d);
      }
    }
  }
  EXPECT_LE(rms_distance(after, want.ht), std::max(this->limit, 1e-14));
  EXPECT_LE(rms_distance(before, want.dh0), std::max(this->limit, 1e-14));
}

// The bound of a run's transition, |M| <= e^(sum of g) for |k| <= 1 and 0 <= beta <= 2.
TYPED_TEST_P(delta_rule_conformance, TransitionsShrinkAtLeastAsTheDecay) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  for (std::uint64_t n = 0; n < 10; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    const index_t tokens = random.between(1, 100), K = TestFixture::head_size(6);
    auto c = random_rule_case<T>(random, {tokens, 1, 2, K, TestFixture::head_size(4)}, 32,
                                 static_cast<key_kind>(random.between(0, 2)));
    if (random.coin()) {
      c.beta.for_each([](T& b) { b = static_cast<T>(2 * real(b)); });
    }
    auto summary = placed_rule<TypeParam>::template nan<A, 1>({c.bias() + c.transition()});
    placed_rule<TypeParam> run(this->backend_, c);
    run.prepare(this->backend_);
    run.summarise(this->backend_, {{0, -1, 0, c.bias(), -1}}, summary);
    const auto values = summary.fetch();
    for (index_t h = 0; h < 2; ++h) {
      double decay = 0;
      for (index_t t = 0; t < c.tokens(); ++t) decay += real(c.g(t, h));
      std::vector<double> x(static_cast<std::size_t>(K), 1), y(x.size());
      double norm = 0;
      for (int power = 0; power < 200; ++power) {  // of M^T M
        const auto M = [&](index_t i, index_t j) { return real(values.at(c.bias() + (h * K + i) * K + j)); };
        for (index_t i = 0; i < K; ++i) {
          y[static_cast<std::size_t>(i)] = 0;
          for (index_t j = 0; j < K; ++j) y[static_cast<std::size_t>(i)] += M(i, j) * x[static_cast<std::size_t>(j)];
        }
        double before = 0, after = 0;
        for (std::size_t i = 0; i < x.size(); ++i) before += x[i] * x[i], after += y[i] * y[i];
        if (before == 0 || after == 0) break;
        norm = std::sqrt(after / before);
        for (index_t i = 0; i < K; ++i) {
          x[static_cast<std::size_t>(i)] = 0;
          for (index_t j = 0; j < K; ++j) x[static_cast<std::size_t>(i)] += M(j, i) * y[static_cast<std::size_t>(j)] / after;
        }
      }
      EXPECT_LE(norm, std::exp(decay) * (1 + 100 * this->limit));
    }
  }
}

TYPED_TEST_P(delta_rule_conformance, ComposingIsAssociativeAndFoldingIsComposing) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  constexpr index_t H = 3, K = 5, V = 7, bias = H * K * V, transition = H * K * K, size = bias + transition;
  random_source random(1);
  host_tensor<A, 1> numbers = random_tensor<A, 1>(random, {8 * size});
  for (index_t i = 3 * size; i < numbers.size(); ++i) numbers.at(i) = static_cast<A>(std::nan(""));
  const auto at = [&](index_t n) { return std::pair{n * size, n * size + bias}; };
  auto buffer = this->place(numbers);
  const auto compose = [&](index_t later, index_t earlier, index_t to) {
    const std::vector<gdn::compose_item> item = {
        {at(later).first, at(later).second, at(earlier).first, at(earlier).second, at(to).first, at(to).second}};
    this->backend_.compose(H, K, V, this->place_table(item).in(), buffer.out(), this->stream_);
    this->backend_.synchronize(this->stream_);
  };
  compose(1, 0, 3);
  compose(2, 3, 4);  // 2 (1 0)
  compose(2, 1, 5);
  compose(5, 0, 6);  // (2 1) 0
  // A fold starts from the bias of its first link.
  auto states = placed_rule<TypeParam>::template nan<A, 4>({3, H, K, V});
  const std::vector<gdn::fold_item> folds = {{0, 3, 2}, {3, 1, 0}};
  const std::vector<gdn::fold_link> links = {
      {at(0).first, -1}, {at(1).first, at(1).second}, {at(2).first, at(2).second}, {at(2).first, -1}};
  this->backend_.fold(H, K, V, this->place_table(folds).in(), this->place_table(links).in(), buffer.in(), states.out(),
                      this->stream_);
  this->backend_.synchronize(this->stream_);
  const auto values = buffer.fetch();
  const auto folded = states.fetch();
  const auto near_each = [&](double a, double b) { EXPECT_NEAR(a, b, 100 * epsilon<A>); };
  for (index_t i = 0; i < size; ++i) near_each(real(values.at(4 * size + i)), real(values.at(6 * size + i)));
  for (index_t i = 0; i < bias; ++i) {
    near_each(real(folded.at(2 * bias + i)), real(values.at(4 * size + i)));
    EXPECT_EQ(folded.at(i), values.at(2 * size + i));
    EXPECT_TRUE(std::isnan(real(folded.at(bias + i)))) << "a state that no fold names stays";
  }
  for (index_t h = 0; h < H; ++h) {  // and it is the matrix product, head by head
    for (index_t i = 0; i < K; ++i) {
      for (index_t j = 0; j < V; ++j) {
        double e = real(values.at(size + (h * K + i) * V + j));
        for (index_t l = 0; l < K; ++l) {
          e += real(values.at(size + bias + (h * K + i) * K + l)) * real(values.at((h * K + l) * V + j));
        }
        near_each(real(values.at(3 * size + (h * K + i) * V + j)), e);
      }
      for (index_t j = 0; j < K; ++j) {
        double m = 0;
        for (index_t l = 0; l < K; ++l) {
          m += real(values.at(size + bias + (h * K + i) * K + l)) * real(values.at(bias + (h * K + l) * K + j));
        }
        near_each(real(values.at(3 * size + bias + (h * K + i) * K + j)), m);
      }
    }
  }
  for (index_t i = 0; i < 3 * size; ++i) EXPECT_EQ(values.at(i), numbers.at(i)) << "inputs stay";
  static_cast<void>(sizeof(T));
}

// Cornstarch: transitions 2, extensions 1 to 4, documents 0 0 1 1: states before each run 0, 1, 0, 3.
TYPED_TEST_P(delta_rule_conformance, PrefixesResetAtDocuments) {
  using A = typename TestFixture::sum_type;
  std::vector<A> numbers;
  for (const int e : {1, 2, 3, 4}) {
    numbers.push_back(static_cast<A>(e));
    numbers.push_back(static_cast<A>(2));
  }
  auto states = this->place(host_tensor<A, 4>({4, 1, 1, 1}));  // zero where a document begins
  const std::vector<gdn::fold_item> folds = {{0, 1, 1}, {1, 1, 3}};
  const std::vector<gdn::fold_link> links = {{0, -1}, {4, -1}};
  this->backend_.fold(1, 1, 1, this->place_table(folds).in(), this->place_table(links).in(),
                      this->place_table(numbers).in(), states.out(), this->stream_);
  this->backend_.synchronize(this->stream_);
  const auto got = states.fetch();
  for (const auto& [run, want] : {std::pair{0, 0.}, {1, 1.}, {2, 0.}, {3, 3.}}) EXPECT_EQ(real(got.at(run)), want);
}

TYPED_TEST_P(delta_rule_conformance, StepsAreTheTokensOfForward) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  for (std::uint64_t n = 0; n < 6; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    constexpr index_t sequences = 3, slots = 5, steps = 9;
    const index_t Hk = random.between(1, 2), Hv = Hk * random.between(1, 4);
    const index_t K = TestFixture::head_size(random.between(2, 70)), V = TestFixture::head_size(random.between(2, 70));
    auto c = random_rule_case<T>(random, {sequences * steps, Hk, Hv, K, V});
    c.cut(std::vector<index_t>(sequences, steps), rule_case<T>::states::all, random);
    const rule_answers want = by_recurrence(c.numbers(), false);
    const std::vector<index_t> slot_of = random.permutation(slots);
    auto pool = random_tensor<A, 4>(random, {slots, Hv, K, V});
    const auto untouched = pool;
    const index_t state = Hv * K * V;
    for (index_t i = 0; i < sequences; ++i) {
      for (index_t e = 0; e < state; ++e) {
        pool.at(slot_of[static_cast<std::size_t>(i)] * state + e) =
            c.h0.at(c.segments[static_cast<std::size_t>(i)].h0 * state + e);
      }
    }
    auto states = this->place(pool);
    for (index_t t = 0; t < steps; ++t) {
      // Row 1 is skipped; the others are the sequences.
      std::vector<std::int32_t> rows_slots = {static_cast<std::int32_t>(slot_of[0]), -1,
                                              static_cast<std::int32_t>(slot_of[1]),
                                              static_cast<std::int32_t>(slot_of[2])};
      const index_t sequence_of[] = {0, 0, 1, 2};
      const auto pick = [&]<class U, int R>(const host_tensor<U, R>& from) {
        std::array<index_t, R> extents;
        for (int i = 0; i < R; ++i) extents[static_cast<std::size_t>(i)] = i == 0 ? 4 : from.extent(i);
        host_tensor<U, R> to(extents);
        const index_t width = from.size() / from.extent(0);
        for (index_t r = 0; r < 4; ++r) {
          for (index_t i = 0; i < width; ++i) to.at(r * width + i) = from.at((sequence_of[r] * steps + t) * width + i);
        }
        return this->place(std::move(to));
      };
      const auto q = pick(c.q), k = pick(c.k), v = pick(c.v);
      const auto g = pick(c.g);
      const auto beta = pick(c.beta);
      auto o = placed_rule<TypeParam>::template nan<T, 3>({4, Hv, V});
      const auto table = this->place_table(rows_slots);
      this->backend_.delta_rule_step(static_cast<A>(c.scale),
                                     gdn::delta_rule_inputs<T, typename TypeParam::backend_type::memory_type>{
                                         q.in(), k.in(), v.in(), g.in(), beta.in()},
                                     states.out(), table.in(), o.out(), this->stream_);
      this->backend_.synchronize(this->stream_);
      const auto got = o.fetch();
      for (index_t r = 0; r < 4; ++r) {
        double error = 0, size = 0;
        for (index_t i = 0; i < Hv * V; ++i) {
          const double a = real(got.at(r * Hv * V + i));
          const double b = r == 1 ? 0 : want.o.at((sequence_of[r] * steps + t) * Hv * V + i);
          if (r == 1) {
            EXPECT_EQ(a, 0) << "a skipped row is zero";
          }
          error += (a - b) * (a - b);
          size += b * b;
        }
        EXPECT_LE(std::sqrt(error), this->limit * std::sqrt(size)) << "step " << t << ", row " << r;
      }
    }
    const auto after = states.fetch();
    for (index_t s = 0; s < slots; ++s) {
      const auto used = std::find(slot_of.begin(), slot_of.begin() + sequences, s) - slot_of.begin();
      for (index_t e = 0; e < state; ++e) {
        if (used == sequences) {
          EXPECT_EQ(after.at(s * state + e), untouched.at(s * state + e)) << "slots of nobody stay";
        } else {
          const auto place = c.segments[static_cast<std::size_t>(used)].ht;
          EXPECT_NEAR(real(after.at(s * state + e)), want.ht.at(place * state + e), 100 * epsilon<A>);
        }
      }
    }
  }
}

TYPED_TEST_P(delta_rule_conformance, FinalStatesMayBeLeftOut) {
  using T = typename TestFixture::value_type;
  using A = typename TestFixture::sum_type;
  using memory = typename TypeParam::backend_type::memory_type;
  random_source random(3);
  const index_t K = TestFixture::head_size(8), V = TestFixture::head_size(6);
  const auto c = random_rule_case<T>(random, {70, 1, 2, K, V}, 32);
  const auto want = this->run(c);
  placed_rule<TypeParam> run(this->backend_, c);
  auto prepared = placed_rule<TypeParam>::template nan<A, 1>({this->backend_.delta_rule_prepared(run.problem())});
  this->backend_.delta_rule_prepare(run.problem(), run.in(), prepared.out(), this->stream_);
  auto o = placed_rule<TypeParam>::template nan<T, 3>({70, 2, V});
  const auto h0 = this->place(c.h0);
  auto ws = run.scratch();
  this->backend_.delta_rule_forward(run.problem(), run.in(), prepared.out(), h0.in(), o.out(),
                                    gdn::states_ref<T, memory>{}, ws, this->stream_);
  this->backend_.synchronize(this->stream_);
  EXPECT_TRUE(same_bits(o.fetch(), want.o));
}

TYPED_TEST_P(delta_rule_conformance, ThreadsAndRunsChangeNoBit) {
  using T = typename TestFixture::value_type;
  random_source random(4);
  auto c = random_rule_case<T>(random, {300, 2, 6, TestFixture::head_size(20), TestFixture::head_size(24)});
  c.cut({100, 1, 70, 129}, rule_case<T>::states::mixed, random);
  const auto run_all = [&](const auto& be) {
    placed_rule<TypeParam> run(be, c);
    using A = typename TestFixture::sum_type;
    auto summaries = placed_rule<TypeParam>::template nan<A, 1>({2 * (c.bias() + c.transition())});
    auto back = placed_rule<TypeParam>::template nan<A, 1>({2 * (c.bias() + c.transition())});
    const index_t second = c.bias() + c.transition();
    run.prepare(be);
    run.summarise(be, {{0, c.segments[0].h0, 0, c.bias(), -1}, {3, -1, second, second + c.bias(), -1}}, summaries);
    run.summarise_gradient(be, {{0, -1, 0, c.bias(), c.bias()}, {3, -1, second, second + c.bias(), second + c.bias()}},
                           summaries, back);
    run.forward(be);
    run.backward(be);
    recorder r;
    run.record(r);
    r(summaries);
    r(back);
    return r;
  };
  this->expect_same_on_variants(run_all);
  this->expect_same_in_threads(run_all);
}

TYPED_TEST_P(delta_rule_conformance, RefusesWhatDoesNotFit) {
  using T = typename TestFixture::value_type;
  random_source random(6);
  const auto c = random_rule_case<T>(random, {20, 1, 2, TestFixture::head_size(4), TestFixture::head_size(3)}, 16);
  placed_rule<TypeParam> run(this->backend_, c);
  auto problem = run.problem();
  problem.tokens = 21;
  auto prepared = placed_rule<TypeParam>::template nan<typename TestFixture::sum_type, 1>({1 << 20});
  EXPECT_THROW(this->backend_.delta_rule_prepare(problem, run.in(), prepared.out(), this->stream_), gdn::shape_error);
  problem = run.problem();
  problem.key_heads = 3;
  EXPECT_THROW(this->backend_.delta_rule_prepare(problem, run.in(), prepared.out(), this->stream_), gdn::shape_error);
}

REGISTER_TYPED_TEST_SUITE_P(delta_rule_conformance, ForwardAndBackwardAreTheTokenRecurrence,
                            GatesAndBetasMayTakeTheirExtremes, KeysMayBeCorrelatedOrIdentical, SegmentsDoNotKnowEachOther,
                            SplitAnywhereEqualsWhole, SplitInSeveralPiecesEqualsWhole, ASummaryActsLikeItsTokens,
                            TransitionsShrinkAtLeastAsTheDecay, ComposingIsAssociativeAndFoldingIsComposing,
                            PrefixesResetAtDocuments, StepsAreTheTokensOfForward, FinalStatesMayBeLeftOut,
                            ThreadsAndRunsChangeNoBit, RefusesWhatDoesNotFit);

}  // namespace gdn_test
