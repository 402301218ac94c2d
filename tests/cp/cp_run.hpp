// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The convolution and the delta rule on their own, over any number of ranks; inputs and results as one stream.
///
/// Where ranks compute is a parameter, Ranks, with
///   memory, stream, communicator   types
///   api<T>(rule, threads)          backend and stream of one rank; the functions of layer_api<T> for cp/, without the
///                                  stream
///   array<U>(host elements, api)   a copy in that memory; data(), fetch()
///   block(requirement, api)        memory full of NaN between guards; workspace(), poison(), guards_hold()

#include <algorithm>
#include <chrono>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/comm/any.hpp>
#include <gdn/comm/threads.hpp>
#include <support/layer_case.hpp>
#include <support/tolerance.hpp>

namespace gdn_test {

/// A stream of documents over ranks.
struct stream_spread {
  int world = 1;
  gdn::fragment_table rows;
  gdn::packing pack;
  gdn::plan_options options{.strategy = gdn::strategy::in_place};
  index_t chunk = 64;
  rule_kind rule = rule_kind::chunked;
  int threads = 1;

  stream_spread on_one_rank() const {
    stream_spread out = *this;
    out.world = 1;
    out.rows = gdn::contiguous_layout{pack.rows(), 1}.fragments();
    out.threads = 2;
    return out;
  }
};

/// Documents of these lengths, without padding, in one row over ranks.
template <class Layout>
stream_spread documents_over(const std::vector<index_t>& lengths, Layout layout) {
  std::vector<index_t> cu = {0};
  for (const index_t n : lengths) cu.push_back(cu.back() + n);
  layout.rows = cu.back();
  stream_spread s;
  s.world = layout.world_size();
  s.rows = layout.fragments();
  s.pack = gdn::packing::from_cu_seqlens(cu, {}, 1, cu.back());
  return s;
}

/// One rank's plan with its tables in memory.
template <class Ranks>
class placed_plan {
  using memory = typename Ranks::memory;

 public:
  template <class Api>
  placed_plan(const Api& api, const stream_spread& s, const gdn::plan_shape& shape, index_t channels, int rank)
      : host(gdn::plan_context_parallel(s.rows, s.pack, shape, channels, s.options, s.world, rank)),
        block_(gdn::resident_requirement<memory>(host), api),
        memory_(block_.workspace()),
        resident(api.upload(host, memory_)) {}

 private:
  gdn::cp_plan host;
  typename Ranks::block block_;
  gdn::workspace<memory> memory_;

 public:
  gdn::resident_plan<memory> resident;
};

template <class T>
T not_a_number() {
  return static_cast<T>(std::numeric_limits<double>::quiet_NaN());
}
/// As many NaN, to be written.
template <class T>
std::vector<T> unwritten(std::size_t n) {
  return std::vector<T>(n, not_a_number<T>());
}
template <class T>
values rounded(values v) {
  for (double& x : v) x = static_cast<double>(static_cast<T>(x));
  return v;
}

// ---- convolution ----------------------------------------------------------------------------------------------------

struct conv_numbers {
  index_t channels = 0, width = 4;
  gdn::activation act = gdn::activation::silu;
  values x, dy;              // [tokens, D]
  values w;                  // [D, W]
  values initial, d_final;   // [N, D, W]
};
struct conv_answers {
  values y, dx, dw, final_, d_initial;
};

inline conv_numbers random_conv(random_source& random, index_t tokens, index_t documents, index_t channels, index_t width,
                                double scale = 1) {
  return {channels,
          width,
          gdn::activation::silu,
          random_values(random, tokens * channels, scale),
          random_values(random, tokens * channels),
          random_values(random, channels * width),
          random_values(random, documents * channels * width, scale),
          random_values(random, documents * channels * width)};
}

/// The numbers that a type stores: references start from the rounded ones.
template <class T>
conv_numbers rounded(conv_numbers n) {
  for (values* v : {&n.x, &n.dy, &n.w, &n.initial, &n.d_final}) *v = rounded<T>(std::move(*v));
  return n;
}

template <class T, class Ranks>
conv_answers run_conv(const conv_numbers& n, const stream_spread& s) {
  using A = gdn::accumulate_t<T>;
  using memory = typename Ranks::memory;
  const index_t D = n.channels, W = n.width;
  conv_answers out{values(n.x.size()), values(n.x.size()), values(n.w.size()), values(n.initial.size()),
                   values(n.initial.size())};
  std::vector<std::vector<A>> dw_of(static_cast<std::size_t>(s.world));
  std::mutex mutex;
  const auto rank = [&](typename Ranks::communicator& transport) {
    gdn::any_communicator<memory, typename Ranks::stream> comm(transport);
    const int me = comm.rank();
    const typename Ranks::template api<T> api(s.rule, s.threads);
    const placed_plan<Ranks> placed(api, s, {W, {}, s.chunk}, D, me);
    const gdn::cp_plan& plan = placed.resident.host;
    const index_t L = plan.compute_rows;
    const auto n_in = static_cast<index_t>(plan.entering.size()), n_out = static_cast<index_t>(plan.leaving.size());
    const auto array = [&](const auto& v) {
      return typename Ranks::template array<typename std::decay_t<decltype(v)>::value_type>(v, api);
    };
    auto x_rows = rows_of_rank<T>(n.x, plan.table, me, D);
    x_rows.resize(static_cast<std::size_t>((L + plan.halo.state_rows) * D), not_a_number<T>());
    const auto x = array(x_rows), dx = array(unwritten<T>(x_rows.size()));
    const auto dy_rows = rows_of_rank<T>(n.dy, plan.table, me, D);
    const auto dy = array(dy_rows), y = array(unwritten<T>(dy_rows.size()));
    const index_t H = plan.halo.rows();
    const auto halo = array(unwritten<T>(static_cast<std::size_t>(H * D)));
    const auto d_halo = array(unwritten<T>(static_cast<std::size_t>(H * D)));
    const auto initial = array(entries<T>(n.initial, plan.entering, D * W));
    const auto d_final = array(entries<T>(n.d_final, plan.leaving, D * W));
    const auto d_initial = array(unwritten<T>(static_cast<std::size_t>(n_in * D * W)));
    const auto final_ = array(unwritten<T>(static_cast<std::size_t>(n_out * D * W)));
    const auto w = array(entries<T>(n.w, {0}, D * W));
    const auto dw = array(std::vector<A>(n.w.size(), A{0}));
    const auto matrix = [&](const auto& v, index_t rows, index_t width) {
      return gdn::make_tensor<memory>(v.data(), rows, width);
    };
    const auto states = [&](const auto& v, index_t count) { return gdn::make_tensor<memory>(v.data(), count, D, W); };
    gdn::tensor_ref<T, 3, memory> from, to, d_from, d_to;
    if (s.options.initial_state) from = states(initial, n_in), d_from = states(d_initial, n_in);
    if (s.options.final_state) to = states(final_, n_out), d_to = states(d_final, n_out);
    const auto mx = matrix(x, L + plan.halo.state_rows, D), mdx = matrix(dx, L + plan.halo.state_rows, D);

    typename Ranks::block block(api.conv_scratch(plan, D), api);
    gdn::workspace<memory> ws = block.workspace();
    api.causal_conv1d(comm, placed.resident, mx, matrix(w, D, W), n.act, from, matrix(halo, H, D), matrix(y, L, D), to, ws);
    block.poison();
    api.causal_conv1d_backward(comm, placed.resident, mx, matrix(halo, H, D), matrix(w, D, W), n.act, matrix(dy, L, D),
                               d_to, mdx, matrix(d_halo, H, D), matrix(dw, D, W), d_from, ws);
    EXPECT_TRUE(block.guards_hold() && ws.used() == 0);
    const auto got_y = y.fetch(), got_final = final_.fetch(), got_d_initial = d_initial.fetch();
    auto got_dx = dx.fetch();
    got_dx.resize(static_cast<std::size_t>(L * D));
    const auto got_dw = dw.fetch();
    const std::lock_guard lock(mutex);
    put_rows_of_rank(got_y, plan.table, me, D, out.y);
    put_rows_of_rank(got_dx, plan.table, me, D, out.dx);
    if (s.options.final_state) put_entries(got_final, plan.leaving, D * W, out.final_);
    if (s.options.initial_state) put_entries(got_d_initial, plan.entering, D * W, out.d_initial);
    dw_of[static_cast<std::size_t>(me)] = got_dw;
  };
  gdn::run_on_threads<typename Ranks::communicator>(s.world, rank, std::chrono::seconds(60));
  for (const auto& part : dw_of) {
    for (std::size_t i = 0; i < part.size(); ++i) out.dw[i] += static_cast<double>(part[i]);
  }
  return out;
}

struct compared {
  const char* name;
  const values &got, &want;
};
inline testing::AssertionResult near(std::initializer_list<compared> tensors, double limit) {
  auto failure = testing::AssertionFailure();
  bool ok = true;
  for (const auto& [name, got, want] : tensors) {
    const double error = rms_error(got, want);
    if (error <= limit) continue;
    ok = false;
    failure << "\n  rms error of " << name << " is " << error << " of its size, limit " << limit;
  }
  return ok ? testing::AssertionSuccess() : failure;
}

inline testing::AssertionResult near(const conv_answers& got, const conv_answers& want, double limit) {
  return near({{"y", got.y, want.y},
               {"dx", got.dx, want.dx},
               {"dw", got.dw, want.dw},
               {"final state", got.final_, want.final_},
               {"d initial state", got.d_initial, want.d_initial}},
              limit);
}

// ---- delta rule -----------------------------------------------------------------------------------------------------

struct rule_stream {
  index_t key_heads = 1, value_heads = 1, K = 1, V = 1;
  values q, k, v, d_o, g, beta;  // [tokens, heads, ..]; q and k of unit length
  values initial, d_final;       // [N, Hv, K, V]
};
struct rule_stream_answers {
  values o, dq, dk, dv, dg, dbeta, final_, d_initial;
};

/// As FLA's CP tests: g = logsigmoid(normal), beta = sigmoid(normal).
inline rule_stream random_rule(random_source& random, index_t tokens, index_t documents, index_t Hk, index_t Hv, index_t K,
                               index_t V) {
  rule_stream r{Hk, Hv, K, V, {}, {}, {}, {}, {}, {}, {}, {}};
  std::normal_distribution<float> normal;
  const auto draw = [&](index_t n) {
    values out(static_cast<std::size_t>(n));
    for (double& x : out) x = static_cast<double>(normal(random.engine()));
    return out;
  };
  const auto to_float = [](double x) { return static_cast<double>(static_cast<float>(x)); };
  r.q = draw(tokens * Hk * K);
  r.k = draw(tokens * Hk * K);
  for (values* t : {&r.q, &r.k}) {
    for (auto row = t->begin(); row != t->end(); row += K) {
      double sum = 1e-6;
      for (auto i = row; i != row + K; ++i) sum += *i * *i;
      for (auto i = row; i != row + K; ++i) *i = to_float(*i / std::sqrt(sum));
    }
  }
  r.v = draw(tokens * Hv * V);
  r.d_o = draw(tokens * Hv * V);
  r.g = draw(tokens * Hv);
  for (double& x : r.g) x = to_float(-std::log1p(std::exp(-x)));
  r.beta = draw(tokens * Hv);
  for (double& x : r.beta) x = to_float(1 / (1 + std::exp(-x)));
  r.initial = random_values(random, documents * Hv * K * V, 0.5);
  r.d_final = random_values(random, documents * Hv * K * V, 0.5);
  return r;
}

template <class T>
rule_stream rounded(rule_stream n) {
  for (values* v : {&n.q, &n.k, &n.v, &n.d_o, &n.beta}) *v = rounded<T>(std::move(*v));
  return n;
}

template <class T, class Ranks>
rule_stream_answers run_rule(const rule_stream& n, const stream_spread& s, std::vector<message_counts>* counts = nullptr) {
  using A = gdn::accumulate_t<T>;
  using memory = typename Ranks::memory;
  const index_t Hk = n.key_heads, Hv = n.value_heads, K = n.K, V = n.V, state = Hv * K * V;
  rule_stream_answers out{values(n.v.size()),    values(n.q.size()),       values(n.k.size()),
                          values(n.v.size()),    values(n.g.size()),       values(n.g.size()),
                          values(n.initial.size()), values(n.initial.size())};
  if (counts != nullptr) counts->resize(static_cast<std::size_t>(s.world));
  std::mutex mutex;
  const auto rank = [&](typename Ranks::communicator& transport) {
    counting_communicator counted(transport);
    gdn::any_communicator<memory, typename Ranks::stream> comm(counted);
    const int me = comm.rank();
    const typename Ranks::template api<T> api(s.rule, s.threads);
    const placed_plan<Ranks> placed(api, s, {1, {Hv, K, V}, s.chunk}, 1, me);
    const gdn::cp_plan& plan = placed.resident.host;
    const index_t L = plan.compute_rows;
    const auto n_in = static_cast<index_t>(plan.entering.size()), n_out = static_cast<index_t>(plan.leaving.size());
    const auto array = [&](const auto& v) {
      return typename Ranks::template array<typename std::decay_t<decltype(v)>::value_type>(v, api);
    };
    const auto part = [&](const values& all, index_t width) { return array(rows_of_rank<T>(all, plan.table, me, width)); };
    const auto out_rows = [&](auto zero, index_t width) {
      return array(unwritten<decltype(zero)>(static_cast<std::size_t>(L * width)));
    };
    const auto q = part(n.q, Hk * K), k = part(n.k, Hk * K), v = part(n.v, Hv * V), d_o = part(n.d_o, Hv * V);
    const auto beta = part(n.beta, Hv);
    const auto g = array(rows_of_rank<A>(n.g, plan.table, me, Hv));
    const auto o = out_rows(T{}, Hv * V), dq = out_rows(T{}, Hk * K), dk = out_rows(T{}, Hk * K), dv = out_rows(T{}, Hv * V);
    const auto dg = out_rows(A{}, Hv), dbeta = out_rows(A{}, Hv);
    const auto initial = array(entries<A>(n.initial, plan.entering, state));
    const auto d_final = array(entries<A>(n.d_final, plan.leaving, state));
    const auto final_ = array(unwritten<A>(static_cast<std::size_t>(n_out * state)));
    const auto d_initial = array(unwritten<A>(static_cast<std::size_t>(n_in * state)));
    const auto heads = [&](const auto& t, index_t h, index_t d) { return gdn::make_tensor<memory>(t.data(), L, h, d); };
    const auto rows = [&](const auto& t) { return gdn::make_tensor<memory>(t.data(), L, Hv); };
    const auto states = [&](const auto& t, index_t count) { return gdn::make_tensor<memory>(t.data(), count, Hv, K, V); };
    gdn::states_ref<T, memory> from, to, d_from, d_to;
    if (s.options.initial_state) from = states(initial, n_in), d_from = states(d_initial, n_in);
    if (s.options.final_state) to = states(final_, n_out), d_to = states(d_final, n_out);

    gdn::workspace<memory> measure;
    api.take_rule_tape(Hk, placed.resident, measure);
    typename Ranks::block tape_block(measure.peak(), api), block(api.rule_scratch(Hk, placed.resident), api);
    gdn::workspace<memory> tape_memory = tape_block.workspace(), ws = block.workspace();
    const auto tape = api.take_rule_tape(Hk, placed.resident, tape_memory);
    const gdn::delta_rule_inputs<T, memory> in{heads(q, Hk, K), heads(k, Hk, K), heads(v, Hv, V), rows(g), rows(beta)};
    api.gated_delta_rule(comm, placed.resident, in, from, heads(o, Hv, V), to, tape, ws);
    block.poison();
    api.gated_delta_rule_backward(comm, placed.resident, in, heads(d_o, Hv, V), d_to,
                                  {heads(dq, Hk, K), heads(dk, Hk, K), heads(dv, Hv, V), rows(dg), rows(dbeta)}, d_from,
                                  tape, ws);
    EXPECT_TRUE(block.guards_hold() && tape_block.guards_hold() && ws.used() == 0);
    const auto got_o = o.fetch(), got_dq = dq.fetch(), got_dk = dk.fetch(), got_dv = dv.fetch();
    const auto got_dg = dg.fetch(), got_dbeta = dbeta.fetch(), got_final = final_.fetch(), got_initial = d_initial.fetch();
    const std::lock_guard lock(mutex);
    put_rows_of_rank(got_o, plan.table, me, Hv * V, out.o);
    put_rows_of_rank(got_dq, plan.table, me, Hk * K, out.dq);
    put_rows_of_rank(got_dk, plan.table, me, Hk * K, out.dk);
    put_rows_of_rank(got_dv, plan.table, me, Hv * V, out.dv);
    put_rows_of_rank(got_dg, plan.table, me, Hv, out.dg);
    put_rows_of_rank(got_dbeta, plan.table, me, Hv, out.dbeta);
    if (s.options.final_state) put_entries(got_final, plan.leaving, state, out.final_);
    if (s.options.initial_state) put_entries(got_initial, plan.entering, state, out.d_initial);
    if (counts != nullptr) (*counts)[static_cast<std::size_t>(me)] = counted.take();
  };
  gdn::run_on_threads<typename Ranks::communicator>(s.world, rank, std::chrono::seconds(60));
  return out;
}

inline testing::AssertionResult near(const rule_stream_answers& got, const rule_stream_answers& want, double limit) {
  return near({{"o", got.o, want.o},
               {"dq", got.dq, want.dq},
               {"dk", got.dk, want.dk},
               {"dv", got.dv, want.dv},
               {"dg", got.dg, want.dg},
               {"dbeta", got.dbeta, want.dbeta},
               {"final state", got.final_, want.final_},
               {"d initial state", got.d_initial, want.d_initial}},
              limit);
}

/// The first difference in bits between two results, or nothing.
template <class Answers>
bool same_bits(const Answers& a, const Answers& b);
template <>
inline bool same_bits(const rule_stream_answers& a, const rule_stream_answers& b) {
  return a.o == b.o && a.dq == b.dq && a.dk == b.dk && a.dv == b.dv && a.dg == b.dg && a.dbeta == b.dbeta &&
         a.final_ == b.final_ && a.d_initial == b.d_initial;
}
template <>
inline bool same_bits(const conv_answers& a, const conv_answers& b) {
  return a.y == b.y && a.dx == b.dx && a.dw == b.dw && a.final_ == b.final_ && a.d_initial == b.d_initial;
}

}  // namespace gdn_test
