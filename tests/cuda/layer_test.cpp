// SPDX-License-Identifier: Apache-2.0
// The layer on the device against the Kokkos backend in double: random plans, long documents, extreme gates, odd heads.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <cuda/layer_device.hpp>
#include <layer/random_layer.hpp>

namespace {

using namespace gdn_test;

/// rms(error) / rms(reference) that a tensor may have. float: IEEE on both sides, so only the order of sums differs;
/// A_log and dt_bias have one number per head, which may cancel. 16 bits: what gdn-run allows.
template <class T>
double layer_limit(const std::string& name) {
  const bool gates = name == "d A_log" || name == "d dt_bias";
  const bool gradient = name.starts_with("d");
  if (std::is_same_v<T, float>) return gates ? 3e-5 : 1e-5;
  if (std::is_same_v<T, gdn::bfloat16>) return gradient ? 5e-2 : 2e-2;
  return gates ? 2e-2 : gradient ? 8e-3 : 4e-3;  // f16 has fewer bits below 6e-5, where many gradients lie
}

template <class T>
class cuda_layer : public testing::Test {
 public:
  /// The device's result is near the reference of the same numbers. What `forget` clears is left out.
  template <class F = void (*)(layer_result&)>
  void check(const layer_batch& batch, layer_spread spread, double factor = 1, F forget = [](layer_result&) {}) {
    spread.rule = rule_kind::chunked;
    const layer_batch b = rounded<T>(batch);
    SCOPED_TRACE(testing::Message() << describe(b) << "\n  " << describe(spread));
    layer_result want = run_layer<double>(b, spread), got = run_layer_on_device<T>(b, spread);
    forget(want);
    forget(got);
    std::vector<const values*> expected;
    want.for_each([&](const std::string&, const values& v) { expected.push_back(&v); });
    std::size_t i = 0;
    got.for_each([&](const std::string& name, const values& v) {
      const double error = rms_error(v, *expected[i++]);
      EXPECT_LE(error, factor * layer_limit<T>(name)) << name;
      double& worst = worst_[name];
      worst = std::max(worst, error);
    });
  }
  ~cuda_layer() override {
    for (const auto& [name, worst] : worst_) std::printf("  %s %.1e\n", name.c_str(), worst);
  }

 private:
  std::map<std::string, double> worst_;  // of the test, for the log
};
using types = testing::Types<float, gdn::bfloat16, gdn::float16>;
TYPED_TEST_SUITE(cuda_layer, types);

gdn::layer_dims dims_of(index_t hidden, index_t Hk, index_t ratio, index_t K, index_t V) {
  gdn::layer_dims d;
  d.hidden = hidden;
  d.key_heads = Hk;
  d.value_heads = Hk * ratio;
  d.key_dim = K;
  d.value_dim = V;
  return d;
}

/// Heads so small that norms of a few numbers amplify roundings are left to the CPU's tests.
TYPED_TEST(cuda_layer, RandomPlansAreTheReference) {
  const std::uint64_t count = 200;
  for (std::uint64_t n = 0; n < count && !this->HasFailure(); ++n) {
    random_source random(n);
    layer_case c = random_layer_case(random);
    if (c.batch.pack.cu_seqlens.back() < 8) continue;  // the gradients of a token or two may cancel
    gdn::layer_dims d = dims_of(8 * random.between(4, 8), random.between(1, 2), random.between(1, 4),
                                16 * random.between(2, 4), 16 * random.between(2, 4));
    d.conv_width = c.batch.dims.conv_width;
    c.batch = random_batch(random, d, c.batch.pack);
    if (random.coin()) c.spread.chunk = 64;
    SCOPED_TRACE(testing::Message() << "case " << n << ": " << c.name);
    this->check(c.batch, c.spread);
  }
}

/// Documents around the length of a chunk, over 1 to 8 ranks, every layout, strategy and share.
TYPED_TEST(cuda_layer, DocumentsAroundAChunkAreTheReference) {
  const std::vector<index_t> cu = {0, 1, 16, 79, 143, 208, 335, 336, 464, 640};
  const index_t tokens = cu.back();
  std::uint64_t n = 0;
  for (const int world : {1, 2, 4, 8}) {
    for (const int layout : {0, 1, 2, 3}) {
      random_source random(n++);
      const auto batch = random_batch(random, dims_of(32, 1, 1 + layout % 4, 32, 48),
                                      gdn::packing::from_cu_seqlens(cu, {}, 1, tokens));
      const gdn::plan_options options{.strategy = strategies[n % 2],
                                      .share = shares[n % 3],
                                      .initial_state = n % 3 != 0,
                                      .final_state = n % 4 != 0};
      switch (layout) {
        case 0: this->check(batch, spread_over(gdn::contiguous_layout{tokens, world}, batch, options)); break;
        case 1: this->check(batch, spread_over(gdn::zigzag_layout{tokens, world}, batch, options)); break;
        case 2: this->check(batch, spread_over(gdn::interleaved_layout{tokens, world}, batch, options)); break;
        default: this->check(batch, spread_over(random_ranges(random, tokens, world), batch, options));
      }
    }
  }
}

/// K and V that fill no tile, and the largest.
TYPED_TEST(cuda_layer, HeadsOfAnySizeUpTo256AreTheReference) {
  const std::pair<index_t, index_t> sizes[] = {{48, 80},  {96, 96},  {128, 128}, {112, 240},
                                               {256, 64}, {64, 256}, {256, 256}};
  std::uint64_t n = 0;
  for (const auto& [K, V] : sizes) {
    random_source random(n);
    const auto batch = random_batch(random, dims_of(64, 1, 1 + static_cast<index_t>(n % 3), K, V),
                                    gdn::packing::rows_of(1, 150));
    const gdn::plan_options options{.strategy = strategies[n % 2], .initial_state = true, .final_state = true};
    this->check(batch, spread_over(gdn::zigzag_layout{150, n % 2 == 0 ? 1 : 3}, batch, options));
    ++n;
  }
}

/// g = 0 or -20, beta exactly 0 or 1, keys that nearly agree. The gradients of such gates and betas vanish, which
/// leaves nothing to compare; what the others lose to them weighs more than usual.
TYPED_TEST(cuda_layer, ExtremeGatesAndKeysAreTheReference) {
  std::uint64_t n = 0;
  for (const double decay : {0.0, 20.0}) {
    for (const bool saturated : {false, true}) {
      for (const bool correlated : {false, true}) {
        random_source random(n++);
        auto batch = random_batch(random, dims_of(48, 2, 2, 64, 64), gdn::packing::rows_of(1, 192));
        if (decay == 0) {
          for (double& v : batch.parameters[A_log]) v = -100;  // g = -e^-100 softplus
        } else {
          for (double& v : batch.parameters[A_log]) v = 0;
          for (double& v : batch.parameters[dt_bias]) v = decay;
          for (double& v : batch.parameters[in_proj_a]) v *= 0.01;
        }
        if (saturated) {
          for (double& v : batch.parameters[in_proj_b]) v *= 4096;
        }
        if (correlated) {  // rows of x that nearly agree
          for (std::size_t i = 48; i < batch.x.size(); ++i) batch.x[i] = 0.9 * batch.x[i % 48] + 0.1 * batch.x[i];
        }
        SCOPED_TRACE(testing::Message() << "g " << -decay << ", beta saturated " << saturated << ", keys correlated "
                                        << correlated);
        const gdn::plan_options options{.strategy = strategies[n % 2], .initial_state = true, .final_state = true};
        this->check(batch, spread_over(gdn::zigzag_layout{192, 2}, batch, options), 10,
                    [&](layer_result& r) {
                      for (const auto p : {in_proj_a, in_proj_b, A_log, dt_bias}) r.gradients[p].clear();
                      // e^-20 of a gradient of about 1 is no number of f16, in which states pass from chunk to chunk.
                      if (decay > 0 && std::is_same_v<TypeParam, gdn::float16>) r.d_initial.clear();
                    });
      }
    }
  }
}

TYPED_TEST(cuda_layer, RunsGiveTheSameBits) {
  const std::vector<index_t> cu_seqlens = {0, 100, 380};
  for (std::uint64_t n = 0; n < 4; ++n) {
    random_source random(n);
    const auto batch = rounded<TypeParam>(random_batch(
        random, dims_of(64, 2, 3, 64, 128), gdn::packing::from_cu_seqlens(cu_seqlens, {}, 1, cu_seqlens.back())));
    const gdn::plan_options options{
        .strategy = strategies[n % 2], .share = shares[n % 3], .initial_state = true, .final_state = true};
    const auto spread = spread_over(gdn::zigzag_layout{380, 2}, batch, options);
    const auto first = run_layer_on_device<TypeParam>(batch, spread);
    for (int again = 0; again < 3; ++again) {
      EXPECT_TRUE(same_bits(run_layer_on_device<TypeParam>(batch, spread), first));
    }
  }
}

TEST(CudaLayer, RefusesHeadsBeyond256ByName) {
  random_source random(0);
  const auto batch = random_batch(random, dims_of(16, 1, 1, 272, 16), gdn::packing::rows_of(1, 4));
  try {
    run_layer_on_device<float>(batch, on_one_rank(batch));
    ADD_FAILURE() << "K = 272 was accepted";
  } catch (const gdn::backend_error& e) {
    EXPECT_NE(std::string(e.what()).find("272"), std::string::npos) << e.what();
  }
}

}  // namespace
