// SPDX-License-Identifier: Apache-2.0
// Layers and batches on which NeMo, Megatron and prime-rl test theirs. They compare bf16 at 1e-3 to 8e-2; here fp64 on
// many ranks is within 1e-10 of one rank, and fp32 within 1e-5.
#include <plan/random_case.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {
namespace {

void expect_parity(const layer_batch& b, const layer_spread& s) {
  const layer_result one = run_layer<double>(b, on_one_rank(b, {.initial_state = s.options.initial_state,
                                                                .final_state = s.options.final_state}));
  EXPECT_TRUE(near(run_layer<double>(b, s), one, 1e-10));
  EXPECT_TRUE(near_rms(run_layer<float>(b, s), one, 1e-5));
}

// hid 64, Hk 16, Hv 32, K = V = 128, W 4: two ranks.
constexpr gdn::layer_dims nemo{.hidden = 64, .key_heads = 16, .value_heads = 32, .key_dim = 128, .value_dim = 128};

TEST(nemo, RoundRobinOnTwoRanks) {  // B 2, S 32, even tokens on rank 0 and odd ones on rank 1; loss = sum(out)
  random_source random(81);
  layer_batch b = random_batch(random, nemo, gdn::packing::rows_of(2, 32));
  std::fill(b.dy.begin(), b.dy.end(), 1);
  std::vector<std::vector<index_t>> seq_index(2);
  for (index_t t = 0; t < 32; ++t) seq_index[static_cast<std::size_t>(t % 2)].push_back(t);
  expect_parity(b, spread_over(gdn::from_positions(seq_index), b));
}

TEST(nemo, PackedContiguousOnTwoRanks) {  // B 1, S 32, documents of 7, 11 and 14
  random_source random(82);
  const std::vector<index_t> cu = {0, 7, 18, 32};
  const layer_batch b = random_batch(random, nemo, gdn::packing::from_cu_seqlens(cu, {}, 1, 32));
  expect_parity(b, spread_over(gdn::contiguous_layout{32, 2}, b));
}

// hid 128, W 2, K = V = 32, Hk 4, Hv 8, S 256, B 4.
constexpr gdn::layer_dims megatron{.hidden = 128, .key_heads = 4, .value_heads = 8, .key_dim = 32, .value_dim = 32, .conv_width = 2};

TEST(megatron, ParallelEqualsSingle) {
  random_source random(83);
  const layer_batch b = random_batch(random, megatron, gdn::packing::rows_of(4, 256));
  layer_spread s = spread_over(gdn::zigzag_layout{256, 2}, b);
  s.keep = gdn::keep_policy::recompute;
  expect_parity(b, s);
}
TEST(megatron, ParallelEqualsSinglePacked) {
  random_source random(84);
  const std::vector<index_t> cu = {0, 256, 512, 768, 1024};
  const layer_batch b = random_batch(random, megatron, gdn::packing::from_cu_seqlens(cu, {}, 1, 1024));
  layer_spread s = spread_over(gdn::per_document_zigzag(b.pack.document_rows(), 1024, 2), b);
  s.options.strategy = gdn::strategy::in_place;
  expect_parity(b, s);
}

/// A batch with the rows of another one, in other rows.
layer_batch moved(const layer_batch& from, gdn::packing pack) {
  layer_batch to = from;
  to.pack = std::move(pack);
  const index_t hid = from.dims.hidden;
  for (values* v : {&to.x, &to.dy}) {
    v->assign(static_cast<std::size_t>(to.pack.rows() * hid), std::numeric_limits<double>::quiet_NaN());
  }
  const auto a = from.pack.indices(), b = to.pack.indices();
  for (std::size_t t = 0; t < a.size(); ++t) {
    std::copy_n(from.x.begin() + a[t] * hid, hid, to.x.begin() + b[t] * hid);
    std::copy_n(from.dy.begin() + a[t] * hid, hid, to.dy.begin() + b[t] * hid);
  }
  return to;
}
values tokens_of(const values& rows, const gdn::packing& pack, index_t hid) {
  values out;
  for (const index_t row : pack.indices()) out.insert(out.end(), rows.begin() + row * hid, rows.begin() + (row + 1) * hid);
  return out;
}

TEST(megatron, PackedAndBatchedSequencesGiveTheSameBits) {  // THD and SBHD: 4 of 32 tokens
  random_source random(85);
  const layer_batch batched = random_batch(random, megatron, gdn::packing::rows_of(4, 32));
  const std::vector<index_t> cu = {0, 32, 64, 96, 128};
  const layer_batch packed = moved(batched, gdn::packing::from_cu_seqlens(cu, {}, 1, 128));
  const gdn::plan_options options{.initial_state = true, .final_state = true};
  const layer_result one = run_layer<double>(batched, on_one_rank(batched, options));
  EXPECT_TRUE(same_bits(run_layer<double>(packed, on_one_rank(packed, options)), one));
  // Zigzag of each document over two ranks, and zigzag of each row.
  const layer_spread thd = spread_over(gdn::per_document_zigzag(packed.pack.document_rows(), 128, 2), packed, options);
  const layer_spread sbhd = spread_over(gdn::zigzag_layout{32, 2}, batched, options);
  EXPECT_TRUE(same_bits(run_layer<double>(packed, thd), run_layer<double>(batched, sbhd)));
  EXPECT_TRUE(near(run_layer<double>(packed, thd), one, 1e-10));
}

TEST(megatron, PaddedPackedSequencesEqualUnpaddedOnes) {  // cu 0 30 60 90 120, padded to 0 32 64 96 128
  random_source random(86);
  const std::vector<index_t> cu = {0, 30, 60, 90, 120};
  const layer_batch unpadded = random_batch(random, megatron, gdn::packing::from_cu_seqlens(cu, {}, 1, 120));
  std::vector<index_t> mask;
  for (index_t t = 0; t < 128; ++t) mask.push_back(t % 32 < 30 ? t / 32 + 1 : 0);
  const layer_batch padded = moved(unpadded, gdn::packing::from_mask(mask, 1, 128));
  layer_result want = run_layer<double>(unpadded, on_one_rank(unpadded, {.final_state = true}));
  for (const int world : {1, 2}) {
    layer_result got = run_layer<double>(padded, spread_over(gdn::zigzag_layout{128, world}, padded, {.final_state = true}));
    got.y = tokens_of(got.y, padded.pack, 128);
    got.dx = tokens_of(got.dx, padded.pack, 128);
    EXPECT_TRUE(near(got, want, 1e-10)) << world;
  }
}

TEST(megatron, RecomputingAndRunningAgainGiveTheSameBits) {
  random_source random(87);
  const layer_batch b = random_batch(random, megatron, gdn::packing::rows_of(1, 256));
  layer_spread s = spread_over(gdn::zigzag_layout{256, 2}, b);
  const layer_result first = run_layer<float>(b, s);
  EXPECT_TRUE(same_bits(run_layer<float>(b, s), first));
  s.keep = gdn::keep_policy::recompute;
  s.backward_runs = 2;
  EXPECT_TRUE(same_bits(run_layer<float>(b, s), first));
}

// prime-rl: two ranks, documents of 37, 51 and 40 tokens in one row, decay rate 0.05.
TEST(prime_rl, PerturbingOneOfThreeDocumentsChangesNothingElse) {
  random_source random(88);
  gdn::layer_dims d = megatron;
  d.hidden = 32;
  const std::vector<index_t> cu = {0, 37, 88, 128};
  layer_batch b = random_batch(random, d, gdn::packing::from_cu_seqlens(cu, {}, 1, 128));
  std::fill(b.parameters[A_log].begin(), b.parameters[A_log].end(), std::log(0.05));
  const layer_spread s = spread_over(gdn::contiguous_layout{128, 2}, b);
  const layer_result before = run_layer<float>(b, s);
  for (std::size_t n = 0; n < 3; ++n) {
    layer_batch other = b;
    for (index_t i = cu[n] * 32; i < cu[n + 1] * 32; ++i) other.x[static_cast<std::size_t>(i)] += 1;
    const layer_result after = run_layer<float>(other, s);
    for (index_t t = 0; t < 128; ++t) {
      const bool inside = cu[n] <= t && t < cu[n + 1];
      double change = 0;
      for (index_t i = t * 32; i < (t + 1) * 32; ++i) {
        change += std::abs(after.y[static_cast<std::size_t>(i)] - before.y[static_cast<std::size_t>(i)]);
      }
      EXPECT_EQ(change > 0, inside) << "document " << n << ", token " << t;
    }
  }
}
TEST(prime_rl, PackedDocumentsEqualEachAlone) {
  random_source random(89);
  gdn::layer_dims d = megatron;
  d.hidden = 32;
  const std::vector<index_t> cu = {0, 37, 88, 128};
  const layer_batch b = random_batch(random, d, gdn::packing::from_cu_seqlens(cu, {}, 1, 128));
  const layer_result packed = run_layer<double>(b, spread_over(gdn::contiguous_layout{128, 2}, b));
  for (std::size_t n = 0; n < 3; ++n) {
    const auto cut = [&](const values& v) { return values(v.begin() + cu[n] * 32, v.begin() + cu[n + 1] * 32); };
    layer_batch alone = b;
    alone.pack = gdn::packing::rows_of(1, cu[n + 1] - cu[n]);
    alone.x = cut(b.x);
    alone.dy = cut(b.dy);
    const layer_result r = run_layer<double>(alone, on_one_rank(alone));
    EXPECT_LE(relative_error(cut(packed.y), r.y), 1e-12);
    EXPECT_LE(relative_error(cut(packed.dx), r.dx), 1e-12);
  }
}

// attention-gym: cu 0 40 232 384, fragments that no chunk is aligned with.
TEST(attention_gym, FragmentsOfThreeDocuments) {
  random_source random(90);
  gdn::layer_dims d = megatron;
  d.hidden = 16;
  const std::vector<index_t> cu = {0, 40, 232, 384};
  const layer_batch b = random_batch(random, d, gdn::packing::from_cu_seqlens(cu, {}, 1, 384));
  const std::vector<std::vector<std::pair<index_t, index_t>>> head_tail = {{{0, 96}, {288, 384}}, {{96, 192}, {192, 288}}};
  const std::vector<std::vector<std::pair<index_t, index_t>>> uneven = {{{0, 41}}, {{232, 384}, {100, 101}}, {{41, 100}, {101, 232}}};
  for (const auto& ranges : {head_tail, uneven}) {
    for (const auto strategy : strategies) {
      layer_spread s = spread_over(gdn::from_ranges(ranges), b);
      s.options.strategy = strategy;
      expect_parity(b, s);
    }
  }
}

}  // namespace
}  // namespace gdn_test
