// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What ranks do after a pass: sum parameter gradients, and take states to where sequences go on.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include <gdn/comm/collectives.hpp>
#include <gdn/concepts/state_pool.hpp>
#include <gdn/layer/state.hpp>
#include <gdn/layer/state_pool.hpp>

namespace gdn {
inline namespace v0 {

/// Bytes of workspace that reduce_gradients takes.
template <class T, memory_kind Memory = host_memory>
memory_requirement reduce_requirement(const layer_dims& d, int world) {
  workspace<Memory> measure;
  memory_requirement most;
  layer_gradients<T, Memory>::carve(measure, d).for_each([&](std::string_view, const auto& t) {
    most.bytes = std::max(most.bytes, all_reduce_scratch<accumulate_t<T>, Memory>(t.size(), world).bytes);
  });
  return most;
}

/// Sums the nine parameter gradients over the ranks, in the order of the ranks: every rank has the same bits.
/// @param grad contiguous tensors, each rank's own sums; replaced by the sums of all
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && backend<Backend, T>
void reduce_gradients(const Backend& be, Comm& comm, const layer_gradients<T, typename Backend::memory_type>& grad,
                      workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  grad.for_each([&](std::string_view, const auto& t) {
    all_reduce_sum<accumulate_t<T>>(be, comm, reshape(t, t.size()), ws, s);
  });
}

/// Bytes of workspace that deliver_states takes.
template <class T, memory_kind Memory = host_memory>
memory_requirement delivery_requirement(const layer_dims& d, const cp_plan& plan, std::span<const int> targets) {
  const exchange_plan delivery = plan_delivery(plan, targets);
  workspace<Memory> tables;
  detail::table_placer place(tables, [](auto, auto) {});
  place(delivery);
  const std::size_t scratch =
      std::max(exchange_scratch<accumulate_t<T>, Memory>(delivery, d.state_size(), false, plan.rank).bytes,
               exchange_scratch<T, Memory>(delivery, d.channels() * d.conv_width, false, plan.rank).bytes);
  return {tables.peak().bytes + scratch};
}

/// Takes the final states of a pass to the ranks on which the documents go on, e.g. all to one that decodes.
///
/// @param targets [N] the rank of each document
/// @param from    the final states of this rank, [plan.leaving, ..]
/// @param to      a place for each document that goes to this rank, ascending
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && backend<Backend, T>
void deliver_states(const Backend& be, Comm& comm, const layer_dims& d, const cp_plan& plan,
                    std::span<const int> targets, const layer_state<T, typename Backend::memory_type>& from,
                    const layer_state<T, typename Backend::memory_type>& to,
                    workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  using A = accumulate_t<T>;
  const auto leaving = static_cast<index_t>(plan.leaving.size());
  const index_t arriving = std::count(targets.begin(), targets.end(), plan.rank);
  const index_t conv = d.channels() * d.conv_width;
  expects_shape(from.recurrent, "the final states", {leaving, d.value_heads, d.key_dim, d.value_dim});
  expects_shape(from.conv, "the final conv states", {leaving, d.channels(), d.conv_width});
  expects_shape(to.recurrent, "the delivered states", {arriving, d.value_heads, d.key_dim, d.value_dim});
  expects_shape(to.conv, "the delivered conv states", {arriving, d.channels(), d.conv_width});
  const scoped_mark scope(ws);
  detail::table_placer place(ws, [&](auto host, auto table) { be.upload(host, table, s); });
  const resident_exchange<memory> delivery = place(plan_delivery(plan, targets));
  exchange_rows<A>(be, comm, delivery, reshape(from.recurrent, leaving, d.state_size()),
                   reshape(to.recurrent, arriving, d.state_size()), ws, s);
  exchange_rows<T>(be, comm, delivery, reshape(from.conv, leaving, conv), reshape(to.conv, arriving, conv), ws, s);
}

/// The first rule that the slots for delivered states break, if any: one for each document that arrives, all different,
/// in the pool; -1 drops a document's states.
inline std::optional<diagnostic> validate_delivery_slots(std::span<const std::int32_t> given, index_t arriving,
                                                         index_t slots) {
  if (static_cast<index_t>(given.size()) != arriving) {
    return diagnostic{say(given.size(), "slots are given, but", arriving, "documents arrive at this rank")};
  }
  std::vector<std::int32_t> seen;
  for (std::size_t i = 0; i < given.size(); ++i) {
    if (given[i] < -1 || given[i] >= slots) {
      return diagnostic{say("arriving document", i, "goes to slot", given[i], "; slots of this pool are 0 to",
                            slots - 1, ", and -1 drops it")};
    }
    if (given[i] >= 0) seen.push_back(given[i]);
  }
  std::sort(seen.begin(), seen.end());
  const auto twice = std::adjacent_find(seen.begin(), seen.end());
  if (twice != seen.end()) return diagnostic{say("slot", *twice, "is named twice")};
  return std::nullopt;
}

namespace detail {

/// What arrives, before it goes to its slots.
template <class T, memory_kind Memory>
struct delivered_states {
  tensor_ref<std::int32_t, 1, Memory> slots;
  layer_state<T, Memory> states;

  static delivered_states take(workspace<Memory>& ws, const layer_dims& d, index_t n) {
    return {ws.template take<std::int32_t>(n), carve_pool<T>(ws, d, n)};
  }
};

}  // namespace detail

/// Bytes of workspace that deliver_states takes to deliver to a pool.
template <class T, memory_kind Memory = host_memory>
memory_requirement pool_delivery_requirement(const layer_dims& d, const cp_plan& plan, std::span<const int> targets) {
  workspace<Memory> measure;
  detail::delivered_states<T, Memory>::take(measure, d, std::count(targets.begin(), targets.end(), plan.rank));
  return {measure.peak().bytes + delivery_requirement<T, Memory>(d, plan, targets).bytes};
}

/// The same into slots of a pool, e.g. that of the rank which decodes what all ranks have prefilled.
///
/// @param targets [N] the rank of each document
/// @param from    the final states of this rank, [plan.leaving, ..]
/// @param pool    of this rank; other slots stay as they are. Ranks where no document arrives may pass an empty one
/// @param slots   on the host: the slot of each document that arrives here, ascending by document; -1 drops its states
/// @throws metadata_error with the text of validate_delivery_slots(), before anything is sent
template <class T, class StateT, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && serving_backend<Backend, T, StateT>
void deliver_states(const Backend& be, Comm& comm, const layer_dims& d, const cp_plan& plan,
                    std::span<const int> targets, const layer_state<T, typename Backend::memory_type>& from,
                    const state_pool<T, StateT, typename Backend::memory_type>& pool,
                    std::span<const std::int32_t> slots, workspace<typename Backend::memory_type>& ws,
                    typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  const index_t arriving = std::count(targets.begin(), targets.end(), plan.rank);
  raise(validate_delivery_slots(slots, arriving, pool.slots()));
  if (arriving > 0) check_pool(pool, d);
  const scoped_mark scope(ws);
  const auto to = detail::delivered_states<T, memory>::take(ws, d, arriving);
  be.upload(slots, to.slots, s);
  deliver_states<T>(be, comm, d, plan, targets, from, to.states, ws, s);
  if (arriving == 0) return;
  be.store_states(detail::read_only(to.states.recurrent), to.slots, pool.recurrent, s);
  be.store_states(detail::read_only(detail::as_states(to.states.conv)), to.slots, detail::as_states(pool.conv), s);
}

}  // namespace v0
}  // namespace gdn
