// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A random layer, pools, and the reference of every serving test: forward() over a sequence alone.

#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/comm/self.hpp>
#include <gdn/kokkos/backend.hpp>
#include <gdn/layer/requirements.hpp>
#include <gdn/layer/serve.hpp>
#include <support/host_rows.hpp>
#include <support/host_tensor.hpp>
#include <support/random.hpp>

namespace gdn_test {

constexpr gdn::layer_dims serving_dims{
    .hidden = 6, .key_heads = 1, .value_heads = 3, .key_dim = 4, .value_dim = 5, .conv_width = 4};

/// A layer with its memory.
template <class T>
struct random_layer {
  explicit random_layer(const gdn::layer_dims& d, std::uint64_t n = 1)
      : memory([&] {
          gdn::workspace<gdn::host_memory> measure;
          gdn::parameter_storage<T>::carve(measure, d);
          return measure.peak();
        }()) {
    auto ws = memory.workspace();
    const auto weights = gdn::parameter_storage<T>::carve(ws, d);
    random_source random(n);
    weights.for_each([&](std::string_view, const auto& w) {
      using W = typename std::remove_cvref_t<decltype(w)>::value_type;
      std::uniform_real_distribution<double> value(-0.8, 0.8);
      for (index_t i = 0; i < w.size(); ++i) w.data()[i] = static_cast<W>(value(random.engine()));
    });
    net = {d, weights};
  }
  host_block memory;
  gdn::gated_delta_net<T> net;
};

/// A pool with its memory, full of NaN.
template <class T, class S = gdn::accumulate_t<T>>
struct filled_pool {
  filled_pool(const gdn::layer_dims& d, index_t slots, gdn::state_order order = gdn::state_order::value_last)
      : memory([&] {
          gdn::workspace<gdn::host_memory> measure;
          gdn::carve_pool<T, S>(measure, d, slots);
          return measure.peak();
        }()) {
    auto ws = memory.workspace();
    views = gdn::carve_pool<T, S>(ws, d, slots, order);
    std::fill_n(views.recurrent.data(), views.recurrent.size(), static_cast<S>(std::nanf("")));
    std::fill_n(views.conv.data(), views.conv.size(), static_cast<T>(std::nanf("")));
  }
  host_block memory;
  gdn::state_pool<T, S> views;
};

/// One call of serve() with exactly the memory that it asks for.
template <class T, class S, class Backend>
void serve_once(const Backend& be, const gdn::gated_delta_net<T>& layer, const gdn::state_pool<T, S>& pool,
                const std::vector<gdn::sequence>& sequences, const host_tensor<T, 2>& x, host_tensor<T, 2>& y,
                index_t chunk = 8) {
  const auto plan = gdn::plan_serving(sequences, x.extent(0), pool.slots(), layer.dims, chunk);
  host_block tables(gdn::resident_requirement<gdn::host_memory>(plan));
  auto table_ws = tables.workspace();
  const auto batch = gdn::upload(be, plan, table_ws, {});
  host_block scratch(gdn::serve_requirement<T>(be, layer.dims, batch));
  auto ws = scratch.workspace();
  gdn::serve(be, layer, pool, batch, x.ref(), y.ref(), ws, {});
}

template <class T>
struct alone_result {
  host_tensor<T, 2> y;
  host_tensor<gdn::accumulate_t<T>, 4> recurrent;  // [1, Hv, K, V]
  host_tensor<T, 3> conv;                          // [1, Dc, W]
};

/// forward() over all tokens of one sequence, on one rank.
template <class T, class Backend>
alone_result<T> forward_alone(const Backend& be, const gdn::gated_delta_net<T>& layer, const host_tensor<T, 2>& x) {
  const gdn::layer_dims& d = layer.dims;
  const index_t n = x.extent(0);
  alone_result<T> out{host_tensor<T, 2>({n, d.hidden}),
                      host_tensor<gdn::accumulate_t<T>, 4>({1, d.value_heads, d.key_dim, d.value_dim}),
                      host_tensor<T, 3>({1, d.channels(), d.conv_width})};
  const auto host =
      gdn::plan_layer(d, gdn::contiguous_layout{n, 1}, gdn::packing::rows_of(1, n), {.final_state = true}, 0, 8);
  host_block tables(gdn::resident_requirement<gdn::host_memory>(host));
  auto table_ws = tables.workspace();
  const auto plan = gdn::upload(be, host, table_ws, {});
  host_block scratch(gdn::requirements<T>(be, d, plan, gdn::keep_policy::nothing).forward);
  auto ws = scratch.workspace();
  gdn::self_communicator self;
  gdn::sequence_states<T> states;
  states.final_ = out.recurrent.ref();
  states.final_conv = out.conv.ref();
  gdn::prefill(be, self, layer, plan, x.ref(), out.y.ref(), states, ws, {});
  return out;
}

/// max |a - b| / max |b|
class worst_error {
 public:
  void add(double got, double want) {
    largest_ = std::max(largest_, std::abs(want));
    const double e = std::abs(got - want);
    worst_ = e <= worst_ ? worst_ : std::isfinite(e) ? e : std::numeric_limits<double>::infinity();
  }
  double value() const { return worst_ / std::max(largest_, 1e-30); }

 private:
  double worst_ = 0, largest_ = 0;
};

/// The state of a slot against that of a sequence alone.
template <class T, class S>
void compare_state(const gdn::state_pool<T, S>& pool, std::int32_t slot, const alone_result<T>& want,
                   worst_error& recurrent, worst_error& conv) {
  const auto& r = pool.recurrent;
  for (index_t h = 0; h < r.extent(1); ++h) {
    for (index_t k = 0; k < r.extent(2); ++k) {
      for (index_t v = 0; v < r.extent(3); ++v) recurrent.add(real(r(slot, h, k, v)), real(want.recurrent(0, h, k, v)));
    }
  }
  for (index_t c = 0; c < pool.conv.extent(1); ++c) {
    for (index_t w = 0; w < pool.conv.extent(2); ++w) conv.add(real(pool.conv(slot, c, w)), real(want.conv(0, c, w)));
  }
}

}  // namespace gdn_test
