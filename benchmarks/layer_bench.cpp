// SPDX-License-Identifier: Apache-2.0
/// @file  A whole layer on one rank: forward, and forward with backward.

#include <algorithm>
#include <type_traits>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/kokkos/backend.hpp>
#include <gdn/layer/requirements.hpp>

#include "support.hpp"

namespace {

using gdn::index_t;
using gdn::make_tensor;
using space = gdn::workspace<gdn::host_memory>;

/// What `carve` takes, in memory of its own.
template <class F>
auto allocate(gdn_bench::block& memory, F&& carve) {
  space measure;
  carve(measure);
  memory = gdn_bench::block(measure.peak());
  space real = memory.workspace();
  return carve(real);
}

/// Arguments: tokens, hidden, Hk, Hv, K, V.
template <class T>
void layer(benchmark::State& state, bool with_backward) {
  const index_t L = state.range(0);
  const gdn::layer_dims dims{.hidden = state.range(1),
                             .key_heads = state.range(2),
                             .value_heads = state.range(3),
                             .key_dim = state.range(4),
                             .value_dim = state.range(5)};
  const gdn::kokkos::backend be;
  gdn::self_communicator self;
  gdn_bench::block weights, gradient_memory, plan_memory, tape_memory, scratch;
  const auto parameters = allocate(weights, [&](auto& m) { return gdn::parameter_storage<T>::carve(m, dims); });
  parameters.for_each([](auto, const auto& w) {
    using E = std::remove_cvref_t<decltype(w.data()[0])>;
    const auto values = gdn_bench::random_values<E>(w.size(), 0.02);
    std::copy(values.begin(), values.end(), w.data());
  });
  const gdn::gated_delta_net<T> net{dims, parameters};
  const auto gradients = allocate(gradient_memory, [&](auto& m) { return gdn::layer_gradients<T>::carve(m, dims); });
  const gdn::contiguous_layout layout{.rows = L, .world = 1};
  const auto host = gdn::plan_layer(dims, layout, gdn::packing::rows_of(1, L), gdn::plan_options{}, 0);
  const auto plan = allocate(plan_memory, [&](auto& m) { return gdn::upload(be, host, m, gdn::host_stream{}); });
  const auto policy = with_backward ? gdn::keep_policy::everything : gdn::keep_policy::nothing;
  const auto need = gdn::requirements<T>(be, dims, plan, policy);
  const auto tape_of = [&](auto& m) { return gdn::make_tape<T>(be, dims, plan, policy, m); };
  auto tape = allocate(tape_memory, tape_of);
  scratch = gdn_bench::block({std::max(need.forward.bytes, need.backward.bytes)});
  auto ws = scratch.workspace();
  const auto x = gdn_bench::random_values<T>(L * dims.hidden), dy = gdn_bench::random_values<T>(L * dims.hidden);
  std::vector<T> y(x.size()), dx(x.size());
  const auto rows = [&](auto& v) { return make_tensor(v.data(), L, dims.hidden); };
  for (auto _ : state) {
    gdn::forward(be, self, net, plan, rows(x), rows(y), {}, tape, ws, gdn::host_stream{});
    if (with_backward) {
      gdn::backward(be, self, net, plan, rows(dy), rows(dx), {}, gradients, tape, ws, gdn::host_stream{});
    }
  }
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(L), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["tape bytes"] = static_cast<double>(need.tape.bytes);
}

template <class T>
void add(const char* name, bool with_backward) {
  benchmark::RegisterBenchmark(name, layer<T>, with_backward)
      ->ArgNames({"T", "hid", "Hk", "Hv", "K", "V"})
      ->Args({1024, 2048, 16, 32, 128, 128})
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime();
}

}  // namespace

int main(int argc, char** argv) {
  gdn_bench::add_yardstick();
  add<float>("layer_forward/f32", false);
  add<float>("layer_training/f32", true);
  add<gdn::bfloat16>("layer_forward/bf16", false);
  add<gdn::bfloat16>("layer_training/bf16", true);
  return gdn_bench::run(argc, argv);
}
