// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Carries out a state chain: summaries travel, are composed, and are folded into states.

#include <algorithm>

#include <gdn/comm/exchange_rows.hpp>

namespace gdn {
inline namespace v0 {

/// Bytes of workspace that share_summaries takes.
template <class A, memory_kind Memory>
memory_requirement share_scratch(const chain_plan& plan, int rank) {
  memory_requirement most;
  for (const chain_round& r : plan.rounds) {
    most.bytes = std::max(most.bytes, exchange_scratch<A, Memory>(r.exchange, 1, false, rank).bytes);
  }
  return most;
}

/// @param summaries the chain's buffer; its published part is filled, the rest is written here
/// All arithmetic in A, the layer's accumulate_t; the order of the products is the plan's, whatever the timing.
template <class A, communicator Comm, class Backend>
  requires compatible<Backend, Comm>
void share_summaries(const Backend& be, Comm& comm, const resident_chain<typename Backend::memory_type>& chain,
                     const summary_shape& shape, tensor_ref<A, 1, typename Backend::memory_type> summaries,
                     workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  const auto elements = make_tensor<typename Backend::memory_type>(summaries.data(), chain.elements, 1);
  for (const auto& round : chain.rounds) {
    exchange_rows<A>(be, comm, round.exchange, elements, elements, ws, s);
    if (round.compose.size() > 0) {
      be.compose(shape.heads, shape.key_dim, shape.value_dim, round.compose, summaries, s);
    }
  }
}

}  // namespace v0
}  // namespace gdn
