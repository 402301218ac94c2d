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

/// The layouts that callers use.
enum class layout_kind { contiguous, zigzag, interleaved, zigzag_documents, ranges, positions };
constexpr layout_kind layout_kinds[] = {layout_kind::contiguous,       layout_kind::zigzag, layout_kind::interleaved,
                                        layout_kind::zigzag_documents, layout_kind::ranges, layout_kind::positions};

/// Documents of these lengths in one row. Where a layout deals out equal chunks, lengths grow to what 2 P divides.
gdn::packing documents_for(layout_kind kind, std::vector<index_t> lengths, int world) {
  const auto missing = [&](index_t n) { return (2 * world - n % (2 * world)) % (2 * world); };
  if (kind == layout_kind::zigzag_documents) {
    for (index_t& n : lengths) n += missing(n);
  }
  if (kind == layout_kind::zigzag) lengths.back() += missing(cumulative(lengths).back());
  const auto cu = cumulative(lengths);
  return gdn::packing::from_cu_seqlens(cu, {}, 1, cu.back());
}

gdn::explicit_layout layout_of(random_source& random, layout_kind kind, const gdn::packing& pack, int world) {
  const index_t rows = pack.row_length;
  switch (kind) {
    case layout_kind::contiguous: return explicit_of(gdn::contiguous_layout{rows, world});
    case layout_kind::zigzag: return explicit_of(gdn::zigzag_layout{rows, world});
    case layout_kind::interleaved: return explicit_of(gdn::interleaved_layout{rows, world});
    case layout_kind::zigzag_documents: return gdn::per_document_zigzag(pack.document_rows(), rows, world);
    case layout_kind::ranges: return random_ranges(random, rows, world);
    default: return random_positions(random, rows, world);
  }
}

/// Strategy, share, states and what is kept are drawn, each for itself.
layer_spread drawn_spread(random_source& random, layout_kind kind, const layer_batch& batch, int world) {
  layer_spread s = random_options(random, spread_over(layout_of(random, kind, batch.pack, world), batch));
  s.chunk = 64;
  return s;
}

int any_world(random_source& random, int most = 8) { return static_cast<int>(random.between(1, most)); }

/// Documents around the length of a chunk: every layout over every number of ranks from 1 to 8, all else drawn.
TYPED_TEST(cuda_layer, DocumentsAroundAChunkAreTheReference) {
  std::uint64_t n = 0;
  for (const layout_kind kind : layout_kinds) {
    for (int world = 1; world <= 8; ++world) {
      random_source random(n++);
      std::vector<index_t> lengths = {0, 1, 15, 63, 64, 65, 127, 128, 129};
      std::shuffle(lengths.begin(), lengths.end(), random.engine());
      const auto dims = dims_of(32, random.between(1, 2), random.between(1, 4), 32, 48);
      const auto batch = random_batch(random, dims, documents_for(kind, lengths, world));
      this->check(batch, drawn_spread(random, kind, batch, world));
    }
  }
}

/// Walks of 16 chunks and more are cut in pieces where there are few of them: whole documents on one rank, and a chain
/// over two whose summaries are joined from pieces. Backward reads what the tape kept, or makes it again.
TYPED_TEST(cuda_layer, DocumentsOfManyChunksAreTheReference) {
  std::uint64_t n = 0;
  for (const auto keep : {gdn::keep_policy::everything, gdn::keep_policy::recompute, gdn::keep_policy::nothing}) {
    for (const int world : {1, 2}) {
      random_source random(n++);
      const auto kind = random.coin() ? layout_kind::contiguous : layout_kind::zigzag;
      const index_t size = 64 * random.between(1, 2);  // K = V
      const auto batch = random_batch(random, dims_of(32, 1, random.between(1, 2), size, size),
                                      documents_for(kind, {2200, 65}, world));
      layer_spread spread = drawn_spread(random, kind, batch, world);
      spread.options.strategy = gdn::strategy::reshard;  // a rank's rows are one long run, from either layout
      spread.keep = keep;
      this->check(batch, spread);
    }
  }
}

/// K and V that fill no tile, and the largest; value heads that share a key head, up to eight.
TYPED_TEST(cuda_layer, HeadsOfAnySizeUpTo256AreTheReference) {
  struct head_sizes {
    index_t K, V, ratio;
  };
  const head_sizes sizes[] = {{48, 80, 1}, {96, 96, 2},   {128, 128, 3}, {112, 240, 1}, {256, 64, 2},
                              {64, 256, 3}, {256, 256, 1}, {64, 64, 8},   {128, 128, 5}};
  std::uint64_t n = 0;
  for (const auto& [K, V, ratio] : sizes) {
    random_source random(n++);
    const auto kind = layout_kinds[random.between(0, 5)];
    const int world = any_world(random, 3);
    const auto batch = random_batch(random, dims_of(64, 1, ratio, K, V), documents_for(kind, {150}, world));
    this->check(batch, drawn_spread(random, kind, batch, world));
  }
}

/// g = 0 or -20, beta exactly 0 or 1, keys that nearly agree: each of the eight in two layouts and worlds that are drawn.
TYPED_TEST(cuda_layer, ExtremeGatesAndKeysAreTheReference) {
  for (std::uint64_t n = 0; n < 16; ++n) {
    const double decay = n % 2 == 0 ? 0 : 20;
    const bool saturated = n / 2 % 2 == 1, correlated = n / 4 % 2 == 1;
    random_source random(n);
    const auto kind = layout_kinds[random.between(0, 5)];
    const int world = any_world(random);
    auto batch = random_batch(random, dims_of(48, 2, 2, 64, 64), documents_for(kind, {127, 65}, world));
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
    this->check(batch, drawn_spread(random, kind, batch, world), [&](layer_result& r) {
      // e^-100, by which the gate's gradients are multiplied, is no number of a float.
      if (decay == 0) {
        for (const auto p : {in_proj_a, A_log, dt_bias}) r.gradients[p].clear();
      }
      // 1 - beta of a float has few digits where beta is almost 1, and none where all tokens agree that it is.
      if (saturated && (correlated || std::is_same_v<TypeParam, float>)) r.gradients[in_proj_b].clear();
      // Nor is e^-20 one of f16, in which da is stored.
      if (decay > 0 && std::is_same_v<TypeParam, gdn::float16>) r.gradients[in_proj_a].clear();
    });
  }
}

/// In every layout; the first holds a document that is cut in pieces.
TYPED_TEST(cuda_layer, RunsGiveTheSameBits) {
  for (std::uint64_t n = 0; n < 6; ++n) {
    random_source random(n);
    const auto kind = layout_kinds[n];
    const int world = n == 0 ? 1 : any_world(random, 4);
    const auto batch = rounded<TypeParam>(
        random_batch(random, dims_of(64, 2, 3, 64, 128), documents_for(kind, {100, n == 0 ? 1100 : 280}, world)));
    layer_spread spread = drawn_spread(random, kind, batch, world);
    SCOPED_TRACE(testing::Message() << describe(batch) << "\n  " << describe(spread));
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
