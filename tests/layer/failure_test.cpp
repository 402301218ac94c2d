// SPDX-License-Identifier: Apache-2.0
// A rank that fails in any exchange of a training step ends all ranks, at once and for good.
#include <atomic>
#include <barrier>
#include <chrono>

#include <gdn/comm/threads.hpp>
#include <plan/random_case.hpp>
#include <support/block.hpp>
#include <support/deadline.hpp>
#include <support/errors.hpp>
#include <support/faulty_communicator.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {
namespace {

using namespace std::chrono_literals;
constexpr gdn::layer_dims dims{.hidden = 3, .key_heads = 1, .value_heads = 2, .key_dim = 4, .value_dim = 3, .conv_width = 4};
constexpr int world = 4;

/// One rank's memory and a training step on it: forward, backward, sums of gradients.
class training_step {
 public:
  training_step(const layer_batch& b, const layer_spread& s, int rank)
      : owned_(b),
        plan_(gdn::plan_context_parallel(s.rows, b.pack, gdn::shape_of(b.dims, 4), b.dims.channels(), s.options, world, rank)),
        tables_(gdn::resident_requirement<gdn::host_memory>(plan_)),
        tables_memory_(tables_.workspace()),
        resident_(api_.upload(plan_, tables_memory_)),
        need_(api_.requirements(b.dims, resident_, gdn::keep_policy::everything)),
        tape_(need_.tape),
        forward_(need_.forward),
        backward_(need_.backward),
        reduce_(gdn::reduce_requirement<double>(b.dims, world)),
        gradients_(gradient_size(b.dims)),
        x_(rows_of_rank<double>(b.x, s.rows, rank, b.dims.hidden)),
        dy_(rows_of_rank<double>(b.dy, s.rows, rank, b.dims.hidden)),
        y_(x_.size()),
        dx_(x_.size()),
        x_given_(x_),
        dy_given_(dy_) {}

  void operator()(any_communicator& comm) {
    const auto rows = [&](auto& v) { return gdn::make_tensor(v.data(), plan_.caller_rows, dims.hidden); };
    memory_block tape_memory = tape_.workspace(), ws = forward_.workspace(), back = backward_.workspace(),
                 reduce = reduce_.workspace(), gradient_memory = gradients_.workspace();
    auto tape = api_.make_tape(dims, resident_, gdn::keep_policy::everything, tape_memory);
    const auto grad = gdn::layer_gradients<double>::carve(gradient_memory, dims);
    api_.forward(comm, owned_.layer(), resident_, rows(x_), rows(y_), {}, tape, ws);
    api_.backward(comm, owned_.layer(), resident_, rows(dy_), rows(dx_), {}, grad, tape, back);
    api_.reduce_gradients(comm, grad, reduce);
  }
  /// Inputs and everything beside the outputs is as it was.
  bool intact() const {
    return owned_.unchanged() && x_ == x_given_ && dy_ == dy_given_ && tables_.guards_hold() && tape_.guards_hold() &&
           forward_.guards_hold() && backward_.guards_hold() && reduce_.guards_hold() && gradients_.guards_hold();
  }

 private:
  static gdn::memory_requirement gradient_size(const gdn::layer_dims& d) {
    memory_block measure;
    gdn::layer_gradients<double>::carve(measure, d);
    return measure.peak();
  }
  layer_api<double> api_;
  owned_layer<double> owned_;
  gdn::cp_plan plan_;
  poisoned_block tables_;
  memory_block tables_memory_;
  plan_on_host resident_;
  gdn::layer_requirements need_;
  poisoned_block tape_, forward_, backward_, reduce_, gradients_;
  std::vector<double> x_, dy_, y_, dx_, x_given_, dy_given_;
};

struct batch_over_ranks {
  layer_batch batch;
  layer_spread spread;
};
batch_over_ranks make(gdn::strategy strategy, gdn::share share) {
  random_source random(61);
  layer_batch b = random_batch(random, dims, gdn::packing::rows_of(1, 24));
  layer_spread s = spread_over(gdn::zigzag_layout{24, world}, b, {strategy, share});
  return {std::move(b), std::move(s)};
}

int exchanges_of(const batch_over_ranks& c, int rank) {
  std::atomic<int> n = 0;
  gdn::run_on_threads(world, [&](gdn::thread_communicator& comm) {
    counting_communicator counted(comm);
    any_communicator any(counted);
    training_step(c.batch, c.spread, comm.rank())(any);
    if (comm.rank() == rank) n = static_cast<int>(counted.take().exchanges);
  });
  return n;
}

/// Rank `culprit` fails in its exchange `at`; what each rank throws must be a comm_error, soon.
void expect_all_fail(const batch_over_ranks& c, int culprit, fault kind, int at) {
  SCOPED_TRACE(testing::Message() << "rank " << culprit << " fails in exchange " << at << ", fault " << static_cast<int>(kind));
  std::atomic<int> failed = 0, again = 0, struck = 0, intact = 0;
  std::barrier everyone(world);
  const auto begin = std::chrono::steady_clock::now();
  gdn::run_on_threads(world, [&](gdn::thread_communicator& transport) {
    faulty_communicator faulty(transport, kind, transport.rank() == culprit ? at : -1);
    training_step step(c.batch, c.spread, transport.rank());
    const auto attempt = [&](std::atomic<int>& count) {
      any_communicator comm(faulty);
      try {
        step(comm);
      } catch (const gdn::comm_error& e) {
        ++count;
        EXPECT_NE(std::string(e.what()).find("rank"), std::string::npos) << e.what();
        EXPECT_NE(comm.state(), gdn::comm_state::ok);
      }
    };
    attempt(failed);
    if (faulty.struck()) ++struck;
    if (kind == fault::leaves) {
      if (step.intact()) ++intact;
      return;  // leaving is what tells the others
    }
    everyone.arrive_and_wait();
    attempt(again);  // the failure is for good
    if (step.intact()) ++intact;
  });
  EXPECT_EQ(struck, 1);
  EXPECT_EQ(failed, world) << "all ranks end with comm_error";
  EXPECT_EQ(again, kind == fault::leaves ? 0 : world) << "and so does every later step";
  EXPECT_EQ(intact, world) << "inputs and memory beside the outputs are untouched";
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 5s);
}

class layer_failure : public testing::TestWithParam<fault> {
  deadline deadline_{60s};
};

TEST_P(layer_failure, InAnyExchangeEndsAllRanks) {
  for (const auto& c : {make(gdn::strategy::reshard, gdn::share::all_gather), make(gdn::strategy::in_place, gdn::share::relay)}) {
    for (const int culprit : {0, 2, 3}) {
      const int n = exchanges_of(c, culprit);
      EXPECT_GT(n, 10);
      for (int at = 0; at < n && !HasFailure(); ++at) {
        // A rank that only receives in an exchange has nothing to truncate, and throws instead.
        expect_all_fail(c, culprit, GetParam(), at);
      }
    }
  }
}
const auto name_of = [](const auto& kind) -> std::string {
  switch (kind.param) {
    case fault::throws: return "throwing";
    case fault::leaves: return "leaving";
    case fault::truncates: return "truncating";
  }
  return "?";
};
INSTANTIATE_TEST_SUITE_P(by, layer_failure, testing::Values(fault::throws, fault::leaves, fault::truncates), name_of);

TEST(layer_failures, ARankWithAWrongShapeNeverHangsTheOthers) {
  const deadline limit(10s);
  const batch_over_ranks c = make(gdn::strategy::reshard, gdn::share::prefix_scan);
  std::atomic<int> consequences = 0;
  EXPECT_THROW(gdn::run_on_threads(world,
                                   [&](gdn::thread_communicator& transport) {
                                     layer_batch b = c.batch;
                                     if (transport.rank() == 2) b.parameters[norm].pop_back();
                                     any_communicator comm(transport);
                                     if (transport.rank() == 2) throw gdn::shape_error("norm axis 0 must be 3, is 2");
                                     try {
                                       training_step(b, c.spread, transport.rank())(comm);
                                     } catch (const gdn::comm_error&) {
                                       ++consequences;
                                       throw;
                                     }
                                   }),
               gdn::shape_error);
  EXPECT_EQ(consequences, world - 1);
}

TEST(layer_failures, AbortingFromOutsideEndsAllRanks) {
  const deadline limit(10s);
  const batch_over_ranks c = make(gdn::strategy::in_place, gdn::share::all_gather);
  std::atomic<int> failed = 0;
  gdn::run_on_threads(world, [&](gdn::thread_communicator& transport) {
    any_communicator comm(transport);
    if (transport.rank() == 1) {
      comm.abort();
      return;
    }
    try {
      training_step(c.batch, c.spread, transport.rank())(comm);
    } catch (const gdn::comm_error&) {
      ++failed;
    }
  });
  EXPECT_EQ(failed, world - 1);
}

}  // namespace
}  // namespace gdn_test
