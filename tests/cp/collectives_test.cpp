// SPDX-License-Identifier: Apache-2.0
// Collectives with the Kokkos backend: concatenation along every axis, and sums of parameter gradients.
#include <mutex>
#include <numeric>

#include <gdn/comm/threads.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <support/block.hpp>
#include <support/host_tensor.hpp>
#include <support/layer_case.hpp>

namespace gdn_test {
namespace {

// NeMo: gather along axes 0 and 1 in the order of the ranks; the adjoint is the own slice of the sum. Here along every
// axis, with parts of any extent, and <gather(x), w> = sum over ranks of <x, adjoint(w)>.
TEST(all_gather_concat, AlongEveryAxisWithUnevenParts) {
  const std::vector<index_t> extents = {3, 0, 2, 1};
  const index_t total = std::accumulate(extents.begin(), extents.end(), index_t{0});
  for (int axis = -3; axis < 3; ++axis) {
    const int at = axis < 0 ? axis + 3 : axis;
    std::array<index_t, 3> shape = {2, 3, 4};
    shape[static_cast<std::size_t>(at)] = total;
    random_source random(static_cast<std::uint64_t>(axis + 3));
    const auto whole = random_tensor<double, 3>(random, shape);
    std::vector<host_tensor<double, 3>> weights;
    for (int r = 0; r < 4; ++r) weights.push_back(random_tensor<double, 3>(random, shape));
    gdn::run_on_threads(4, [&](gdn::thread_communicator& comm) {
      const gdn::kokkos::backend<Kokkos::Serial> be(Kokkos::Serial(Kokkos::NewInstance{}));
      const auto me = static_cast<std::size_t>(comm.rank());
      const index_t begin = std::accumulate(extents.begin(), extents.begin() + comm.rank(), index_t{0});
      std::array<index_t, 3> own = shape;
      own[static_cast<std::size_t>(at)] = extents[me];
      const auto global = [&](std::array<index_t, 3> i) {
        i[static_cast<std::size_t>(at)] += begin;
        return i;
      };
      host_tensor<double, 3> mine(own), sum(own), got(shape);
      const auto for_each_own = [&](auto&& f) {
        for (index_t i = 0; i < own[0]; ++i) {
          for (index_t j = 0; j < own[1]; ++j) {
            for (index_t k = 0; k < own[2]; ++k) f(i, j, k, global({i, j, k}));
          }
        }
      };
      for_each_own([&](index_t i, index_t j, index_t k, auto g) { mine(i, j, k) = whole(g[0], g[1], g[2]); });
      poisoned_block block({1 << 16});
      auto ws = block.workspace();
      gdn::all_gather_concat<double, 3>(be, comm, mine.ref(), extents, axis, got.ref(), ws, {});
      EXPECT_TRUE(same_bits(got, whole)) << "axis " << axis;
      gdn::all_gather_concat_adjoint<double, 3>(be, comm, weights[me].ref(), extents, axis, sum.ref(), ws, {});
      for_each_own([&](index_t i, index_t j, index_t k, auto g) {
        double want = 0;
        for (const auto& w : weights) want += w(g[0], g[1], g[2]);
        EXPECT_EQ(sum(i, j, k), want) << "in the order of the ranks";
      });
      EXPECT_EQ(ws.used(), 0U);
    });
  }
}

template <class T>
void expect_reduced() {
  constexpr int world = 3;
  gdn::layer_dims d{.hidden = 5, .key_heads = 1, .value_heads = 2, .key_dim = 3, .value_dim = 4, .conv_width = 2};
  using A = gdn::accumulate_t<T>;
  memory_block measure;
  gdn::layer_gradients<T>::carve(measure, d);
  const auto elements = measure.peak().bytes / sizeof(A);
  std::vector<std::vector<A>> of_rank;
  random_source random(9);
  for (int r = 0; r < world; ++r) {
    const values v = random_values(random, static_cast<index_t>(elements));
    of_rank.emplace_back(v.begin(), v.end());
  }
  gdn::run_on_threads(world, [&](gdn::thread_communicator& transport) {
    any_communicator comm(transport);
    const auto me = static_cast<std::size_t>(comm.rank());
    poisoned_block block(measure.peak()), scratch(gdn::reduce_requirement<T>(d, world));
    std::copy(of_rank[me].begin(), of_rank[me].end(), reinterpret_cast<A*>(block.data()));
    memory_block memory = block.workspace(), ws = scratch.workspace();
    const auto grad = gdn::layer_gradients<T>::carve(memory, d);
    layer_api<T>().reduce_gradients(comm, grad, ws);
    std::size_t tensors = 0;
    grad.for_each([&](std::string_view name, const auto& g) {
      ++tensors;
      for (index_t i = 0; i < g.size(); ++i) {
        const auto at = static_cast<std::size_t>(g.data() - reinterpret_cast<A*>(block.data()) + i);
        EXPECT_EQ(g.data()[i], of_rank[0][at] + of_rank[1][at] + of_rank[2][at]) << name;
      }
    });
    EXPECT_EQ(tensors, 9U);
    EXPECT_TRUE(block.guards_hold() && scratch.guards_hold() && ws.used() == 0);
    EXPECT_EQ(ws.peak().bytes, scratch.bytes()) << "the promise is exact";
  });
}
TEST(reduce_gradients, SumsAllNineInTheOrderOfTheRanks) {
  expect_reduced<double>();
  expect_reduced<float>();
}

/// Undo brings the ranks' rows into natural order and redo brings them back, to the bit.
void expect_round_trip(const gdn::sequence_layout auto& layout) {
  constexpr index_t width = 3;
  const index_t rows = layout.size();
  const int world = layout.world_size();
  random_source random(static_cast<std::uint64_t>(world));
  const values x = random_values(random, rows * width);
  gdn::run_on_threads(world, [&](gdn::thread_communicator& comm) {
    const gdn::kokkos::backend<Kokkos::Serial> be(Kokkos::Serial(Kokkos::NewInstance{}));
    const index_t L = rows / world;
    const auto exchange = [&](const gdn::exchange_plan& plan, const std::vector<double>& from) {
      std::vector<double> to(from.size(), std::nan(""));
      const gdn::resident_exchange<gdn::host_memory> ex{plan, gdn::make_tensor(plan.sends.data(), plan.sends.size()),
                                                        gdn::make_tensor(plan.recvs.data(), plan.recvs.size())};
      poisoned_block block(gdn::exchange_scratch<double, gdn::host_memory>(plan, width, false, comm.rank()));
      memory_block ws = block.workspace();
      gdn::exchange_rows<double>(be, comm, ex, gdn::make_tensor(from.data(), L, width),
                                 gdn::make_tensor(to.data(), L, width), ws, {});
      return to;
    };
    const auto mine = rows_of_rank<double>(x, layout.fragments(), comm.rank(), width);
    const auto natural = exchange(gdn::undo_load_balancing(layout, comm.rank()), mine);
    EXPECT_EQ(natural, rows_of_rank<double>(x, gdn::contiguous_layout{rows, world}.fragments(), comm.rank(), width));
    EXPECT_EQ(exchange(gdn::redo_load_balancing(layout, comm.rank()), natural), mine);
  });
}
TEST(undo_load_balancing, ZigzagToContiguousAndBackIsIdentity) {  // Relax
  for (const int world : {1, 2, 4, 8}) expect_round_trip(gdn::zigzag_layout{48, world});
}
TEST(undo_load_balancing, PerDocumentZigzagAndBackIsIdentity) {  // Megatron's documents, on 2 and 4 ranks
  const std::vector<std::vector<index_t>> all = {{0, 32, 64}, {0, 32, 64, 96, 128}, {0, 16, 48, 80}};
  for (const auto& cu : all) {
    const auto documents = gdn::packing::from_cu_seqlens(cu, {}, 1, cu.back()).document_rows();
    for (const int world : {2, 4}) expect_round_trip(gdn::per_document_zigzag(documents, cu.back(), world));
  }
}

}  // namespace
}  // namespace gdn_test
