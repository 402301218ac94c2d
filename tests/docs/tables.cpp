// SPDX-License-Identifier: Apache-2.0
// Prints the tables of docs/layouts.md, and what plans say of themselves. check_docs.py compares them, and --write puts
// them there.

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <gdn/layer/gated_delta_net.hpp>

namespace {

using gdn::index_t;

// Qwen3.5-4B: 16-bit activations, states in fp32.
constexpr gdn::layer_dims dims{.hidden = 2560, .key_heads = 16, .value_heads = 32, .key_dim = 128, .value_dim = 128};
constexpr index_t element = 2;
constexpr index_t accumulate = 4;

struct totals {
  gdn::traffic busiest;  // by kind: of the rank that receives most of it
  index_t all = 0;       // of all ranks, all kinds
  index_t rounds = 0;
};

template <class Layout>
totals received(const Layout& layout, const gdn::packing& pack, const gdn::plan_options& options, bool backward) {
  totals t;
  for (int r = 0; r < layout.world_size(); ++r) {
    const auto plan = gdn::plan_layer(dims, layout, pack, options, r);
    const gdn::traffic x = backward ? plan.backward_traffic(dims.hidden, element, accumulate)
                                    : plan.forward_traffic(dims.hidden, element, accumulate);
    t.busiest.halo = std::max(t.busiest.halo, x.halo);
    t.busiest.state = std::max(t.busiest.state, x.state);
    t.busiest.activations = std::max(t.busiest.activations, x.activations);
    t.all += x.total();
    t.rounds = std::max(t.rounds, static_cast<index_t>(plan.chain.rounds.size()));
  }
  return t;
}

std::string mib(index_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, bytes == 0 ? "0" : "%.2f", static_cast<double>(bytes) / (1 << 20));
  return text;
}

const char* name(gdn::strategy s) {
  return s == gdn::strategy::reshard ? "`reshard`" : "`in_place`";
}
const char* name(gdn::share s) {
  return s == gdn::share::all_gather ? "`all_gather`" : s == gdn::share::prefix_scan ? "`prefix_scan`" : "`relay`";
}

/// One document over P contiguous ranks: what the three ways to share cost.
void share_table() {
  std::puts("begin share");
  std::puts("| P | `share` | rounds | forward, busiest rank | forward, all ranks | backward, all ranks |");
  std::puts("|---|---|---|---|---|---|");
  for (const int world : {2, 4, 8, 16, 64}) {
    const gdn::contiguous_layout layout{index_t{1024} * world, world};
    const auto one = gdn::packing::rows_of(1, layout.rows);
    for (const auto how : {gdn::share::all_gather, gdn::share::prefix_scan, gdn::share::relay}) {
      const gdn::plan_options options{.share = how};
      const totals forward = received(layout, one, options, false);
      std::printf("| %d | %s | %lld | %s | %s | %s |\n", world, name(how), static_cast<long long>(forward.rounds),
                  mib(forward.busiest.state).c_str(), mib(forward.all).c_str(),
                  mib(received(layout, one, options, true).all).c_str());
    }
  }
  std::puts("end share");
}

/// 65,536 tokens over eight ranks: what each layout and strategy costs.
template <class Layout>
void strategy_rows(const char* what, const Layout& layout, const gdn::packing& pack) {
  for (const auto how : {gdn::strategy::reshard, gdn::strategy::in_place}) {
    const gdn::plan_options options{.strategy = how, .share = gdn::share::relay};
    const auto done = gdn::plan_layer(dims, layout, pack, options, 0).strategy;
    const totals t = received(layout, pack, options, false);
    std::printf("| %s | %s%s | %s | %s | %s |\n", what, name(how), done == how ? "" : " → `reshard`",
                mib(t.busiest.activations).c_str(), mib(t.busiest.halo).c_str(), mib(t.busiest.state).c_str());
  }
}

void strategy_table() {
  constexpr index_t tokens = 65536;
  constexpr int world = 8;
  const auto one = gdn::packing::rows_of(1, tokens);
  std::vector<std::pair<index_t, index_t>> documents;
  std::vector<index_t> cu = {0};
  for (index_t at = 0; at < tokens; at += 4096) {
    documents.emplace_back(at, at + 4096);
    cu.push_back(at + 4096);
  }
  const auto packed = gdn::packing::from_cu_seqlens(cu, {}, 1, tokens);
  std::puts("begin strategy");
  std::puts("| layout and documents | `strategy` | activations | halo | state |");
  std::puts("|---|---|---|---|---|");
  strategy_rows("contiguous, 1 document", gdn::contiguous_layout{tokens, world}, one);
  strategy_rows("contiguous, 16 documents", gdn::contiguous_layout{tokens, world}, packed);
  strategy_rows("zigzag, 1 document", gdn::zigzag_layout{tokens, world}, one);
  strategy_rows("zigzag, 16 documents", gdn::zigzag_layout{tokens, world}, packed);
  strategy_rows("zigzag per document, 16 documents", gdn::per_document_zigzag(documents, tokens, world), packed);
  strategy_rows("interleaved, 1 document", gdn::interleaved_layout{tokens, world}, one);
  std::puts("end strategy");
}

/// What a plan says of itself.
void description() {
  const auto pack = gdn::packing::rows_of(2, 64);
  const gdn::plan_options options{.strategy = gdn::strategy::in_place, .share = gdn::share::relay};
  std::puts("begin describe\n```text");
  std::fputs(gdn::plan_layer(dims, gdn::zigzag_layout{64, 4}, pack, options, 1).describe().c_str(), stdout);
  std::puts("```\nend describe\nbegin fallback\n```text");
  std::fputs(gdn::plan_layer(dims, gdn::interleaved_layout{64, 4}, pack, options, 1).describe().c_str(), stdout);
  std::puts("```\nend fallback");
}

}  // namespace

int main() {
  share_table();
  strategy_table();
  description();
}
