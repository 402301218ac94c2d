// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A bundle through the public API, as a host project would: one thread per rank, each with its own part.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <gdn/io/checkpoint.hpp>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/reduce.hpp>
#include <gdn/layer/requirements.hpp>

#include "run.hpp"

namespace gdn_run {

/// Memory of one rank, from which workspaces and tensors are made.
class memory_block {
 public:
  explicit memory_block(gdn::memory_requirement need, std::byte fill = std::byte{0})
      : bytes_(need.bytes), data_(static_cast<std::byte*>(::operator new(bytes_ + 1, alignment))) {
    std::fill(data_.get(), data_.get() + bytes_, fill);
  }
  gdn::workspace<gdn::host_memory> workspace() { return {data_.get(), bytes_}; }

 private:
  static constexpr std::align_val_t alignment{gdn::workspace<gdn::host_memory>::alignment};
  struct release {
    void operator()(std::byte* p) const { ::operator delete(p, alignment); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, release> data_;
};

/// Milliseconds of each phase: of the slowest rank, in the fastest repetition.
class phase_clock {
 public:
  void add(const std::string& phase, int repetition, double ms) {
    const std::lock_guard lock(mutex_);
    auto at = std::find_if(phases_.begin(), phases_.end(), [&](const auto& p) { return p.first == phase; });
    if (at == phases_.end()) at = phases_.insert(phases_.end(), {phase, {}});
    auto& slowest = at->second;
    slowest.resize(std::max(slowest.size(), static_cast<std::size_t>(repetition) + 1));
    slowest[static_cast<std::size_t>(repetition)] = std::max(slowest[static_cast<std::size_t>(repetition)], ms);
  }
  std::vector<std::pair<std::string, double>> least() const {
    std::vector<std::pair<std::string, double>> out;
    for (const auto& [name, times] : phases_) out.emplace_back(name, *std::min_element(times.begin(), times.end()));
    return out;
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<std::string, std::vector<double>>> phases_;
};

/// A run of a layer of type T. `make_backend(threads)` makes the backend of one rank.
template <class T, class MakeBackend>
class layer_run {
  using A = gdn::accumulate_t<T>;
  using host = gdn::host_memory;
  using workspace = gdn::workspace<host>;

 public:
  layer_run(const options& o, const bundle& b, const gdn::fragment_table& layout, MakeBackend make_backend)
      : o_(o), b_(b), d_(b.dims()), layout_(layout), make_backend_(std::move(make_backend)) {
    grad_ = o.grad && b.grad_output != nullptr;
    decode_ = o.decode && b.decode_hidden_states != nullptr;
    initial_gradient_ = grad_ && (b.expects_gradient_of("initial_state") || b.expects_gradient_of("initial_conv_state") ||
                                  b.initial_state != nullptr || b.initial_conv_state != nullptr);
    plan_options_ = {o.strategy, o.share,
                     b.initial_state != nullptr || b.initial_conv_state != nullptr || initial_gradient_, true};
  }

  run_result run() {
    const index_t N = b_.packing.documents();
    const std::vector<index_t> rows = {b_.batch, b_.seq, d_.hidden};
    const std::vector<index_t> recurrent = {N, d_.value_heads, d_.key_dim, d_.value_dim};
    const std::vector<index_t> conv = {N, d_.channels(), d_.conv_width};
    output_ = reserve("output", rows);
    conv_state_ = reserve("conv_state", conv);
    recurrent_state_ = reserve("recurrent_state", recurrent);
    if (grad_) grad_hidden_ = reserve("grad.hidden_states", rows);
    if (initial_gradient_) {
      grad_initial_ = reserve("grad.initial_state", recurrent);
      grad_initial_conv_ = reserve("grad.initial_conv_state", conv);
    }
    if (decode_) {
      decode_output_ = reserve("decode.output", {b_.batch, b_.decode_tokens, d_.hidden});
      decode_conv_ = reserve("decode.conv_state", conv);
      decode_recurrent_ = reserve("decode.recurrent_state", recurrent);
    }

    workspace measure;
    gdn::parameter_storage<T>::carve(measure, d_);
    memory_block weights(measure.peak());
    workspace weights_ws = weights.workspace();
    const auto parameters = gdn::parameter_storage<T>::carve(weights_ws, d_);
    gdn::load_parameters<T>(b_.file.content, parameter_prefix, d_, parameters, b_.config.ssm);
    layer_ = {d_, parameters};

    result_.received.resize(static_cast<std::size_t>(o_.ranks));
    gdn::run_on_threads(o_.ranks, [&](gdn::thread_communicator& comm) { rank(comm); });
    result_.tokens = b_.packing.tokens();
    result_.milliseconds = clock_.least();
    std::vector<gdn::named_values> results;
    for (const auto& t : tensors_) results.push_back(std::move(*t));
    result_.tensors = std::move(results);
    for (auto& g : gradients_) result_.tensors.push_back(std::move(g));
    return std::move(result_);
  }

 private:
  gdn::named_values* reserve(std::string name, std::vector<index_t> shape) {
    index_t n = 1;
    for (const index_t e : shape) n *= e;
    tensors_.push_back(std::make_unique<gdn::named_values>(
        gdn::named_values{std::move(name), std::move(shape), std::vector<double>(static_cast<std::size_t>(n))}));
    return tensors_.back().get();
  }

  template <class F>
  void timed(const char* phase, int repetition, F&& f) {
    const auto begin = std::chrono::steady_clock::now();
    f();
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - begin;
    clock_.add(phase, repetition, ms.count());
  }

  /// f(row of the batch, row of this rank) for each of this rank's rows.
  template <class F>
  void for_each_row(int rank, F&& f) const {
    for (const gdn::fragment& piece : layout_) {
      for (index_t i = 0; piece.rank == rank && i < piece.count; ++i) f(piece.begin + i, piece.local + i);
    }
  }

  /// Rows of a tensor of the bundle (or of results), by their index in the batch or the list of documents.
  template <class E>
  static void read_rows(std::span<const double> from, index_t row, index_t width, E* to) {
    std::transform(from.data() + row * width, from.data() + (row + 1) * width, to,
                   [](double v) { return static_cast<E>(v); });
  }
  template <class E>
  static void write_rows(const E* from, index_t width, index_t row, gdn::named_values& to) {
    std::transform(from, from + width, to.values.data() + row * width, [](E v) { return static_cast<double>(v); });
  }
  /// Entry i of `to` from row documents[i] of the bundle's tensor; zeros if the bundle lacks it.
  template <class E>
  static void read_documents(const gdn::tensor_entry* from, std::span<const index_t> documents, index_t width, E* to) {
    if (from == nullptr) return;
    const std::vector<double> values = gdn::values_of<double>(*from);
    for (std::size_t i = 0; i < documents.size(); ++i) {
      read_rows(std::span<const double>(values), documents[i], width, to + static_cast<index_t>(i) * width);
    }
  }
  template <class E>
  static void write_documents(const E* from, std::span<const index_t> documents, index_t width, gdn::named_values* to) {
    for (std::size_t i = 0; i < documents.size(); ++i) {
      write_rows(from + static_cast<index_t>(i) * width, width, documents[i], *to);
    }
  }

  void rank(gdn::thread_communicator& comm) {
    const gdn::host_stream s;
    const int me = comm.rank();
    const auto be = make_backend_(o_.ranks);
    const index_t state = d_.state_size();
    const index_t conv = d_.channels() * d_.conv_width;

    // Plan.
    gdn::cp_plan plan;
    timed("plan", 0, [&] {
      plan = gdn::plan_context_parallel(layout_, b_.packing, gdn::shape_of(d_), d_.channels(), plan_options_, o_.ranks,
                                        me);
    });
    gdn::check_same_plan(comm, plan, s);
    memory_block tables(gdn::resident_requirement<host>(plan));
    workspace tables_ws = tables.workspace();
    const gdn::resident_plan<host> resident = gdn::upload(be, plan, tables_ws, s);
    const auto policy = grad_ ? gdn::keep_policy::everything : gdn::keep_policy::nothing;
    const gdn::layer_requirements need = gdn::requirements<T>(be, d_, resident, policy);

    // Memory, and this rank's part of the input.
    constexpr auto poison = std::byte{0xff};  // NaN: a read of what was not written shows
    memory_block tape_memory(need.tape, poison);
    workspace tape_ws = tape_memory.workspace();
    auto tape = gdn::make_tape<T>(be, d_, resident, policy, tape_ws);
    const std::vector<int> to_root(static_cast<std::size_t>(plan.documents()), 0);
    memory_block scratch({std::max({need.forward.bytes, need.backward.bytes,
                                    gdn::reduce_requirement<T>(d_, o_.ranks).bytes,
                                    gdn::delivery_requirement<T>(d_, plan, to_root).bytes,
                                    gdn::decode_requirement<T>(d_, b_.batch).bytes})},
                         poison);
    workspace ws = scratch.workspace();
    const auto n_in = static_cast<index_t>(plan.entering.size());
    const auto n_out = static_cast<index_t>(plan.leaving.size());
    struct io {
      gdn::tensor_ref<T, 2> x, y, dy, dx;
      gdn::states_ref<T, host> initial, final_, d_final, d_initial;
      gdn::tensor_ref<T, 3> initial_conv, final_conv, d_final_conv, d_initial_conv;
      gdn::layer_gradients<T> grad;
    };
    const auto carve = [&](workspace& m) {
      const auto rows = [&] { return m.take<T>(plan.caller_rows, d_.hidden); };
      const auto states = [&](index_t n) { return m.take<A>(n, d_.value_heads, d_.key_dim, d_.value_dim); };
      const auto convs = [&](index_t n) { return m.take<T>(n, d_.channels(), d_.conv_width); };
      return io{rows(),       rows(),       rows(),       rows(),      states(n_in), states(n_out), states(n_out),
                states(n_in), convs(n_in),  convs(n_out), convs(n_out), convs(n_in),
                gdn::layer_gradients<T>::carve(m, d_)};
    };
    workspace measure;
    carve(measure);
    memory_block io_memory(measure.peak());
    workspace io_ws = io_memory.workspace();
    const io t = carve(io_ws);
    {
      const std::vector<double> x = gdn::values_of<double>(*b_.hidden_states);
      for_each_row(me, [&](index_t row, index_t local) {
        read_rows(std::span<const double>(x), row, d_.hidden, &t.x(local, 0));
      });
    }
    read_documents(b_.initial_state, plan.entering, state, t.initial.data());
    read_documents(b_.initial_conv_state, plan.entering, conv, t.initial_conv.data());
    if (grad_) {
      const std::vector<double> dy = gdn::values_of<double>(*b_.grad_output);
      for_each_row(me, [&](index_t row, index_t local) {
        read_rows(std::span<const double>(dy), row, d_.hidden, &t.dy(local, 0));
      });
      read_documents(b_.grad_recurrent_state, plan.leaving, state, t.d_final.data());
      read_documents(b_.grad_conv_state, plan.leaving, conv, t.d_final_conv.data());
    }

    // Compute.
    gdn::sequence_states<T> states{.initial = {}, .initial_conv = {}, .final_ = t.final_, .final_conv = t.final_conv};
    if (plan_options_.initial_state) {
      states.initial = t.initial;
      states.initial_conv = t.initial_conv;
    }
    gdn::state_gradients<T> d_states{.final_ = t.d_final, .final_conv = t.d_final_conv, .initial = {}, .initial_conv = {}};
    if (initial_gradient_) {
      d_states.initial = t.d_initial;
      d_states.initial_conv = t.d_initial_conv;
    }
    for (int i = 0; i < o_.repeat; ++i) {
      timed("forward", i, [&] { gdn::forward(be, comm, layer_, resident, t.x, t.y, states, tape, ws, s); });
      if (!grad_) continue;
      t.grad.for_each([](std::string_view, const auto& g) { std::fill_n(g.data(), g.size(), A{0}); });
      timed("backward", i,
            [&] { gdn::backward(be, comm, layer_, resident, t.dy, t.dx, d_states, t.grad, tape, ws, s); });
      timed("reduce", i, [&] { gdn::reduce_gradients<T>(be, comm, t.grad, ws, s); });
    }
    gdn::traffic& received = result_.received[static_cast<std::size_t>(me)];
    received = plan.forward_traffic(d_.hidden, sizeof(T), sizeof(A));
    if (grad_) {
      const gdn::traffic back = plan.backward_traffic(d_.hidden, sizeof(T), sizeof(A));
      received.halo += back.halo;
      received.state += back.state;
      received.activations += back.activations;
    }

    // Results: every row and document has one owner, so ranks write different places.
    for_each_row(me, [&](index_t row, index_t local) { write_rows(&t.y(local, 0), d_.hidden, row, *output_); });
    write_documents(t.final_.data(), plan.leaving, state, recurrent_state_);
    write_documents(t.final_conv.data(), plan.leaving, conv, conv_state_);
    if (grad_) {
      for_each_row(me, [&](index_t row, index_t local) { write_rows(&t.dx(local, 0), d_.hidden, row, *grad_hidden_); });
      if (me == 0) {
        gradients_ = gdn::checkpoint_tensors(t.grad, b_.weights, std::string("grad.") + parameter_prefix, d_);
      }
    }
    if (initial_gradient_) {
      write_documents(t.d_initial.data(), plan.entering, state, grad_initial_);
      write_documents(t.d_initial_conv.data(), plan.entering, conv, grad_initial_conv_);
    }
    if (decode_) {
      decode(be, comm, plan, to_root, {t.final_, t.final_conv}, ws);
    }
  }

  /// After the prefill of many ranks, one decodes: token by token, all sequences at once.
  template <class Backend>
  void decode(const Backend& be, gdn::thread_communicator& comm, const gdn::cp_plan& plan,
              const std::vector<int>& targets, const gdn::layer_state<T>& from, workspace& ws) {
    const gdn::host_stream s;
    const index_t B = b_.batch;  // documents, too
    const index_t D = b_.decode_tokens;
    const bool root = comm.rank() == 0;
    const index_t n = root ? B : 0;
    gdn::layer_state<T> state;
    gdn::tensor_ref<T, 2> x, y;
    gdn::tensor_ref<std::int32_t, 1> slots;
    const auto carve = [&](workspace& m) {
      state = {m.take<A>(n, d_.value_heads, d_.key_dim, d_.value_dim), m.take<T>(n, d_.channels(), d_.conv_width)};
      x = m.take<T>(n, d_.hidden);
      y = m.take<T>(n, d_.hidden);
      slots = m.take<std::int32_t>(n);
    };
    workspace measure;
    carve(measure);
    memory_block memory(measure.peak());
    workspace own = memory.workspace();
    carve(own);
    gdn::deliver_states<T>(be, comm, d_, plan, targets, from, state, ws, s);
    if (!root) return;

    for (index_t i = 0; i < B; ++i) slots(i) = static_cast<std::int32_t>(i);
    const std::vector<double> tokens = gdn::values_of<double>(*b_.decode_hidden_states);
    timed("decode", 0, [&] {
      for (index_t t = 0; t < D; ++t) {
        for (index_t i = 0; i < B; ++i) read_rows(std::span<const double>(tokens), i * D + t, d_.hidden, &x(i, 0));
        gdn::decode_step(be, layer_, x, y, state, slots, ws, s);
        for (index_t i = 0; i < B; ++i) write_rows(&y(i, 0), d_.hidden, i * D + t, *decode_output_);
      }
    });
    write_documents(state.recurrent.data(), plan_order(B), d_.state_size(), decode_recurrent_);
    write_documents(state.conv.data(), plan_order(B), d_.channels() * d_.conv_width, decode_conv_);
  }

  static std::vector<index_t> plan_order(index_t n) {
    std::vector<index_t> out;
    for (index_t i = 0; i < n; ++i) out.push_back(i);
    return out;
  }

  const options& o_;
  const bundle& b_;
  const gdn::layer_dims d_;
  const gdn::fragment_table& layout_;
  MakeBackend make_backend_;
  bool grad_ = false;
  bool decode_ = false;
  bool initial_gradient_ = false;
  gdn::plan_options plan_options_;
  gdn::gated_delta_net<T> layer_;
  phase_clock clock_;
  run_result result_;
  std::vector<std::unique_ptr<gdn::named_values>> tensors_;
  std::vector<gdn::named_values> gradients_;  // of parameters
  gdn::named_values *output_ = nullptr, *conv_state_ = nullptr, *recurrent_state_ = nullptr, *grad_hidden_ = nullptr,
                    *grad_initial_ = nullptr, *grad_initial_conv_ = nullptr, *decode_output_ = nullptr,
                    *decode_conv_ = nullptr, *decode_recurrent_ = nullptr;
};

/// One per type and backend, each in a translation unit of its own.
run_result run_kokkos_f32(const options& o, const bundle& b, const gdn::fragment_table& layout);
run_result run_kokkos_f64(const options& o, const bundle& b, const gdn::fragment_table& layout);

}  // namespace gdn_run
