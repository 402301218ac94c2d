// SPDX-License-Identifier: Apache-2.0
#include <support/layer_case.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <mutex>
#include <utility>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>
#include <support/block.hpp>
#include <support/faulty_communicator.hpp>

namespace gdn_test {

// ---- batches --------------------------------------------------------------------------------------------------------

values random_values(random_source& random, index_t n, double scale) {
  std::uniform_real_distribution<float> value(static_cast<float>(-scale), static_cast<float>(scale));
  values out(static_cast<std::size_t>(n));
  for (double& v : out) v = static_cast<double>(value(random.engine()));
  return out;
}

layer_batch random_batch(random_source& random, const gdn::layer_dims& d, gdn::packing pack) {
  const auto make = [&](index_t n, double scale) { return random_values(random, n, scale); };
  const double in = 2 / std::sqrt(static_cast<double>(d.hidden));  // projections of about 1
  layer_batch b;
  b.dims = d;
  b.pack = std::move(pack);
  b.parameters[in_proj_qkv] = make(d.channels() * d.hidden, in);
  b.parameters[in_proj_z] = make(d.values() * d.hidden, in);
  b.parameters[in_proj_b] = make(d.value_heads * d.hidden, in);
  b.parameters[in_proj_a] = make(d.value_heads * d.hidden, in);
  b.parameters[conv1d] = make(d.channels() * d.conv_width, 1);
  b.parameters[A_log] = make(d.value_heads, 1.5);  // decays of some tokens to many
  for (double& v : b.parameters[A_log]) v = static_cast<double>(static_cast<float>(v - 1));
  b.parameters[dt_bias] = make(d.value_heads, 1);
  b.parameters[norm] = make(d.value_dim, 0.5);
  for (double& v : b.parameters[norm]) v = static_cast<double>(static_cast<float>(v + 1));
  b.parameters[out_proj] = make(d.hidden * d.values(), 1 / std::sqrt(static_cast<double>(d.values())));
  b.x = make(b.pack.rows() * d.hidden, 1);
  b.dy = make(b.pack.rows() * d.hidden, 1);
  std::vector<bool> valid(static_cast<std::size_t>(b.pack.rows()), false);
  for (const index_t row : b.pack.indices()) valid[static_cast<std::size_t>(row)] = true;
  for (std::size_t row = 0; row < valid.size(); ++row) {
    if (valid[row]) continue;
    const auto begin = static_cast<std::ptrdiff_t>(row) * d.hidden;
    std::fill_n(b.x.begin() + begin, d.hidden, std::numeric_limits<double>::quiet_NaN());
    std::fill_n(b.dy.begin() + begin, d.hidden, std::numeric_limits<double>::quiet_NaN());
  }
  b.initial = make(b.documents() * b.state_size(), 0.5);
  b.d_final = make(b.documents() * b.state_size(), 0.5);
  b.initial_conv = make(b.documents() * b.conv_size(), 1);
  b.d_final_conv = make(b.documents() * b.conv_size(), 0.5);
  return b;
}

layer_spread on_one_rank(const layer_batch& batch, gdn::plan_options options) {
  return spread_over(gdn::contiguous_layout{batch.pack.row_length, 1}, batch, options);
}

std::string describe(const layer_batch& b) {
  const gdn::layer_dims& d = b.dims;
  std::string out = gdn::say("GDN_SEED", seed(), ": hid", d.hidden, "Hk", d.key_heads, "Hv", d.value_heads, "K", d.key_dim,
                             "V", d.value_dim, "W", d.conv_width, ", batch", b.pack.batch, "x", b.pack.row_length, ", cu");
  for (const index_t n : b.pack.cu_seqlens) out += gdn::say("", n);
  out += ", runs";
  for (const gdn::token_run& r : b.pack.runs) out += " " + std::to_string(r.row) + "+" + std::to_string(r.count);
  return out;
}
std::string describe(const layer_spread& s) {
  std::string out = gdn::say(s.world, "ranks, strategy", static_cast<int>(s.options.strategy), "share",
                             static_cast<int>(s.options.share), "states", s.options.initial_state,
                             s.options.final_state, "chunk", s.chunk, "rule", static_cast<int>(s.rule), "keep",
                             static_cast<int>(s.keep), ", fragments");
  for (const gdn::fragment& f : s.rows) {
    out += " " + std::to_string(f.begin) + "+" + std::to_string(f.count) + "@" + std::to_string(f.rank) + ":" +
           std::to_string(f.local);
  }
  return out;
}

// ---- comparisons ----------------------------------------------------------------------------------------------------

double relative_error(const values& got, const values& want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(got[i] - want[i]);
    if (!std::isfinite(error)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, error);
    largest = std::max(largest, std::abs(want[i]));
  }
  return worst == 0 ? 0 : worst / largest;
}

double rms_error(const values& got, const values& want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double error = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  if (!std::isfinite(error)) return std::numeric_limits<double>::infinity();
  return error == 0 ? 0 : std::sqrt(error / size);
}

namespace {

template <class F>
testing::AssertionResult compare(const layer_result& got, const layer_result& want, double limit, F&& error_of) {
  std::vector<std::pair<std::string, const values*>> expected;
  want.for_each([&](std::string name, const values& v) { expected.emplace_back(std::move(name), &v); });
  std::string failures;
  std::size_t i = 0;
  got.for_each([&](const std::string& name, const values& v) {
    const double error = error_of(v, *expected[i++].second);
    if (!(error <= limit)) {
      std::ostringstream text;
      text << "\n  " << name << " is off by " << error << " of its size (limit " << limit << ")";
      failures += text.str();
    }
  });
  if (failures.empty()) return testing::AssertionSuccess();
  return testing::AssertionFailure() << failures;
}

}  // namespace

testing::AssertionResult near(const layer_result& got, const layer_result& want, double limit) {
  return compare(got, want, limit, relative_error);
}
testing::AssertionResult near_rms(const layer_result& got, const layer_result& want, double limit) {
  return compare(got, want, limit, rms_error);
}
testing::AssertionResult same_bits(const layer_result& got, const layer_result& want) {
  return compare(got, want, 0, [](const values& a, const values& b) {
    const auto same = [](double x, double y) { return std::bit_cast<std::uint64_t>(x) == std::bit_cast<std::uint64_t>(y); };
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), same) ? 0. : relative_error(a, b) + 1e-300;
  });
}

// ---- one rank -------------------------------------------------------------------------------------------------------

namespace {

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {  // NaN is equal to itself
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace

template <class T>
owned_layer<T>::owned_layer(const layer_batch& batch) {
  const gdn::layer_dims& d = batch.dims;
  for (std::size_t i = 0; i < 9; ++i) {
    for (const double v : batch.parameters[i]) {
      weights_[i].push_back(static_cast<T>(v));
      full_[i].push_back(static_cast<gdn::accumulate_t<T>>(v));
    }
  }
  weights_before_ = weights_;
  full_before_ = full_;
  const auto at = [&](std::size_t i) { return static_cast<const T*>(weights_[i].data()); };
  const auto full = [&](std::size_t i) { return static_cast<const gdn::accumulate_t<T>*>(full_[i].data()); };
  using gdn::make_tensor;
  layer_.dims = d;
  layer_.weights = {make_tensor(at(in_proj_qkv), d.channels(), d.hidden),
                    make_tensor(at(in_proj_z), d.values(), d.hidden),
                    make_tensor(at(in_proj_b), d.value_heads, d.hidden),
                    make_tensor(at(in_proj_a), d.value_heads, d.hidden),
                    make_tensor(at(conv1d), d.channels(), d.conv_width),
                    make_tensor(full(A_log), d.value_heads),
                    make_tensor(full(dt_bias), d.value_heads),
                    make_tensor(full(norm), d.value_dim),
                    make_tensor(at(out_proj), d.hidden, d.values())};
}
template <class T>
bool owned_layer<T>::unchanged() const {
  for (std::size_t i = 0; i < 9; ++i) {
    if (!same_bytes(weights_[i], weights_before_[i]) || !same_bytes(full_[i], full_before_[i])) return false;
  }
  return true;
}
template class owned_layer<double>;
template class owned_layer<float>;
template class owned_layer<gdn::bfloat16>;

namespace {

/// `n` NaN, to be written.
template <class T>
std::vector<T> unwritten(index_t n) {
  return std::vector<T>(static_cast<std::size_t>(n), static_cast<T>(std::numeric_limits<double>::quiet_NaN()));
}

template <class T>
class rank_run {
  using A = gdn::accumulate_t<T>;

 public:
  rank_run(const layer_batch& b, const layer_spread& s, const gdn::gated_delta_net<T>& layer, layer_result& out,
           std::mutex& mutex)
      : b_(b), s_(s), d_(b.dims), layer_(layer), out_(out), mutex_(mutex) {}

  template <gdn::communicator Comm>
  void operator()(Comm& transport) {
    counting_communicator counted(transport);
    late_communicator late(counted, 7 + static_cast<std::uint64_t>(transport.rank()));
    if (s_.late) {
      any_communicator comm(late);
      run(comm, counted);
    } else {
      any_communicator comm(counted);
      run(comm, counted);
    }
  }

 private:
  gdn::tensor_ref<A, 4> states(std::vector<A>& v, index_t n) const {
    return gdn::make_tensor(v.data(), n, d_.value_heads, d_.key_dim, d_.value_dim);
  }
  gdn::tensor_ref<T, 3> convs(std::vector<T>& v, index_t n) const {
    return gdn::make_tensor(v.data(), n, d_.channels(), d_.conv_width);
  }

  template <class Counted>
  void run(any_communicator& comm, Counted& counted) {
    const int me = comm.rank();
    const auto at = static_cast<std::size_t>(me);
    const layer_api<T> api(s_.rule, s_.threads);
    const gdn::cp_plan plan = gdn::plan_context_parallel(s_.rows, b_.pack, gdn::shape_of(d_, s_.chunk), d_.channels(),
                                                         s_.options, s_.world, me);
    poisoned_block table_block(gdn::resident_requirement<gdn::host_memory>(plan));
    memory_block tables = table_block.workspace();
    const plan_on_host resident = api.upload(plan, tables);
    const bool grad = s_.keep != gdn::keep_policy::nothing;
    const gdn::layer_requirements need = api.requirements(d_, resident, s_.keep);
    const bool initial = s_.options.initial_state, final_ = s_.options.final_state;
    const auto n_in = static_cast<index_t>(plan.entering.size());
    const auto n_out = static_cast<index_t>(plan.leaving.size());

    // This rank's part of the batch.
    const auto x = rows_of_rank<T>(b_.x, s_.rows, me, d_.hidden), x_given = x;
    const auto dy = rows_of_rank<T>(b_.dy, s_.rows, me, d_.hidden), dy_given = dy;
    auto initial_state = entries<A>(b_.initial, plan.entering, b_.state_size());
    auto initial_conv = entries<T>(b_.initial_conv, plan.entering, b_.conv_size());
    auto d_final = entries<A>(b_.d_final, plan.leaving, b_.state_size());
    auto d_final_conv = entries<T>(b_.d_final_conv, plan.leaving, b_.conv_size());
    const auto initial_given = initial_state;
    const auto initial_conv_given = initial_conv;
    const auto d_final_given = d_final;
    const auto d_final_conv_given = d_final_conv;
    auto y = unwritten<T>(plan.caller_rows * d_.hidden), dx = y;
    auto final_state = unwritten<A>(n_out * b_.state_size()), d_initial = unwritten<A>(n_in * b_.state_size());
    auto final_conv = unwritten<T>(n_out * b_.conv_size()), d_initial_conv = unwritten<T>(n_in * b_.conv_size());
    const auto rows = [&](auto& v) { return gdn::make_tensor(v.data(), plan.caller_rows, d_.hidden); };

    gdn::sequence_states<T> io;
    gdn::state_gradients<T> d_io;
    if (initial) {
      io.initial = states(initial_state, n_in);
      io.initial_conv = convs(initial_conv, n_in);
      d_io.initial = states(d_initial, n_in);
      d_io.initial_conv = convs(d_initial_conv, n_in);
    }
    if (final_) {
      io.final_ = states(final_state, n_out);
      io.final_conv = convs(final_conv, n_out);
      d_io.final_ = states(d_final, n_out);
      d_io.final_conv = convs(d_final_conv, n_out);
    }

    poisoned_block tape_block(need.tape);
    memory_block tape_memory = tape_block.workspace();
    gdn::layer_tape<T> tape = api.make_tape(d_, resident, s_.keep, tape_memory);
    EXPECT_EQ(tape_memory.used(), need.tape.bytes) << "the promise for a tape is exact";
    poisoned_block forward_block(need.forward);
    memory_block forward_ws = forward_block.workspace();
    counted.take();
    api.forward(comm, layer_, resident, rows(x), rows(y), io, tape, forward_ws);
    EXPECT_EQ(forward_ws.used(), 0U);
    EXPECT_LE(forward_ws.peak().bytes, need.forward.bytes);
    EXPECT_TRUE(forward_block.guards_hold() && tape_block.guards_hold());
    const message_counts forward_messages = counted.take();
    message_counts backward_messages;

    std::array<std::vector<A>, 9> grad_values;
    if (grad) {
      gdn::layer_gradients<T> g;
      std::size_t i = 0;
      const auto as = [&](const auto& w) {  // a gradient of the weight's shape; sums begin from zero
        auto& v = grad_values[i++];
        v.assign(static_cast<std::size_t>(w.size()), A{0});
        gdn::tensor_ref<A, std::remove_cvref_t<decltype(w)>::rank()> t;
        t.data_ = v.data();
        for (int k = 0; k < w.rank(); ++k) {
          t.extent_[k] = w.extent(k);
          t.stride_[k] = w.stride(k);
        }
        return t;
      };
      const auto& w = layer_.weights;
      g.in_proj_qkv = as(w.in_proj_qkv);
      g.in_proj_z = as(w.in_proj_z);
      g.in_proj_b = as(w.in_proj_b);
      g.in_proj_a = as(w.in_proj_a);
      g.conv1d = as(w.conv1d);
      g.A_log = as(w.A_log);
      g.dt_bias = as(w.dt_bias);
      g.norm = as(w.norm);
      g.out_proj = as(w.out_proj);
      poisoned_block backward_block(need.backward);
      std::vector<T> dx_first;
      std::array<std::vector<A>, 9> grad_first;
      std::vector<A> d_initial_first;
      for (int n = 0; n < s_.backward_runs; ++n) {
        if (n > 0) {
          dx_first = std::exchange(dx, unwritten<T>(plan.caller_rows * d_.hidden));
          d_initial_first = std::exchange(d_initial, unwritten<A>(n_in * b_.state_size()));
          if (initial) d_io.initial = states(d_initial, n_in);
          grad_first = grad_values;
          for (auto& v : grad_values) std::fill(v.begin(), v.end(), A{0});
        }
        backward_block.poison();
        memory_block backward_ws = backward_block.workspace();
        counted.take();
        api.backward(comm, layer_, resident, rows(dy), rows(dx), d_io, g, tape, backward_ws);
        backward_messages = counted.take();
        EXPECT_EQ(backward_ws.used(), 0U);
        EXPECT_LE(backward_ws.peak().bytes, need.backward.bytes);
        EXPECT_TRUE(backward_block.guards_hold() && tape_block.guards_hold());
        if (n > 0) {
          EXPECT_TRUE(same_bytes(dx, dx_first) && same_bytes(d_initial, d_initial_first));
          for (std::size_t k = 0; k < 9; ++k) EXPECT_TRUE(same_bytes(grad_values[k], grad_first[k])) << parameter_names[k];
        }
      }
    }

    EXPECT_TRUE(same_bytes(x, x_given) && same_bytes(dy, dy_given)) << "inputs stay as they are";
    EXPECT_TRUE(same_bytes(initial_state, initial_given) && same_bytes(initial_conv, initial_conv_given));
    EXPECT_TRUE(same_bytes(d_final, d_final_given) && same_bytes(d_final_conv, d_final_conv_given));
    EXPECT_TRUE(table_block.guards_hold());
    for (const gdn::run& p : plan.padding) {
      for (index_t i = p.local * d_.hidden; i < (p.local + p.count) * d_.hidden; ++i) {
        EXPECT_EQ(static_cast<double>(y[static_cast<std::size_t>(i)]), 0) << "padding of y";
        if (grad) {
          EXPECT_EQ(static_cast<double>(dx[static_cast<std::size_t>(i)]), 0) << "padding of dx";
        }
      }
    }

    const std::lock_guard lock(mutex_);
    put_rows_of_rank(y, s_.rows, me, d_.hidden, out_.y);
    if (final_) {
      put_entries(final_state, plan.leaving, b_.state_size(), out_.final_);
      put_entries(final_conv, plan.leaving, b_.conv_size(), out_.final_conv);
    }
    if (grad) {
      put_rows_of_rank(dx, s_.rows, me, d_.hidden, out_.dx);
      if (initial) {
        put_entries(d_initial, plan.entering, b_.state_size(), out_.d_initial);
        put_entries(d_initial_conv, plan.entering, b_.conv_size(), out_.d_initial_conv);
      }
      of_rank_[at] = std::move(grad_values);
    }
    out_.forward_messages[at] = forward_messages;
    out_.backward_messages[at] = backward_messages;
    out_.forward_plan[at] = gdn::forward_traffic<T>(d_, plan);
    out_.backward_plan[at] = gdn::backward_traffic<T>(d_, plan);
    out_.promised[at] = need;
    out_.strategy[at] = plan.strategy;
  }

  const layer_batch& b_;
  const layer_spread& s_;
  const gdn::layer_dims& d_;
  const gdn::gated_delta_net<T>& layer_;
  layer_result& out_;
  std::mutex& mutex_;

 public:
  std::vector<std::array<std::vector<A>, 9>> of_rank_;
};

}  // namespace

template <class T>
layer_result run_layer(const layer_batch& b, const layer_spread& s) {
  const bool grad = s.keep != gdn::keep_policy::nothing;
  const auto ranks = static_cast<std::size_t>(s.world);
  layer_result out;
  out.y = unwritten<double>(b.pack.rows() * b.dims.hidden);
  if (s.options.final_state) {
    out.final_ = unwritten<double>(b.documents() * b.state_size());
    out.final_conv = unwritten<double>(b.documents() * b.conv_size());
  }
  if (grad) out.dx = out.y;
  if (grad && s.options.initial_state) {
    out.d_initial = unwritten<double>(b.documents() * b.state_size());
    out.d_initial_conv = unwritten<double>(b.documents() * b.conv_size());
  }
  out.forward_messages.resize(ranks);
  out.backward_messages.resize(ranks);
  out.forward_plan.resize(ranks);
  out.backward_plan.resize(ranks);
  out.promised.resize(ranks);
  out.strategy.resize(ranks);

  const owned_layer<T> owned(b);
  std::mutex mutex;
  rank_run<T> run(b, s, owned.layer(), out, mutex);
  run.of_rank_.resize(ranks);
  if (s.world == 1) {
    gdn::self_communicator self;
    run(self);
  } else {
    gdn::run_on_threads(s.world, [&](gdn::thread_communicator& comm) { run(comm); }, std::chrono::seconds(60));
  }
  EXPECT_TRUE(owned.unchanged()) << "weights stay as they are";
  if (grad) {
    for (std::size_t i = 0; i < 9; ++i) {  // in the order of the ranks, as reduce_gradients() does
      out.gradients[i].assign(run.of_rank_[0][i].size(), 0.0);
      std::vector<gdn::accumulate_t<T>> sum(out.gradients[i].size());
      for (const auto& part : run.of_rank_) {
        for (std::size_t k = 0; k < sum.size(); ++k) sum[k] += part[i][k];
      }
      std::copy(sum.begin(), sum.end(), out.gradients[i].begin());
    }
  }
  return out;
}
template layer_result run_layer<double>(const layer_batch&, const layer_spread&);
template layer_result run_layer<float>(const layer_batch&, const layer_spread&);
template layer_result run_layer<gdn::bfloat16>(const layer_batch&, const layer_spread&);

}  // namespace gdn_test
