// SPDX-License-Identifier: Apache-2.0
#pragma once
// What projects that use gdn do with it here: a layer, spread over the ranks of any communicator, and its rows compared.
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/requirements.hpp>
#include <gdn/version.hpp>

namespace consumer {

using gdn::index_t;
using workspace = gdn::workspace<gdn::host_memory>;

constexpr gdn::layer_dims dims{.hidden = 8, .key_heads = 1, .value_heads = 2, .key_dim = 4, .value_dim = 6};
constexpr index_t tokens = 12;

inline workspace allocate(gdn::memory_requirement need) {  // until the program ends
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

/// A layer with weights of its own, and rows for it.
struct problem {
  gdn::gated_delta_net<double> layer;
  std::vector<double> x = std::vector<double>(static_cast<std::size_t>(tokens * dims.hidden));

  problem() {
    workspace measure;
    gdn::parameter_storage<double>::carve(measure, dims);
    auto memory = allocate(measure.peak());
    const auto weights = gdn::parameter_storage<double>::carve(memory, dims);
    weights.for_each([](auto, const auto& w) {
      for (index_t i = 0; i < w.size(); ++i) w.data()[i] = std::sin(static_cast<double>(7 * i + w.size()));
    });
    layer = {dims, weights};
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<double>(i * i));
  }
};

/// The exit status of a comparison; rows that `several` does not hold are NaN there.
inline int compare(const std::vector<double>& one, const std::vector<double>& several) {
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < one.size(); ++i) {
    if (!std::isnan(several[i])) error = std::fmax(error, std::abs(one[i] - several[i]));
    if (!std::isnan(several[i])) size = std::fmax(size, std::abs(one[i]));
  }
  std::printf("gdn %d.%d.%d: several ranks differ from one by %g of %g\n", GDN_VERSION_MAJOR, GDN_VERSION_MINOR,
              GDN_VERSION_PATCH, error, size);
  return size > 0 && error <= 1e-12 * size ? 0 : 1;
}

}  // namespace consumer
