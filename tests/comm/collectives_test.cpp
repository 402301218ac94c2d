// SPDX-License-Identifier: Apache-2.0
#include <gdn/comm/collectives.hpp>
#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <gdn/core/storage.hpp>
#include <gdn/layer/gated_delta_net.hpp>
#include <plan/random_case.hpp>
#include <support/deadline.hpp>
#include <support/errors.hpp>
#include <support/host_rows.hpp>

#include <gtest/gtest.h>

#include <array>
#include <atomic>

namespace {

using namespace gdn_test;
using gdn::metadata_error;
using gdn::shape_error;
using gdn::thread_communicator;

constexpr gdn::host_stream stream;
constexpr host_rows be;

class collectives : public testing::Test {
  deadline deadline_{std::chrono::seconds(30)};
};

/// A tensor [a, n, b] whose axis 1 is cut into the ranks' parts; element values tell where it is in the whole.
struct cut_tensor {
  index_t a, b;
  std::vector<index_t> extents;

  index_t total() const { return std::accumulate(extents.begin(), extents.end(), index_t{0}); }
  index_t begin(int rank) const { return std::accumulate(extents.begin(), extents.begin() + rank, index_t{0}); }
  std::vector<double> whole(double factor = 1) const {
    std::vector<double> out;
    for (index_t i = 0; i < a * total() * b; ++i) out.push_back(factor * static_cast<double>(i));
    return out;
  }
  std::vector<double> part(const std::vector<double>& of, int rank) const {
    std::vector<double> out;
    for (index_t i = 0; i < a; ++i) {
      const auto at = of.begin() + (i * total() + begin(rank)) * b;
      out.insert(out.end(), at, at + extents[static_cast<std::size_t>(rank)] * b);
    }
    return out;
  }
};

template <class Body>
void for_random_cuts(std::uint64_t n, Body body) {
  for (std::uint64_t i = 0; i < n && !testing::Test::HasFailure(); ++i) {
    random_source random(i);
    const int world = static_cast<int>(random.between(1, 6));
    cut_tensor t{random.between(1, 3), random.between(1, 3), {}};
    for (int r = 0; r < world; ++r) t.extents.push_back(random.between(0, 4));
    SCOPED_TRACE(testing::Message() << "case " << i << ", GDN_SEED=" << seed());
    gdn::run_on_threads(world, [&](thread_communicator& comm) { body(comm, t); });
  }
}

TEST_F(collectives, AllGatherConcatPutsThePartsInTheOrderOfTheRanks) {
  for_random_cuts(150, [](thread_communicator& comm, const cut_tensor& t) {
    const std::vector<double> want = t.whole(), mine = t.part(want, comm.rank());
    std::vector<double> got(want.size(), -1);
    host_block block({1 << 16});
    auto ws = block.workspace();
    const index_t n = t.extents[static_cast<std::size_t>(comm.rank())];
    for (const int axis : {1, -2}) {
      gdn::all_gather_concat<double, 3>(be, comm, gdn::make_tensor(mine.data(), t.a, n, t.b), t.extents, axis,
                                        gdn::make_tensor(got.data(), t.a, t.total(), t.b), ws, stream);
      EXPECT_EQ(got, want);
    }
    EXPECT_EQ(ws.used(), 0U);
  });
}

TEST_F(collectives, TheAdjointOfAllGatherConcatIsTheOwnPartOfTheSum) {
  for_random_cuts(150, [](thread_communicator& comm, const cut_tensor& t) {
    const int size = comm.size();
    const std::vector<double> gradient = t.whole(comm.rank() + 1);  // rank r brings (r + 1) times the whole
    const std::vector<double> want = t.part(t.whole(size * (size + 1) / 2), comm.rank());
    std::vector<double> got(want.size(), -1);
    host_block block({1 << 16});
    auto ws = block.workspace();
    const index_t n = t.extents[static_cast<std::size_t>(comm.rank())];
    gdn::all_gather_concat_adjoint<double, 3>(be, comm, gdn::make_tensor(gradient.data(), t.a, t.total(), t.b),
                                              t.extents, 1, gdn::make_tensor(got.data(), t.a, n, t.b), ws, stream);
    EXPECT_EQ(got, want);
    EXPECT_EQ(gradient, t.whole(comm.rank() + 1));  // the caller's gradient stays
  });
}

TEST_F(collectives, AllGatherConcatRefusesShapesThatDisagree) {
  gdn::self_communicator comm;
  std::vector<double> a(6), b(6);
  host_block block({4096});
  auto ws = block.workspace();
  const auto run = [&](std::vector<index_t> extents, int axis, index_t rows) {
    gdn::all_gather_concat<double, 2>(be, comm, gdn::make_tensor(std::as_const(a).data(), 2, 3), extents, axis,
                                      gdn::make_tensor(b.data(), rows, 3), ws, stream);
  };
  EXPECT_EQ(text_of<shape_error>([&] { run({2, 2}, 0, 2); }), "extents of 2 ranks are given, the group has 1");
  EXPECT_EQ(text_of<shape_error>([&] { run({3}, 0, 2); }), "rank 0 must have 3 of the axis, contiguous");
  EXPECT_EQ(text_of<shape_error>([&] { run({2}, 2, 2); }), "a tensor of 2 axes has no axis 2");
  EXPECT_EQ(text_of<shape_error>([&] { run({2}, 0, 1); }), "the result must have 2 of the axis, contiguous");
  EXPECT_NO_THROW(run({2}, 0, 2));
}

TEST_F(collectives, AllReduceSumAddsInTheOrderOfTheRanksWithTheWorkspaceThatWasPredicted) {
  for (int world = 1; world <= 6; ++world) {
    for (const index_t n : {0, 1, 5, 64}) {
      // 1e16 and its negative swallow or keep the small values: another order of the sum gives other bits.
      const auto value = [](int rank, index_t i) {
        return (rank % 2 == 0 ? 1e16 : -1e16) + static_cast<double>(i * (rank + 1));
      };
      gdn::run_on_threads(world, [&](thread_communicator& comm) {
        std::vector<double> t, want;
        for (index_t i = 0; i < n; ++i) {
          t.push_back(value(comm.rank(), i));
          double sum = world == 1 ? value(0, i) : 0;
          for (int r = 0; world > 1 && r < world; ++r) sum += value(r, i);
          want.push_back(sum);
        }
        host_block block(gdn::all_reduce_scratch<double, gdn::host_memory>(n, world));
        auto ws = block.workspace();
        gdn::all_reduce_sum<double>(be, comm, gdn::make_tensor(t.data(), n), ws, stream);
        EXPECT_EQ(t, want);
      });
    }
  }
}

TEST_F(collectives, RanksWithDifferentPlansAllFindOut) {
  for (int odd = -1; odd < 4; ++odd) {
    std::atomic<int> found = 0;
    gdn::run_on_threads(4, [&](thread_communicator& comm) {
      // One rank has another idea of where the documents end.
      const auto pack =
          gdn::packing::from_cu_seqlens(std::vector<index_t>{0, comm.rank() == odd ? 7 : 8, 16}, {}, 1, 16);
      const auto plan = gdn::plan_context_parallel(gdn::contiguous_layout{16, 4}, pack, {}, 1, {}, comm.rank());
      try {
        gdn::check_same_plan(comm, plan, stream);
      } catch (const metadata_error&) {
        ++found;
      }
      EXPECT_EQ(comm.state(), gdn::comm_state::ok);  // and the communicator is as good as before
    });
    EXPECT_EQ(found, odd < 0 ? 0 : 4);
  }
}

TEST_F(collectives, RanksWithLayersOfDifferentTypesOrSizesAllFindOut) {
  const auto found = [](auto check) {
    std::atomic<int> n = 0;
    gdn::run_on_threads(3, [&](thread_communicator& comm) {
      gdn::layer_dims dims{.hidden = 8, .key_heads = 2, .value_heads = 4, .key_dim = 4, .value_dim = 4};
      const auto plan = [&] {
        return gdn::plan_layer(dims, gdn::contiguous_layout{12, 3}, gdn::packing::rows_of(1, 12), {}, comm.rank());
      };
      try {
        check(comm, dims, plan);
      } catch (const metadata_error&) {
        ++n;
      }
    });
    return n.load();
  };
  const auto typed = [&]<class Odd, class Others>(Odd, Others) {
    return found([](thread_communicator& comm, const auto&, auto plan) {
      comm.rank() == 1 ? gdn::check_same_plan<Odd>(comm, plan(), stream)
                       : gdn::check_same_plan<Others>(comm, plan(), stream);
    });
  };
  EXPECT_EQ(typed(float{}, float{}), 0);
  EXPECT_EQ(typed(gdn::bfloat16{}, gdn::bfloat16{}), 0);
  EXPECT_EQ(typed(double{}, float{}), 3);
  EXPECT_EQ(typed(float{}, gdn::bfloat16{}), 3);
  EXPECT_EQ(typed(gdn::float16{}, gdn::bfloat16{}), 3);  // of one size
  const auto sized = [&](auto change) {
    return found([&](thread_communicator& comm, gdn::layer_dims& dims, auto plan) {
      if (comm.rank() == 1) change(dims);
      gdn::check_same_plan(comm, plan(), stream);
    });
  };
  EXPECT_EQ(sized([](gdn::layer_dims&) {}), 0);
  EXPECT_EQ(sized([](gdn::layer_dims& d) { d.hidden = 16; }), 3);
  EXPECT_EQ(sized([](gdn::layer_dims& d) { d.key_heads = 4; }), 3);
  EXPECT_EQ(sized([](gdn::layer_dims& d) { d.value_heads = 2; }), 3);
}

TEST_F(collectives, GatherLayoutBuildsOneTableFromWhatEachRankKnows) {
  for (std::uint64_t n = 0; n < 100; ++n) {
    random_source random(n);
    const int world = static_cast<int>(random.between(1, 6));
    const gdn::explicit_layout layout = random_positions(random, random.between(0, 20), world);
    gdn::run_on_threads(world, [&](thread_communicator& comm) {
      const auto mine = gdn::positions(layout, comm.rank());
      EXPECT_EQ(gdn::gather_layout(comm, mine, stream), layout);
    });
  }
}

TEST_F(collectives, GatherLayoutRejectsPositionsThatAreNotDenseOnEveryRank) {  // NeMo's example
  gdn::run_on_threads(2, [](thread_communicator& comm) {
    const std::vector<index_t> mine =
        comm.rank() == 0 ? std::vector<index_t>{0, 2, 4, 8} : std::vector<index_t>{1, 3, 5, 9};
    EXPECT_EQ(text_of<metadata_error>([&] { gdn::gather_layout(comm, mine, stream); }),
              "rank 0 holds position 8 at local row 3; positions must cover 0 to 7 densely");
  });
}

TEST_F(collectives, LocalPositionsTakesOneRowOrEqualRows) {
  const std::vector<index_t> one = {4, 5, 0}, two = {4, 5, 0, 4, 5, 0}, other = {4, 5, 0, 4, 5, 1};
  EXPECT_EQ(gdn::local_positions(one, 2, 3), one);
  EXPECT_EQ(gdn::local_positions(two, 2, 3), one);
  EXPECT_EQ(gdn::local_positions({}, 2, 0), std::vector<index_t>{});
  EXPECT_EQ(text_of<metadata_error>([&] { gdn::local_positions(other, 2, 3); }),
            "seq_index row 1 position 2 is 1, in row 0 it is 0; the rows must agree");
  EXPECT_EQ(text_of<metadata_error>([&] { gdn::local_positions(one, 2, 4); }),
            "seq_index has 3 entries; it must have 4 or 2 x 4");
}

TEST_F(collectives, StatesGoToWhereTheyAreContinued) {
  for (std::uint64_t n = 0; n < 100 && !HasFailure(); ++n) {
    random_source random(n);
    const plan_case c = any_case(random);
    const auto plans = c.plans({gdn::strategy::in_place, gdn::share::relay, false, true});
    std::vector<int> targets;
    for (index_t d = 0; d < c.pack.documents(); ++d)
      targets.push_back(static_cast<int>(random.between(0, c.world - 1)));
    gdn::run_on_threads(c.world, [&](thread_communicator& comm) {
      const auto& plan = plans[static_cast<std::size_t>(comm.rank())];
      const gdn::exchange_plan delivery = gdn::plan_delivery(plan, targets);
      std::vector<double> from(plan.leaving.begin(), plan.leaving.end()), want;
      for (std::size_t d = 0; d < targets.size(); ++d) {
        if (targets[d] == comm.rank()) want.push_back(static_cast<double>(d));
      }
      std::vector<double> to(want.size(), -1);
      const gdn::resident_exchange<gdn::host_memory> ex{
          delivery, gdn::make_tensor(delivery.sends.data(), static_cast<index_t>(delivery.sends.size())),
          gdn::make_tensor(delivery.recvs.data(), static_cast<index_t>(delivery.recvs.size()))};
      host_block block({1 << 16});
      auto ws = block.workspace();
      gdn::exchange_rows<double>(be, comm, ex,
                                 gdn::make_tensor(std::as_const(from).data(), static_cast<index_t>(from.size()), 1),
                                 gdn::make_tensor(to.data(), static_cast<index_t>(to.size()), 1), ws, stream);
      EXPECT_EQ(to, want);
    });
  }
}

TEST_F(collectives, DeliveryNeedsATargetForEveryDocument) {
  const auto plan = gdn::plan_context_parallel(gdn::contiguous_layout{4, 2}, gdn::packing::rows_of(2, 4), {}, 1, {}, 0);
  EXPECT_EQ(text_of<metadata_error>([&] { gdn::plan_delivery(plan, std::array{0}); }),
            "targets of 1 documents are given, the plan has 2");
  EXPECT_EQ(text_of<metadata_error>([&] {
              gdn::plan_delivery(plan, std::array{0, 2});
            }),
            "document 1 goes to rank 2 of 2");
}

}  // namespace
