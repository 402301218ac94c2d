// SPDX-License-Identifier: Apache-2.0
// The operations around the delta rule on one GPU, each beside the bytes it must move and the bandwidth of a copy.
//   cuda_operations_bench --benchmark_filter=conv

#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_timing.cuh"

namespace {

using gdn::bfloat16;
using gdn::index_t;
using gdn::tensor_ref;
using gdn_bench::device;
using gdn_bench::fill;
using gdn_bench::report;
using gdn_bench::setup;
using space = gdn::workspace<device>;
template <class T>
using matrix = tensor_ref<T, 2, device>;
template <class T>
using heads = tensor_ref<T, 3, device>;

constexpr index_t head_dim = 128, key_heads = 16, width = 4;

double bytes_of(index_t elements, std::size_t size) {
  return static_cast<double>(elements) * static_cast<double>(size);
}

gdn::memory_requirement scratch(const gdn_bench::bench& b, index_t tokens, index_t channels, index_t value_heads) {
  return b.be.scratch(
      {.tokens = tokens, .channels = channels, .conv_width = width, .heads = value_heads, .head_dim = head_dim});
}

// ---- convolution ----------------------------------------------------------------------------------------------------

/// Documents of `length` tokens; Y is the type of the result (the layer keeps keys in float until they are normalised).
template <class Y>
void conv_forward(benchmark::State& state, index_t tokens, index_t channels, index_t length) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> x, w;
  matrix<Y> y;
  tensor_ref<gdn::conv_segment, 1, device> segments;
  const gdn_bench::memory m([&](space& ws) {
    x = ws.take<bfloat16>(tokens, channels);
    w = ws.take<bfloat16>(channels, width);
    y = ws.take<Y>(tokens, channels);
    segments = ws.take<gdn::conv_segment>(tokens / length);
  });
  std::vector<gdn::conv_segment> host;
  for (index_t t = 0; t < tokens; t += length) host.push_back({t, length, -1});
  gdn::cuda::copy_to_device<gdn::conv_segment>(host, segments, s);
  fill(x, s);
  fill(w, s, 0.3f);
  report(state, watch, s, bytes_of(x.size(), sizeof(bfloat16) + sizeof(Y)), 0,
         [&] { be.causal_conv1d_forward(segments, x, {}, w, gdn::activation::silu, y, s); });
}

void conv_backward(benchmark::State& state, index_t tokens, index_t channels, index_t length) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> x, w, dy, dx;
  matrix<float> dw;
  tensor_ref<gdn::conv_segment, 1, device> segments;
  const gdn_bench::memory m([&](space& ws) {
    x = ws.take<bfloat16>(tokens, channels);
    w = ws.take<bfloat16>(channels, width);
    dy = ws.take<bfloat16>(tokens, channels);
    dx = ws.take<bfloat16>(tokens, channels);
    dw = ws.take<float>(channels, width);
    segments = ws.take<gdn::conv_segment>(tokens / length);
  });
  const gdn::cuda::device_block block(scratch(setup(), tokens, channels, 1));
  std::vector<gdn::conv_segment> host;
  for (index_t t = 0; t < tokens; t += length) host.push_back({t, length, -1});
  gdn::cuda::copy_to_device<gdn::conv_segment>(host, segments, s);
  fill(x, s);
  fill(w, s, 0.3f);
  fill(dy, s);
  report(state, watch, s, bytes_of(x.size(), 3 * sizeof(bfloat16)), 0, [&] {
    auto ws = block.workspace();
    be.causal_conv1d_backward<bfloat16>(segments, x, {}, w, gdn::activation::silu, dy, dx, {}, dw, ws, s);
  });
}

// ---- norms ----------------------------------------------------------------------------------------------------------

/// The layer's is from float, in which convolved keys stay until they are normalised.
template <class X>
void l2norm_forward(benchmark::State& state, index_t tokens) {
  auto& [be, s, watch] = setup();
  heads<X> x;
  heads<bfloat16> y;
  matrix<float> rstd;
  const gdn_bench::memory m([&](space& ws) {
    x = ws.take<X>(tokens, key_heads, head_dim);
    y = ws.take<bfloat16>(tokens, key_heads, head_dim);
    rstd = ws.take<float>(tokens, key_heads);
  });
  fill(x, s);
  report(state, watch, s, bytes_of(x.size(), sizeof(X) + 2) + bytes_of(rstd.size(), 4), 0,
         [&] { be.l2norm_forward(x, 1e-6, y, rstd, s); });
}

void l2norm_backward(benchmark::State& state, index_t tokens) {
  auto& [be, s, watch] = setup();
  heads<bfloat16> dy, y, dx;
  matrix<float> rstd;
  const gdn_bench::memory m([&](space& ws) {
    for (auto* t : {&dy, &y, &dx}) *t = ws.take<bfloat16>(tokens, key_heads, head_dim);
    rstd = ws.take<float>(tokens, key_heads);
  });
  fill(dy, s);
  fill(y, s, 0.1f);
  fill(rstd, s, 0.1f, 1);
  report(state, watch, s, bytes_of(y.size(), 6) + bytes_of(rstd.size(), 4), 0,
         [&] { be.l2norm_backward<bfloat16>(dy, y, rstd, dx, s); });
}

void gated_norm_forward(benchmark::State& state, index_t tokens, index_t value_heads) {
  auto& [be, s, watch] = setup();
  heads<bfloat16> o, z, y;
  matrix<float> rstd;
  tensor_ref<float, 1, device> w;
  const gdn_bench::memory m([&](space& ws) {
    for (auto* t : {&o, &z, &y}) *t = ws.take<bfloat16>(tokens, value_heads, head_dim);
    rstd = ws.take<float>(tokens, value_heads);
    w = ws.take<float>(head_dim);
  });
  fill(o, s);
  fill(z, s);
  fill(w, s, 0.1f, 1);
  report(state, watch, s, bytes_of(o.size(), 6) + bytes_of(rstd.size(), 4), 0,
         [&] { be.gated_norm_forward<bfloat16>(o, z, w, 1e-6, y, rstd, s); });
}

void gated_norm_backward(benchmark::State& state, index_t tokens, index_t value_heads) {
  auto& [be, s, watch] = setup();
  heads<bfloat16> dy, o, z, d_o, dz;
  matrix<float> rstd;
  tensor_ref<float, 1, device> w, dw;
  const gdn_bench::memory m([&](space& ws) {
    for (auto* t : {&dy, &o, &z, &d_o, &dz}) *t = ws.take<bfloat16>(tokens, value_heads, head_dim);
    rstd = ws.take<float>(tokens, value_heads);
    w = ws.take<float>(head_dim);
    dw = ws.take<float>(head_dim);
  });
  const gdn::cuda::device_block block(scratch(setup(), tokens, 1, value_heads));
  for (auto* t : {&dy, &o, &z}) fill(*t, s);
  fill(w, s, 0.1f, 1);
  fill(rstd, s, 0.1f, 1);
  report(state, watch, s, bytes_of(o.size(), 10) + bytes_of(rstd.size(), 4), 0, [&] {
    auto ws = block.workspace();
    be.gated_norm_backward<bfloat16>(dy, o, z, w, rstd, d_o, dz, dw, ws, s);
  });
}

// ---- gates ----------------------------------------------------------------------------------------------------------

struct gate_tensors {
  matrix<bfloat16> a, b, beta, da, db;
  matrix<float> g, dg, d_beta;
  tensor_ref<float, 1, device> A_log, dt_bias, dA_log, d_dt_bias;
  gdn_bench::memory m;

  gate_tensors(index_t tokens, index_t value_heads, gdn::cuda::stream_ref s)
      : m([&](space& ws) {
          for (auto* t : {&a, &b, &beta, &da, &db}) *t = ws.take<bfloat16>(tokens, value_heads);
          for (auto* t : {&g, &dg, &d_beta}) *t = ws.take<float>(tokens, value_heads);
          for (auto* t : {&A_log, &dt_bias, &dA_log, &d_dt_bias}) *t = ws.take<float>(value_heads);
        }) {
    fill(a, s);
    fill(b, s);
    fill(dg, s);
    fill(d_beta, s);
    for (auto* t : {&A_log, &dt_bias, &dA_log, &d_dt_bias}) fill(*t, s, 0.5f);
  }
};

void gates_forward(benchmark::State& state, index_t tokens, index_t value_heads) {
  auto& [be, s, watch] = setup();
  const gate_tensors t(tokens, value_heads, s);
  report(state, watch, s, bytes_of(t.a.size(), 2 + 2 + 4 + 2), 0,
         [&] { be.gates_forward<bfloat16>(t.a, t.b, t.A_log, t.dt_bias, t.g, t.beta, s); });
}

void gates_backward(benchmark::State& state, index_t tokens, index_t value_heads) {
  auto& [be, s, watch] = setup();
  const gate_tensors t(tokens, value_heads, s);
  const gdn::cuda::device_block block(scratch(setup(), tokens, 1, value_heads));
  report(state, watch, s, bytes_of(t.a.size(), 4 + 4 + 2 + 2 + 2 + 2), 0, [&] {
    auto ws = block.workspace();
    be.gates_backward<bfloat16>(t.dg, t.d_beta, t.a, t.b, t.A_log, t.dt_bias, t.da, t.db, t.dA_log, t.d_dt_bias, ws, s);
  });
}

// ---- rows -----------------------------------------------------------------------------------------------------------

/// Zigzag's pieces: every second run of `piece` rows goes into one message, and back.
void move_rows(benchmark::State& state, index_t tokens, index_t columns, index_t piece, bool gather) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> all, message;
  tensor_ref<gdn::run, 1, device> runs;
  const index_t n = tokens / piece / 2;
  const gdn_bench::memory m([&](space& ws) {
    all = ws.take<bfloat16>(tokens, columns);
    message = ws.take<bfloat16>(n * piece, columns);
    runs = ws.take<gdn::run>(n);
  });
  std::vector<gdn::run> host;
  for (index_t i = 0; i < n; ++i) host.push_back({0, 2 * i * piece, piece, i * piece});
  gdn::cuda::copy_to_device<gdn::run>(host, runs, s);
  fill(all, s);
  fill(message, s);
  report(state, watch, s, bytes_of(message.size(), 4), 0, [&] {
    gather ? be.gather_rows<bfloat16>(all, runs, message, s) : be.scatter_rows<bfloat16>(message, runs, all, s);
  });
}

/// Columns of a wider tensor to a dense one.
void copy_rows(benchmark::State& state, index_t tokens, index_t columns) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> wide, dense;
  const gdn_bench::memory m([&](space& ws) {
    wide = ws.take<bfloat16>(tokens, 2 * columns);
    dense = ws.take<bfloat16>(tokens, columns);
  });
  fill(wide, s);
  report(state, watch, s, bytes_of(dense.size(), 4), 0,
         [&] { be.copy_rows<bfloat16>(gdn::columns(wide, 0, columns), dense, s); });
}

/// Gradients of history, three rows for each of `documents`, are added to those of the tokens that they came from.
void scatter_add_rows(benchmark::State& state, index_t tokens, index_t columns, index_t documents) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> all, message;
  tensor_ref<gdn::run, 1, device> runs;
  const gdn_bench::memory m([&](space& ws) {
    all = ws.take<bfloat16>(tokens, columns);
    message = ws.take<bfloat16>(3 * documents, columns);
    runs = ws.take<gdn::run>(documents);
  });
  std::vector<gdn::run> host;
  for (index_t i = 0; i < documents; ++i) host.push_back({0, (i + 1) * (tokens / documents) - 3, 3, 3 * i});
  gdn::cuda::copy_to_device<gdn::run>(host, runs, s);
  fill(all, s);
  fill(message, s);
  report(state, watch, s, bytes_of(message.size(), 6), 0,
         [&] { be.scatter_add_rows<bfloat16>(message, runs, all, s); });
}

void fill_zero(benchmark::State& state, index_t rows, index_t columns) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> x;
  const gdn_bench::memory m([&](space& ws) { x = ws.take<bfloat16>(rows, columns); });
  report(state, watch, s, bytes_of(x.size(), 2), 0, [&] { be.fill_zero(x, s); });
}

/// Convolution states [N, Dc, W] as rows of history [N, W, Dc], or back.
void swap_axes(benchmark::State& state, index_t batch, index_t channels, bool to_rows) {
  auto& [be, s, watch] = setup();
  heads<bfloat16> x, y;
  const gdn_bench::memory m([&](space& ws) {
    x = to_rows ? ws.take<bfloat16>(batch, channels, width) : ws.take<bfloat16>(batch, width, channels);
    y = to_rows ? ws.take<bfloat16>(batch, width, channels) : ws.take<bfloat16>(batch, channels, width);
  });
  fill(x, s);
  report(state, watch, s, bytes_of(x.size(), 4), 0, [&] { be.swap_axes<bfloat16>(x, y, s); });
}

// ---- products -------------------------------------------------------------------------------------------------------

enum class product { forward, input, added_input, weight };

/// Those with few outputs (b and a have one for each value head) are bound by memory, so they count bytes.
void linear(benchmark::State& state, index_t tokens, index_t in, index_t out, product which) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> x, w, y;
  matrix<float> dw;
  const gdn_bench::memory m([&](space& ws) {
    x = ws.take<bfloat16>(tokens, in);
    w = ws.take<bfloat16>(out, in);
    y = ws.take<bfloat16>(tokens, out);
    dw = ws.take<float>(out, in);
  });
  const gdn::cuda::device_block block(scratch(setup(), tokens, 1, 1));
  fill(x, s);
  fill(w, s, 0.02f);
  fill(y, s);
  const bool few = out < head_dim, add = which == product::added_input;
  const double bytes = bytes_of((add ? 2 : 1) * x.size() + y.size(), 2) +
                       bytes_of(w.size(), which == product::weight ? 2 * sizeof(float) : 2);  // dw is added to
  report(state, watch, s, few ? bytes : 0,
         2.0 * static_cast<double>(tokens) * static_cast<double>(in) * static_cast<double>(out), [&] {
           auto ws = block.workspace();
           switch (which) {
             case product::forward:
               return be.linear_forward<bfloat16>(x, w, y, ws, s);
             case product::input:
             case product::added_input:
               return be.linear_backward_input<bfloat16>(y, w, x, add, ws, s);
             case product::weight:
               return be.linear_backward_weight(y, x, dw, ws, s);
           }
         });
}

// ---- decode ---------------------------------------------------------------------------------------------------------

/// One token of each of `batch` sequences, on states of type S in the first slots of a pool, in a scattered order.
template <class S>
void decode(benchmark::State& state, index_t batch, index_t value_heads) {
  auto& [be, s, watch] = setup();
  heads<bfloat16> q, k, v, o;
  matrix<float> g;
  matrix<bfloat16> beta;
  tensor_ref<S, 4, device> pool;
  tensor_ref<std::int32_t, 1, device> slots;
  const gdn_bench::memory m([&](space& ws) {
    for (auto* t : {&q, &k}) *t = ws.take<bfloat16>(batch, key_heads, head_dim);
    for (auto* t : {&v, &o}) *t = ws.take<bfloat16>(batch, value_heads, head_dim);
    g = ws.take<float>(batch, value_heads);
    beta = ws.take<bfloat16>(batch, value_heads);
    pool = ws.take<S>(batch + 3, value_heads, head_dim, head_dim);
    slots = ws.take<std::int32_t>(batch);
  });
  std::vector<std::int32_t> places(static_cast<std::size_t>(batch));
  for (std::size_t i = 0; i < places.size(); ++i) places[i] = static_cast<std::int32_t>((i * 7919 + 3) % places.size());
  gdn::cuda::copy_to_device<std::int32_t>(places, slots, s);
  for (auto* t : {&q, &k}) fill(*t, s, 0.088f);
  fill(v, s);
  fill(g, s, 0.01f, -0.1f);
  fill(beta, s, 0.1f, 0.5f);
  fill(pool, s);
  const double bytes = bytes_of(2 * batch * value_heads * head_dim * head_dim, sizeof(S)) +
                       bytes_of(q.size() + k.size() + v.size() + o.size() + beta.size(), 2) + bytes_of(g.size(), 4);
  report(state, watch, s, bytes, 0, [&] {
    be.delta_rule_step<bfloat16, S>(0.088f, {q, k, v, g, beta}, pool, slots, o, s);
  });
}

void conv_step(benchmark::State& state, index_t batch, index_t channels) {
  auto& [be, s, watch] = setup();
  matrix<bfloat16> x, w, y;
  heads<bfloat16> pool;
  tensor_ref<std::int32_t, 1, device> slots;
  const gdn_bench::memory m([&](space& ws) {
    for (auto* t : {&x, &y}) *t = ws.take<bfloat16>(batch, channels);
    w = ws.take<bfloat16>(channels, width);
    pool = ws.take<bfloat16>(batch, channels, width);
    slots = ws.take<std::int32_t>(batch);
  });
  std::vector<std::int32_t> places(static_cast<std::size_t>(batch));
  std::iota(places.begin(), places.end(), 0);
  gdn::cuda::copy_to_device<std::int32_t>(places, slots, s);
  fill(x, s);
  fill(w, s, 0.3f);
  fill(pool, s);
  report(state, watch, s, bytes_of(2 * pool.size() + 2 * x.size() + w.size(), 2), 0,
         [&] { be.causal_conv1d_step<bfloat16>(x, pool, slots, w, gdn::activation::silu, y, s); });
}

/// States of sequences out of a pool of S into fp32, or back.
template <class S>
void move_states(benchmark::State& state, index_t batch, index_t value_heads, bool to_pool) {
  auto& [be, s, watch] = setup();
  tensor_ref<S, 4, device> pool;
  tensor_ref<float, 4, device> dense;
  tensor_ref<std::int32_t, 1, device> slots;
  const gdn_bench::memory m([&](space& ws) {
    pool = ws.take<S>(batch, value_heads, head_dim, head_dim);
    dense = ws.take<float>(batch, value_heads, head_dim, head_dim);
    slots = ws.take<std::int32_t>(batch);
  });
  std::vector<std::int32_t> places(static_cast<std::size_t>(batch));
  std::iota(places.begin(), places.end(), 0);
  gdn::cuda::copy_to_device<std::int32_t>(places, slots, s);
  fill(pool, s);
  fill(dense, s);
  report(state, watch, s, bytes_of(pool.size(), sizeof(S) + 4), 0,
         [&] { to_pool ? be.store_states(dense, slots, pool, s) : be.load_states(pool, slots, dense, s); });
}

// ---- between ranks --------------------------------------------------------------------------------------------------

/// The state before a rank from the summaries of `links` ranks before it; bytes: each summary read once.
void fold(benchmark::State& state, index_t value_heads, index_t links) {
  auto& [be, s, watch] = setup();
  const index_t bias = value_heads * head_dim * head_dim;
  tensor_ref<float, 1, device> summaries;
  tensor_ref<float, 4, device> states;
  tensor_ref<gdn::fold_item, 1, device> items;
  tensor_ref<gdn::fold_link, 1, device> table;
  const gdn_bench::memory m([&](space& ws) {
    summaries = ws.take<float>(2 * links * bias);
    states = ws.take<float>(1, value_heads, head_dim, head_dim);
    items = ws.take<gdn::fold_item>(1);
    table = ws.take<gdn::fold_link>(links);
  });
  const gdn::fold_item item{0, links, 0};
  std::vector<gdn::fold_link> host;
  for (index_t i = 0; i < links; ++i) host.push_back({2 * i * bias, i == 0 ? -1 : (2 * i + 1) * bias});
  gdn::cuda::copy_to_device<gdn::fold_item>({&item, 1}, items, s);
  gdn::cuda::copy_to_device<gdn::fold_link>(host, table, s);
  fill(summaries, s, 0.05f);
  report(state, watch, s, bytes_of(2 * links * bias, 4), 2.0 * static_cast<double>((links - 1) * bias * head_dim),
         [&] { be.fold(value_heads, head_dim, head_dim, items, table, summaries, states, s); });
}

void compose(benchmark::State& state, index_t value_heads) {
  auto& [be, s, watch] = setup();
  const index_t bias = value_heads * head_dim * head_dim;
  tensor_ref<float, 1, device> summaries;
  tensor_ref<gdn::compose_item, 1, device> items;
  const gdn_bench::memory m([&](space& ws) {
    summaries = ws.take<float>(6 * bias);
    items = ws.take<gdn::compose_item>(1);
  });
  const gdn::compose_item item{0, bias, 2 * bias, 3 * bias, 4 * bias, 5 * bias};
  gdn::cuda::copy_to_device<gdn::compose_item>({&item, 1}, items, s);
  fill(summaries, s, 0.05f);
  report(state, watch, s, bytes_of(6 * bias, 4), 4.0 * static_cast<double>(bias * head_dim),
         [&] { be.compose(value_heads, head_dim, head_dim, items, summaries, s); });
}

template <class F, class... Args>
void add(const std::string& name, F f, Args... args) {
  gdn_bench::add(name, [=](benchmark::State& state) { f(state, args...); });
}

}  // namespace

int main(int argc, char** argv) {
  gdn_bench::add("copy/1GiB", [](benchmark::State& state) {
    for (auto _ : state) state.SetIterationTime(double(std::size_t{2} << 30) / setup().watch.copy_bandwidth());
    state.counters["TB/s"] = setup().watch.copy_bandwidth() / 1e12;
  });
  for (const index_t tokens : {32768, 8192}) {
    for (const index_t Hv : {16, 32, 48, 64}) {
      const std::string at = "/" + std::to_string(key_heads) + "," + std::to_string(Hv) + "/" + std::to_string(tokens);
      const index_t channels = (2 * key_heads + Hv) * head_dim;
      add("conv_forward" + at, conv_forward<bfloat16>, tokens, channels, tokens);
      add("conv_backward" + at, conv_backward, tokens, channels, tokens);
      if (Hv == 32) {
        add("conv_forward/keys in float" + at, conv_forward<float>, tokens, 2 * key_heads * head_dim, tokens);
        add("conv_forward/documents of 512" + at, conv_forward<bfloat16>, tokens, channels, index_t{512});
        add("conv_backward/documents of 512" + at, conv_backward, tokens, channels, index_t{512});
        add("l2norm_forward" + at, l2norm_forward<float>, tokens);
        add("l2norm_forward/from bf16" + at, l2norm_forward<bfloat16>, tokens);
        add("l2norm_backward" + at, l2norm_backward, tokens);
        add("gather_rows/2048 columns" + at, move_rows, tokens, index_t{2048}, tokens / 16, true);
        add("scatter_rows/2048 columns" + at, move_rows, tokens, index_t{2048}, tokens / 16, false);
        add("copy_rows/4096 of 8192 columns" + at, copy_rows, tokens, index_t{4096});
        add("fill_zero/2048 columns" + at, fill_zero, tokens, index_t{2048});
      }
      add("gates_forward" + at, gates_forward, tokens, Hv);
      add("gates_backward" + at, gates_backward, tokens, Hv);
      add("gated_norm_forward" + at, gated_norm_forward, tokens, Hv);
      add("gated_norm_backward" + at, gated_norm_backward, tokens, Hv);
    }
    for (const auto& [name, hidden, Hv] : gdn_bench::geometries) {
      const std::string at = std::string("/") + name + "/" + std::to_string(tokens);
      const auto add_product = [&](const std::string& of, index_t in, index_t out, product input) {
        add("linear_forward/" + of + at, linear, tokens, in, out, product::forward);
        add("linear_backward_input/" + of + at, linear, tokens, in, out, input);
        add("linear_backward_weight/" + of + at, linear, tokens, in, out, product::weight);
      };
      add_product("qkv", hidden, (2 * key_heads + Hv) * head_dim, product::input);
      add_product("z", hidden, Hv * head_dim, product::added_input);  // the gradient of x is a sum
      add_product("a", hidden, Hv, product::added_input);             // b is as large
      add_product("out", Hv * head_dim, hidden, product::input);
    }
  }
  for (const index_t Hv : {32, 64}) {
    for (const index_t batch : {1, 8, 16, 32, 64, 128, 256}) {
      const std::string at = "/" + std::to_string(key_heads) + "," + std::to_string(Hv) + "/" + std::to_string(batch);
      add("decode/float state" + at, decode<float>, batch, Hv);
      add("decode/bf16 state" + at, decode<bfloat16>, batch, Hv);
    }
    for (const index_t batch : {16, 128}) {
      const std::string at = "/" + std::to_string(Hv) + "/" + std::to_string(batch);
      const index_t channels = (2 * key_heads + Hv) * head_dim;
      add("conv_step" + at, conv_step, batch, channels);
      add("load_states/bf16" + at, move_states<bfloat16>, batch, Hv, false);
      add("store_states/bf16" + at, move_states<bfloat16>, batch, Hv, true);
      add("load_states/float" + at, move_states<float>, batch, Hv, false);
      add("store_states/float" + at, move_states<float>, batch, Hv, true);
      add("swap_axes/to rows" + at, swap_axes, batch, channels, true);
      add("swap_axes/to states" + at, swap_axes, batch, channels, false);
    }
    for (const index_t documents : {1, 16, 128}) {
      const std::string at = "/history/" + std::to_string(Hv) + "/" + std::to_string(documents);
      add("scatter_add_rows" + at, scatter_add_rows, index_t{32768}, (2 * key_heads + Hv) * head_dim, documents);
      add("fill_zero" + at, fill_zero, 3 * documents, (2 * key_heads + Hv) * head_dim);
    }
    add("fold/8 ranks/" + std::to_string(Hv), fold, Hv, index_t{8});
    add("compose/" + std::to_string(Hv), compose, Hv);
  }
  return gdn_bench::run(argc, argv);
}
