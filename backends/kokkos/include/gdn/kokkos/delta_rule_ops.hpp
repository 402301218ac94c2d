// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The delta rule over all segments and heads at once, by either rule, and the algebra of summaries.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <gdn/concepts/gated_delta_rule.hpp>
#include <gdn/concepts/operands.hpp>
#include <gdn/kokkos/delta_rule.hpp>
#include <gdn/kokkos/delta_rule_chunked.hpp>
#include <gdn/kokkos/detail/eigen_map.hpp>
#include <gdn/kokkos/detail/parallel.hpp>
#include <gdn/kokkos/detail/workers.hpp>
#include <gdn/kokkos/states.hpp>

namespace gdn {
inline namespace v0 {
namespace kokkos::detail {

template <class T>
using problem_ref = const delta_rule_problem<T, host_memory>&;
template <class T>
using rule_inputs_ref = const delta_rule_inputs<T, host_memory>&;
template <class A>
using vector_ref = tensor_ref<A, 1, host_memory>;

template <class T>
void check_problem(problem_ref<T> p, rule_inputs_ref<T> in) {
  expects_rule_inputs(in, p.tokens, p.key_heads, p.value_heads, p.key_dim, p.value_dim);
  expects<backend_error>(1 <= p.chunk && p.chunk <= max_chunk, "the chunk length must lie in 1 to", max_chunk,
                         ", is", p.chunk);
}

/// Each worker's scratch; the elements that any call may need.
template <class Rule, class T, class Exec>
tensor_ref<accumulate_t<T>, 2, host_memory> take_scratch(const Exec& exec, problem_ref<T> p,
                                                         workspace<host_memory>& ws) {
  constexpr index_t line = 32;  // workers never share a cache line
  return ws.take<accumulate_t<T>>(worker_count(exec), (Rule::scratch(p) + line - 1) / line * line);
}

template <class Rule, class T, class Exec>
memory_requirement delta_rule_scratch(const Exec& exec, problem_ref<T> p) {
  workspace<host_memory> measure;
  take_scratch<Rule, T>(exec, p, measure);
  return measure.peak();
}

template <class Rule, class T, class Exec>
void delta_rule_forward(const Exec& exec, problem_ref<T> p, rule_inputs_ref<T> in,
                        const_summaries_ref<T, host_memory> prepared, const_states_ref<T, host_memory> h0,
                        tensor_ref<T, 3, host_memory> o, states_ref<T, host_memory> ht, workspace<host_memory>& ws) {
  check_problem<T>(p, in);
  const scoped_mark scope(ws);
  const auto scratch = take_scratch<Rule, T>(exec, p, ws);
  // Value heads of a key head share work, if that leaves enough items; a head's bits are the same either way.
  const bool share = p.segments.extent(0) * p.key_heads >= 2 * worker_count(exec);
  const index_t heads = share ? p.value_heads / p.key_heads : 1;
  const index_t groups = p.value_heads / heads;
  for_each_item_with_scratch(exec, p.segments.extent(0) * groups, [&](index_t item, index_t worker) {
    Rule::forward(p, in, p.segments(item / groups), item % groups * heads, heads, prepared.data(), h0, o, ht,
                  &scratch(worker, 0));
  });
}

template <class Rule, class T, class Exec>
void delta_rule_summarise(const Exec& exec, problem_ref<T> p, rule_inputs_ref<T> in,
                          const_summaries_ref<T, host_memory> prepared,
                          tensor_ref<const published_summary, 1, host_memory> table,
                          const_states_ref<T, host_memory> h0, summaries_ref<T, host_memory> out,
                          workspace<host_memory>& ws) {
  check_problem<T>(p, in);
  const scoped_mark scope(ws);
  const auto scratch = take_scratch<Rule, T>(exec, p, ws);
  for_each_item_with_scratch(exec, 2 * table.extent(0) * p.value_heads, [&](index_t item, index_t worker) {
    const published_summary& e = table(item / 2 / p.value_heads);
    const rule_segment& s = p.segments(e.segment);
    const rule_item<T> x{p, in, s, item / 2 % p.value_heads};
    if (item % 2 == 0) {
      Rule::bias(x, prepared.data(), state_at(h0, e.start, x.head), &out(e.bias + x.head * x.K() * x.V()),
                 &scratch(worker, 0));
    } else if (e.transition >= 0) {
      Rule::transition(x, prepared.data(), &out(e.transition + x.head * x.K() * x.K()), &scratch(worker, 0));
    }
  });
}

template <class Rule, class T, class Exec>
void delta_rule_summarise_gradient(const Exec& exec, problem_ref<T> p, rule_inputs_ref<T> in,
                                   const_summaries_ref<T, host_memory> prepared,
                                   tensor_ref<const T, 3, host_memory> d_o, const_states_ref<T, host_memory> dht,
                                   tensor_ref<const published_summary, 1, host_memory> table,
                                   const_summaries_ref<T, host_memory> own, summaries_ref<T, host_memory> out,
                                   workspace<host_memory>& ws) {
  check_problem<T>(p, in);
  const scoped_mark scope(ws);
  const auto scratch = take_scratch<Rule, T>(exec, p, ws);
  for_each_item_with_scratch(exec, 2 * table.extent(0) * p.value_heads, [&](index_t item, index_t worker) {
    const published_summary& e = table(item / 2 / p.value_heads);
    const rule_segment& s = p.segments(e.segment);
    const rule_item<T> x{p, in, s, item / 2 % p.value_heads};
    const index_t K = x.K();
    if (item % 2 == 0) {
      Rule::gradient_bias(x, prepared.data(), d_o, state_at(dht, e.start, x.head), &out(e.bias + x.head * K * x.V()),
                          &scratch(worker, 0));
    } else if (e.transition >= 0) {
      eigen_map(&out(e.transition + x.head * K * K), K, K, K) =
          eigen_map(&own(e.own_transition + x.head * K * K), K, K, K).transpose();
    }
  });
}

template <class Rule, class T, class Exec>
void delta_rule_backward(const Exec& exec, problem_ref<T> p, rule_inputs_ref<T> in,
                         const_summaries_ref<T, host_memory> prepared, const_states_ref<T, host_memory> h0,
                         tensor_ref<const T, 3, host_memory> d_o, const_states_ref<T, host_memory> dht,
                         const delta_rule_gradients<T, host_memory>& out, states_ref<T, host_memory> dh0,
                         workspace<host_memory>& ws) {
  check_problem<T>(p, in);
  const scoped_mark scope(ws);
  const auto scratch = take_scratch<Rule, T>(exec, p, ws);
  for_each_item_with_scratch(exec, p.segments.extent(0) * p.key_heads, [&](index_t item, index_t worker) {
    Rule::backward(p, in, p.segments(item / p.key_heads), item % p.key_heads, prepared.data(), h0, d_o, dht, out, dh0,
                   &scratch(worker, 0));
  });
}

template <class A, class Exec>
void compose(const Exec& exec, index_t heads, index_t K, index_t V,
             tensor_ref<const compose_item, 1, host_memory> items, vector_ref<A> buffer) {
  for_each_item(exec, items.extent(0) * heads, [&](index_t at) {
    const compose_item& e = items(at / heads);
    const index_t h = at % heads;
    const auto bias = [&](index_t from) { return eigen_map(&buffer(from + h * K * V), K, V, V); };
    const auto transition = [&](index_t from) { return eigen_map(&buffer(from + h * K * K), K, K, K); };
    bias(e.bias) = bias(e.later_bias);
    add_product(transition(e.later_transition), bias(e.earlier_bias), bias(e.bias));
    if (e.transition >= 0) {
      auto composed = transition(e.transition);
      composed.setZero();
      add_product(transition(e.later_transition), transition(e.earlier_transition), composed);
    }
  });
}

/// A state's columns are independent, so they are folded in blocks that fit on the stack.
template <class A, class Exec>
void fold(const Exec& exec, index_t heads, index_t K, index_t V, tensor_ref<const fold_item, 1, host_memory> items,
          tensor_ref<const fold_link, 1, host_memory> links, vector_ref<const A> summaries,
          tensor_ref<A, 4, host_memory> states) {
  constexpr index_t elements = 4096;
  expects<backend_error>(K <= elements, "the fold holds keys of up to", elements, "elements, not", K);
  const index_t width = std::max<index_t>(1, elements / K);
  const index_t blocks = (V + width - 1) / width;
  for_each_item(exec, items.extent(0) * heads * blocks, [&](index_t at) {
    const fold_item& e = items(at / blocks / heads);
    const index_t h = at / blocks % heads;
    const index_t column = at % blocks * width;
    const index_t n = std::min(width, V - column);
    auto state = eigen_map(&states(e.target, h, 0, column), K, n, states.stride(2));
    std::array<A, static_cast<std::size_t>(elements)> copy;
    const auto before = eigen_map(copy.data(), K, n, n);
    for (index_t i = e.begin; i < e.begin + e.count; ++i) {
      const fold_link& link = links(i);
      const auto bias = eigen_map(&summaries(link.bias + h * K * V + column), K, n, V);
      if (i == e.begin) {
        state = bias;
      } else {
        eigen_map(copy.data(), K, n, n) = state;
        state = bias;
        add_product(eigen_map(&summaries(link.transition + h * K * K), K, K, K), before, state);
      }
    }
  });
}

/// One token per row on its slot of `states`, in place. A state is read twice and written once, so that it is rounded
/// once; both orders of its axes give the same bits.
template <class T, class S, class Exec>
void delta_rule_step(const Exec& exec, accumulate_t<T> scale, rule_inputs_ref<T> in,
                     tensor_ref<S, 4, host_memory> states, tensor_ref<const std::int32_t, 1, host_memory> slots,
                     tensor_ref<T, 3, host_memory> o) {
  using A = accumulate_t<T>;
  constexpr index_t block = 64;
  expects_delta_rule_step(in, states, slots, o);
  const index_t Hv = in.v.extent(1);
  const index_t V = in.v.extent(2);
  const index_t K = in.k.extent(2);
  const index_t ratio = Hv / in.k.extent(1);
  const index_t blocks = (V + block - 1) / block;
  expects_slots(slots, states.extent(0));
  for_each_item(exec, slots.extent(0) * Hv * blocks, [=](index_t at) {
    const index_t row = at / blocks / Hv;
    const index_t head = at / blocks % Hv;
    const index_t column = at % blocks * block;
    const index_t n = std::min(block, V - column);
    if (slots(row) < 0) {
      for (index_t j = 0; j < n; ++j) o(row, head, column + j) = static_cast<T>(A{0});
      return;
    }
    const T* q = &in.q(row, head / ratio, 0);
    const T* k = &in.k(row, head / ratio, 0);
    const A alpha = std::exp(in.g(row, head));
    const A beta = static_cast<A>(in.beta(row, head));
    S* const state = &states(slots(row), head, 0, column);
    A delta[block] = {};
    A out[block] = {};
    A next[block];
    const auto advance_by = [&](auto value_stride) {
      for (index_t i = 0; i < K; ++i) {
        const S* const from = state + i * states.stride(2);
        const A ki = static_cast<A>(k[i]);
        for (index_t j = 0; j < n; ++j) delta[j] += ki * (alpha * static_cast<A>(from[j * value_stride]));
      }
      for (index_t j = 0; j < n; ++j) delta[j] = beta * (static_cast<A>(in.v(row, head, column + j)) - delta[j]);
      for (index_t i = 0; i < K; ++i) {
        S* const to = state + i * states.stride(2);
        const A ki = static_cast<A>(k[i]);
        const A qi = static_cast<A>(q[i]) * scale;
        for (index_t j = 0; j < n; ++j) next[j] = alpha * static_cast<A>(to[j * value_stride]) + ki * delta[j];
        for (index_t j = 0; j < n; ++j) out[j] += qi * next[j];
        for (index_t j = 0; j < n; ++j) to[j * value_stride] = static_cast<S>(next[j]);
      }
    };
    if (states.stride(3) == 1) {
      advance_by(std::integral_constant<index_t, 1>{});
    } else {
      advance_by(states.stride(3));
    }
    for (index_t j = 0; j < n; ++j) o(row, head, column + j) = static_cast<T>(out[j]);
  });
}

}  // namespace kokkos::detail
}  // namespace v0
}  // namespace gdn
