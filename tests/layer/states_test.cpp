// SPDX-License-Identifier: Apache-2.0
// Sequences in several calls: chunks with carried states and gradients, continuation, decoding.
#include <mutex>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <plan/random_case.hpp>
#include <support/block.hpp>
#include <support/layer_reference.hpp>

namespace gdn_test {
namespace {

constexpr gdn::layer_dims dims{.hidden = 6, .key_heads = 2, .value_heads = 4, .key_dim = 4, .value_dim = 5, .conv_width = 4};
constexpr gdn::plan_options with_states{.initial_state = true, .final_state = true};

/// Tokens [begin, end) of every row, which is one document.
layer_batch part_of(const layer_batch& b, index_t begin, index_t end) {
  const auto cut = [&](const values& v) {
    values out;
    for (index_t row = 0; row < b.pack.batch; ++row) {
      const auto at = v.begin() + row * b.pack.row_length * b.dims.hidden;
      out.insert(out.end(), at + begin * b.dims.hidden, at + end * b.dims.hidden);
    }
    return out;
  };
  layer_batch out = b;
  out.pack = gdn::packing::rows_of(b.pack.batch, end - begin);
  out.x = cut(b.x);
  out.dy = cut(b.dy);
  return out;
}
/// Puts the rows of a part back.
void put(const values& part, index_t begin, const layer_batch& b, values& all) {
  const auto rows = static_cast<index_t>(part.size()) / b.pack.batch / b.dims.hidden;
  for (index_t row = 0; row < b.pack.batch; ++row) {
    std::copy_n(part.begin() + row * rows * b.dims.hidden, rows * b.dims.hidden,
                all.begin() + (row * b.pack.row_length + begin) * b.dims.hidden);
  }
}

/// A pass over whole rows in parts, each on its own number of ranks, states carried forward and gradients back.
layer_result in_parts(const layer_batch& b, const std::vector<index_t>& cuts, const std::vector<int>& worlds) {
  std::vector<layer_batch> parts;
  std::vector<layer_spread> spreads;
  layer_result out;
  out.y.resize(b.x.size());
  out.dx.resize(b.x.size());
  for (std::size_t i = 0; i < 9; ++i) out.gradients[i].assign(b.parameters[i].size(), 0);
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    layer_batch part = part_of(b, cuts[i], cuts[i + 1]);
    if (i > 0) {
      part.initial = out.final_;
      part.initial_conv = out.final_conv;
    }
    layer_spread s = i % 2 == 0 ? spread_over(gdn::contiguous_layout{cuts[i + 1] - cuts[i], worlds[i]}, part, with_states)
                                : spread_over(gdn::zigzag_layout{cuts[i + 1] - cuts[i], worlds[i]}, part, with_states);
    s.options.strategy = i % 3 == 0 ? gdn::strategy::in_place : gdn::strategy::reshard;
    s.keep = gdn::keep_policy::nothing;
    layer_result r = run_layer<double>(part, s);
    put(r.y, cuts[i], b, out.y);
    out.final_ = r.final_;
    out.final_conv = r.final_conv;
    s.keep = gdn::keep_policy::recompute;
    parts.push_back(std::move(part));
    spreads.push_back(std::move(s));
  }
  out.d_initial = b.d_final;
  out.d_initial_conv = b.d_final_conv;
  for (std::size_t i = parts.size(); i-- > 0;) {
    parts[i].d_final = out.d_initial;
    parts[i].d_final_conv = out.d_initial_conv;
    layer_result r = run_layer<double>(parts[i], spreads[i]);
    put(r.dx, cuts[i], b, out.dx);
    out.d_initial = r.d_initial;
    out.d_initial_conv = r.d_initial_conv;
    for (std::size_t k = 0; k < 9; ++k) {
      for (std::size_t e = 0; e < r.gradients[k].size(); ++e) out.gradients[k][e] += r.gradients[k][e];
    }
  }
  return out;
}

TEST(layer_states, ADocumentInThreeCallsIsTheDocumentInOne) {
  random_source random(31);
  const layer_batch b = random_batch(random, dims, gdn::packing::rows_of(2, 40));
  const layer_result want = run_layer<double>(b, on_one_rank(b, with_states));
  EXPECT_TRUE(near(in_parts(b, {0, 13, 29, 40}, {1, 1, 1}), want, 1e-10));
  EXPECT_TRUE(near(in_parts(b, {0, 10, 26, 40}, {4, 2, 3}), want, 1e-10));
}

TEST(layer_states, CallsOfOneOrTwoTokensAreTheDocumentToo) {  // parts shorter than the window
  random_source random(32);
  const layer_batch b = random_batch(random, dims, gdn::packing::rows_of(1, 11));
  const layer_result want = run_layer<double>(b, on_one_rank(b, with_states));
  EXPECT_TRUE(near(in_parts(b, {0, 1, 3, 4, 6, 11}, {1, 1, 1, 1, 1}), want, 1e-10));
  EXPECT_TRUE(near(in_parts(b, {0, 1, 5, 6, 8, 11}, {1, 2, 1, 1, 4}), want, 1e-10));
}

/// What decoding after a prefill gives: y [N, D, hid], and the states after it.
struct decoded {
  values y, recurrent, conv;
};

/// Prefill over ranks, all states to rank `to`, then `steps` tokens of every document there; slots in reverse order.
template <class T>
decoded prefill_and_decode(const layer_batch& prompt, const layer_spread& s, int to, const values& tokens, index_t steps) {
  using A = gdn::accumulate_t<T>;
  const gdn::layer_dims& d = prompt.dims;
  const index_t N = prompt.documents();
  const owned_layer<T> owned(prompt);
  decoded out{values(tokens.size()), values(prompt.initial.size()), values(prompt.initial_conv.size())};
  const std::vector<int> targets(static_cast<std::size_t>(N), to);
  gdn::run_on_threads(s.world, [&](gdn::thread_communicator& transport) {
    any_communicator comm(transport);
    const layer_api<T> api(s.rule);
    const gdn::cp_plan plan = gdn::plan_context_parallel(s.rows, prompt.pack, gdn::shape_of(d, s.chunk), d.channels(),
                                                         s.options, s.world, comm.rank());
    poisoned_block tables_block(gdn::resident_requirement<gdn::host_memory>(plan));
    memory_block tables = tables_block.workspace();
    const plan_on_host resident = api.upload(plan, tables);
    const auto n = static_cast<index_t>(plan.leaving.size());
    const index_t arriving = comm.rank() == to ? N : 0;
    const auto x = rows_of_rank<T>(prompt.x, s.rows, comm.rank(), d.hidden);
    std::vector<T> y(x.size());
    const auto states = [&](std::vector<A>& v, index_t count) {
      return gdn::make_tensor(v.data(), count, d.value_heads, d.key_dim, d.value_dim);
    };
    const auto convs = [&](std::vector<T>& v, index_t count) {
      return gdn::make_tensor(v.data(), count, d.channels(), d.conv_width);
    };
    std::vector<A> final_(static_cast<std::size_t>(n * prompt.state_size())), pool(static_cast<std::size_t>(arriving * prompt.state_size()));
    std::vector<T> final_conv(static_cast<std::size_t>(n * prompt.conv_size())), conv_pool(static_cast<std::size_t>(arriving * prompt.conv_size()));
    poisoned_block block(api.requirements(d, resident, gdn::keep_policy::nothing).forward);
    memory_block ws = block.workspace();
    gdn::sequence_states<T> io;
    io.final_ = states(final_, n);
    io.final_conv = convs(final_conv, n);
    api.prefill(comm, owned.layer(), resident, gdn::make_tensor(x.data(), plan.caller_rows, d.hidden),
                gdn::make_tensor(y.data(), plan.caller_rows, d.hidden), io, ws);
    poisoned_block delivery(gdn::delivery_requirement<T>(d, plan, targets));
    memory_block delivery_ws = delivery.workspace();
    const gdn::layer_state<T> state{states(pool, arriving), convs(conv_pool, arriving)};
    api.deliver_states(comm, d, plan, targets, {io.final_, io.final_conv}, state, delivery_ws);
    EXPECT_TRUE(delivery.guards_hold() && block.guards_hold());
    if (arriving == 0) return;

    poisoned_block decode_block(api.decode_requirement(d, N));
    for (index_t step = 0; step < steps; ++step) {
      std::vector<T> in, result(static_cast<std::size_t>(N * d.hidden));
      std::vector<std::int32_t> slots;
      for (index_t i = N - 1; i >= 0; --i) {
        slots.push_back(static_cast<std::int32_t>(i));
        const auto at = tokens.begin() + (i * steps + step) * d.hidden;
        for (auto v = at; v != at + d.hidden; ++v) in.push_back(static_cast<T>(*v));
      }
      decode_block.poison();
      memory_block decode_ws = decode_block.workspace();
      api.decode_step(owned.layer(), gdn::make_tensor(static_cast<const T*>(in.data()), N, d.hidden),
                      gdn::make_tensor(result.data(), N, d.hidden), state,
                      gdn::make_tensor(static_cast<const std::int32_t*>(slots.data()), N), decode_ws);
      EXPECT_EQ(decode_ws.peak().bytes, decode_block.bytes()) << "the promise is exact";
      for (index_t i = 0; i < N; ++i) {
        for (index_t e = 0; e < d.hidden; ++e) {
          out.y[static_cast<std::size_t>(((N - 1 - i) * steps + step) * d.hidden + e)] =
              static_cast<double>(result[static_cast<std::size_t>(i * d.hidden + e)]);
        }
      }
    }
    EXPECT_TRUE(decode_block.guards_hold());
    std::copy(pool.begin(), pool.end(), out.recurrent.begin());
    std::copy(conv_pool.begin(), conv_pool.end(), out.conv.begin());
  });
  return out;
}

/// Prompts of these lengths, right-padded; then the same sequences with `steps` more tokens, in one pass.
void expect_decoding_goes_on(const std::vector<index_t>& lengths, index_t row_length, index_t steps) {
  random_source random(33);
  const layer_batch prompt = random_batch(random, dims, gdn::packing::from_lengths(lengths, row_length));
  const auto N = static_cast<index_t>(lengths.size());
  const values tokens = random_values(random, N * steps * dims.hidden);
  std::vector<index_t> longer;
  for (const index_t n : lengths) longer.push_back(n + steps);
  layer_batch whole = random_batch(random, dims, gdn::packing::from_lengths(longer, row_length + steps));
  whole.parameters = prompt.parameters;
  for (index_t b = 0; b < N; ++b) {
    const index_t n = lengths[static_cast<std::size_t>(b)];
    const auto to = whole.x.begin() + b * (row_length + steps) * dims.hidden;
    std::copy_n(prompt.x.begin() + b * row_length * dims.hidden, n * dims.hidden, to);
    std::copy_n(tokens.begin() + b * steps * dims.hidden, steps * dims.hidden, to + n * dims.hidden);
  }
  const layer_result want = layer_by_formulas(whole, false);
  values want_y;
  for (index_t b = 0; b < N; ++b) {
    const auto from = want.y.begin() + (b * (row_length + steps) + lengths[static_cast<std::size_t>(b)]) * dims.hidden;
    want_y.insert(want_y.end(), from, from + steps * dims.hidden);
  }
  for (const int world : {1, 4}) {
    for (const auto strategy : strategies) {
      layer_spread s = spread_over(gdn::zigzag_layout{row_length, world}, prompt,
                                   {.strategy = strategy, .final_state = true});
      for (const int to : {0, world - 1}) {
        const decoded got = prefill_and_decode<double>(prompt, s, to, tokens, steps);
        EXPECT_LE(relative_error(got.y, want_y), 1e-10) << world << " ranks";
        EXPECT_LE(relative_error(got.recurrent, want.final_), 1e-10);
        EXPECT_LE(relative_error(got.conv, want.final_conv), 1e-10);
        const decoded f = prefill_and_decode<float>(prompt, s, to, tokens, steps);
        EXPECT_LE(rms_error(f.y, want_y), 1e-5);
        EXPECT_LE(rms_error(f.recurrent, want.final_), 1e-5);
      }
    }
  }
}

TEST(layer_states, DecodingAfterAPrefillOnFourRanksIsOnePass) { expect_decoding_goes_on({24, 17, 9}, 24, 5); }
TEST(layer_states, PromptsShorterThanTheWindowAreDecodedOn) { expect_decoding_goes_on({1, 2, 3, 0, 8}, 8, 6); }

TEST(layer_states, ConvStatesOfShortPromptsHaveZerosOnTheLeft) {
  random_source random(34);
  const layer_batch b = random_batch(random, dims, gdn::packing::from_lengths(std::vector<index_t>{1, 2, 3, 4, 8}, 8));
  const layer_result r = run_layer<double>(b, spread_over(gdn::zigzag_layout{8, 4}, b, {.final_state = true}));
  const index_t lengths[] = {1, 2, 3, 4, 8};
  for (index_t n = 0; n < 5; ++n) {
    for (index_t c = 0; c < dims.channels(); ++c) {
      for (index_t j = 0; j < 4; ++j) {
        const double v = r.final_conv[static_cast<std::size_t>((n * dims.channels() + c) * 4 + j)];
        EXPECT_EQ(v == 0, j < 4 - lengths[n]) << "document " << n << ", column " << j;
      }
    }
  }
}

TEST(layer_states, SeveralTokensContinueFromAState) {  // where the original starts from zero again
  random_source random(35);
  const layer_batch b = random_batch(random, dims, gdn::packing::rows_of(3, 23));
  const layer_result whole = run_layer<double>(b, on_one_rank(b, with_states));
  const layer_batch head = part_of(b, 0, 20);
  const layer_result first = run_layer<double>(head, spread_over(gdn::zigzag_layout{20, 2}, head, with_states));
  layer_batch tail = part_of(b, 20, 23);
  tail.initial = first.final_;
  tail.initial_conv = first.final_conv;
  const layer_result second = run_layer<double>(tail, on_one_rank(tail, with_states));
  EXPECT_LE(relative_error(second.y, part_of({b.dims, b.pack, {}, whole.y, b.dy, {}, {}, {}, {}}, 20, 23).x), 1e-10);
  EXPECT_LE(relative_error(second.final_, whole.final_), 1e-10);
  EXPECT_LE(relative_error(second.final_conv, whole.final_conv), 1e-15);
}

}  // namespace
}  // namespace gdn_test
