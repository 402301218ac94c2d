// SPDX-License-Identifier: Apache-2.0
// Plans carried out by threads, through the library's own transport of rows.
#include <gdn/comm/share.hpp>
#include <gdn/comm/threads.hpp>
#include <plan/random_case.hpp>
#include <support/deadline.hpp>
#include <support/errors.hpp>
#include <support/host_rows.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace {

using namespace gdn_test;

constexpr gdn::host_stream stream;
constexpr host_rows be;

/// The plan's tables in the host's memory.
struct resident {
  explicit resident(const gdn::cp_plan& plan)
      : block(gdn::resident_requirement<gdn::host_memory>(plan)),
        memory(block.workspace()),
        tables(gdn::upload(be, plan, memory, stream)) {}
  host_block block;
  gdn::workspace<gdn::host_memory> memory;
  gdn::resident_plan<gdn::host_memory> tables;
};

using matrix = std::vector<double>;
gdn::tensor_ref<double, 2> view(matrix& m, index_t width) {
  return gdn::make_tensor(m.data(), static_cast<index_t>(m.size()) / width, width);
}
gdn::tensor_ref<const double, 2> view(const matrix& m, index_t width) {
  return gdn::make_tensor(m.data(), static_cast<index_t>(m.size()) / width, width);
}

/// exchange_rows with exactly the workspace that was predicted.
void move_rows(gdn::thread_communicator& comm, const gdn::resident_exchange<gdn::host_memory>& ex, const matrix& from,
               matrix& to, index_t width, bool add = false) {
  host_block block(gdn::exchange_scratch<double, gdn::host_memory>(ex.plan, width, add, comm.rank()));
  auto ws = block.workspace();
  if (add) {
    gdn::exchange_rows_add<double>(be, comm, ex, view(from, width), view(to, width), ws, stream);
  } else {
    gdn::exchange_rows<double>(be, comm, ex, view(from, width), view(to, width), ws, stream);
  }
  EXPECT_EQ(ws.used(), 0U);
}

class exchange_rows : public testing::Test {
  deadline deadline_{std::chrono::seconds(60)};
};

TEST_F(exchange_rows, UndoThenRedoIsIdentityAndKeepsPadding) {
  for (std::uint64_t n = 0; n < cases(150) && !HasFailure(); ++n) {
    random_source random(n);
    const plan_case c = any_case(random);
    const index_t width = random.between(1, 3);
    for (const gdn::strategy strategy : strategies) {
      SCOPED_TRACE(testing::Message() << "case " << n << ": " << c);
      gdn::run_on_threads(c.world, [&](gdn::thread_communicator& comm) {
        const gdn::cp_plan plan = c.plan({strategy}, comm.rank());
        const resident r(plan);
        matrix x, natural(static_cast<std::size_t>(plan.compute_rows * width), -1);
        for (index_t i = 0; i < plan.caller_rows * width; ++i)
          x.push_back(static_cast<double>(i) + 1000. * comm.rank());
        move_rows(comm, r.tables.undo, x, natural, width);
        for (const double v : natural) EXPECT_GE(v, 0);
        matrix y(x.size(), -1);
        move_rows(comm, r.tables.redo, natural, y, width);
        matrix want = x;  // rows of padding are left alone
        for (const gdn::run& p : plan.padding) {
          std::fill_n(want.begin() + p.local * width, p.count * width, -1.);
        }
        EXPECT_EQ(y, want);
      });
    }
  }
}

TEST_F(exchange_rows, RowsThatATensorDoesNotHaveAreRefusedBeforeAnythingIsSent) {
  const auto pack = gdn::packing::rows_of(1, 16);
  gdn::run_on_threads(2, [&](gdn::thread_communicator& comm) {
    const resident r(gdn::plan_context_parallel(gdn::zigzag_layout{16, 2}, pack, {}, 1, {}, comm.rank()));
    matrix full(8), shorter(7);
    EXPECT_THAT(text_of<gdn::shape_error>([&] { move_rows(comm, r.tables.undo, shorter, full, 1); }),
                testing::HasSubstr("sent, the tensor has 7"));
    EXPECT_THAT(text_of<gdn::shape_error>([&] { move_rows(comm, r.tables.undo, full, shorter, 1); }),
                testing::HasSubstr("received, the tensor has 7"));
    EXPECT_EQ(comm.state(), gdn::comm_state::ok);
    matrix moved(8);
    move_rows(comm, r.tables.undo, full, moved, 1);
  });
}

// <halo(x), h> = <x, halo^T(h)>, over all ranks; the numbers are small integers, so sums are exact in any order.
TEST_F(exchange_rows, ReturningHistoryIsTheAdjointOfFetchingIt) {
  for (std::uint64_t n = 0; n < cases(150) && !HasFailure(); ++n) {
    random_source random(n);
    const plan_case c = any_case(random);
    const bool initial = random.coin(), final_ = random.coin();
    SCOPED_TRACE(testing::Message() << "case " << n << ": " << c);
    std::vector<double> there(static_cast<std::size_t>(c.world)), back(there);
    gdn::run_on_threads(c.world, [&](gdn::thread_communicator& comm) {
      const auto me = static_cast<std::size_t>(comm.rank());
      const gdn::cp_plan plan = c.plan({gdn::strategy::in_place, gdn::share::relay, initial, final_}, comm.rank());
      const resident r(plan);
      random_source mine(n * 100 + me);
      matrix x(static_cast<std::size_t>(plan.compute_rows + plan.halo.state_rows)), dx(x.size(), 0);
      matrix dh(static_cast<std::size_t>(plan.halo.rows())), h(dh.size(), 0);
      for (double& v : x) v = static_cast<double>(mine.between(-9, 9));
      for (double& v : dh) v = static_cast<double>(mine.between(-9, 9));
      move_rows(comm, r.tables.halo, x, h, 1);
      move_rows(comm, r.tables.halo_adjoint, dh, dx, 1, true);
      for (std::size_t i = 0; i < h.size(); ++i) there[me] += h[i] * dh[i];
      for (std::size_t i = 0; i < x.size(); ++i) back[me] += x[i] * dx[i];
    });
    EXPECT_EQ(std::accumulate(there.begin(), there.end(), 0.), std::accumulate(back.begin(), back.end(), 0.));
  }
}

TEST_F(exchange_rows, SharedSummariesFoldToTheStatesOfTheWholeStream) {
  for (std::uint64_t n = 0; n < cases(150) && !HasFailure(); ++n) {
    random_source random(n);
    plan_case c = any_case(random);
    c.shape.summary = {};
    for (const gdn::share share : shares) {
      SCOPED_TRACE(testing::Message() << "case " << n << ": " << c << ", share " << static_cast<int>(share));
      gdn::run_on_threads(c.world, [&](gdn::thread_communicator& comm) {
        const gdn::cp_plan plan = c.plan({gdn::strategy::in_place, share}, comm.rank());
        const resident r(plan);
        // Token t of the stream takes the state s to a s + t, where a is -1 or 1.
        const auto a = [](index_t t) { return t % 3 == 0 ? -1. : 1.; };
        matrix buffer(static_cast<std::size_t>(plan.chain.elements), 1e300);
        for (const gdn::published_summary& p : plan.chain.published) {
          const gdn::segment& s = plan.segments[static_cast<std::size_t>(p.segment)];
          const gdn::fragment& f = plan.table[s.fragment];
          double m = 1, e = 0;
          for (index_t i = 0; i < s.count; ++i) {
            const index_t t = f.begin + s.begin - f.local + i;
            m *= a(t);
            e = a(t) * e + static_cast<double>(t);
          }
          buffer[static_cast<std::size_t>(p.bias)] = e;
          if (p.transition >= 0) buffer[static_cast<std::size_t>(p.transition)] = m;
        }
        host_block block(gdn::share_scratch<double, gdn::host_memory>(plan.chain, comm.rank()));
        auto ws = block.workspace();
        gdn::share_summaries<double>(be, comm, r.tables.chain, plan.shape.summary,
                                     gdn::make_tensor(buffer.data(), plan.chain.elements), ws, stream);
        for (const gdn::fold_item& fold : plan.chain.folds) {
          double state = 0;
          for (index_t i = fold.begin; i < fold.begin + fold.count; ++i) {
            const gdn::fold_link& link = plan.chain.links[static_cast<std::size_t>(i)];
            const double m = link.transition < 0 ? 0 : buffer[static_cast<std::size_t>(link.transition)];
            state = m * state + buffer[static_cast<std::size_t>(link.bias)];
          }
          for (std::size_t k = 0; k < plan.segments.size(); ++k) {
            if (plan.rule_segments[k].h0 != fold.target) continue;
            const gdn::segment& s = plan.segments[k];
            double want = 0;
            const index_t start = plan.cu_seqlens[static_cast<std::size_t>(s.document)];
            for (index_t t = start; t < plan.table[s.fragment].begin; ++t) want = a(t) * want + static_cast<double>(t);
            EXPECT_EQ(state, want);
          }
        }
      });
    }
  }
}

TEST_F(exchange_rows, RefusesRowsWithGapsOrOfAnotherWidth) {
  gdn::run_on_threads(1, [](gdn::thread_communicator& comm) {
    const auto layout = gdn::from_positions(std::vector<std::vector<index_t>>{{1, 0}});
    const gdn::cp_plan plan = gdn::plan_context_parallel(layout, gdn::packing::rows_of(1, 2), {}, 1, {}, 0);
    const resident r(plan);
    matrix a(8, 1), b(8, 2);
    host_block block({4096});
    auto ws = block.workspace();
    const auto narrow = [](matrix& m) { return gdn::columns(gdn::make_tensor(m.data(), 2, 4), 0, 2); };
    const auto tight = [](matrix& m) { return gdn::make_tensor(m.data(), 2, 2); };
    const auto run = [&](auto from, auto to) {
      gdn::exchange_rows<double>(be, comm, r.tables.undo, gdn::tensor_ref<const double, 2>(from), to, ws, stream);
    };
    EXPECT_THROW(run(narrow(a), tight(b)), gdn::shape_error);
    EXPECT_THROW(run(tight(a), narrow(b)), gdn::shape_error);
    EXPECT_THROW(run(gdn::make_tensor(a.data(), 2, 3), tight(b)), gdn::shape_error);
    EXPECT_NO_THROW(run(tight(a), tight(b)));
  });
}

TEST_F(exchange_rows, NamesTheWorkspaceThatIsTooSmall) {
  gdn::run_on_threads(1, [](gdn::thread_communicator& comm) {
    const auto layout = gdn::from_positions(std::vector<std::vector<index_t>>{{1, 0}});
    const resident r(gdn::plan_context_parallel(layout, gdn::packing::rows_of(1, 2), {}, 1, {}, 0));
    matrix a(2, 1), b(2, 2);
    gdn::workspace<gdn::host_memory> none(nullptr, 0);
    EXPECT_EQ(text_of<gdn::workspace_error>([&] {
                gdn::exchange_rows<double>(be, comm, r.tables.undo, view(std::as_const(a), 1), view(b, 1), none,
                                           stream);
              }),
              "the workspace has 0 bytes, and 256 or more are needed; ask requirements()");
  });
}

}  // namespace
