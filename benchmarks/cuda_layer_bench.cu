// SPDX-License-Identifier: Apache-2.0
// A whole layer on one GPU in bf16 at the published sizes: forward, and forward with backward, one document.
//   cuda_layer_bench --benchmark_filter=35B

#include <algorithm>
#include <string>
#include <type_traits>

#include <gdn/cuda/self.hpp>
#include <gdn/layer/requirements.hpp>

#include "cuda_timing.cuh"

namespace {

using gdn::bfloat16;
using gdn::index_t;
using gdn_bench::device;
using gdn_bench::fill;
using space = gdn::workspace<device>;
using rows = gdn::tensor_ref<bfloat16, 2, device>;

void layer(benchmark::State& state, const gdn_bench::geometry& sizes, index_t tokens, bool with_backward) {
  static const gdn::cuda::backend be;
  static const gdn::cuda::stream s;
  static gdn_bench::stopwatch watch(s);
  const gdn::layer_dims dims{
      .hidden = sizes.hidden, .key_heads = 16, .value_heads = sizes.value_heads, .key_dim = 128, .value_dim = 128};
  gdn::cuda::self_communicator self;
  const auto policy = with_backward ? gdn::keep_policy::everything : gdn::keep_policy::nothing;
  const gdn::contiguous_layout layout{.rows = tokens, .world = 1};
  const auto host = gdn::plan_layer(dims, layout, gdn::packing::rows_of(1, tokens), gdn::plan_options{}, 0);

  gdn::gated_delta_net<bfloat16, device> net;
  gdn::layer_gradients<bfloat16, device> gradients;
  gdn::resident_plan<device> plan;
  rows x, y, dy, dx;
  const auto carve_plan = [&](space& ws) { plan = gdn::upload(be, host, ws, s); };
  const gdn_bench::memory weights([&](space& ws) {
    net = {dims, gdn::parameter_storage<bfloat16, device>::carve(ws, dims)};
    gradients = gdn::layer_gradients<bfloat16, device>::carve(ws, dims);
    for (rows* t : {&x, &y, &dy, &dx}) *t = ws.take<bfloat16>(tokens, dims.hidden);
  });
  const gdn_bench::memory tables(carve_plan);
  gdn::layer_tape<bfloat16, device> tape;
  const gdn_bench::memory kept([&](space& ws) { tape = gdn::make_tape<bfloat16>(be, dims, plan, policy, ws); });
  const auto need = gdn::requirements<bfloat16>(be, dims, plan, policy);
  const gdn::cuda::device_block block({std::max(need.forward.bytes, need.backward.bytes)});
  net.weights.for_each([](auto, const auto& w) {
    using E = std::remove_const_t<typename std::remove_cvref_t<decltype(w)>::element_type>;
    auto mine = gdn::tensor_ref<E, 1, device>{const_cast<E*>(w.data()), {w.size()}, {1}};
    fill(mine, s, 0.02f);
  });
  fill(x, s);
  fill(dy, s);

  gdn_bench::report(state, watch, s, 0, 0, [&] {
    auto ws = block.workspace();
    gdn::forward(be, self, net, plan, x, y, {}, tape, ws, s);
    if (with_backward) gdn::backward(be, self, net, plan, dy, dx, {}, gradients, tape, ws, s);
  });
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["tape MB"] = static_cast<double>(need.tape.bytes) / 1e6;
}

}  // namespace

int main(int argc, char** argv) {
  for (const gdn_bench::geometry& g : gdn_bench::geometries) {
    for (const index_t tokens : {32768, 8192}) {
      const std::string at = std::string("/") + g.name + "/" + std::to_string(tokens);
      gdn_bench::add("layer_forward" + at, [=](benchmark::State& s) { layer(s, g, tokens, false); });
      gdn_bench::add("layer_training" + at, [=](benchmark::State& s) { layer(s, g, tokens, true); });
    }
  }
  return gdn_bench::run(argc, argv);
}
