// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  resident_plan: a plan with its tables in a backend's memory, uploaded once.

#include <span>
#include <vector>

#include <gdn/core/tensor.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/plan/cp_plan.hpp>

namespace gdn {
inline namespace v0 {

template <memory_kind Memory>
struct resident_exchange {
  exchange_plan plan;
  tensor_ref<const run, 1, Memory> sends;
  tensor_ref<const run, 1, Memory> recvs;
};

template <memory_kind Memory>
struct resident_chain {
  struct round {
    resident_exchange<Memory> exchange;
    tensor_ref<const compose_item, 1, Memory> compose;
  };
  tensor_ref<const published_summary, 1, Memory> published;
  std::vector<round> rounds;
  tensor_ref<const fold_item, 1, Memory> folds;
  tensor_ref<const fold_link, 1, Memory> links;
  index_t published_elements = 0;
  index_t elements = 0;
};

/// What forward and backward take. Immutable; any number of calls may share it. The memory behind the tables is the
/// caller's and must outlive it.
template <memory_kind Memory>
struct resident_plan {
  cp_plan host;
  resident_exchange<Memory> undo, redo, halo, halo_adjoint;
  tensor_ref<const conv_segment, 1, Memory> conv_segments;
  tensor_ref<const rule_segment, 1, Memory> rule_segments;
  resident_chain<Memory> chain, reverse_chain;
};

namespace detail {

/// Places tables in memory; without a backend it only measures.
template <memory_kind Memory, class Upload>
class table_placer {
 public:
  table_placer(workspace<Memory>& memory, Upload upload) : memory_(memory), upload_(upload) {}

  template <class Entry>
  tensor_ref<const Entry, 1, Memory> operator()(const std::vector<Entry>& entries) {
    auto table = memory_.template take<Entry>(static_cast<index_t>(entries.size()));
    if (!memory_.measuring() && !entries.empty()) upload_(std::span<const Entry>(entries), table);
    return table;
  }
  resident_exchange<Memory> operator()(const exchange_plan& plan) {
    return {plan, (*this)(plan.sends), (*this)(plan.recvs)};
  }
  resident_chain<Memory> operator()(const chain_plan& plan) {
    resident_chain<Memory> out{(*this)(plan.published), {}, (*this)(plan.folds), (*this)(plan.links),
                               plan.published_elements, plan.elements};
    for (const chain_round& r : plan.rounds) out.rounds.push_back({(*this)(r.exchange), (*this)(r.compose)});
    return out;
  }
  resident_plan<Memory> operator()(const cp_plan& plan) {
    return {plan,
            (*this)(plan.undo),
            (*this)(plan.redo),
            (*this)(plan.halo.exchange),
            (*this)(plan.halo.exchange.inverse()),
            (*this)(plan.conv_segments),
            (*this)(plan.rule_segments),
            (*this)(plan.chain),
            (*this)(plan.reverse_chain)};
  }

 private:
  workspace<Memory>& memory_;
  Upload upload_;
};

}  // namespace detail

/// Bytes that upload() takes for the tables of a plan.
template <memory_kind Memory>
memory_requirement resident_requirement(const cp_plan& plan) {
  workspace<Memory> measure;
  detail::table_placer place(measure, [](auto, auto) {});
  place(plan);
  return measure.peak();
}

/// Copies the tables of a plan to where the backend reads them.
/// @param memory at least resident_requirement(plan) bytes, alive as long as the result
template <class Backend>
resident_plan<typename Backend::memory_type> upload(const Backend& be, const cp_plan& plan,
                                                    workspace<typename Backend::memory_type>& memory,
                                                    typename Backend::stream_type s) {
  detail::table_placer place(memory, [&](auto host, auto table) { be.upload(host, table, s); });
  return place(plan);
}

}  // namespace v0
}  // namespace gdn
