// SPDX-License-Identifier: Apache-2.0
// TF32 only where it was asked for: in products of float matrices, and nowhere in the delta rule.

#include <conformance/delta_rule.hpp>
#include <cuda/setup.cuh>

namespace gdn_test {
namespace {

using gdn::cuda::float_products;

template <class T>
host_tensor<T, 2> product(float_products how, const host_tensor<T, 2>& x, const host_tensor<T, 2>& w) {
  using fixture = backend_fixture<cuda_setup<T>>;
  const gdn::cuda::backend be(how);
  auto y = fixture::place(host_tensor<T, 2>({x.extent(0), w.extent(0)}));
  be.linear_forward(fixture::place(x).in(), fixture::place(w).in(), y.out(), fixture::scratch(), cuda_setup<T>::stream());
  be.synchronize(cuda_setup<T>::stream());
  return y.fetch();
}

/// TF32 keeps 10 bits after the point: an operand is off by up to 2^-11 of itself if it is rounded, 2^-10 if it is cut
/// off, and about half of that on average. A sum of products of random numbers inherits the relative error of one.
TEST(FloatProducts, AreIeeeUnlessTheBackendAsksForTf32) {
  random_source random(1);
  const auto x = random_tensor<float, 2>(random, {256, 512}), w = random_tensor<float, 2>(random, {320, 512});
  host_tensor<double, 2> want({256, 320});
  for (index_t i = 0; i < 256; ++i) {
    for (index_t o = 0; o < 320; ++o) {
      for (index_t j = 0; j < 512; ++j) want(i, o) += real(x(i, j)) * real(w(o, j));
    }
  }
  const double ieee = rms_distance(product(float_products::ieee, x, w), want);
  const double tf32 = rms_distance(product(float_products::tf32, x, w), want);
  std::printf("  ieee %.2e, tf32 %.2e\n", ieee, tf32);
  EXPECT_LE(ieee, 10 * epsilon<float>);
  EXPECT_GE(tf32, 0x1p-14);
  EXPECT_LE(tf32, 0x1p-9);
}

TEST(FloatProducts, OfSixteenBitsDoNotKnowTheOption) {
  random_source random(2);
  const auto x = random_tensor<gdn::bfloat16, 2>(random, {64, 96}), w = random_tensor<gdn::bfloat16, 2>(random, {80, 96});
  EXPECT_TRUE(same_bits(product(float_products::tf32, x, w), product(float_products::ieee, x, w)));
}

/// Summaries, folds and all else of the rule are IEEE whatever the projections are.
TEST(FloatProducts, OfTheDeltaRuleAreIeeeAlways) {
  using subject = cuda_setup<float>;
  random_source random(3);
  const auto c = random_rule_case<float>(random, {150, 1, 2, 64, 48});
  const auto run = [&](float_products how) {
    const gdn::cuda::backend be(how);
    placed_rule<subject> r(be, c);
    auto summary = placed_rule<subject>::nan<float, 1>({c.bias() + c.transition()});
    r.prepare(be);
    r.summarise(be, {{0, 0, 0, c.bias(), -1}}, summary);
    r.fold(be, {{0, 1, 0}}, {{0, -1}}, summary);
    r.forward(be);
    r.backward(be);
    recorder out;
    r.record(out);
    out(summary);
    return out;
  };
  EXPECT_TRUE(run(float_products::tf32) == run(float_products::ieee));
}

}  // namespace
}  // namespace gdn_test
