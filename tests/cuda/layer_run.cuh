// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A batch through the layer on the device, by ranks that are threads; the result as run_layer() gives it.

#include <array>
#include <chrono>
#include <cstddef>
#include <limits>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include <gdn/comm/threads.hpp>
#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/local.hpp>
#include <gdn/cuda/memory.hpp>
#include <gdn/layer/requirements.hpp>
#include <cuda/layer_device.hpp>
#include <support/device_block.cuh>

namespace gdn_test {

/// One rank. What all ranks together computed goes to `out`, under `mutex`.
template <class T>
class device_rank {
  using A = gdn::accumulate_t<T>;
  using memory = gdn::device_memory;

 public:
  device_rank(const layer_batch& b, const layer_spread& s, layer_result& out, std::mutex& mutex)
      : b_(b), s_(s), d_(b.dims), out_(out), mutex_(mutex) {}

  template <class Comm>
  void operator()(Comm& comm) const {
    const int me = comm.rank();
    const gdn::cuda::stream s;
    static const gdn::cuda::backend be;  // ranks and tests share its handle
    const bool grad = s_.keep != gdn::keep_policy::nothing;
    const auto plan = gdn::plan_context_parallel(s_.rows, b_.pack, gdn::shape_of(d_, s_.chunk), d_.channels(),
                                                 s_.options, s_.world, me);
    const poisoned_device_block tables(gdn::resident_requirement<memory>(plan), s);
    auto table_ws = tables.workspace();
    const auto resident = gdn::upload(be, plan, table_ws, s);
    const auto need = gdn::requirements<T>(be, d_, resident, s_.keep);
    const auto n_in = static_cast<index_t>(plan.entering.size());
    const auto n_out = static_cast<index_t>(plan.leaving.size());

    // The layer, each rank its own copy.
    std::vector<device_array<T>> narrow;
    std::vector<device_array<A>> wide;
    for (const values& v : b_.parameters) {
      narrow.emplace_back(converted<T>(v), s);
      wide.emplace_back(converted<A>(v), s);
    }
    const auto weight = [&](std::size_t i, index_t rows, index_t columns) {
      return gdn::make_tensor<memory>(static_cast<const T*>(narrow[i].data()), rows, columns);
    };
    const auto vector = [&](std::size_t i, index_t n) {
      return gdn::make_tensor<memory>(static_cast<const A*>(wide[i].data()), n);
    };
    gdn::gated_delta_net<T, memory> layer;
    layer.dims = d_;
    layer.weights = {weight(in_proj_qkv, d_.channels(), d_.hidden), weight(in_proj_z, d_.values(), d_.hidden),
                     weight(in_proj_b, d_.value_heads, d_.hidden),  weight(in_proj_a, d_.value_heads, d_.hidden),
                     weight(conv1d, d_.channels(), d_.conv_width),  vector(A_log, d_.value_heads),
                     vector(dt_bias, d_.value_heads),               vector(norm, d_.value_dim),
                     weight(out_proj, d_.hidden, d_.values())};

    // This rank's part of the batch.
    const auto local = plan.caller_rows * d_.hidden;
    const device_array<T> x(rows_of_rank<T>(b_.x, s_.rows, me, d_.hidden), s), y(local, s);
    const device_array<T> dy(rows_of_rank<T>(b_.dy, s_.rows, me, d_.hidden), s), dx(local, s);
    const device_array<A> initial(entries<A>(b_.initial, plan.entering, b_.state_size()), s);
    const device_array<T> initial_conv(entries<T>(b_.initial_conv, plan.entering, b_.conv_size()), s);
    const device_array<A> d_final(entries<A>(b_.d_final, plan.leaving, b_.state_size()), s);
    const device_array<T> d_final_conv(entries<T>(b_.d_final_conv, plan.leaving, b_.conv_size()), s);
    const device_array<A> final_(n_out * b_.state_size(), s), d_initial(n_in * b_.state_size(), s);
    const device_array<T> final_conv(n_out * b_.conv_size(), s), d_initial_conv(n_in * b_.conv_size(), s);
    const auto rows = [&](const auto& a) { return gdn::make_tensor<memory>(a.data(), plan.caller_rows, d_.hidden); };
    const auto states = [&](const device_array<A>& a, index_t n) {
      return gdn::make_tensor<memory>(a.data(), n, d_.value_heads, d_.key_dim, d_.value_dim);
    };
    const auto convs = [&](const device_array<T>& a, index_t n) {
      return gdn::make_tensor<memory>(a.data(), n, d_.channels(), d_.conv_width);
    };
    gdn::sequence_states<T, memory> io;
    gdn::state_gradients<T, memory> d_io;
    if (s_.options.initial_state) {
      io.initial = states(initial, n_in);
      io.initial_conv = convs(initial_conv, n_in);
      d_io.initial = states(d_initial, n_in);
      d_io.initial_conv = convs(d_initial_conv, n_in);
    }
    if (s_.options.final_state) {
      io.final_ = states(final_, n_out);
      io.final_conv = convs(final_conv, n_out);
      d_io.final_ = states(d_final, n_out);
      d_io.final_conv = convs(d_final_conv, n_out);
    }

    const poisoned_device_block tape_block(need.tape, s), forward_block(need.forward, s);
    const poisoned_device_block backward_block(need.backward, s);
    auto tape_ws = tape_block.workspace();
    auto tape = gdn::make_tape<T>(be, d_, resident, s_.keep, tape_ws);
    auto forward_ws = forward_block.workspace();
    gdn::forward(be, comm, layer, resident, rows(x), rows(y), io, tape, forward_ws, s);
    EXPECT_LE(forward_ws.peak().bytes, need.forward.bytes);

    gdn::workspace<memory> measure;
    gdn::layer_gradients<T, memory>::carve(measure, d_);
    const gdn::cuda::device_block gradient_block(measure.peak());
    auto gradient_ws = gradient_block.workspace();
    const auto gradients = gdn::layer_gradients<T, memory>::carve(gradient_ws, d_);
    std::array<std::vector<A>, 9> sums;
    if (grad) {
      gdn::cuda::check(cudaMemsetAsync(gradient_block.data(), 0, gradient_block.bytes(), s.get()), "cudaMemsetAsync");
      auto backward_ws = backward_block.workspace();
      gdn::backward(be, comm, layer, resident, rows(dy), rows(dx), d_io, gradients, tape, backward_ws, s);
      EXPECT_LE(backward_ws.peak().bytes, need.backward.bytes);
      std::size_t i = 0;
      gradients.for_each([&](auto, const auto& g) { sums[i++] = gdn::cuda::copy_to_host(g, s); });
    }

    const auto got_y = y.fetch(), got_dx = dx.fetch();
    const auto got_final = final_.fetch(), got_d_initial = d_initial.fetch();
    const auto got_final_conv = final_conv.fetch(), got_d_initial_conv = d_initial_conv.fetch();
    EXPECT_TRUE(tape_block.guards_hold() && forward_block.guards_hold() && backward_block.guards_hold());
    const std::lock_guard lock(mutex_);
    put_rows_of_rank(got_y, s_.rows, me, d_.hidden, out_.y);
    if (s_.options.final_state) {
      put_entries(got_final, plan.leaving, b_.state_size(), out_.final_);
      put_entries(got_final_conv, plan.leaving, b_.conv_size(), out_.final_conv);
    }
    if (!grad) return;
    put_rows_of_rank(got_dx, s_.rows, me, d_.hidden, out_.dx);
    if (s_.options.initial_state) {
      put_entries(got_d_initial, plan.entering, b_.state_size(), out_.d_initial);
      put_entries(got_d_initial_conv, plan.entering, b_.conv_size(), out_.d_initial_conv);
    }
    for (std::size_t i = 0; i < 9; ++i) {
      out_.gradients[i].resize(sums[i].size());
      for (std::size_t k = 0; k < sums[i].size(); ++k) out_.gradients[i][k] += static_cast<double>(sums[i][k]);
    }
  }

 private:
  template <class U>
  static std::vector<U> converted(const values& v) {
    std::vector<U> out;
    for (const double x : v) out.push_back(static_cast<U>(x));
    return out;
  }

  const layer_batch& b_;
  const layer_spread& s_;
  const gdn::layer_dims& d_;
  layer_result& out_;
  std::mutex& mutex_;
};

template <class T>
layer_result run_layer_on_device(const layer_batch& b, const layer_spread& s) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto all = [&](index_t n) { return values(static_cast<std::size_t>(n), nan); };
  const bool grad = s.keep != gdn::keep_policy::nothing;
  layer_result out;
  out.y = all(b.pack.rows() * b.dims.hidden);
  if (s.options.final_state) {
    out.final_ = all(b.documents() * b.state_size());
    out.final_conv = all(b.documents() * b.conv_size());
  }
  if (grad) out.dx = out.y;
  if (grad && s.options.initial_state) {
    out.d_initial = all(b.documents() * b.state_size());
    out.d_initial_conv = all(b.documents() * b.conv_size());
  }
  std::mutex mutex;
  const device_rank<T> rank(b, s, out, mutex);
  gdn::run_on_threads<gdn::cuda::local_communicator>(s.world, rank, std::chrono::seconds(60));
  return out;
}
}  // namespace gdn_test
