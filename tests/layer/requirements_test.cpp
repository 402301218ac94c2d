// SPDX-License-Identifier: Apache-2.0
// Promised memory: enough, exact, and the same for any number of ranks. (The laws run with exactly what is promised.)
#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <plan/random_case.hpp>
#include <support/block.hpp>
#include <support/errors.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {
namespace {

constexpr gdn::layer_dims dims{.hidden = 6, .key_heads = 1, .value_heads = 2, .key_dim = 8, .value_dim = 4, .conv_width = 4};

template <class T>
gdn::layer_requirements promised(const layer_spread& s, const gdn::packing& pack, const gdn::layer_dims& d, int rank,
                                 gdn::keep_policy keep, rule_kind rule = rule_kind::chunked) {
  const layer_api<T> api(rule);
  const gdn::cp_plan plan =
      gdn::plan_context_parallel(s.rows, pack, gdn::shape_of(d, s.chunk), d.channels(), s.options, s.world, rank);
  poisoned_block block(gdn::resident_requirement<gdn::host_memory>(plan));
  memory_block memory = block.workspace();
  return api.requirements(d, api.upload(plan, memory), keep);
}

/// The most that any rank needs at L rows per rank.
gdn::layer_requirements most(const auto& layout, gdn::plan_options options) {
  const auto pack = gdn::packing::rows_of(1, layout.size());
  layer_spread s;
  s.world = layout.world_size();
  s.rows = layout.fragments();
  s.options = options;
  gdn::layer_requirements out;
  for (int rank = 0; rank < s.world; ++rank) {
    const auto r = promised<double>(s, pack, dims, rank, gdn::keep_policy::everything);
    out.tape.bytes = std::max(out.tape.bytes, r.tape.bytes);
    out.forward.bytes = std::max(out.forward.bytes, r.forward.bytes);
    out.backward.bytes = std::max(out.backward.bytes, r.backward.bytes);
  }
  return out;
}

void expect_no_growth(const auto& requirement_of) {
  // From 5 ranks on there is a rank in every role: first, last, and two between.
  const gdn::layer_requirements few = requirement_of(5);
  for (const int world : {1, 2, 3, 4, 6, 7, 8, 16, 33, 64}) {
    const gdn::layer_requirements many = requirement_of(world);
    EXPECT_LE(many.tape.bytes, few.tape.bytes) << world << " ranks";
    EXPECT_LE(many.forward.bytes, few.forward.bytes) << world << " ranks";
    EXPECT_LE(many.backward.bytes, few.backward.bytes) << world << " ranks";
  }
}

TEST(layer_requirements, DoNotGrowWithTheNumberOfRanks) {
  constexpr index_t L = 16;
  for (const auto share : {gdn::share::prefix_scan, gdn::share::relay}) {
    for (const bool states : {false, true}) {
      const gdn::plan_options here{gdn::strategy::in_place, share, states, states};
      const gdn::plan_options there{gdn::strategy::reshard, share, states, states};
      expect_no_growth([&](int world) { return most(gdn::contiguous_layout{L * world, world}, here); });
      expect_no_growth([&](int world) { return most(gdn::zigzag_layout{L * world, world}, here); });
      expect_no_growth([&](int world) { return most(gdn::zigzag_layout{L * world, world}, there); });
    }
  }
}

TEST(layer_requirements, AnAllGatherGrowsByWhatItFoldsOnly) {
  constexpr index_t L = 16;
  const auto need = [&](int world) {
    return most(gdn::contiguous_layout{L * world, world}, {gdn::strategy::in_place, gdn::share::all_gather});
  };
  // One summary more for each rank more: E is Hv K V and M Hv K K doubles; M makes room for the padding of 256 bytes.
  const std::size_t summary = 2 * 8 * (4 + 8) * sizeof(double);
  for (const int world : {8, 16, 32, 64}) {
    EXPECT_LE(need(world).forward.bytes, need(4).forward.bytes + static_cast<std::size_t>(world - 4) * summary + 256);
    EXPECT_EQ(need(world).tape.bytes, need(4).tape.bytes);
  }
}

TEST(layer_requirements, AreOfThisRanksRowsAlone) {  // and so fall where a rank has fewer
  const std::vector<std::vector<std::pair<index_t, index_t>>> ranges = {{{0, 40}}, {{40, 44}}, {}};
  const gdn::explicit_layout layout = gdn::from_ranges(ranges);
  layer_spread s;
  s.world = 3;
  s.rows = layout.fragments();
  const auto need = [&](int rank) {
    return promised<double>(s, gdn::packing::rows_of(1, 44), dims, rank, gdn::keep_policy::everything);
  };
  EXPECT_GT(need(0).tape.bytes, need(1).tape.bytes);
  EXPECT_GT(need(1).tape.bytes, need(2).tape.bytes);
  EXPECT_EQ(need(2).tape.bytes, 0U);
}

TEST(layer_requirements, TapesHoldMoreWhereLessIsRebuilt) {
  layer_spread s;
  s.rows = gdn::contiguous_layout{200, 1}.fragments();
  const auto pack = gdn::packing::rows_of(1, 200);
  const auto all = promised<double>(s, pack, dims, 0, gdn::keep_policy::everything);
  const auto few = promised<double>(s, pack, dims, 0, gdn::keep_policy::recompute);
  const auto none = promised<double>(s, pack, dims, 0, gdn::keep_policy::nothing);
  EXPECT_GT(all.tape.bytes, few.tape.bytes);
  EXPECT_EQ(few.tape.bytes, 0U) << "one rank without states receives nothing";
  EXPECT_EQ(none.tape.bytes, 0U);
  EXPECT_EQ(none.backward.bytes, 0U);
  EXPECT_GT(few.forward.bytes, all.forward.bytes);
  EXPECT_GT(few.backward.bytes, all.backward.bytes);
}

/// A pass on one rank with workspaces and a tape that lack so many bytes; what is too small must be named.
template <class T>
void pass(const layer_batch& b, rule_kind rule, gdn::keep_policy keep, std::size_t less_tape, std::size_t less_forward,
          std::size_t less_backward, std::size_t* forward_peak = nullptr, std::size_t* backward_peak = nullptr) {
  const layer_api<T> api(rule);
  const layer_spread s = on_one_rank(b);
  const gdn::cp_plan plan = gdn::plan_context_parallel(s.rows, b.pack, gdn::shape_of(b.dims), b.dims.channels(), s.options, 1, 0);
  poisoned_block tables(gdn::resident_requirement<gdn::host_memory>(plan));
  memory_block tables_memory = tables.workspace();
  const plan_on_host resident = api.upload(plan, tables_memory);
  const gdn::layer_requirements need = api.requirements(b.dims, resident, keep);
  const poisoned_block tape_block({need.tape.bytes - less_tape}), forward_block({need.forward.bytes - less_forward}),
      backward_block({need.backward.bytes - less_backward});
  memory_block tape_memory = tape_block.workspace(), ws = forward_block.workspace(), back = backward_block.workspace();
  const owned_layer<T> owned(b);
  gdn::self_communicator self;
  any_communicator comm(self);
  std::vector<T> x(b.x.begin(), b.x.end()), y(x.size()), dx(x.size());
  const auto rows = [&](auto& v) { return gdn::make_tensor(v.data(), b.pack.rows(), b.dims.hidden); };
  memory_block measure;
  gdn::layer_gradients<T>::carve(measure, b.dims);
  const poisoned_block gradient_block(measure.peak());
  memory_block gradient_memory = gradient_block.workspace();
  const auto grad = gdn::layer_gradients<T>::carve(gradient_memory, b.dims);
  gdn::layer_tape<T> tape = api.make_tape(b.dims, resident, keep, tape_memory);
  api.forward(comm, owned.layer(), resident, rows(x), rows(y), {}, tape, ws);
  if (forward_peak != nullptr) *forward_peak = need.forward.bytes - ws.peak().bytes;
  api.backward(comm, owned.layer(), resident, rows(x), rows(dx), {}, grad, tape, back);
  if (backward_peak != nullptr) *backward_peak = need.backward.bytes - back.peak().bytes;
  EXPECT_TRUE(tape_block.guards_hold() && forward_block.guards_hold() && backward_block.guards_hold());
}

TEST(layer_requirements, OneStepLessIsAnErrorBeforeMemoryIsOverrun) {
  random_source random(51);
  const layer_batch b = random_batch(random, dims, gdn::packing::rows_of(1, 70));
  for (const auto rule : {rule_kind::chunked, rule_kind::recurrent}) {
    for (const auto keep : {gdn::keep_policy::everything, gdn::keep_policy::recompute}) {
      std::size_t unused_forward = 0, unused_backward = 0;
      EXPECT_NO_THROW(pass<double>(b, rule, keep, 0, 0, 0, &unused_forward, &unused_backward));
      EXPECT_EQ(unused_forward, 0U) << "forward uses all it asks for";
      EXPECT_EQ(unused_backward, 0U) << "backward uses all it asks for";
      const auto expect_named = [](const std::string& text) {
        EXPECT_NE(text.find("or more are needed"), std::string::npos) << text;
      };
      if (keep == gdn::keep_policy::everything) {
        expect_named(text_of<gdn::workspace_error>([&] { pass<double>(b, rule, keep, 256, 0, 0); }));
      }
      expect_named(text_of<gdn::workspace_error>([&] { pass<double>(b, rule, keep, 0, 256, 0); }));
      expect_named(text_of<gdn::workspace_error>([&] { pass<double>(b, rule, keep, 0, 0, 256); }));
    }
  }
}

}  // namespace
}  // namespace gdn_test
