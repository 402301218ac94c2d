// SPDX-License-Identifier: Apache-2.0
// The layer on the device against the Kokkos backend in double: random plans, long documents, extreme gates, odd heads.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <cuda/layer_device.hpp>
#include <layer/random_layer.hpp>
#include <support/tolerance.hpp>

namespace {

using namespace gdn_test;

/// The batch with every number that a layer of type T stores moved by a random half of a rounding or less.
template <class T>
layer_batch shaken(layer_batch b, random_source& random) {
  std::uniform_real_distribution<double> half(-0.5, 0.5);
  const auto shake = [&](values& v) {
    for (double& x : v) x *= 1 + epsilon<T> * half(random.engine());
  };
  for (const auto i : {in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, conv1d, out_proj}) shake(b.parameters[i]);
  for (values* v : {&b.x, &b.dy, &b.initial_conv, &b.d_final_conv}) shake(*v);
  return b;
}

/// What a layer computes may be off by so many times what one rounding of its input moves exact results: the sum of its
/// own roundings, weighed by how the batch magnifies them. Few tokens, small heads and sums that cancel need no exception
/// then. A layer stores about 20 tensors between x and dx, and as many numbers are moved in the input, so one would be
/// about right in 16 bits, whose sums are in float; sums in float of float numbers round at every step. What the gates
/// get is one number per token, and per head in the end: differences, which the moved input may leave alone by chance.
template <class T>
double roundings(const std::string& name) {
  const bool gates = name == "d A_log" || name == "d dt_bias" || name == "d in_proj_a" || name == "d in_proj_b";
  return (sizeof(T) == 2 ? 3 : 12) * (gates ? 3 : 1);
}

template <class T>
class cuda_layer : public testing::Test {
 public:
  /// The device's result is near the reference of the same numbers. What `forget` clears is left out.
  template <class F = void (*)(layer_result&)>
  void check(const layer_batch& batch, layer_spread spread, F forget = [](layer_result&) {}) {
    spread.rule = rule_kind::chunked;
    const layer_batch b = rounded<T>(batch);
    SCOPED_TRACE(testing::Message() << describe(b) << "\n  " << describe(spread));
    layer_result want = run_layer<double>(b, spread), got = run_layer_on_device<T>(b, spread);
    forget(want);
    forget(got);
    std::vector<const values*> expected;
    want.for_each([&](const std::string&, const values& v) { expected.push_back(&v); });
    std::vector<double> moved(expected.size());
    random_source random(b.x.size());
    for (int run = 0; run < 3; ++run) {
      layer_result other = run_layer<double>(shaken<T>(b, random), spread);
      forget(other);
      std::size_t i = 0;
      other.for_each([&](const std::string&, const values& v) {
        moved[i] = std::max(moved[i], rms_error(v, *expected[i]));
        ++i;
      });
    }
    std::size_t i = 0;
    got.for_each([&](const std::string& name, const values& v) {
      const double error = rms_error(v, *expected[i]);
      EXPECT_LE(error, roundings<T>(name) * moved[i]) << name;
      auto& [worst, ratio] = worst_[name];
      worst = std::max(worst, error);
      if (error > 0) ratio = std::max(ratio, error / moved[i]);
      ++i;
    });
  }
  ~cuda_layer() override {
    for (const auto& [name, worst] : worst_) {
      std::printf("  %-20s %.1e, %4.1f roundings\n", name.c_str(), worst.first, worst.second);
    }
  }

 private:
  std::map<std::string, std::pair<double, double>> worst_;  // of the test, for the log
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

TYPED_TEST(cuda_layer, RandomPlansAreTheReference) {
  const std::uint64_t count = 200;
  for (std::uint64_t n = 0; n < count; ++n) {
    random_source random(n);
    layer_case c = random_layer_case(random);
    gdn::layer_dims d = dims_of(8 * random.between(4, 8), random.between(1, 2), random.between(1, 4),
                                16 * random.between(1, 4), 16 * random.between(1, 4));
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

/// g = 0 or -20, beta exactly 0 or 1, keys that nearly agree.
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
        this->check(batch, spread_over(gdn::zigzag_layout{192, 2}, batch, options), [&](layer_result& r) {
          // e^-100, by which the gate's gradients are multiplied, is no number of a float.
          if (decay == 0) {
            for (const auto p : {in_proj_a, A_log, dt_bias}) r.gradients[p].clear();
          }
          // Nor is e^-20 one of f16, in which da is stored.
          if (decay > 0 && std::is_same_v<TypeParam, gdn::float16>) r.gradients[in_proj_a].clear();
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

TEST(CudaLayer, RefusesHeadsThatAreNoMultiplesOf16UpTo256ByName) {
  for (const index_t K : {7, 24, 272}) {
    random_source random(0);
    const auto batch = random_batch(random, dims_of(16, 1, 1, K, 16), gdn::packing::rows_of(1, 4));
    try {
      run_layer_on_device<float>(batch, on_one_rank(batch));
      ADD_FAILURE() << "K = " << K << " was accepted";
    } catch (const gdn::backend_error& e) {
      EXPECT_NE(std::string(e.what()).find("is " + std::to_string(K)), std::string::npos) << e.what();
    }
  }
}

}  // namespace
