// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The gated delta rule over all segments of a rank at once, and the algebra of its summaries.

#include <concepts>
#include <cstdint>

#include <gdn/core/stream.hpp>
#include <gdn/core/tensor.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/plan/tables.hpp>

namespace gdn {
inline namespace v0 {

/// The sizes of one call. Segments tile the rows [0, tokens) in order; none is empty.
template <class T, memory_kind Memory>
struct delta_rule_problem {
  index_t tokens = 0;       ///< L, rows of this rank
  index_t key_heads = 1;    ///< Hk
  index_t value_heads = 1;  ///< Hv; value head h reads key head h / (Hv / Hk)
  index_t key_dim = 0;      ///< K
  index_t value_dim = 0;    ///< V
  index_t chunk = 64;       ///< C
  index_t chunks = 0;       ///< chunks of all segments
  index_t longest = 0;      ///< tokens of the longest segment; with fewer, some may be left out
  accumulate_t<T> scale{1};                        ///< of q, usually K^(-1/2)
  tensor_ref<const rule_segment, 1, Memory> segments;  ///< [N]
  bool chained = false;  ///< summaries of segments will be asked for, so it pays to make them of use for all calls
};

/// q and k have unit length (l2norm is the prologue's); g <= 0 is the natural logarithm of the decay.
template <class T, memory_kind Memory>
struct delta_rule_inputs {
  tensor_ref<const T, 3, Memory> q;                ///< [L, Hk, K]
  tensor_ref<const T, 3, Memory> k;                ///< [L, Hk, K]
  tensor_ref<const T, 3, Memory> v;                ///< [L, Hv, V]
  tensor_ref<const accumulate_t<T>, 2, Memory> g;  ///< [L, Hv]
  tensor_ref<const T, 2, Memory> beta;             ///< [L, Hv]
};

/// All are written. g and beta in accumulate_t: their sums over V and over later tokens cancel.
template <class T, memory_kind Memory>
struct delta_rule_gradients {
  tensor_ref<T, 3, Memory> q;                   ///< [L, Hk, K], summed over the value heads of each key head
  tensor_ref<T, 3, Memory> k;                   ///< [L, Hk, K], likewise
  tensor_ref<T, 3, Memory> v;                   ///< [L, Hv, V]
  tensor_ref<accumulate_t<T>, 2, Memory> g;     ///< [L, Hv]
  tensor_ref<accumulate_t<T>, 2, Memory> beta;  ///< [L, Hv]
};

/// Buffers of states [n, Hv, K, V], of summaries (elements as the tables say) and of prepared chunk inverses.
template <class T, memory_kind Memory>
using states_ref = tensor_ref<accumulate_t<T>, 4, Memory>;
template <class T, memory_kind Memory>
using const_states_ref = tensor_ref<const accumulate_t<T>, 4, Memory>;
template <class T, memory_kind Memory>
using summaries_ref = tensor_ref<accumulate_t<T>, 1, Memory>;
template <class T, memory_kind Memory>
using const_summaries_ref = tensor_ref<const accumulate_t<T>, 1, Memory>;

/// S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  o_t = scale S_t^T q_t,  a = exp(g)    (arXiv:2412.06464)
///
/// 1. `delta_rule_prepared(problem)`: elements of accumulate_t that `delta_rule_prepare` leaves for all other calls
///    (the inverses of the chunks' unit triangular matrices), once per forward, and to which these may add, from forward
///    to backward. 0 if the backend keeps nothing.
/// 2. `delta_rule_scratch(problem)`: bytes that each of the calls may take from `ws`; free again on return.
/// 3. `delta_rule_summarise(problem, in, prepared, table, h0, summaries, ws, s)`: E, and M where it is wanted, of
///    every published segment. E starts from the state `start` of h0, or from zero: so the first of a chain publishes
///    a state and its M is never read.
/// 4. `compose(heads, K, V, items, summaries, s)` and `fold(heads, K, V, items, links, summaries, states, s)`: the
///    algebra between ranks, in accumulate_t at full precision, in the order of the links.
/// 5. `delta_rule_forward(problem, in, prepared, h0, o, ht, ws, s)`: o [L, Hv, V]; ht of the segments that have one,
///    unless the view is empty.
/// 6. `delta_rule_summarise_gradient(problem, in, prepared, d_o, dht, table, own, summaries, ws, s)`: the same going
///    left: dS_in = M^T dS_out + F. Writes F, which starts from the gradient `start` of dht or from zero, and M^T copied
///    from `own`.
/// 7. `delta_rule_backward(problem, in, prepared, h0, d_o, dht, gradients, dh0, ws, s)`.
/// 8. `delta_rule_step(scale, in, states, slots, o, s)`: one token per sequence; row i updates states[slots[i]] in
///    place and writes o[i]; slot -1 skips the row and writes zeros.
/// Order: prepare, summarise, forward; summarise_gradient, backward. Where a problem is not `chained`, summaries may be
/// left out; where it is, they are made with an empty table, too.
/// Inputs are not written, outputs overlap nothing. Every call is enqueued on the stream, allocates nothing, and gives
/// the same bits on every run. A segment's results depend on its own rows and states, and on the sizes of the problem:
/// a backend may cut long segments where there are few.
template <class B, class T>
concept gated_delta_rule = requires(
    const B& be, const delta_rule_problem<T, typename B::memory_type>& problem,
    const delta_rule_inputs<T, typename B::memory_type>& in,
    const delta_rule_gradients<T, typename B::memory_type>& gradients,
    const_states_ref<T, typename B::memory_type> state, states_ref<T, typename B::memory_type> state_out,
    summaries_ref<T, typename B::memory_type> summaries, const_summaries_ref<T, typename B::memory_type> prepared,
    tensor_ref<const published_summary, 1, typename B::memory_type> table,
    tensor_ref<const compose_item, 1, typename B::memory_type> composes,
    tensor_ref<const fold_item, 1, typename B::memory_type> folds,
    tensor_ref<const fold_link, 1, typename B::memory_type> links,
    tensor_ref<const std::int32_t, 1, typename B::memory_type> slots, tensor_ref<T, 3, typename B::memory_type> o,
    tensor_ref<const T, 3, typename B::memory_type> d_o, index_t n, accumulate_t<T> scale,
    workspace<typename B::memory_type>& ws, typename B::stream_type s) {
  { be.delta_rule_prepared(problem) } -> std::same_as<index_t>;
  { be.delta_rule_scratch(problem) } -> std::same_as<memory_requirement>;
  be.delta_rule_prepare(problem, in, summaries, s);
  be.delta_rule_summarise(problem, in, summaries, table, state, summaries, ws, s);
  be.compose(n, n, n, composes, summaries, s);
  be.fold(n, n, n, folds, links, prepared, state_out, s);
  be.delta_rule_forward(problem, in, summaries, state, o, state_out, ws, s);
  be.delta_rule_summarise_gradient(problem, in, summaries, d_o, state, table, prepared, summaries, ws, s);
  be.delta_rule_backward(problem, in, summaries, state, d_o, state, gradients, state_out, ws, s);
  be.delta_rule_step(scale, in, state_out, slots, o, s);
};

}  // namespace v0
}  // namespace gdn
