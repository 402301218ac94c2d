// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A training step of one layer on one rank, with its device memory: to be enqueued, captured, repeated.

#include <algorithm>
#include <cstddef>
#include <random>
#include <string_view>
#include <type_traits>
#include <vector>

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>
#include <gdn/cuda/self.hpp>
#include <gdn/layer/requirements.hpp>

namespace gdn_test {

using gdn::index_t;

/// Two documents, with initial and final states, forward and backward.
template <class T>
class layer_step {
  using memory = gdn::device_memory;
  using A = gdn::accumulate_t<T>;

 public:
  static constexpr gdn::layer_dims dims{.hidden = 64, .key_heads = 2, .value_heads = 4, .key_dim = 64, .value_dim = 64};
  static constexpr index_t tokens = 200;

  explicit layer_step(unsigned seed) : random_(seed) {
    const std::vector<index_t> cu_seqlens = {0, 130, tokens};
    const auto host = gdn::plan_layer(dims, gdn::contiguous_layout{tokens, 1},
                                      gdn::packing::from_cu_seqlens(cu_seqlens, {}, 1, tokens),
                                      {.initial_state = true, .final_state = true}, 0);
    tables_ = gdn::cuda::device_block(gdn::resident_requirement<memory>(host));
    auto table_ws = tables_.workspace();
    plan_ = gdn::upload(be_, host, table_ws, s_);
    const auto need = gdn::requirements<T>(be_, dims, plan_, gdn::keep_policy::everything);
    tape_block_ = gdn::cuda::device_block(need.tape);
    scratch_ = gdn::cuda::device_block({std::max(need.forward.bytes, need.backward.bytes)});

    gdn::workspace<memory> measure;
    carve(measure);
    block_ = gdn::cuda::device_block(measure.peak());
    auto ws = block_.workspace();
    carve(ws);
    weights_.for_each([&](std::string_view, const auto& w) { fill(w, 0.3F); });
    fill(states_.initial, 0.5F);
    fill(states_.initial_conv, 1);
    fill(arriving_.recurrent, 0.5F);
    fill(arriving_.conv, 0.5F);
    new_data();
  }

  /// Other x and dy.
  void new_data() {
    fill(x_, 1);
    fill(dy_, 1);
  }
  /// NaN in all that a step writes before it reads: outputs, tape and workspace.
  void poison() {
    for (const auto* block : {&tape_block_, &scratch_}) set(*block, 0xff);
    const auto nan = [&](const auto& t) {
      const std::size_t bytes = static_cast<std::size_t>(t.size()) * sizeof(*t.data());
      gdn::cuda::check(cudaMemsetAsync(t.data(), 0xff, bytes, s_.get()), "cudaMemsetAsync");
    };
    nan(y_);
    nan(dx_);
    nan(states_.final_);
    nan(states_.final_conv);
    s_.synchronize();
  }
  /// Enqueues the step and nothing else.
  void operator()(gdn::cuda::stream_ref s) {
    gradients_.for_each([&](std::string_view, const auto& g) { be_.template fill_zero<A>(as_rows(g), s); });
    auto tape_ws = tape_block_.workspace();
    auto tape = gdn::make_tape<T>(be_, dims, plan_, gdn::keep_policy::everything, tape_ws);
    auto ws = scratch_.workspace();
    const gdn::gated_delta_net<T, memory> layer{dims, weights_};
    gdn::state_gradients<T, memory> d_states;
    d_states.final_ = arriving_.recurrent;
    d_states.final_conv = arriving_.conv;
    gdn::forward(be_, self_, layer, plan_, x_, y_, states_, tape, ws, s);
    gdn::backward(be_, self_, layer, plan_, dy_, dx_, d_states, gradients_, tape, ws, s);
  }
  /// Enqueues the step, then waits.
  std::vector<float> run() {
    (*this)(s_);
    return results();
  }
  /// All that it computed, once its stream is done.
  std::vector<float> results() {
    std::vector<float> out;
    const auto add = [&](const auto& t) {
      for (const auto v : gdn::cuda::copy_to_host(t, s_)) out.push_back(static_cast<float>(v));
    };
    add(y_);
    add(dx_);
    add(states_.final_);
    add(states_.final_conv);
    gradients_.for_each([&](std::string_view, const auto& g) { add(g); });
    return out;
  }
  const gdn::cuda::stream& stream() const { return s_; }

 private:
  void carve(gdn::workspace<memory>& ws) {
    weights_ = gdn::parameter_storage<T, memory>::carve(ws, dims);
    gradients_ = gdn::layer_gradients<T, memory>::carve(ws, dims);
    for (auto* t : {&x_, &y_, &dx_, &dy_}) *t = ws.template take<T>(tokens, dims.hidden);
    const index_t N = 2;
    const auto state = [&] { return ws.template take<A>(N, dims.value_heads, dims.key_dim, dims.value_dim); };
    const auto conv = [&] { return ws.template take<T>(N, dims.channels(), dims.conv_width); };
    initial_ = {state(), conv()};
    arriving_ = {state(), conv()};
    states_.initial = initial_.recurrent;
    states_.initial_conv = initial_.conv;
    states_.final_ = state();
    states_.final_conv = conv();
  }
  template <class U, int R>
  static gdn::tensor_ref<U, 2, memory> as_rows(const gdn::tensor_ref<U, R, memory>& t) {
    return gdn::make_tensor<memory>(t.data(), index_t{1}, t.size());
  }
  template <class U, int R>
  void fill(const gdn::tensor_ref<U, R, memory>& t, float scale) {
    using V = std::remove_const_t<U>;
    std::vector<V> host(static_cast<std::size_t>(t.size()));
    std::uniform_real_distribution<float> value(-scale, scale);
    for (V& v : host) v = static_cast<V>(value(random_));
    gdn::cuda::check(cudaMemcpyAsync(const_cast<V*>(t.data()), host.data(), host.size() * sizeof(V),
                                     cudaMemcpyHostToDevice, s_.get()),
                     "cudaMemcpyAsync");
    s_.synchronize();
  }
  void set(const gdn::cuda::device_block& block, int byte) {
    gdn::cuda::check(cudaMemsetAsync(block.data(), byte, block.bytes(), s_.get()), "cudaMemsetAsync");
  }

  std::mt19937 random_;
  gdn::cuda::stream s_;
  gdn::cuda::backend be_;
  gdn::cuda::self_communicator self_;
  gdn::cuda::device_block tables_{{0}}, tape_block_{{0}}, scratch_{{0}}, block_{{0}};
  gdn::resident_plan<memory> plan_;
  gdn::parameter_storage<T, memory> weights_;
  gdn::layer_gradients<T, memory> gradients_;
  gdn::tensor_ref<T, 2, memory> x_, y_, dx_, dy_;
  gdn::layer_state<T, memory> initial_, arriving_;
  gdn::sequence_states<T, memory> states_;
};

}  // namespace gdn_test
