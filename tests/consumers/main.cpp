// SPDX-License-Identifier: Apache-2.0
// What a project that uses gdn looks like: the same program in each of the folders beside this file. It runs a layer
// on one rank and on two, and compares.
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/requirements.hpp>
#include <gdn/version.hpp>

namespace {

using gdn::index_t;
using workspace = gdn::workspace<gdn::host_memory>;

constexpr gdn::layer_dims dims{.hidden = 8, .key_heads = 1, .value_heads = 2, .key_dim = 4, .value_dim = 6};
constexpr index_t tokens = 12;

workspace allocate(gdn::memory_requirement need) {  // until the program ends
  return {std::aligned_alloc(need.alignment, need.bytes), need.bytes};
}

template <gdn::communicator Comm>
void run(Comm& comm, const gdn::gated_delta_net<double>& layer, const std::vector<double>& x, std::vector<double>& y) {
  const gdn::kokkos::backend be;
  const std::vector<index_t> cu_seqlens = {0, 9, tokens};
  const auto documents = gdn::packing::from_cu_seqlens(cu_seqlens, {}, 1, tokens);
  const gdn::zigzag_layout layout{tokens, comm.size()};
  const auto plan = gdn::plan_layer(dims, layout, documents, {}, comm.rank());
  auto tables = allocate(gdn::resident_requirement<gdn::host_memory>(plan));
  const auto resident = gdn::upload(be, plan, tables, {});
  auto ws = allocate(gdn::requirements<double>(be, dims, resident, gdn::keep_policy::nothing).forward);

  const auto mine = gdn::positions(layout, comm.rank());
  std::vector<double> in(mine.size() * dims.hidden);
  std::vector<double> out(in.size());
  const auto at = [](index_t row, index_t i) { return static_cast<std::size_t>(row * dims.hidden + i); };
  for (std::size_t n = 0; n < in.size(); ++n) in[n] = x[at(mine[n / dims.hidden], n % dims.hidden)];
  const auto rows = [&](auto& v) { return gdn::make_tensor(v.data(), mine.size(), dims.hidden); };
  gdn::prefill(be, comm, layer, resident, rows(in), rows(out), {}, ws, {});
  for (std::size_t n = 0; n < in.size(); ++n) y[at(mine[n / dims.hidden], n % dims.hidden)] = out[n];
}

}  // namespace

int main() {
  const Kokkos::ScopeGuard kokkos;
  workspace measure;
  gdn::parameter_storage<double>::carve(measure, dims);
  auto memory = allocate(measure.peak());
  const auto weights = gdn::parameter_storage<double>::carve(memory, dims);
  weights.for_each([](auto, const auto& w) {
    for (index_t i = 0; i < w.size(); ++i) w.data()[i] = std::sin(static_cast<double>(7 * i + w.size()));
  });
  const gdn::gated_delta_net<double> layer{dims, weights};
  std::vector<double> x(static_cast<std::size_t>(tokens * dims.hidden));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<double>(i * i));

  std::vector<double> one(x.size());
  std::vector<double> two(x.size());
  gdn::self_communicator self;
  run(self, layer, x, one);
  gdn::run_on_threads(2, [&](gdn::thread_communicator& comm) { run(comm, layer, x, two); });

  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < one.size(); ++i) {
    error = std::fmax(error, std::abs(one[i] - two[i]));
    size = std::fmax(size, std::abs(one[i]));
  }
  std::printf("gdn %d.%d.%d: two ranks differ by %g of %g\n", GDN_VERSION_MAJOR, GDN_VERSION_MINOR, GDN_VERSION_PATCH,
              error, size);
  return size > 0 && error <= 1e-12 * size ? 0 : 1;
}
