// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A training step of one layer on one rank, with its device memory: to be enqueued, captured, repeated.

#include <algorithm>
#include <cstddef>
#include <random>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>
#include <gdn/cuda/self.hpp>
#include <gdn/layer/requirements.hpp>

#include <support/explicit_layout.hpp>

namespace gdn_test {

using gdn::index_t;

/// A rank among others that are not there: what arrives is what it sends in the same call, cut short or followed by
/// zeros. Such numbers mean nothing, but a rank does all that it does amid others, and gets the same on every run.
class mirror_communicator {
 public:
  using memory_type = gdn::device_memory;
  using stream_type = gdn::cuda::stream_ref;

  mirror_communicator(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  gdn::comm_state state() const noexcept { return gdn::comm_state::ok; }
  void abort() noexcept {}
  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, gdn::cuda::stream_ref s) {
    for (std::size_t i = 0; i < recvs.size(); ++i) {
      const gdn::send_op from = sends.empty() ? gdn::send_op{} : sends[i % sends.size()];
      const std::size_t n = std::min(from.bytes, recvs[i].bytes);
      if (n > 0) gdn::cuda::detail::copy_on_device(recvs[i].data, from.data, n, s);
      if (n == recvs[i].bytes) continue;
      gdn::cuda::check(cudaMemsetAsync(static_cast<std::byte*>(recvs[i].data) + n, 0, recvs[i].bytes - n, s.get()),
                       "cudaMemsetAsync");
    }
  }

 private:
  int rank_, size_;
};
static_assert(gdn::communicator<mirror_communicator>);

/// The layer, its documents, and this rank's part in them.
struct step_shape {
  gdn::layer_dims dims;
  std::vector<index_t> cu_seqlens;
  gdn::explicit_layout layout;
  gdn::plan_options options{.initial_state = true, .final_state = true};
  int rank = 0;
  gdn::keep_policy keep = gdn::keep_policy::everything;
};

/// Two documents on the only rank, in order.
inline step_shape step_alone() {
  return {.dims = {.hidden = 64, .key_heads = 2, .value_heads = 4, .key_dim = 64, .value_dim = 64},
          .cu_seqlens = {0, 130, 200},
          .layout = explicit_of(gdn::contiguous_layout{200, 1})};
}
/// The only rank again: rows out of order, a document that is cut in pieces, and a tape that keeps little.
inline step_shape long_step_alone() {
  const std::vector<std::vector<std::pair<index_t, index_t>>> swapped = {{{600, 1263}, {0, 600}}};
  return {.dims = {.hidden = 64, .key_heads = 1, .value_heads = 2, .key_dim = 128, .value_dim = 128},
          .cu_seqlens = {0, 70, 1200, 1263},
          .layout = gdn::from_ranges(swapped),
          .keep = gdn::keep_policy::recompute};
}
/// The second of four ranks: pieces of two documents in place, whose states are folded from several summaries.
inline step_shape step_amid_others() {
  return {.dims = {.hidden = 64, .key_heads = 2, .value_heads = 4, .key_dim = 64, .value_dim = 64},
          .cu_seqlens = {0, 130, 700, 800},
          .layout = explicit_of(gdn::zigzag_layout{800, 4}),
          .options = {.strategy = gdn::strategy::in_place,
                      .share = gdn::share::all_gather,
                      .initial_state = true,
                      .final_state = true},
          .rank = 1,
          .keep = gdn::keep_policy::recompute};
}
/// The third of four ranks: rows move, and summaries that are joined from pieces are composed on their way.
inline step_shape long_step_amid_others() {
  return {.dims = {.hidden = 64, .key_heads = 1, .value_heads = 2, .key_dim = 128, .value_dim = 128},
          .cu_seqlens = {0, 130, 4530, 4560},
          .layout = explicit_of(gdn::zigzag_layout{4560, 4}),
          .options = {.strategy = gdn::strategy::reshard,
                      .share = gdn::share::prefix_scan,
                      .initial_state = true,
                      .final_state = true},
          .rank = 2};
}

/// With initial and final states, forward and backward.
template <class T>
class layer_step {
  using memory = gdn::device_memory;
  using A = gdn::accumulate_t<T>;

 public:
  explicit layer_step(unsigned seed, const step_shape& shape = step_alone())
      : random_(seed), dims_(shape.dims), keep_(shape.keep), mirror_(shape.rank, shape.layout.world) {
    const auto host = gdn::plan_layer(dims_, shape.layout,
                                      gdn::packing::from_cu_seqlens(shape.cu_seqlens, {}, 1, shape.cu_seqlens.back()),
                                      shape.options, shape.rank);
    tables_ = gdn::cuda::device_block(gdn::resident_requirement<memory>(host));
    auto table_ws = tables_.workspace();
    plan_ = gdn::upload(be_, host, table_ws, s_);
    const auto need = gdn::requirements<T>(be_, dims_, plan_, keep_);
    tape_block_ = gdn::cuda::device_block(need.tape);
    scratch_ = gdn::cuda::device_block({std::max(need.forward.bytes, need.backward.bytes)});

    gdn::workspace<memory> measure;
    carve(measure);
    block_ = gdn::cuda::device_block(measure.peak());
    auto ws = block_.workspace();
    carve(ws);
    weights_.for_each([&](std::string_view, const auto& w) { fill(w, 0.3F); });
    fill(initial_.recurrent, 0.5F);
    fill(initial_.conv, 1);
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
      if (bytes == 0) return;
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
    if (mirror_.size() == 1) {
      enqueue(self_, s);
    } else {
      enqueue(mirror_, s);
    }
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
  template <class Comm>
  void enqueue(Comm& comm, gdn::cuda::stream_ref s) {
    gradients_.for_each([&](std::string_view, const auto& g) { be_.template fill_zero<A>(as_rows(g), s); });
    auto tape_ws = tape_block_.workspace();
    auto tape = gdn::make_tape<T>(be_, dims_, plan_, keep_, tape_ws);
    auto ws = scratch_.workspace();
    const gdn::gated_delta_net<T, memory> layer{dims_, weights_};
    gdn::state_gradients<T, memory> d_states;
    d_states.final_ = arriving_.recurrent;
    d_states.final_conv = arriving_.conv;
    gdn::forward(be_, comm, layer, plan_, x_, y_, states_, tape, ws, s);
    gdn::backward(be_, comm, layer, plan_, dy_, dx_, d_states, gradients_, tape, ws, s);
  }
  void carve(gdn::workspace<memory>& ws) {
    weights_ = gdn::parameter_storage<T, memory>::carve(ws, dims_);
    gradients_ = gdn::layer_gradients<T, memory>::carve(ws, dims_);
    for (auto* t : {&x_, &y_, &dx_, &dy_}) *t = ws.template take<T>(plan_.host.caller_rows, dims_.hidden);
    const auto n_in = static_cast<index_t>(plan_.host.entering.size());
    const auto n_out = static_cast<index_t>(plan_.host.leaving.size());
    const auto states = [&](index_t n) {
      return ws.template take<A>(n, dims_.value_heads, dims_.key_dim, dims_.value_dim);
    };
    const auto convs = [&](index_t n) { return ws.template take<T>(n, dims_.channels(), dims_.conv_width); };
    initial_ = {states(n_in), convs(n_in)};
    arriving_ = {states(n_out), convs(n_out)};
    states_.initial = initial_.recurrent;
    states_.initial_conv = initial_.conv;
    states_.final_ = states(n_out);
    states_.final_conv = convs(n_out);
  }
  template <class U, int R>
  static gdn::tensor_ref<U, 2, memory> as_rows(const gdn::tensor_ref<U, R, memory>& t) {
    return gdn::make_tensor<memory>(t.data(), index_t{1}, t.size());
  }
  template <class U, int R>
  void fill(const gdn::tensor_ref<U, R, memory>& t, float scale) {
    using V = std::remove_const_t<U>;
    if (t.size() == 0) return;
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
  gdn::layer_dims dims_;
  gdn::keep_policy keep_;
  gdn::cuda::stream s_;
  gdn::cuda::backend be_;
  gdn::cuda::self_communicator self_;
  mirror_communicator mirror_;
  gdn::cuda::device_block tables_{{0}}, tape_block_{{0}}, scratch_{{0}}, block_{{0}};
  gdn::resident_plan<memory> plan_;
  gdn::parameter_storage<T, memory> weights_;
  gdn::layer_gradients<T, memory> gradients_;
  gdn::tensor_ref<T, 2, memory> x_, y_, dx_, dy_;
  gdn::layer_state<T, memory> initial_, arriving_;
  gdn::sequence_states<T, memory> states_;
};

}  // namespace gdn_test
