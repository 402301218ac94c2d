// SPDX-License-Identifier: Apache-2.0
// Arguments that do not fit: what each message says.
#include <gmock/gmock.h>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <plan/random_case.hpp>
#include <support/block.hpp>
#include <support/errors.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {
namespace {

using testing::HasSubstr;
constexpr gdn::layer_dims dims{.hidden = 6, .key_heads = 1, .value_heads = 2, .key_dim = 4, .value_dim = 3, .conv_width = 4};

/// A call on one rank that is right, until a test spoils something.
class layer_errors : public testing::Test {
 protected:
  static constexpr index_t rows = 8;
  using T = double;

  struct plan_in_memory {
    gdn::cp_plan plan;
    poisoned_block block;
    memory_block memory;
    plan_on_host resident;
    plan_in_memory(const layer_api<T>& api, gdn::cp_plan p)
        : plan(std::move(p)),
          block(gdn::resident_requirement<gdn::host_memory>(plan)),
          memory(block.workspace()),
          resident(api.upload(plan, memory)) {}
  };
  static layer_batch make_batch(const gdn::layer_dims& d) {
    random_source random(71);
    return random_batch(random, d, gdn::packing::rows_of(1, rows));
  }
  static gdn::cp_plan plan_for(const gdn::layer_dims& d, gdn::plan_options options = {}, index_t n = rows, int world = 1,
                               int rank = 0) {
    return gdn::plan_layer(d, gdn::contiguous_layout{n, world}, gdn::packing::rows_of(1, n), options, rank);
  }

  layer_errors() : batch(make_batch(dims)), owned(batch), any(self), layer(owned.layer()), tape_memory({1 << 20}) {
    use(plan_for(dims));
    x_ = gdn::make_tensor(static_cast<const T*>(buffer[0].data()), rows, dims.hidden);
    y_ = gdn::make_tensor(buffer[1].data(), rows, dims.hidden);
    dy_ = gdn::make_tensor(static_cast<const T*>(buffer[2].data()), rows, dims.hidden);
    dx_ = gdn::make_tensor(buffer[3].data(), rows, dims.hidden);
    memory_block m = gradient_block.workspace();
    grad = gdn::layer_gradients<T>::carve(m, dims);
  }
  void use(gdn::cp_plan p) { plan = std::make_unique<plan_in_memory>(api, std::move(p)); }
  gdn::layer_tape<T> make_tape(gdn::keep_policy keep = gdn::keep_policy::everything) {
    tape_memory = poisoned_block({1 << 20});
    memory_block m = tape_memory.workspace();
    return api.make_tape(dims, plan->resident, keep, m);
  }
  void forward() {
    memory_block ws = memory.workspace();
    if (!tape) tape = make_tape();
    api.forward(any, layer, plan->resident, x_, y_, states, *tape, ws);
  }
  void backward() {
    memory_block ws = memory.workspace();
    api.backward(any, layer, plan->resident, dy_, dx_, d_states, grad, *tape, ws);
  }
  template <class E>
  void expect_forward(std::string_view text) {
    EXPECT_THAT(text_of<E>([&] { forward(); }), HasSubstr(std::string(text)));
  }
  template <class E>
  void expect_backward(std::string_view text) {
    EXPECT_THAT(text_of<E>([&] { backward(); }), HasSubstr(std::string(text)));
  }
  gdn::states_ref<T, gdn::host_memory> states_of(index_t n, index_t V = dims.value_dim) {
    return gdn::make_tensor(buffer[4].data(), n, dims.value_heads, dims.key_dim, V);
  }
  gdn::tensor_ref<T, 3> convs_of(index_t n, index_t W = dims.conv_width) {
    return gdn::make_tensor(buffer[5].data(), n, dims.channels(), W);
  }

  layer_api<T> api;
  layer_batch batch;
  owned_layer<T> owned;
  gdn::self_communicator self;
  any_communicator any;
  gdn::gated_delta_net<T> layer;
  std::unique_ptr<plan_in_memory> plan;
  std::array<std::vector<T>, 6> buffer = [] {
    std::array<std::vector<T>, 6> b;
    b.fill(std::vector<T>(1000, 0.5));
    return b;
  }();
  poisoned_block memory{{1 << 20}}, tape_memory, gradient_block{{1 << 16}};
  gdn::tensor_ref<const T, 2> x_, dy_;
  gdn::tensor_ref<T, 2> y_, dx_;
  gdn::sequence_states<T> states;
  gdn::state_gradients<T> d_states;
  gdn::layer_gradients<T> grad;
  std::optional<gdn::layer_tape<T>> tape;
};

TEST_F(layer_errors, WithoutAnyTheCallWorks) {
  forward();
  backward();
}

TEST_F(layer_errors, RowsNameTheTensorTheAxisAndBothExtents) {
  x_ = gdn::rows(x_, 0, rows - 1);
  expect_forward<gdn::shape_error>("x axis 0 must be 8 is 7");
  x_ = gdn::make_tensor(static_cast<const T*>(buffer[0].data()), rows, dims.hidden + 1);
  expect_forward<gdn::shape_error>("x axis 1 must be 6 is 7");
  x_ = gdn::columns(x_, 0, dims.hidden);
  expect_forward<gdn::shape_error>("x must be contiguous");
  x_ = gdn::make_tensor(static_cast<const T*>(nullptr), rows, dims.hidden);
  expect_forward<gdn::shape_error>("x has no data");
  x_ = gdn::make_tensor(static_cast<const T*>(buffer[0].data()), rows, dims.hidden);
  y_ = gdn::rows(y_, 0, rows + 1);
  expect_forward<gdn::shape_error>("y axis 0 must be 8 is 9");
}

TEST_F(layer_errors, GradientsOfRowsToo) {
  forward();
  dy_ = gdn::rows(dy_, 0, 3);
  expect_backward<gdn::shape_error>("dy axis 0 must be 8 is 3");
  dy_ = gdn::make_tensor(static_cast<const T*>(buffer[2].data()), rows, dims.hidden);
  dx_ = gdn::make_tensor(buffer[3].data(), rows, dims.hidden + 2);
  expect_backward<gdn::shape_error>("dx axis 1 must be 6 is 8");
}

TEST_F(layer_errors, WeightsNameTheTensor) {
  layer.weights.norm = gdn::rows(layer.weights.norm, 0, 2);
  expect_forward<gdn::shape_error>("norm axis 0 must be 3 is 2");
  layer = owned.layer();
  layer.weights.conv1d = gdn::columns(layer.weights.conv1d, 1, 3);
  expect_forward<gdn::shape_error>("conv1d axis 1 must be 4 is 3");
  layer = owned.layer();
  layer.weights.in_proj_a = layer.weights.in_proj_z;
  expect_forward<gdn::shape_error>("in_proj_a axis 0 must be 2 is 6");
}

TEST_F(layer_errors, GradientsOfWeightsNameTheTensor) {
  forward();
  grad.A_log = gdn::rows(grad.A_log, 0, 1);
  expect_backward<gdn::shape_error>("A_log axis 0 must be 2 is 1");
}

TEST_F(layer_errors, DimsThatCannotBe) {
  layer.dims.value_heads = 3;
  layer.dims.key_heads = 2;
  expect_forward<gdn::metadata_error>("linear_num_value_heads 3 is no multiple of linear_num_key_heads 2");
  layer = owned.layer();
  layer.dims.hidden = 0;
  expect_forward<gdn::metadata_error>("hidden_size is 0");
  layer = owned.layer();
  layer.dims.norm_eps = 0;
  expect_forward<gdn::metadata_error>("rms_norm_eps");
}

TEST_F(layer_errors, APlanForAnotherLayer) {
  gdn::layer_dims other = dims;
  other.conv_width = 3;
  tape = make_tape();
  use(plan_for(other));
  expect_forward<gdn::metadata_error>("the plan is for conv width 3, the layer has 4");
  other = dims;
  other.value_dim = 5;
  use(plan_for(other));
  expect_forward<gdn::metadata_error>("the plan is for 2 value heads of 4 x 5 and 18 channels, which are not this layer's");
  other = dims;
  other.key_heads = 2;  // the same summaries, other channels
  use(plan_for(other));
  expect_forward<gdn::metadata_error>("22 channels, which are not this layer's");
}

TEST_F(layer_errors, APlanForAnotherRankOrGroup) {
  tape = make_tape();
  use(plan_for(dims, {}, rows, 2, 1));
  expect_forward<gdn::metadata_error>("the plan is for rank 1 of 2, the communicator is rank 0 of 1");
  gdn::run_on_threads(2, [&](gdn::thread_communicator& transport) {  // every rank finds out, and none waits
    any_communicator comm(transport);
    const layer_api<T> mine;
    const plan_in_memory wrong(mine, plan_for(dims, {}, rows, 2, 1 - comm.rank()));
    memory_block ws;
    gdn::layer_tape<T> none;
    EXPECT_THAT(text_of<gdn::metadata_error>([&] {
                  std::vector<T> mine_x(24), mine_y(24);
                  mine.forward(comm, owned.layer(), wrong.resident, gdn::make_tensor(static_cast<const T*>(mine_x.data()), 4, 6),
                               gdn::make_tensor(mine_y.data(), 4, 6), {}, none, ws);
                }),
                HasSubstr(gdn::say("the plan is for rank", 1 - comm.rank(), "of 2, the communicator is rank", comm.rank())));
  });
}

TEST_F(layer_errors, StatesWithoutTheOption) {
  states.initial = states_of(1);
  expect_forward<gdn::metadata_error>("an initial state is given, but the plan was made without initial_state");
  states = {};
  states.initial_conv = convs_of(1);
  expect_forward<gdn::metadata_error>("an initial state is given, but the plan was made without initial_state");
  states = {};
  states.final_conv = convs_of(1);
  expect_forward<gdn::metadata_error>("a final state is asked for, but the plan was made without final_state");
  states = {};
  forward();
  d_states.final_ = states_of(1);
  expect_backward<gdn::metadata_error>("a gradient of the final state is given, but the plan was made without final_state");
  d_states = {};
  d_states.initial_conv = convs_of(1);
  expect_backward<gdn::metadata_error>("a gradient of the initial state is asked for, but the plan was made without initial_state");
}

TEST_F(layer_errors, StatesThatAreMissingOrOfWrongShape) {
  use(plan_for(dims, {.initial_state = true}));
  expect_forward<gdn::shape_error>("the initial recurrent state axis 0 must be 1 is 0");
  states.initial = states_of(1, 4);
  expect_forward<gdn::shape_error>("the initial recurrent state axis 3 must be 3 is 4");
  states.initial = states_of(2);
  expect_forward<gdn::shape_error>("the initial recurrent state axis 0 must be 1 is 2");
  states.initial = states_of(1);
  states.initial_conv = convs_of(1, 3);
  expect_forward<gdn::shape_error>("the initial conv state axis 2 must be 4 is 3");
  states.initial_conv = convs_of(1);
  forward();
  d_states.initial = states_of(2);
  expect_backward<gdn::shape_error>("the initial state's gradient axis 0 must be 1 is 2");

  tape.reset();
  states = {};
  d_states = {};
  use(plan_for(dims, {.final_state = true}));
  expect_forward<gdn::shape_error>("the final recurrent state axis 0 must be 1 is 0");
  states.final_ = states_of(1);
  expect_forward<gdn::shape_error>("the final conv state axis 0 must be 1 is 0");
  states.final_conv = convs_of(1);
  forward();
  d_states.final_conv = convs_of(1, 5);
  expect_backward<gdn::shape_error>("the final conv state's gradient axis 2 must be 4 is 5");
}

TEST_F(layer_errors, TapesThatAreNotThisPlans) {
  tape = make_tape();
  expect_backward<gdn::metadata_error>("the tape was not filled by forward");
  forward();
  const auto first = std::move(plan);
  use(plan_for(dims, {.strategy = gdn::strategy::in_place, .share = gdn::share::relay}));
  expect_backward<gdn::metadata_error>("the tape was filled with another plan");
  tape = make_tape(gdn::keep_policy::nothing);
  forward();
  expect_backward<gdn::metadata_error>("the tape keeps nothing; backward needs a policy");
}

TEST_F(layer_errors, AForwardThatFailsEmptiesItsTape) {
  gdn::run_on_threads(2, [&](gdn::thread_communicator& transport) {
    any_communicator comm(transport);
    const layer_api<T> mine;
    const plan_in_memory p(mine, plan_for(dims, {}, rows, 2, comm.rank()));
    const poisoned_block tape_block({1 << 20}), block({1 << 20});
    memory_block tape_memory_ = tape_block.workspace(), ws = block.workspace();
    auto t = mine.make_tape(dims, p.resident, gdn::keep_policy::everything, tape_memory_);
    std::vector<T> in(24, 1), out(24);
    const auto x = gdn::make_tensor(static_cast<const T*>(in.data()), 4, 6);
    const auto y = gdn::make_tensor(out.data(), 4, 6);
    mine.forward(comm, owned.layer(), p.resident, x, y, {}, t, ws);
    if (comm.rank() == 0) return;  // leaves, so the other waits for history in vain
    EXPECT_THROW(mine.forward(comm, owned.layer(), p.resident, x, y, {}, t, ws), gdn::comm_error);
    EXPECT_EQ(ws.used(), 0U) << "and gives its workspace back";
    EXPECT_THAT(text_of<gdn::metadata_error>([&] { mine.backward(comm, owned.layer(), p.resident, x, y, {}, grad, t, ws); }),
                HasSubstr("the tape was not filled by forward"));
  });
}

TEST_F(layer_errors, MemoryThatIsMisalignedOrMissing) {
  EXPECT_THAT(text_of<gdn::workspace_error>([&] { memory_block(memory.data() + 8, 1000); }),
              HasSubstr("a workspace must be aligned to 256 bytes"));
  EXPECT_THAT(text_of<gdn::workspace_error>([&] { memory_block(nullptr, 1000); }),
              HasSubstr("a workspace of 1000 bytes has no memory"));
}

TEST_F(layer_errors, DecodingNamesWhatDoesNotFit) {
  std::vector<std::int32_t> slots = {0, 1};
  memory_block ws = memory.workspace();
  const gdn::layer_state<T> pool{states_of(3), convs_of(3)};
  const auto step = [&](gdn::tensor_ref<const T, 2> in, gdn::tensor_ref<T, 2> out, const gdn::layer_state<T>& state, index_t n) {
    api.decode_step(layer, in, out, state, gdn::make_tensor(static_cast<const std::int32_t*>(slots.data()), n), ws);
  };
  const auto in = gdn::rows(x_, 0, 2);
  const auto out = gdn::rows(y_, 0, 2);
  step(in, out, pool, 2);
  EXPECT_THAT(text_of<gdn::shape_error>([&] { step(in, gdn::rows(out, 0, 1), pool, 2); }), HasSubstr("y axis 0 must be 2 is 1"));
  EXPECT_THAT(text_of<gdn::shape_error>([&] { step(in, out, pool, 1); }), HasSubstr("slots axis 0 must be 2 is 1"));
  gdn::layer_state<T> wrong = pool;
  wrong.conv = convs_of(3, 3);
  EXPECT_THAT(text_of<gdn::shape_error>([&] { step(in, out, wrong, 2); }), HasSubstr("axis 2 must be 4 is 3"));
  wrong = pool;
  wrong.recurrent = states_of(3, 2);
  EXPECT_THAT(text_of<gdn::shape_error>([&] { step(in, out, wrong, 2); }), HasSubstr("axis 3 must be 3 is 2"));
  memory_block small(memory.data(), 256);
  EXPECT_THAT(text_of<gdn::workspace_error>([&] {
                api.decode_step(layer, in, out, pool, gdn::make_tensor(static_cast<const std::int32_t*>(slots.data()), 2), small);
              }),
              HasSubstr("the workspace has 256 bytes"));
}

TEST_F(layer_errors, DeliveryNamesWhatDoesNotFit) {
  use(plan_for(dims, {.final_state = true}));
  memory_block ws = memory.workspace();
  const gdn::layer_state<T> one{states_of(1), convs_of(1)}, two{states_of(2), convs_of(2)};
  const std::vector<int> here = {0}, nowhere = {1}, many = {0, 0};
  api.deliver_states(any, dims, plan->plan, here, one, one, ws);
  EXPECT_THAT(text_of<gdn::metadata_error>([&] { api.deliver_states(any, dims, plan->plan, nowhere, one, {states_of(0), convs_of(0)}, ws); }),
              HasSubstr("document 0 goes to rank 1 of 1"));
  EXPECT_THAT(text_of<gdn::metadata_error>([&] { api.deliver_states(any, dims, plan->plan, many, one, two, ws); }),
              HasSubstr("targets of 2 documents are given, the plan has 1"));
  EXPECT_THAT(text_of<gdn::shape_error>([&] { api.deliver_states(any, dims, plan->plan, here, two, one, ws); }),
              HasSubstr("the final states axis 0 must be 1 is 2"));
}

}  // namespace
}  // namespace gdn_test
