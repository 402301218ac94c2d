// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One call for the sequences of a server: prefill, a few more tokens, or one, each on its slot of a pool.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <gdn/concepts/state_pool.hpp>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/state_pool.hpp>
#include <gdn/layer/steps.hpp>
#include <gdn/plan/resident.hpp>

namespace gdn {
inline namespace v0 {

/// Rows [begin, begin + count) of x are the next tokens of the sequence whose state is in `slot`; `fresh` if they are
/// its first ones: then the slot's old content is not read. Slot -1: the rows are skipped, and their y is zero.
struct sequence {
  index_t begin = 0;
  index_t count = 0;
  std::int32_t slot = -1;
  bool fresh = false;
  constexpr bool operator==(const sequence&) const = default;
};

/// The first rule that the sequences of a call break, if any: ranges lie within `tokens` rows and do not overlap, slots
/// lie in -1 to slots - 1, none is named twice.
inline std::optional<diagnostic> validate_sequences(std::span<const sequence> sequences, index_t tokens,
                                                    index_t slots) {
  if (tokens < 0) return diagnostic{say("a call cannot have", tokens, "rows")};
  constexpr index_t most_slots = index_t{1} << 31;
  if (slots < 0 || slots > most_slots) {
    return diagnostic{say("a pool cannot have", slots, "slots; their number must lie in 0 to", most_slots)};
  }
  std::vector<std::size_t> by_slot, by_row;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const sequence& q = sequences[i];
    if (q.begin < 0 || q.count < 0 || q.begin > tokens || q.count > tokens - q.begin) {
      return diagnostic{say("sequence", i, "has", q.count, "rows from row", q.begin, "on; the call has", tokens)};
    }
    if (q.slot < -1 || q.slot >= slots) {
      return diagnostic{
          say("sequence", i, "names slot", q.slot, "; slots of this pool are 0 to", slots - 1, ", and -1 skips")};
    }
    if (q.slot >= 0) by_slot.push_back(i);
    if (q.count > 0) by_row.push_back(i);
  }
  std::sort(by_slot.begin(), by_slot.end(), [&](std::size_t a, std::size_t b) {
    return std::pair{sequences[a].slot, a} < std::pair{sequences[b].slot, b};
  });
  for (std::size_t i = 1; i < by_slot.size(); ++i) {
    if (sequences[by_slot[i - 1]].slot == sequences[by_slot[i]].slot) {
      return diagnostic{
          say("slot", sequences[by_slot[i]].slot, "is named twice, by sequences", by_slot[i - 1], "and", by_slot[i])};
    }
  }
  std::sort(by_row.begin(), by_row.end(), [&](std::size_t a, std::size_t b) {
    return std::pair{sequences[a].begin, a} < std::pair{sequences[b].begin, b};
  });
  for (std::size_t i = 1; i < by_row.size(); ++i) {
    const sequence& a = sequences[by_row[i - 1]];
    const sequence& b = sequences[by_row[i]];
    if (b.begin < a.begin + a.count) {
      return diagnostic{say("sequences", std::min(by_row[i - 1], by_row[i]), "and", std::max(by_row[i - 1], by_row[i]),
                            "overlap: both have row", b.begin)};
    }
  }
  return std::nullopt;
}

/// What one call serves, as plain values: made once per batch shape on the host, used by every layer of these sizes.
///
/// The sequences that have rows are documents of a stream on one rank, in the order of their rows; rows that nobody
/// has, or whose slot is -1, are its padding.
struct serving_plan {
  index_t tokens = 0;  ///< rows of x
  index_t slots = 0;   ///< of the pool
  bool steps = false;  ///< every sequence that has rows has one: states are updated in place
  cp_plan stream;
  std::vector<std::int32_t> reads;   ///< the slot of each document's initial state; -1 where it is fresh
  std::vector<std::int32_t> writes;  ///< the slot of each document
  std::vector<std::int32_t> clears;  ///< slots that are zeroed first: fresh ones without rows, and all that steps start
};

/// @param tokens rows of x, @param slots of the pool, @param chunk tokens per chunk of the delta rule
/// @throws metadata_error with the text of validate_sequences() or validate_dims()
inline serving_plan plan_serving(std::span<const sequence> sequences, index_t tokens, index_t slots,
                                 const layer_dims& d, index_t chunk = 64) {
  raise(validate_dims(d));
  raise(validate_sequences(sequences, tokens, slots));
  serving_plan plan{tokens, slots, true, {}, {}, {}, {}};
  std::vector<sequence> documents;
  for (const sequence& q : sequences) {
    if (q.slot < 0) continue;
    if (q.count > 0) {
      documents.push_back(q);
      plan.steps = plan.steps && q.count == 1;
    } else if (q.fresh) {
      plan.clears.push_back(q.slot);
    }
  }
  std::sort(documents.begin(), documents.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  packing pack{1, tokens, {}, {0}};
  for (const sequence& q : documents) {
    plan.reads.push_back(q.fresh ? -1 : q.slot);
    plan.writes.push_back(q.slot);
    if (plan.steps && q.fresh) plan.clears.push_back(q.slot);
    const index_t token = pack.tokens();
    if (!pack.runs.empty() && pack.runs.back().row + pack.runs.back().count == q.begin) {
      pack.runs.back().count += q.count;
    } else {
      pack.runs.push_back({q.begin, token, q.count});
    }
    pack.cu_seqlens.push_back(token + q.count);
  }
  plan.stream =
      plan_layer(d, contiguous_layout{tokens, 1}, pack, {.initial_state = true, .final_state = true}, 0, chunk);
  return plan;
}

/// A serving_plan with its tables in a backend's memory; what serve() takes.
template <memory_kind Memory>
struct resident_serving {
  serving_plan host;
  resident_plan<Memory> stream;
  tensor_ref<const std::int32_t, 1, Memory> reads, writes, clears;
};

namespace detail {
template <memory_kind Memory, class Place>
resident_serving<Memory> place_serving(const serving_plan& plan, Place&& place) {
  return {plan, place(plan.stream), place(plan.reads), place(plan.writes), place(plan.clears)};
}
}  // namespace detail

/// Bytes that upload() takes for the tables of a plan.
template <memory_kind Memory>
memory_requirement resident_requirement(const serving_plan& plan) {
  workspace<Memory> measure;
  detail::place_serving<Memory>(plan, detail::table_placer(measure, [](auto, auto) {}));
  return measure.peak();
}

/// Copies the tables of a plan to where the backend reads them.
/// @param memory at least resident_requirement(plan) bytes, alive as long as the result
template <class Backend>
resident_serving<typename Backend::memory_type> upload(const Backend& be, const serving_plan& plan,
                                                       workspace<typename Backend::memory_type>& memory,
                                                       typename Backend::stream_type s) {
  using memory_type = typename Backend::memory_type;
  return detail::place_serving<memory_type>(
      plan, detail::table_placer(memory, [&](auto host, auto table) { be.upload(host, table, s); }));
}

namespace detail {

/// The communicator of a call that has no other ranks: rows move within one memory.
template <class Backend>
struct no_ranks {
  using memory_type = typename Backend::memory_type;
  using stream_type = typename Backend::stream_type;
  int rank() const noexcept { return 0; }
  int size() const noexcept { return 1; }
  comm_state state() const noexcept { return comm_state::ok; }
  void exchange(std::span<const send_op>, std::span<const recv_op>, stream_type) {
    throw comm_error("serving has no other ranks");
  }
  void abort() noexcept {}
};

/// What serve takes from the workspace for its whole length.
template <class T, memory_kind Memory>
struct serving_buffers {
  activations<T, Memory> act;
  tensor_ref<T, 2, Memory> n;     // [L, Hv V]
  tensor_ref<T, 2, Memory> ys;    // [L, hid], or nothing where every row is computed
  tensor_ref<T, 3, Memory> conv;  // [N, Dc, W], before and then after; nothing for steps
  states_ref<T, Memory> ht;       // [N, Hv, K, V]; likewise

  template <class Backend>
  static serving_buffers take(const Backend& be, workspace<Memory>& ws, const layer_dims& d,
                              const resident_serving<Memory>& batch) {
    const cp_plan& p = batch.host.stream;
    const index_t moved = p.undo_is_identity() ? 0 : p.compute_rows;
    serving_buffers b;
    if (batch.host.steps) {
      b.act = decode_buffers<T>(ws, d, p.compute_rows);
      b.act.moved = ws.template take<T>(moved, d.hidden);
    } else {
      b.act.take_rest(ws, d, p, be.delta_rule_prepared(layer_problem<T>(d, batch.stream)),
                      keep_policy::nothing);
      b.conv = ws.template take<T>(p.entering_states, d.channels(), d.conv_width);
      b.ht = ws.template take<accumulate_t<T>>(p.entering_states, d.value_heads, d.key_dim, d.value_dim);
    }
    b.n = ws.template take<T>(p.compute_rows, d.values());
    b.ys = ws.template take<T>(moved, d.hidden);
    return b;
  }
};

/// From projections to the delta rule's output, for sequences of any lengths: their states are taken out of the pool
/// and put back.
template <class T, class StateT, class Backend, memory_kind Memory>
void serve_stream(const Backend& be, const gated_delta_net<T, Memory>& layer, const state_pool<T, StateT, Memory>& pool,
                  const resident_serving<Memory>& batch, const serving_buffers<T, Memory>& b, workspace<Memory>& ws,
                  typename Backend::stream_type s) {
  const layer_dims& d = layer.dims;
  const activations<T, Memory>& act = b.act;
  const auto problem = layer_problem<T>(d, batch.stream);
  const auto in = act.rule_inputs(d);
  no_ranks<Backend> alone;

  be.load_states(read_only(as_states(pool.conv)), batch.reads, as_states(b.conv), s);   // [N, Dc, W]
  be.load_states(read_only(pool.recurrent), batch.reads, act.rule.h0, s);               // [N, Hv, K, V]
  // The states before are read before those after are written, so they share a buffer.
  fetch_history(be, alone, batch.stream, act.qkv, read_only(b.conv), act.halo, b.conv, ws, s);  // [., Dc]
  prologue<T>(be, layer, batch.stream, act, s);                                         // q, k, v, g, beta
  be.delta_rule_prepare(problem, in, act.rule.prepared, s);
  be.delta_rule_forward(problem, in, act.rule.prepared, act.rule.h0, split_columns(act.o, d.value_heads, d.value_dim),
                        b.ht, ws, s);  // [L, Hv, V]
  be.store_states(read_only(as_states(b.conv)), batch.writes, as_states(pool.conv), s);
  be.store_states(read_only(b.ht), batch.writes, pool.recurrent, s);
}

}  // namespace detail

/// Bytes of workspace that serve() takes. They depend on the rows and sequences of the call, not on the pool.
template <class T, class Backend>
  requires backend<Backend, T>
memory_requirement serve_requirement(const Backend& be, const layer_dims& d,
                                     const resident_serving<typename Backend::memory_type>& batch) {
  using memory = typename Backend::memory_type;
  detail::check_heads(be, d);
  const cp_plan& p = batch.host.stream;
  workspace<memory> measure;
  detail::serving_buffers<T, memory>::take(be, measure, d, batch);
  std::size_t scratch = be.scratch(detail::sizes_of(d, p.compute_rows)).bytes;
  for (const exchange_plan* e : {&p.undo, &p.redo}) {
    scratch = std::max(scratch, exchange_scratch<T, memory>(*e, d.hidden, false, 0).bytes);
  }
  if (!batch.host.steps) {
    scratch = std::max({scratch, history_scratch<between_t<T, memory>, memory>(p, d.channels()).bytes,
                        be.delta_rule_scratch(detail::layer_problem<T>(d, batch.stream)).bytes});
  }
  measure.template take<std::byte>(static_cast<index_t>(scratch));
  return measure.peak();
}

/// The next tokens of some sequences: the first ones of new sequences, several more of others, one of most. One rank.
///
/// Where every sequence has one token, states are updated in their slots. Otherwise those of all named slots are copied
/// out of the pool, go through the chunked rule, and are copied back.
///
/// @param pool  caller's memory; the slots that the plan names are updated, the others stay as they are
/// @param batch made by plan_serving() for this layer's sizes and this pool, and uploaded
/// @param x     [batch.host.tokens, hid] contiguous; rows that are skipped may hold anything
/// @param y     likewise, written; rows that are skipped become zero; must not overlap x
/// @param ws    at least serve_requirement() bytes; free again once the stream has passed this call
/// Numbers of a sequence depend on its own rows and state only: equal, up to rounding, to those of the sequence alone
/// and to forward() over all its tokens at once. Enqueued on `s`; allocates a few words of host memory and nothing
/// else; may be captured in a graph; same bits on every run.
/// @throws metadata_error, shape_error, workspace_error before anything runs
template <class T, class StateT, class Backend, tensor_like X, tensor_like Y>
  requires serving_backend<Backend, T, StateT>
void serve(const Backend& be, const gated_delta_net<T, typename Backend::memory_type>& layer,
           const state_pool<T, StateT, typename Backend::memory_type>& pool,
           const resident_serving<typename Backend::memory_type>& batch, const X& x, const Y& y,
           workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  const layer_dims& d = layer.dims;
  const cp_plan& p = batch.host.stream;
  const auto in = as_tensor<const T, 2, memory>(x);
  const auto out = as_tensor<T, 2, memory>(y);
  check_layer(layer, p);
  detail::check_heads(be, d);
  check_pool(pool, d);
  expects<metadata_error>(pool.slots() == batch.host.slots, "the plan is for a pool of", batch.host.slots,
                          "slots, this one has", pool.slots());
  detail::check_rows(in, "x", batch.host.tokens, d.hidden);
  detail::check_rows(out, "y", batch.host.tokens, d.hidden);

  const scoped_mark scope(ws);
  auto b = detail::serving_buffers<T, memory>::take(be, ws, d, batch);
  if (!batch.host.clears.empty()) {
    be.store_states(const_states_ref<T, memory>{}, batch.clears, pool.recurrent, s);
    be.store_states(tensor_ref<const T, 4, memory>{}, batch.clears, detail::as_states(pool.conv), s);
  }
  if (p.compute_rows == 0) {
    be.fill_zero(out, s);
    return;
  }
  detail::no_ranks<Backend> alone;
  const auto ys = p.undo_is_identity() ? out : b.ys;
  b.act.xs = detail::undo<T>(be, alone, batch.stream, in, b.act.moved, ws, s);  // [L, hid]
  detail::project_in(be, layer, b.act, ws, s);                                  // qkv | z | b | a
  if (batch.host.steps) {
    detail::step(be, layer, b.act, pool, batch.writes, s);  // [L, Hv, V]
  } else {
    detail::serve_stream(be, layer, pool, batch, b, ws, s);  // [L, Hv, V]
  }
  epilogue<T>(be, layer, b.act, b.n, s);                      // [L, Hv V]
  be.linear_forward(b.n, layer.weights.out_proj, ys, ws, s);  // [L, hid]
  detail::redo<T>(be, alone, batch.stream, ys, out, ws, s);   // zero where rows are skipped
}

}  // namespace v0
}  // namespace gdn
