// SPDX-License-Identifier: Apache-2.0
// The tensor cores' delta rule against the same rule in IEEE float, on the same 16-bit inputs.

#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <support/cuda_rule_problem.cuh>

namespace gdn_test {
namespace {

using gdn::bfloat16;
using gdn::float16;

/// rms(a - b) / rms(b)
template <class A, class B>
double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(static_cast<float>(a[i]));
    const double y = static_cast<double>(static_cast<float>(b[i]));
    error += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(error / size);
}

/// Operands of all products are rounded to T, which puts an error of half a unit in the last place on each, and results
/// once more: sums over many of them are off by about one unit of their size. Gradients are products of products.
template <class T>
struct limits {
  static constexpr double unit = std::is_same_v<T, bfloat16> ? 0x1p-8 : 0x1p-11;
  static constexpr double forward = unit;
  static constexpr double gradient = 1.5 * unit;
};

template <class T>
class delta_rule_mma : public testing::Test {
 protected:
  gdn::cuda::backend be;
  gdn::cuda::stream s;

  /// The same inputs as float tensors: the kernels of float are IEEE.
  static void copy_inputs(const rule_problem_on_device<T>& from, const rule_problem_on_device<float>& to,
                          gdn::cuda::stream_ref s) {
    const auto widen = [&](const auto& a, const auto& b) {
      std::vector<float> out;
      for (const T v : gdn::cuda::copy_to_host(a, s)) out.push_back(static_cast<float>(v));
      gdn::cuda::copy_to_device<float>(out, b, s);
    };
    widen(from.q_, to.q_);
    widen(from.k_, to.k_);
    widen(from.v_, to.v_);
    widen(from.beta_, to.beta_);
    gdn::cuda::copy_to_device<float>(gdn::cuda::copy_to_host(from.g_, s), to.g_, s);
    gdn::cuda::copy_to_device<float>(gdn::cuda::copy_to_host(from.h0_, s), to.h0_, s);
  }
};
using types = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(delta_rule_mma, types);

TYPED_TEST(delta_rule_mma, MatchesIeeeFloatForwardAndBackward) {
  using T = TypeParam;
  for (const rule_shape& sizes :
       {rule_shape{1, 1, {64}}, rule_shape{2, 4, {300, 129, 64, 1}}, rule_shape{2, 6, {65, 63, 15, 127, 200}},
        rule_shape{4, 4, {1000}}, rule_shape{2, 4, {300, 129, 64, 1}, 256, 256},
        rule_shape{2, 6, {65, 63, 15, 127, 200}, 192, 64}, rule_shape{1, 4, {1000}, 144, 128},
        rule_shape{1, 1, std::vector<index_t>(66000, 1), 16, 16}}) {  // more documents than CUDA's grids are wide
    SCOPED_TRACE(testing::Message() << sizes.key_heads << '/' << sizes.value_heads << " heads, K " << sizes.K << ", V "
                                    << sizes.V);
    const rule_problem_on_device<T> fast(this->be, sizes, this->s);
    const rule_problem_on_device<float> exact(this->be, sizes, this->s);
    this->copy_inputs(fast, exact, this->s);
    fast.forward();
    exact.forward();
    const auto o = gdn::cuda::copy_to_host(exact.o_, this->s);
    EXPECT_LT(relative_error(gdn::cuda::copy_to_host(fast.o_, this->s), o), limits<T>::forward);
    EXPECT_LT(relative_error(gdn::cuda::copy_to_host(fast.ht_, this->s), gdn::cuda::copy_to_host(exact.ht_, this->s)),
              limits<T>::forward);

    // The same d_o and dht for both: o of the 16-bit run, widened.
    std::vector<float> wide;
    for (const T v : gdn::cuda::copy_to_host(fast.o_, this->s)) wide.push_back(static_cast<float>(v));
    gdn::cuda::copy_to_device<float>(wide, exact.o_, this->s);
    gdn::cuda::copy_to_device<float>(gdn::cuda::copy_to_host(fast.ht_, this->s), exact.ht_, this->s);
    fast.backward();
    exact.backward();
    const auto near = [&](const char* name, const auto& a, const auto& b) {
      EXPECT_LT(relative_error(gdn::cuda::copy_to_host(a, this->s), gdn::cuda::copy_to_host(b, this->s)),
                limits<T>::gradient)
          << name;
    };
    near("dq", fast.dq_, exact.dq_);
    near("dk", fast.dk_, exact.dk_);
    near("dv", fast.dv_, exact.dv_);
    near("dg", fast.dg_, exact.dg_);
    near("dbeta", fast.d_beta_, exact.d_beta_);
    near("dh0", fast.dh0_, exact.dh0_);
  }
}

/// Two documents that are cut in pieces, and what summaries of them are asked for. K = V.
template <class T>
struct chained_run {
  static constexpr index_t heads = 2;
  index_t states;  // elements of one of all heads
  rule_problem_on_device<T> p;
  gdn::cuda::device_block memory{gdn::memory_requirement{static_cast<std::size_t>(4 * states) * sizeof(float) + 1024}};
  gdn::cuda::device_block tables{gdn::memory_requirement{4096}};
  gdn::summaries_ref<T, device> summaries;
  gdn::tensor_ref<gdn::published_summary, 1, device> table, reverse;

  /// @param longest of segments, as the problem claims; it decides whether they are cut
  chained_run(const gdn::cuda::backend& be, gdn::cuda::stream_ref s, index_t K, const std::vector<index_t>& lengths,
              index_t longest, bool chained)
      : states(heads * K * K), p(be, {1, heads, lengths, K, K}, s) {
    p.p_.chained = chained;
    p.p_.longest = longest;
    auto ws = memory.workspace();
    summaries = ws.template take<float>(4 * states);
    // The first starts from zero and hands on E and M; the second starts from its given state. Back, likewise.
    auto places = tables.workspace();
    table = places.template take<gdn::published_summary>(2);
    reverse = places.template take<gdn::published_summary>(2);
    const gdn::published_summary forward[] = {{0, -1, 0, states, -1}, {1, 1, 2 * states, 3 * states, -1}};
    const gdn::published_summary back[] = {{0, -1, 0, -1, -1}, {1, 1, 2 * states, -1, -1}};
    gdn::cuda::copy_to_device<gdn::published_summary>(forward, table, s);
    gdn::cuda::copy_to_device<gdn::published_summary>(back, reverse, s);
  }

  void forward() const {
    auto ws = p.memory_[1].workspace();
    p.be_.delta_rule_prepare(p.p_, p.in_, p.prepared_, p.s_);
    p.be_.delta_rule_summarise(p.p_, p.in_, p.prepared_, table, p.h0_, summaries, ws, p.s_);
    p.be_.delta_rule_forward(p.p_, p.in_, p.prepared_, p.h0_, p.o_, p.ht_, ws, p.s_);
  }
  /// The gradients of o and ht are o and ht.
  void backward() const {
    auto ws = p.memory_[1].workspace();
    p.be_.delta_rule_summarise_gradient(p.p_, p.in_, p.prepared_, p.o_, p.ht_, reverse, summaries, summaries, ws, p.s_);
    p.backward();
  }

  /// Relative errors of all that comes out, against the same of the IEEE kernels.
  std::map<std::string, double> errors(chained_run<float>& exact, gdn::cuda::stream_ref s) {
    std::map<std::string, double> out;
    const auto note = [&](const std::string& name, const auto& a, const auto& b) {
      out[name] = relative_error(gdn::cuda::copy_to_host(a, s), gdn::cuda::copy_to_host(b, s));
    };
    forward();
    exact.forward();
    const auto parts = [&](const char* const (&names)[4]) {
      for (index_t i = 0; i < 4; ++i) {
        if (names[i] == nullptr) continue;
        const auto part = [&](auto& run) {
          return gdn::make_tensor<device>(run.summaries.data() + i * states, states);
        };
        note(names[i], part(*this), part(exact));
      }
    };
    parts({"E", "M", "E from a state", "M of the second"});
    note("o", p.o_, exact.p.o_);
    note("ht", p.ht_, exact.p.ht_);
    std::vector<float> wide;  // the same gradients for both
    for (const T v : gdn::cuda::copy_to_host(p.o_, s)) wide.push_back(static_cast<float>(v));
    gdn::cuda::copy_to_device<float>(wide, exact.p.o_, s);
    gdn::cuda::copy_to_device<float>(gdn::cuda::copy_to_host(p.ht_, s), exact.p.ht_, s);
    backward();
    exact.backward();
    parts({"F", nullptr, "F from a gradient", nullptr});
    note("dq", p.dq_, exact.p.dq_);
    note("dk", p.dk_, exact.p.dk_);
    note("dv", p.dv_, exact.p.dv_);
    note("dg", p.dg_, exact.p.dg_);
    note("dbeta", p.d_beta_, exact.p.d_beta_);
    note("dh0", p.dh0_, exact.p.dh0_);
    return out;
  }
};

TYPED_TEST(delta_rule_mma, CuttingSegmentsLosesNothing) {
  using T = TypeParam;
  for (const index_t K : {128, 144, 256}) {
    const auto run = [&](index_t longest, bool chained) {
      chained_run<T> fast(this->be, this->s, K, {3000, 1100}, longest, chained);
      chained_run<float> exact(this->be, this->s, K, {3000, 1100}, longest, chained);
      this->copy_inputs(fast.p, exact.p, this->s);
      return fast.errors(exact, this->s);
    };
    const auto whole = run(64, false);  // claims to be short, so nothing is cut
    const auto cut = run(3000, false);
    const auto chained = run(3000, true);
    std::printf("  K %d\n", static_cast<int>(K));
    for (const auto& [name, error] : whole) {
      std::printf("  %-18s whole %.2e, cut %.2e, chained %.2e\n", name.c_str(), error, cut.at(name), chained.at(name));
      // The roundings differ, and with them the error, by what chance makes of it. Most of dg's is that of one number
      // per chunk and head, <S, dS>: a hundred of them, of which the few large ones count.
      const double most = (name == "dg" ? 1.6 : 1.1) * error;
      EXPECT_GT(error, 0) << name << ", K " << K;
      EXPECT_LE(cut.at(name), most) << name << ", K " << K;
      EXPECT_LE(chained.at(name), most) << name << ", K " << K;
    }
  }
}

/// The same bits from two runs, of widths of keys that are compiled.
template <class T>
void expect_same_bits(const gdn::cuda::backend& be, gdn::cuda::stream_ref s, const std::vector<index_t>& lengths) {
  for (const index_t K : {64, 128, 256}) {
    for (const bool chained : {false, true}) {
      const chained_run<T> run(be, s, K, lengths, lengths[0], chained);
      const auto bits = [&] {
        std::vector<float> all;
        const auto add = [&](const auto& t) {
          for (const auto x : gdn::cuda::copy_to_host(t, s)) all.push_back(static_cast<float>(x));
        };
        run.forward();
        add(run.p.o_), add(run.p.ht_), add(run.summaries);
        run.backward();
        add(run.p.dq_), add(run.p.dk_), add(run.p.dv_), add(run.p.dg_), add(run.p.d_beta_), add(run.p.dh0_);
        add(run.summaries);
        return all;
      };
      const auto first = bits();
      EXPECT_TRUE(first == bits()) << "K " << K << (chained ? ", chained" : "");
    }
  }
}

TYPED_TEST(delta_rule_mma, RunsGiveTheSameBits) { expect_same_bits<TypeParam>(this->be, this->s, {130, 65}); }
TYPED_TEST(delta_rule_mma, RunsOfCutSegmentsGiveTheSameBits) {
  expect_same_bits<TypeParam>(this->be, this->s, {1100, 1030});
}

}  // namespace
}  // namespace gdn_test
