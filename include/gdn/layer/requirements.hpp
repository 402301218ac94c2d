// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  How much memory a layer needs: the code that lays it out, run without memory.

#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include <gdn/layer/backward.hpp>
#include <gdn/layer/forward.hpp>

namespace gdn {
inline namespace v0 {

struct layer_requirements {
  memory_requirement tape;
  memory_requirement forward;   ///< workspace of forward(); that of prefill() if the policy is `nothing`
  memory_requirement backward;  ///< workspace of backward()
};

/// Bytes for one rank. They depend on the rank's own rows and states, not on the number of ranks, but for what an
/// all-gather folds.
template <class T, class Backend>
  requires backend<Backend, T>
layer_requirements requirements(const Backend& be, const layer_dims& d,
                                const resident_plan<typename Backend::memory_type>& plan, keep_policy policy) {
  using memory = typename Backend::memory_type;
  const cp_plan& p = plan.host;
  using W = between_t<T, memory>;
  const index_t prepared = be.delta_rule_prepared(detail::layer_problem<T>(d, plan));
  const auto with_scratch = [](workspace<memory>& ws, std::initializer_list<memory_requirement> calls) {
    std::size_t most = 0;
    for (const memory_requirement& r : calls) most = std::max(most, r.bytes);
    ws.template take<std::byte>(static_cast<index_t>(most));
    return ws.peak();
  };
  const auto moves = [&](const exchange_plan& e) { return exchange_scratch<T, memory>(e, d.hidden, false, p.rank); };
  const auto scratch = {moves(p.undo), moves(p.redo), history_scratch<W, memory>(p, d.channels()),
                        rule_scratch<W>(be, d.key_heads, plan), be.scratch(detail::sizes_of(d, p.compute_rows))};

  layer_requirements out;
  workspace<memory> tape;
  make_tape<T>(be, d, plan, policy, tape);
  out.tape = tape.peak();

  workspace<memory> forward;
  activations<T, memory> act;
  act.take_rest(forward, d, p, prepared, policy);
  detail::forward_buffers<T, memory>::take(forward, d, p);
  out.forward = with_scratch(forward, scratch);
  if (policy == keep_policy::nothing) return out;

  workspace<memory> backward;
  act.take_rest(backward, d, p, prepared, policy);
  detail::backward_buffers<T, memory>::take(backward, d, p);
  out.backward = with_scratch(backward, scratch);
  return out;
}

/// Bytes that the plan's rank receives in forward() of a layer of type T.
template <class T, memory_kind Memory = host_memory>
traffic forward_traffic(const layer_dims& d, const cp_plan& plan) {
  traffic t = plan.forward_traffic(d.hidden, sizeof(T), sizeof(accumulate_t<T>));
  t.halo = plan.forward_traffic(d.hidden, sizeof(between_t<T, Memory>), sizeof(accumulate_t<T>)).halo;
  return t;
}
/// The same of backward().
template <class T, memory_kind Memory = host_memory>
traffic backward_traffic(const layer_dims& d, const cp_plan& plan) {
  traffic t = plan.backward_traffic(d.hidden, sizeof(T), sizeof(accumulate_t<T>));
  t.halo = plan.backward_traffic(d.hidden, sizeof(between_t<T, Memory>), sizeof(accumulate_t<T>)).halo;
  return t;
}

}  // namespace v0
}  // namespace gdn
