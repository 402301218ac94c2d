// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gated delta rule over a sequence that is split over ranks, forward and backward.

#include <algorithm>
#include <cmath>

#include <gdn/comm/share.hpp>
#include <gdn/concepts/backend.hpp>
#include <gdn/plan/resident.hpp>

namespace gdn {
inline namespace v0 {

/// The delta rule of one rank, as its plan cuts it.
template <class T, memory_kind Memory>
delta_rule_problem<T, Memory> rule_problem(index_t key_heads, const resident_plan<Memory>& plan) {
  const cp_plan& p = plan.host;
  const summary_shape& s = p.shape.summary;
  return {p.compute_rows,
          key_heads,
          s.heads,
          s.key_dim,
          s.value_dim,
          p.shape.chunk,
          p.chunks,
          p.longest_segment,
          static_cast<accumulate_t<T>>(1.0 / std::sqrt(static_cast<double>(s.key_dim))),
          plan.rule_segments,
          p.chain.elements > 0};
}

/// What the forward pass leaves for the backward one.
template <class T, memory_kind Memory>
struct rule_tape {
  summaries_ref<T, Memory> prepared;  ///< chunk inverses, as the backend keeps them
  states_ref<T, Memory> h0;           ///< [plan.h0_states, Hv, K, V] states before segments
  summaries_ref<T, Memory> own;       ///< summaries that this rank published: backward needs their transitions

  void take_states(workspace<Memory>& m, const cp_plan& p) {
    const summary_shape& s = p.shape.summary;
    h0 = m.template take<accumulate_t<T>>(p.h0_states, s.heads, s.key_dim, s.value_dim);
    own = m.template take<accumulate_t<T>>(p.chain.published_elements);
  }
  void take_prepared(workspace<Memory>& m, index_t elements) {
    prepared = m.template take<accumulate_t<T>>(elements);
  }
  template <class Backend>
  static rule_tape take(const Backend& be, index_t key_heads, const resident_plan<Memory>& plan,
                        workspace<Memory>& m) {
    rule_tape t;
    t.take_states(m, plan.host);
    t.take_prepared(m, be.delta_rule_prepared(rule_problem<T>(key_heads, plan)));
    return t;
  }
};

/// Bytes of workspace that gated_delta_rule and gated_delta_rule_backward take.
template <class T, class Backend>
memory_requirement rule_scratch(const Backend& be, index_t key_heads,
                                const resident_plan<typename Backend::memory_type>& plan) {
  using memory = typename Backend::memory_type;
  using A = accumulate_t<T>;
  const cp_plan& p = plan.host;
  const summary_shape& s = p.shape.summary;
  workspace<memory> forward;
  forward.template take<A>(p.chain.elements);
  workspace<memory> backward;
  backward.template take<A>(p.reverse_chain.elements);
  backward.template take<A>(p.dht_states, s.heads, s.key_dim, s.value_dim);
  backward.template take<A>(p.entering_states, s.heads, s.key_dim, s.value_dim);
  return {std::max(forward.peak().bytes, backward.peak().bytes) +
          std::max({share_scratch<A, memory>(p.chain, p.rank).bytes,
                    share_scratch<A, memory>(p.reverse_chain, p.rank).bytes,
                    be.delta_rule_scratch(rule_problem<T>(key_heads, plan)).bytes})};
}

namespace detail {

template <class A, class Backend>
using states_of = tensor_ref<A, 4, typename Backend::memory_type>;

/// A buffer of states [n, Hv, K, V] as rows.
template <class A, memory_kind Memory>
tensor_ref<A, 2, Memory> as_rows(const tensor_ref<A, 4, Memory>& states) {
  return make_tensor<Memory>(states.data(), states.extent(0),
                             states.extent(1) * states.extent(2) * states.extent(3));
}

/// The first `n` states of `to` from the caller's, or zeros where there are none.
template <class A, class Backend>
void place_states(const Backend& be, states_of<const A, Backend> from, states_of<A, Backend> to, index_t n,
                  typename Backend::stream_type s) {
  if (n == 0) return;
  const auto target = rows(as_rows(to), 0, n);
  if (from.data() != nullptr) {
    be.copy_rows(as_rows(from), target, s);
  } else {
    be.fill_zero(target, s);
  }
}

/// An empty document passes its state on as it came: for each, row `in` of `from` (or zero) to row `out` of `to`.
template <class A, class Backend>
void pass_empty(const Backend& be, const cp_plan& plan, states_of<const A, Backend> from, states_of<A, Backend> to,
                bool reverse, typename Backend::stream_type s) {
  if (to.data() == nullptr) return;
  for (const run& e : plan.empty_documents) {
    const auto target = rows(as_rows(to), reverse ? e.local : e.packed, 1);
    if (from.data() != nullptr) {
      be.copy_rows(rows(as_rows(from), reverse ? e.packed : e.local, 1), target, s);
    } else {
      be.fill_zero(target, s);
    }
  }
}

}  // namespace detail

namespace cp {

/// o_t = scale S_t^T q_t over documents that begin, end and go on wherever the plan says, scale = K^(-1/2).
///
/// @param in      rows in compute order: the caller's own where plan.host.undo_is_identity(), else as
///                exchange_rows(plan.undo) leaves them
/// @param initial [plan.entering, Hv, K, V], read if the plan was made with `initial_state`
/// @param o       [L, Hv, V] written
/// @param final_  [plan.leaving, Hv, K, V], written if the plan was made with `final_state`
/// @param tape    written; gated_delta_rule_backward() needs it
/// @param ws      at least rule_scratch() bytes
/// Enqueued on `s`; same bits on every run. All ranks call it; only documents that cross ranks communicate.
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && gdn::gated_delta_rule<Backend, T>
void gated_delta_rule(const Backend& be, Comm& comm, const resident_plan<typename Backend::memory_type>& plan,
                      const delta_rule_inputs<T, typename Backend::memory_type>& in,
                        const_states_ref<T, typename Backend::memory_type> initial,
                        tensor_ref<T, 3, typename Backend::memory_type> o,
                        states_ref<T, typename Backend::memory_type> final_,
                        const rule_tape<T, typename Backend::memory_type>& tape,
                        workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using A = accumulate_t<T>;
  using memory = typename Backend::memory_type;
  const cp_plan& p = plan.host;
  const summary_shape& shape = p.shape.summary;
  const auto problem = rule_problem<T>(in.q.extent(1), plan);
  const scoped_mark scope(ws);
  const auto summaries = ws.template take<A>(p.chain.elements);

  be.delta_rule_prepare(problem, in, tape.prepared, s);
  detail::place_states<A>(be, initial, tape.h0, p.entering_states, s);
  be.delta_rule_summarise(problem, in, tape.prepared, plan.chain.published, tape.h0, summaries, ws, s);
  share_summaries<A>(be, comm, plan.chain, shape, summaries, ws, s);
  be.fold(shape.heads, shape.key_dim, shape.value_dim, plan.chain.folds, plan.chain.links, summaries, tape.h0, s);
  be.delta_rule_forward(problem, in, tape.prepared, tape.h0, o, final_, ws, s);
  detail::pass_empty<A>(be, p, initial, final_, false, s);

  if (tape.own.size() > 0) {  // the transitions for backward
    be.copy_rows(make_tensor<memory>(static_cast<const A*>(summaries.data()), 1, tape.own.size()),
                 make_tensor<memory>(tape.own.data(), 1, tape.own.size()), s);
  }
}

/// The gradients of gated_delta_rule(): the chain runs from the last rank to the first, through the same transitions,
/// transposed.
///
/// @param d_final   [plan.leaving, Hv, K, V] what arrives at final states; zero if empty
/// @param gradients written
/// @param d_initial [plan.entering, Hv, K, V] written unless empty
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && gdn::gated_delta_rule<Backend, T>
void gated_delta_rule_backward(const Backend& be, Comm& comm,
                                 const resident_plan<typename Backend::memory_type>& plan,
                                 const delta_rule_inputs<T, typename Backend::memory_type>& in,
                                 tensor_ref<const T, 3, typename Backend::memory_type> d_o,
                                 const_states_ref<T, typename Backend::memory_type> d_final,
                                 const delta_rule_gradients<T, typename Backend::memory_type>& gradients,
                                 states_ref<T, typename Backend::memory_type> d_initial,
                                 const rule_tape<T, typename Backend::memory_type>& tape,
                                 workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using A = accumulate_t<T>;
  const cp_plan& p = plan.host;
  const summary_shape& shape = p.shape.summary;
  const auto problem = rule_problem<T>(in.q.extent(1), plan);
  const scoped_mark scope(ws);
  const auto summaries = ws.template take<A>(p.reverse_chain.elements);
  const auto dht = ws.template take<A>(p.dht_states, shape.heads, shape.key_dim, shape.value_dim);
  const auto dh0 = ws.template take<A>(p.entering_states, shape.heads, shape.key_dim, shape.value_dim);

  detail::place_states<A>(be, d_final, dht, p.leaving_states, s);
  be.delta_rule_summarise_gradient(problem, in, tape.prepared, d_o, dht, plan.reverse_chain.published, tape.own,
                                   summaries, ws, s);
  share_summaries<A>(be, comm, plan.reverse_chain, shape, summaries, ws, s);
  be.fold(shape.heads, shape.key_dim, shape.value_dim, plan.reverse_chain.folds, plan.reverse_chain.links, summaries,
          dht, s);
  be.delta_rule_backward(problem, in, tape.prepared, tape.h0, d_o, dht, gradients, dh0, ws, s);
  if (d_initial.data() != nullptr) {
    detail::place_states<A>(be, dh0, d_initial, p.entering_states, s);
    detail::pass_empty<A>(be, p, d_final, d_initial, true, s);
  }
}

}  // namespace cp
}  // namespace v0
}  // namespace gdn
