// SPDX-License-Identifier: Apache-2.0
// Context parallelism on the CPU: four ranks, each a thread, hold a packed sequence in the zigzag layout.
// Checks that outputs, final states and all gradients equal those of one rank.

#include <algorithm>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/reduce.hpp>
#include <gdn/layer/requirements.hpp>

#include "support.hpp"

namespace {

using example::block;
using gdn::index_t;
using T = double;  // of weights and activations; float works alike
using values = std::vector<T>;

constexpr gdn::layer_dims dims{.hidden = 24, .key_heads = 2, .value_heads = 4, .key_dim = 8, .value_dim = 12};
constexpr index_t tokens = 64;
const std::vector<index_t> cu_seqlens = {0, 20, 21, tokens};  // documents of 20, 1 and 43 tokens in one row

/// The whole sequence, as no rank of a real program holds it.
struct sequence {
  values x = example::random_values(tokens * dims.hidden, 100);
  values dy = example::random_values(tokens * dims.hidden, 101);
  values y = values(x.size());
  values dx = values(x.size());
  values states = values(static_cast<std::size_t>(3 * dims.state_size()));
  values gradients;  // of all parameters, one after the other
};

/// The entries `which` of an array whose entries have one size, and back.
values pick(const values& all, const std::vector<index_t>& which, index_t size) {
  values out;
  for (const index_t i : which) out.insert(out.end(), all.begin() + i * size, all.begin() + (i + 1) * size);
  return out;
}
void place(const values& part, const std::vector<index_t>& which, index_t size, values& all) {
  auto from = part.begin();
  for (const index_t i : which) {
    std::copy_n(from, size, all.begin() + i * size);
    from += size;
  }
}

/// One training step of a layer. Every rank calls it, with its own communicator and its own rows.
template <gdn::communicator Comm, gdn::sequence_layout Layout>
void train(Comm& comm, const Layout& layout, const gdn::gated_delta_net<T>& layer, sequence& all) {
  const gdn::kokkos::backend be;
  const gdn::host_stream s;

  // Plan, once per batch shape, from what all ranks know.
  const auto documents = gdn::packing::from_cu_seqlens(cu_seqlens, {}, 1, tokens);
  const gdn::plan_options options{.strategy = gdn::strategy::reshard, .final_state = true};
  const gdn::cp_plan host_plan = gdn::plan_layer(dims, layout, documents, options, comm.rank());
  gdn::check_same_plan<T>(comm, host_plan, s);
  block plan_memory;
  const auto plan = example::allocate(plan_memory, [&](auto& ws) { return gdn::upload(be, host_plan, ws, s); });

  // Memory: the tape lives from forward to backward, the workspace is free again after each call.
  const auto need = gdn::requirements<T>(be, dims, plan, gdn::keep_policy::everything);
  const auto reduce = gdn::reduce_requirement<T>(dims, comm.size());
  const block tape_memory(need.tape);
  const block scratch({std::max({need.forward.bytes, need.backward.bytes, reduce.bytes})});
  auto tape_ws = tape_memory.over();
  auto ws = scratch.over();
  auto tape = gdn::make_tape<T>(be, dims, plan, gdn::keep_policy::everything, tape_ws);
  block gradient_memory;
  const auto gradients =
      example::allocate(gradient_memory, [](auto& memory) { return gdn::layer_gradients<T>::carve(memory, dims); });
  gradients.for_each([](auto, const auto& g) { std::fill_n(g.data(), g.size(), T{0}); });  // backward adds

  // This rank's rows, and the final states of the documents that end here.
  const auto mine = gdn::positions(layout, comm.rank());
  const auto n = static_cast<index_t>(host_plan.leaving.size());
  const values x = pick(all.x, mine, dims.hidden);
  const values dy = pick(all.dy, mine, dims.hidden);
  values y(x.size());
  values dx(x.size());
  values state(static_cast<std::size_t>(n * dims.state_size()));
  values conv(static_cast<std::size_t>(n * dims.channels() * dims.conv_width));
  const auto rows = [&](auto& v) { return gdn::make_tensor(v.data(), host_plan.caller_rows, dims.hidden); };
  gdn::sequence_states<T> states;
  states.final_ = gdn::make_tensor(state.data(), n, dims.value_heads, dims.key_dim, dims.value_dim);
  states.final_conv = gdn::make_tensor(conv.data(), n, dims.channels(), dims.conv_width);

  gdn::forward(be, comm, layer, plan, rows(x), rows(y), states, tape, ws, s);
  gdn::backward(be, comm, layer, plan, rows(dy), rows(dx), {}, gradients, tape, ws, s);
  gdn::reduce_gradients<T>(be, comm, gradients, ws, s);

  place(y, mine, dims.hidden, all.y);
  place(dx, mine, dims.hidden, all.dx);
  place(state, host_plan.leaving, dims.state_size(), all.states);
  if (comm.rank() != 0) return;  // all ranks have the same gradients now
  gradients.for_each(
      [&](auto, const auto& g) { all.gradients.insert(all.gradients.end(), g.data(), g.data() + g.size()); });
}

}  // namespace

int main() {
  const Kokkos::ScopeGuard kokkos;
  block weights;
  const auto layer = example::random_layer(dims, weights);

  sequence one, four;
  gdn::self_communicator self;
  train(self, gdn::contiguous_layout{tokens, 1}, layer, one);
  gdn::run_on_threads(4, [&](gdn::thread_communicator& comm) {
    train(comm, gdn::zigzag_layout{tokens, 4}, layer, four);
  });

  bool ok = example::expect_at_most("outputs", example::difference(four.y, one.y), 1e-12);
  ok = example::expect_at_most("gradient of the input", example::difference(four.dx, one.dx), 1e-12) && ok;
  ok = example::expect_at_most("final states", example::difference(four.states, one.states), 1e-12) && ok;
  ok = example::expect_at_most("parameter gradients", example::difference(four.gradients, one.gradients), 1e-11) && ok;
  return ok ? 0 : 1;
}
