// SPDX-License-Identifier: Apache-2.0
// The tensor cores' delta rule against the same rule in IEEE float, on the same 16-bit inputs.

#include <cmath>
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

template <class T>
struct limits;
template <>
struct limits<bfloat16> {
  static constexpr double forward = 3.1e-3;
  static constexpr double gradient = 5.2e-3;
};
template <>
struct limits<float16> {
  static constexpr double forward = 1.0e-3;
  static constexpr double gradient = 1.7e-3;
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
  for (const rule_shape& sizes : {rule_shape{1, 1, {64}}, rule_shape{2, 4, {300, 129, 64, 1}},
                                  rule_shape{2, 6, {65, 63, 15, 127, 200}}, rule_shape{4, 4, {1000}}}) {
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

}  // namespace
}  // namespace gdn_test
