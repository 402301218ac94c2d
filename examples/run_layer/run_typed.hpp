// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  A bundle through the public API, as a host project would: one thread per rank, each with its own part.

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gdn/comm/abort_guard.hpp>
#include <gdn/io/checkpoint.hpp>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/reduce.hpp>
#include <gdn/layer/requirements.hpp>

#include "run.hpp"

namespace gdn_run {

/// Host memory of one rank, from which workspaces and tensors are made.
class host_block {
 public:
  explicit host_block(gdn::memory_requirement need, std::byte fill = std::byte{0})
      : bytes_(need.bytes), data_(static_cast<std::byte*>(::operator new(bytes_ + 1, alignment))) {
    std::fill(data_.get(), data_.get() + bytes_, fill);
  }
  gdn::workspace<gdn::host_memory> workspace() const { return {data_.get(), bytes_}; }
  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

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
  struct entry {
    std::array<char, 16> phase{};  ///< ends with 0
    int repetition = 0;
    double ms = 0;
  };
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
  std::vector<entry> entries() const {
    std::vector<entry> out;
    for (const auto& [name, times] : phases_) {
      for (std::size_t i = 0; i < times.size(); ++i) {
        out.push_back({.repetition = static_cast<int>(i), .ms = times[i]});
        name.copy(out.back().phase.data(), out.back().phase.size() - 1);
      }
    }
    return out;
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<std::string, std::vector<double>>> phases_;
};

/// A run of a layer of type T on a platform, which offers
///   memory, communicator, stream    types; stream of one rank
///   make_backend(ranks)             the backend of one rank among several
///   block(requirement, fill)        memory of that kind
///   put(span, tensor, stream)       host elements into a contiguous tensor
///   get(tensor, stream)             and back
///   run_ranks(f)                    f(communicator&) on every rank of this process
///   one_memory()                    optional: whether these ranks may read each other's memory; otherwise they do
template <class T, class Platform>
class layer_run {
  using A = gdn::accumulate_t<T>;
  using memory = typename Platform::memory;
  using communicator = typename Platform::communicator;
  using workspace = gdn::workspace<memory>;
  template <class E, int R>
  using tensor = gdn::tensor_ref<E, R, memory>;

 public:
  layer_run(const options& o, const bundle& b, const gdn::fragment_table& layout, const Platform& platform)
      : o_(o), b_(b), d_(b.dims()), layout_(layout), platform_(platform) {
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

    gdn::workspace<gdn::host_memory> measure;
    gdn::parameter_storage<T>::carve(measure, d_);
    const host_block loaded(measure.peak());
    auto loaded_ws = loaded.workspace();
    gdn::load_parameters<T>(b_.file.content, parameter_prefix, d_, gdn::parameter_storage<T>::carve(loaded_ws, d_),
                            b_.config.ssm);
    const auto weights = one_memory() ? upload(loaded) : platform_.block({}, std::byte{0});
    result_.received.resize(static_cast<std::size_t>(o_.ranks));
    platform_.run_ranks([&](communicator& comm) {
      if (one_memory()) {
        rank(comm, layer_in(weights));
      } else {
        const auto own = upload(loaded);
        const abort_on_error guard(comm);
        rank(comm, layer_in(own));
      }
      if (o_.processes) gather(comm);
    });
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

  /// Freeing device memory waits for work that may wait for a peer.
  using abort_on_error = gdn::abort_guard<communicator>;

  bool one_memory() const {
    if constexpr (requires { platform_.one_memory(); }) {
      return platform_.one_memory();
    } else {
      return true;
    }
  }
  auto upload(const host_block& from) const {
    auto out = platform_.block({from.bytes()}, std::byte{0});
    const auto s = platform_.make_stream();
    workspace ws = out.workspace();
    platform_.put(std::span<const std::byte>(from.data(), from.bytes()),
                  ws.template take<std::byte>(static_cast<index_t>(from.bytes())), s);
    return out;
  }
  template <class Block>
  gdn::gated_delta_net<T, memory> layer_in(const Block& weights) const {
    workspace ws = weights.workspace();
    return {d_, gdn::parameter_storage<T, memory>::carve(ws, d_)};
  }

  /// Until the work of the stream is done, messages of peers included.
  template <class Stream>
  static void settle(communicator& comm, const Stream& s) {
    if constexpr (gdn::waits_for_streams<communicator>) comm.synchronize(s);
  }

  template <class Backend, class Stream, class F>
  void timed(const char* phase, int repetition, const Backend& be, communicator& comm, const Stream& s, F&& f) {
    const auto begin = std::chrono::steady_clock::now();
    f();
    settle(comm, s);
    be.synchronize(s);
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
  /// Rows of this rank from a tensor [B, S, hid] of the bundle.
  template <class Stream>
  void read_own(const gdn::tensor_entry& from, int rank, const tensor<T, 2>& to, const Stream& s) const {
    const std::vector<double> values = gdn::values_of<double>(from);
    std::vector<T> own(static_cast<std::size_t>(to.size()));
    for_each_row(rank, [&](index_t row, index_t local) {
      read_rows(std::span<const double>(values), row, d_.hidden, own.data() + local * d_.hidden);
    });
    platform_.put(std::span<const T>(own), to, s);
  }
  template <class Stream>
  void write_own(const tensor<T, 2>& from, int rank, gdn::named_values& to, const Stream& s) const {
    const std::vector<T> own = platform_.get(from, s);
    for_each_row(rank, [&](index_t row, index_t local) {
      write_rows(own.data() + local * d_.hidden, d_.hidden, row, to);
    });
  }
  /// Entry i of `to` from row documents[i] of the bundle's tensor; zeros if the bundle lacks it.
  template <class E, int R, class Stream>
  void read_documents(const gdn::tensor_entry* from, std::span<const index_t> documents, const tensor<E, R>& to,
                      const Stream& s) const {
    std::vector<E> own(static_cast<std::size_t>(to.size()), static_cast<E>(0.0));
    const std::vector<double> values = from == nullptr ? std::vector<double>{} : gdn::values_of<double>(*from);
    const index_t width = documents.empty() ? 0 : to.size() / to.extent(0);
    for (std::size_t i = 0; from != nullptr && i < documents.size(); ++i) {
      read_rows(std::span<const double>(values), documents[i], width, own.data() + static_cast<index_t>(i) * width);
    }
    platform_.put(std::span<const E>(own), to, s);
  }
  template <class E, int R, class Stream>
  void write_documents(const tensor<E, R>& from, std::span<const index_t> documents, gdn::named_values* to,
                       const Stream& s) const {
    const auto own = platform_.get(from, s);
    const index_t width = documents.empty() ? 0 : from.size() / from.extent(0);
    for (std::size_t i = 0; i < documents.size(); ++i) {
      write_rows(own.data() + static_cast<index_t>(i) * width, width, documents[i], *to);
    }
  }

  void rank(communicator& comm, const gdn::gated_delta_net<T, memory>& layer) {
    const auto stream = platform_.make_stream();
    const typename communicator::stream_type s = stream;
    const int me = comm.rank();
    const auto be = platform_.make_backend(o_.ranks);

    // Plan.
    gdn::cp_plan plan;
    timed("plan", 0, be, comm, s, [&] {
      plan = gdn::plan_context_parallel(layout_, b_.packing, gdn::shape_of(d_), d_.channels(), plan_options_, o_.ranks,
                                        me);
    });
    const auto tables = platform_.block(gdn::resident_requirement<memory>(plan), std::byte{0});
    workspace tables_ws = tables.workspace();
    const gdn::resident_plan<memory> resident = gdn::upload(be, plan, tables_ws, s);
    const auto policy = grad_ ? gdn::keep_policy::everything : gdn::keep_policy::nothing;
    const gdn::layer_requirements need = gdn::requirements<T>(be, d_, resident, policy);

    // Memory, and this rank's part of the input.
    constexpr auto poison = std::byte{0xff};  // NaN: a read of what was not written shows
    const auto tape_memory = platform_.block(need.tape, poison);
    workspace tape_ws = tape_memory.workspace();
    auto tape = gdn::make_tape<T>(be, d_, resident, policy, tape_ws);
    const std::vector<int> to_root(static_cast<std::size_t>(plan.documents()), 0);
    const auto scratch = platform_.block({std::max({need.forward.bytes, need.backward.bytes,
                                                    gdn::reduce_requirement<T, memory>(d_, o_.ranks).bytes,
                                                    gdn::delivery_requirement<T, memory>(d_, plan, to_root).bytes,
                                                    gdn::decode_requirement<T>(be, d_, b_.batch).bytes})},
                                         poison);
    workspace ws = scratch.workspace();
    const auto n_in = static_cast<index_t>(plan.entering.size());
    const auto n_out = static_cast<index_t>(plan.leaving.size());
    struct io {
      tensor<T, 2> x, y, dy, dx;
      gdn::states_ref<T, memory> initial, final_, d_final, d_initial;
      tensor<T, 3> initial_conv, final_conv, d_final_conv, d_initial_conv;
    };
    const auto carve = [&](workspace& m) {
      const auto rows = [&] { return m.template take<T>(plan.caller_rows, d_.hidden); };
      const auto states = [&](index_t n) { return m.template take<A>(n, d_.value_heads, d_.key_dim, d_.value_dim); };
      const auto convs = [&](index_t n) { return m.template take<T>(n, d_.channels(), d_.conv_width); };
      return io{rows(),       rows(),      rows(),       rows(),       states(n_in), states(n_out),
                states(n_out), states(n_in), convs(n_in), convs(n_out), convs(n_out), convs(n_in)};
    };
    workspace measure;
    carve(measure);
    const auto io_memory = platform_.block(measure.peak(), poison);
    workspace io_ws = io_memory.workspace();
    const io t = carve(io_ws);
    workspace measure_gradients;
    gdn::layer_gradients<T, memory>::carve(measure_gradients, d_);
    const auto gradient_memory = platform_.block(measure_gradients.peak(), poison);
    workspace gradient_ws = gradient_memory.workspace();
    const auto gradients = gdn::layer_gradients<T, memory>::carve(gradient_ws, d_);
    const abort_on_error guard(comm);
    read_own(*b_.hidden_states, me, t.x, s);
    read_documents(b_.initial_state, plan.entering, t.initial, s);
    read_documents(b_.initial_conv_state, plan.entering, t.initial_conv, s);
    if (grad_) {
      read_own(*b_.grad_output, me, t.dy, s);
      read_documents(b_.grad_recurrent_state, plan.leaving, t.d_final, s);
      read_documents(b_.grad_conv_state, plan.leaving, t.d_final_conv, s);
    }

    // Compute.
    gdn::sequence_states<T, memory> states{
        .initial = {}, .initial_conv = {}, .final_ = t.final_, .final_conv = t.final_conv};
    if (plan_options_.initial_state) {
      states.initial = t.initial;
      states.initial_conv = t.initial_conv;
    }
    gdn::state_gradients<T, memory> d_states{
        .final_ = t.d_final, .final_conv = t.d_final_conv, .initial = {}, .initial_conv = {}};
    if (initial_gradient_) {
      d_states.initial = t.d_initial;
      d_states.initial_conv = t.d_initial_conv;
    }
    for (int i = 0; i < o_.repeat; ++i) {
      timed("forward", i, be, comm, s, [&] { gdn::forward(be, comm, layer, resident, t.x, t.y, states, tape, ws, s); });
      if (!grad_) continue;
      gradients.for_each([&](std::string_view, const auto& g) {
        be.fill_zero(gdn::make_tensor<memory>(g.data(), 1, g.size()), s);
      });
      timed("backward", i, be, comm, s,
            [&] { gdn::backward(be, comm, layer, resident, t.dy, t.dx, d_states, gradients, tape, ws, s); });
      timed("reduce", i, be, comm, s, [&] { gdn::reduce_gradients<T>(be, comm, gradients, ws, s); });
    }
    gdn::traffic& received = result_.received[static_cast<std::size_t>(me)];
    received = gdn::forward_traffic<T, memory>(d_, plan);
    if (grad_) {
      const gdn::traffic back = gdn::backward_traffic<T, memory>(d_, plan);
      received.halo += back.halo;
      received.state += back.state;
      received.activations += back.activations;
    }

    // Results: every row and document has one owner, so ranks write different places.
    write_own(t.y, me, *output_, s);
    write_documents(t.final_, plan.leaving, recurrent_state_, s);
    write_documents(t.final_conv, plan.leaving, conv_state_, s);
    if (grad_) {
      write_own(t.dx, me, *grad_hidden_, s);
      if (me == 0) write_gradients(gradient_memory, s);
    }
    if (initial_gradient_) {
      write_documents(t.d_initial, plan.entering, grad_initial_, s);
      write_documents(t.d_initial_conv, plan.entering, grad_initial_conv_, s);
    }
    if (decode_) decode(be, comm, layer, plan, to_root, {t.final_, t.final_conv}, ws, s);
  }

  /// The gradients' memory as it lies there, on the host, under the names of the bundle.
  template <class Block, class Stream>
  void write_gradients(const Block& block, const Stream& s) {
    workspace ws = block.workspace();
    const auto bytes = platform_.get(ws.template take<std::byte>(static_cast<index_t>(block.bytes())), s);
    const host_block copy({block.bytes()});
    std::copy(bytes.begin(), bytes.end(), copy.data());
    auto copy_ws = copy.workspace();
    gradients_ = gdn::checkpoint_tensors(gdn::layer_gradients<T>::carve(copy_ws, d_), b_.weights,
                                         std::string("grad.") + parameter_prefix, d_);
  }

  /// After the prefill of many ranks, one decodes: token by token, all sequences at once.
  template <class Backend, class Stream>
  void decode(const Backend& be, communicator& comm, const gdn::gated_delta_net<T, memory>& layer,
              const gdn::cp_plan& plan, const std::vector<int>& targets, const gdn::layer_state<T, memory>& from, workspace& ws, const Stream& s) {
    const index_t B = b_.batch;  // documents, too
    const index_t D = b_.decode_tokens;
    const bool root = comm.rank() == 0;
    const index_t n = root ? B : 0;
    gdn::layer_state<T, memory> state;
    tensor<T, 2> x, y;
    tensor<std::int32_t, 1> slots;
    const auto carve = [&](workspace& m) {
      state = {m.template take<A>(n, d_.value_heads, d_.key_dim, d_.value_dim),
               m.template take<T>(n, d_.channels(), d_.conv_width)};
      x = m.template take<T>(n * D, d_.hidden);
      y = m.template take<T>(n * D, d_.hidden);
      slots = m.template take<std::int32_t>(n);
    };
    workspace measure;
    carve(measure);
    const auto block = platform_.block(measure.peak(), std::byte{0xff});
    workspace own = block.workspace();
    carve(own);
    const abort_on_error guard(comm);
    gdn::deliver_states<T>(be, comm, d_, plan, targets, from, state, ws, s);
    settle(comm, s);
    if (!root) return;

    std::vector<std::int32_t> all;
    std::vector<index_t> documents;
    for (index_t i = 0; i < B; ++i) {
      all.push_back(static_cast<std::int32_t>(i));
      documents.push_back(i);
    }
    platform_.put(std::span<const std::int32_t>(all), slots, s);
    const std::vector<double> tokens = gdn::values_of<double>(*b_.decode_hidden_states);
    std::vector<T> by_step(tokens.size());  // [D, B, hid]
    for (index_t i = 0; i < B * D; ++i) {
      read_rows(std::span<const double>(tokens), i, d_.hidden, by_step.data() + (i % D * B + i / D) * d_.hidden);
    }
    platform_.put(std::span<const T>(by_step), x, s);
    timed("decode", 0, be, comm, s, [&] {
      for (index_t t = 0; t < D; ++t) {
        gdn::decode_step(be, layer, gdn::rows(x, t * B, B), gdn::rows(y, t * B, B), state, slots, ws, s);
      }
    });
    const std::vector<T> decoded = platform_.get(y, s);
    for (index_t i = 0; i < B * D; ++i) {
      write_rows(decoded.data() + (i % D * B + i / D) * d_.hidden, d_.hidden, i, *decode_output_);
    }
    write_documents(state.recurrent, documents, decode_recurrent_, s);
    write_documents(state.conv, documents, decode_conv_, s);
  }

  /// Brings the results of ranks that are processes to rank 0, through the communicator; none of these bytes is counted.
  /// Every place has one writer and is 0 on the other ranks, so the whole is the union of the bits.
  void gather(communicator& comm) {
    const auto stream = platform_.make_stream();
    const typename communicator::stream_type s = stream;
    const auto move_to_root = [&](int from, auto* data, std::size_t n) {
      const std::size_t bytes = n * sizeof(*data);
      if (n == 0) return;
      workspace measure;
      measure.template take<std::byte>(static_cast<index_t>(bytes));
      const auto block = platform_.block(measure.peak(), std::byte{0});  // where the communicator's messages lie
      const abort_on_error guard(comm);
      workspace ws = block.workspace();
      const auto message = ws.template take<std::byte>(static_cast<index_t>(bytes));
      const std::array sends = {gdn::send_op{message.data(), bytes, 0}};
      const std::array recvs = {gdn::recv_op{message.data(), bytes, from}};
      if (comm.rank() == from) {
        platform_.put(std::as_bytes(std::span(data, n)), message, s);
        comm.exchange(sends, {}, s);
      }
      if (comm.rank() == 0) comm.exchange({}, recvs, s);
      settle(comm, s);
      if (comm.rank() == 0) std::memcpy(data, platform_.get(message, s).data(), bytes);
    };
    std::vector<double> arrived;
    for (int r = 1; r < comm.size(); ++r) {
      if (comm.rank() != 0 && comm.rank() != r) continue;
      for (const auto& t : tensors_) {
        if (comm.rank() == 0) arrived.resize(t->values.size());
        move_to_root(r, comm.rank() == 0 ? arrived.data() : t->values.data(), t->values.size());
        for (std::size_t i = 0; comm.rank() == 0 && i < arrived.size(); ++i) {
          t->values[i] = std::bit_cast<double>(std::bit_cast<std::uint64_t>(t->values[i]) |
                                               std::bit_cast<std::uint64_t>(arrived[i]));
        }
      }
      move_to_root(r, &result_.received[static_cast<std::size_t>(r)], 1);
      std::vector<phase_clock::entry> times = clock_.entries();
      std::uint64_t n = times.size();
      move_to_root(r, &n, 1);
      times.resize(n);
      move_to_root(r, times.data(), n);
      for (const auto& t : times) {
        if (comm.rank() == 0) clock_.add(t.phase.data(), t.repetition, t.ms);
      }
    }
  }

  const options& o_;
  const bundle& b_;
  const gdn::layer_dims d_;
  const gdn::fragment_table& layout_;
  const Platform& platform_;
  bool grad_ = false;
  bool decode_ = false;
  bool initial_gradient_ = false;
  gdn::plan_options plan_options_;
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
run_result run_kokkos_bf16(const options& o, const bundle& b, const gdn::fragment_table& layout);
run_result run_kokkos_f16(const options& o, const bundle& b, const gdn::fragment_table& layout);
run_result run_cuda_f32(const options& o, const bundle& b, const gdn::fragment_table& layout);
run_result run_cuda_bf16(const options& o, const bundle& b, const gdn::fragment_table& layout);
run_result run_cuda_f16(const options& o, const bundle& b, const gdn::fragment_table& layout);

}  // namespace gdn_run
