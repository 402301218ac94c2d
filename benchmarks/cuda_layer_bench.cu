// SPDX-License-Identifier: Apache-2.0
// A layer on one GPU in bf16 at the published sizes: forward, forward with backward, and what of them is neither delta
// rule nor matrix product.
//   cuda_layer_bench --benchmark_filter=35B

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include <gdn/cuda/self.hpp>
#include <gdn/layer/requirements.hpp>

#include "cuda_timing.cuh"

namespace {

using gdn::bfloat16;
using gdn::index_t;
using gdn_bench::device;
using gdn_bench::fill;
using gdn_bench::setup;
using space = gdn::workspace<device>;
using rows = gdn::tensor_ref<bfloat16, 2, device>;

gdn::layer_dims dims_of(const gdn_bench::geometry& sizes) {
  return {.hidden = sizes.hidden, .key_heads = 16, .value_heads = sizes.value_heads, .key_dim = 128, .value_dim = 128};
}

/// A layer of random weights over packed documents on one rank, with all that its calls need.
struct layer_on_device {
  gdn::layer_dims dims;
  gdn::cp_plan host;
  gdn::gated_delta_net<bfloat16, device> net;
  gdn::layer_gradients<bfloat16, device> gradients;
  gdn::resident_plan<device> plan;
  gdn::layer_tape<bfloat16, device> tape;
  rows x, y, dy, dx;
  gdn::layer_requirements need;
  gdn_bench::memory weights, tables, kept;
  gdn::cuda::device_block block;  ///< the workspace

  layer_on_device(const gdn_bench::geometry& sizes, const std::vector<index_t>& lengths, gdn::keep_policy policy)
      : dims(dims_of(sizes)),
        host(plan_of(dims, lengths)),
        weights([&](space& ws) { carve(ws); }),
        tables([&](space& ws) { plan = gdn::upload(setup().be, host, ws, setup().s); }),
        kept([&](space& ws) { tape = gdn::make_tape<bfloat16>(setup().be, dims, plan, policy, ws); }),
        block({workspace_of(policy)}) {
    const gdn::cuda::stream_ref s = setup().s;
    net.weights.for_each([&](auto, const auto& w) {
      using E = std::remove_const_t<typename std::remove_cvref_t<decltype(w)>::element_type>;
      fill(gdn::tensor_ref<E, 1, device>{const_cast<E*>(w.data()), {w.size()}, {1}}, s, 0.02f);
    });
    fill(x, s);
    fill(dy, s);
  }

  static gdn::cp_plan plan_of(const gdn::layer_dims& dims, const std::vector<index_t>& lengths) {
    std::vector<index_t> cu{0};
    for (const index_t n : lengths) cu.push_back(cu.back() + n);
    return gdn::plan_layer(dims, gdn::contiguous_layout{.rows = cu.back(), .world = 1},
                           gdn::packing::from_cu_seqlens(cu, {}, 1, cu.back()), gdn::plan_options{}, 0);
  }
  void carve(space& ws) {
    net = {dims, gdn::parameter_storage<bfloat16, device>::carve(ws, dims)};
    gradients = gdn::layer_gradients<bfloat16, device>::carve(ws, dims);
    for (rows* t : {&x, &y, &dy, &dx}) *t = ws.take<bfloat16>(host.compute_rows, dims.hidden);
  }
  std::size_t workspace_of(gdn::keep_policy policy) {
    need = gdn::requirements<bfloat16>(setup().be, dims, plan, policy);
    return std::max(need.forward.bytes, need.backward.bytes);
  }
};

void layer(benchmark::State& state, const gdn_bench::geometry& sizes, const std::vector<index_t>& lengths,
           bool with_backward) {
  auto& [be, s, watch] = setup();
  gdn::cuda::self_communicator self;
  layer_on_device l(sizes, lengths, with_backward ? gdn::keep_policy::everything : gdn::keep_policy::nothing);
  gdn_bench::report(state, watch, s, 0, 0, [&] {
    auto ws = l.block.workspace();
    gdn::forward(be, self, l.net, l.plan, l.x, l.y, {}, l.tape, ws, s);
    if (with_backward) gdn::backward(be, self, l.net, l.plan, l.dy, l.dx, {}, l.gradients, l.tape, ws, s);
  });
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(l.host.tokens), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["tape MB"] = static_cast<double>(l.need.tape.bytes) / 1e6;
}

/// All of a layer but the delta rule and the products, in the layer's own calls on its own buffers: convolution,
/// l2norms, gates and gated norm; backward without what it computes again, which is forward's. `moves` adds what a rank
/// moves where rows are resharded: x (or dy) into messages and out of them, and y (or dx) back.
void around(benchmark::State& state, const gdn_bench::geometry& sizes, index_t tokens, bool backward, bool moves) {
  auto& [be, s, watch] = setup();
  gdn::cuda::self_communicator self;
  layer_on_device l(sizes, {tokens}, gdn::keep_policy::everything);
  const gdn::layer_dims& d = l.dims;
  rows message;
  gdn::tensor_ref<gdn::run, 1, device> runs;
  const gdn_bench::memory m([&](space& ws) {
    message = ws.take<bfloat16>(tokens, d.hidden);
    runs = ws.take<gdn::run>(2);
  });
  const index_t half = tokens / 2;  // zigzag's two pieces of a document
  const std::vector<gdn::run> pieces = {{0, 0, half, half}, {0, half, half, 0}};
  gdn::cuda::copy_to_device<gdn::run>(pieces, runs, s);
  const auto move = [&](const rows& from, const rows& to) {
    be.gather_rows<bfloat16>(from, runs, message, s);
    be.scatter_rows<bfloat16>(message, runs, to, s);
  };

  // Laid out as forward() and backward() do.
  auto ws = l.block.workspace();
  auto act = l.tape.values;
  act.take_rest(ws, d, l.host, be.delta_rule_prepared(gdn::detail::layer_problem<bfloat16>(d, l.plan)), l.tape.policy);
  const auto g = gdn::detail::backward_buffers<bfloat16, device>::take(ws, d, l.host);
  for (const rows& t : {act.qkv, act.z, act.b, act.a, act.o, g.dn, g.d_convolved}) fill(t, s);
  for (const auto& t : {g.dq, g.dk}) fill(t, s);
  for (const auto& t : {g.dg, g.d_beta}) fill(t, s);
  gdn::prologue<bfloat16>(be, l.net, l.plan, act, s);
  gdn::epilogue<bfloat16>(be, l.net, act, g.n, s);

  using view2 = gdn::tensor_ref<const bfloat16, 2, device>;
  using view3 = gdn::tensor_ref<const bfloat16, 3, device>;
  const auto heads = [&](const auto& t) { return gdn::split_columns(t, d.value_heads, d.value_dim); };
  const auto keys = [&](index_t i) {
    return gdn::split_columns(gdn::columns(g.d_convolved, i * d.keys(), d.keys()), d.key_heads, d.key_dim);
  };
  const auto forward_work = [&] {
    if (moves) move(l.x, l.dx);
    gdn::prologue<bfloat16>(be, l.net, l.plan, act, s);
    gdn::epilogue<bfloat16>(be, l.net, act, g.n, s);
    if (moves) move(l.dy, l.y);
  };
  const auto backward_work = [&] {
    auto scratch = ws;
    if (moves) move(l.dy, l.dx);
    be.gated_norm_backward(heads(view2(g.dn)), heads(view2(act.o)), heads(view2(act.z)), l.net.weights.norm, act.rstd_o,
                           heads(g.d_o), heads(g.dz), l.gradients.norm, scratch, s);
    be.gates_backward(g.dg, g.d_beta, act.a, act.b, l.net.weights.A_log, l.net.weights.dt_bias, g.da, g.db,
                      l.gradients.A_log, l.gradients.dt_bias, scratch, s);
    be.l2norm_backward(view3(g.dq), view3(act.q), act.rstd_q, keys(0), s);
    be.l2norm_backward(view3(g.dk), view3(act.k), act.rstd_k, keys(1), s);
    gdn::cp::causal_conv1d_backward(be, self, l.plan, act.qkv, act.halo, l.net.weights.conv1d, gdn::activation::silu,
                                    g.d_convolved, {}, g.dqkv, g.d_halo, l.gradients.conv1d, {}, scratch, s);
    if (moves) move(l.x, l.y);
  };

  // Per token: what each operation reads and writes, once.
  const index_t of_keys = 2 * d.keys(), values = d.values(), Hk = d.key_heads, Hv = d.value_heads;
  const index_t conv = backward ? 6 * d.channels() : 6 * of_keys + 4 * values;  // keys to float
  const index_t l2norms = 6 * of_keys + 2 * 4 * Hk;
  const index_t gates = backward ? 16 * Hv : 10 * Hv;
  const index_t norm = (backward ? 10 : 6) * values + 4 * Hv;
  const index_t moved = moves ? 2 * 8 * d.hidden : 0;
  const auto bytes = static_cast<double>(tokens * (conv + l2norms + gates + norm + moved));
  if (backward) {
    gdn_bench::report(state, watch, s, bytes, 0, backward_work);
  } else {
    gdn_bench::report(state, watch, s, bytes, 0, forward_work);
  }
}

}  // namespace

int main(int argc, char** argv) {
  using lengths = std::vector<index_t>;
  const auto add_layer = [](const gdn_bench::geometry& g, const std::string& set, const lengths& documents) {
    const std::string at = std::string("/") + g.name + "/" + set;
    gdn_bench::add("layer_forward" + at, [=](benchmark::State& s) { layer(s, g, documents, false); });
    gdn_bench::add("layer_training" + at, [=](benchmark::State& s) { layer(s, g, documents, true); });
  };
  for (const gdn_bench::geometry& g : gdn_bench::geometries) {
    for (const index_t tokens : {32768, 8192}) add_layer(g, std::to_string(tokens), {tokens});
    if (std::string(g.name) != "35B" && std::string(g.name) != "397B") continue;
    add_layer(g, "4096x8", lengths(8, 4096));
    add_layer(g, "2048x16", lengths(16, 2048));
    for (const index_t tokens : {32768, 8192}) {
      for (const bool moves : {false, true}) {
        const std::string at = std::string("/") + g.name + "/" + std::to_string(tokens) + (moves ? "/moves" : "");
        gdn_bench::add("around_rule_and_products_forward" + at,
                       [=](benchmark::State& s) { around(s, g, tokens, false, moves); });
        gdn_bench::add("around_rule_and_products_backward" + at,
                       [=](benchmark::State& s) { around(s, g, tokens, true, moves); });
      }
    }
  }
  return gdn_bench::run(argc, argv);
}
