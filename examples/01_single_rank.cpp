// SPDX-License-Identifier: Apache-2.0
// One layer on one rank: a forward and a backward pass, then a prefill that is continued token by token.
// Checks the gradient against a difference, and the decoded tokens against the forward pass.

#include <cstdint>
#include <numeric>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/requirements.hpp>

#include "support.hpp"

namespace {

using example::block;
using gdn::index_t;
using T = double;  // of weights and activations; float works alike
using values = std::vector<T>;

constexpr gdn::layer_dims dims{.hidden = 24, .key_heads = 2, .value_heads = 4, .key_dim = 8, .value_dim = 12};
constexpr index_t tokens = 40;

/// n rows of a contiguous array, [n, hid].
template <class V>
auto rows(V& v, index_t first, index_t n) {
  return gdn::make_tensor(v.data() + first * dims.hidden, n, dims.hidden);
}

/// One document of `length` tokens, on one rank, as the backend reads it.
gdn::resident_plan<gdn::host_memory> plan_document(const gdn::kokkos::backend<>& be, index_t length, bool final_state,
                                                   block& memory) {
  const gdn::contiguous_layout layout{.rows = length, .world = 1};
  const gdn::plan_options options{.final_state = final_state};
  const auto plan = gdn::plan_layer(dims, layout, gdn::packing::rows_of(1, length), options, 0);
  return example::allocate(memory, [&](auto& ws) { return gdn::upload(be, plan, ws, gdn::host_stream{}); });
}

}  // namespace

int main() {
  const Kokkos::ScopeGuard kokkos;  // the program's task, never the library's
  const gdn::kokkos::backend be;
  const gdn::host_stream s;
  gdn::self_communicator self;

  block weights;
  const auto layer = example::random_layer(dims, weights);
  const values x = example::random_values(tokens * dims.hidden, 100);
  const values dy = example::random_values(tokens * dims.hidden, 101);

  // A training step. The tape lives from forward to backward; the workspace is free again after each call.
  block plan_memory;
  const auto plan = plan_document(be, tokens, false, plan_memory);
  const auto policy = gdn::keep_policy::everything;
  const auto need = gdn::requirements<T>(be, dims, plan, policy);
  const block tape_memory(need.tape);
  auto tape_ws = tape_memory.over();
  auto tape = gdn::make_tape<T>(be, dims, plan, policy, tape_ws);
  const auto need_prefill = gdn::requirements<T>(be, dims, plan, gdn::keep_policy::nothing);
  const auto need_decode = gdn::decode_requirement<T>(be, dims, 1);
  const block scratch(
      {std::max({need.forward.bytes, need.backward.bytes, need_prefill.forward.bytes, need_decode.bytes})});
  auto ws = scratch.over();
  block gradient_memory;
  const auto gradients =
      example::allocate(gradient_memory, [](auto& memory) { return gdn::layer_gradients<T>::carve(memory, dims); });
  gradients.for_each([](auto, const auto& g) { std::fill_n(g.data(), g.size(), 0); });  // backward adds

  values y(x.size());
  values dx(x.size());
  gdn::forward(be, self, layer, plan, rows(x, 0, tokens), rows(y, 0, tokens), {}, tape, ws, s);
  gdn::backward(be, self, layer, plan, rows(dy, 0, tokens), rows(dx, 0, tokens), {}, gradients, tape, ws, s);

  // The derivative of <dy, y> along a random direction of x.
  const values direction = example::random_values(tokens * dims.hidden, 102);
  const auto loss = [&](T step) {
    values moved = x;
    values out(x.size());
    for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += step * direction[i];
    gdn::prefill(be, self, layer, plan, rows(moved, 0, tokens), rows(out, 0, tokens), {}, ws, s);
    return std::inner_product(out.begin(), out.end(), dy.begin(), T{0});
  };
  const T step = 1e-5;
  const T want = (loss(step) - loss(-step)) / (2 * step);
  const T got = std::inner_product(dx.begin(), dx.end(), direction.begin(), T{0});
  bool ok = example::expect_at_most("gradient against a difference, relative", std::abs(got / want - 1), 1e-6);

  // Generation: most tokens at once, the others one by one from the state that those leave.
  const index_t prompt = tokens - 6;
  block states_memory;
  const auto states = example::allocate(states_memory, [](auto& memory) {
    return gdn::layer_state<T>{memory.template take<T>(1, dims.value_heads, dims.key_dim, dims.value_dim),
                               memory.template take<T>(1, dims.channels(), dims.conv_width)};
  });
  block prompt_memory;
  const auto prompt_plan = plan_document(be, prompt, true, prompt_memory);
  values generated(x.size());
  gdn::sequence_states<T> passing;
  passing.final_ = states.recurrent;
  passing.final_conv = states.conv;
  gdn::prefill(be, self, layer, prompt_plan, rows(x, 0, prompt), rows(generated, 0, prompt), passing, ws, s);
  const std::int32_t slot = 0;  // of the states, which have one
  for (index_t t = prompt; t < tokens; ++t) {
    gdn::decode_step(be, layer, rows(x, t, 1), rows(generated, t, 1), states, gdn::make_tensor(&slot, 1), ws, s);
  }
  ok = example::expect_at_most("prefill and decode against forward", example::difference(generated, y), 1e-12) && ok;
  return ok ? 0 : 1;
}
