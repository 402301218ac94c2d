// SPDX-License-Identifier: Apache-2.0
// What plans say that a layer moves, for any number of ranks: the input of scaling_model.py.
//
//   scaling_plans [--ranks 2,4,8,64,512,4096] [--tokens 32768] [--node 8] [--document 0]
//
// A JSON object per line: bytes that the busiest rank receives in forward and backward, from its own node of `--node`
// ranks and from others, and how many messages. What travels in the chain of states is summed over its rounds, each with
// its busiest rank, since they wait for each other; for a relay that is the whole way of a state, from piece to piece.
// One document over all tokens, or documents of `--document` tokens each.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include <gdn/layer/gated_delta_net.hpp>

namespace {

using gdn::index_t;

struct load {
  double near = 0, far = 0;  // bytes
  index_t messages = 0;
  void grow(const load& other) {
    near = std::max(near, other.near);
    far = std::max(far, other.far);
    messages = std::max(messages, other.messages);
  }
  void add(const load& other) {
    near += other.near;
    far += other.far;
    messages += other.messages;
  }
};

int node = 8;

load of(const std::vector<gdn::run>& received, int rank, index_t bytes_per_row) {
  load out;
  gdn::for_each_peer(received, [&](int peer, std::size_t, std::size_t, index_t rows) {
    if (peer == rank) return;
    (peer / node == rank / node ? out.near : out.far) += static_cast<double>(rows * bytes_per_row);
    ++out.messages;
  });
  return out;
}

/// The busiest of the ranks looked at. For many ranks these are some: the ends, the middle, and the ends of nodes.
struct summary {
  load activations, halo, state;
  index_t rounds = 0, far_rounds = 0, pieces = 0, folds = 0;
};

std::vector<int> some_ranks(int P) {
  std::set<int> out;
  for (const int r : {0, 1, node - 1, node, P / 4, P / 2 - 1, P / 2, P / 2 + 1, 3 * P / 4, P - 2, P - 1}) {
    if (0 <= r && r < P) out.insert(r);
  }
  for (int r = 0; r < P && P <= 64; ++r) out.insert(r);
  return {out.begin(), out.end()};
}

/// From piece to piece of the longest document.
void walk(const gdn::cp_plan& p, bool reverse, index_t state_bytes, summary& out) {
  index_t longest = 0, at = 0;
  for (index_t n = 0; n < p.documents(); ++n) {
    const index_t rows = p.cu_seqlens[static_cast<std::size_t>(n) + 1] - p.cu_seqlens[static_cast<std::size_t>(n)];
    if (rows > longest) longest = rows, at = n;
  }
  const index_t begin = p.cu_seqlens[static_cast<std::size_t>(at)];
  std::vector<int> ranks;
  for (const gdn::fragment& f : p.table) {
    if (f.begin < begin + longest && f.end() > begin) ranks.push_back(f.rank);
  }
  if (reverse) std::reverse(ranks.begin(), ranks.end());
  for (std::size_t i = 1; i < ranks.size(); ++i) {
    const bool is_near = ranks[i] / node == ranks[i - 1] / node;
    (is_near ? out.state.near : out.state.far) += static_cast<double>(state_bytes);
    ++out.state.messages;
    ++out.rounds;
    out.far_rounds += is_near ? 0 : 1;
  }
}

summary look_at(const gdn::layer_dims& d, const gdn::fragment_table& table, const gdn::packing& pack,
                const gdn::plan_options& options, int P, bool backward) {
  constexpr index_t element = 2, accumulated = 4, between = 2;
  summary out;
  std::vector<load> rounds;
  std::vector<char> far_round;
  const std::vector<int> ranks = some_ranks(P);
  for (const int r : ranks) {
    const gdn::cp_plan p = gdn::plan_context_parallel(table, pack, gdn::shape_of(d), d.channels(), options, P, r);
    load moved = of(p.undo.recvs, r, d.hidden * element);
    moved.add(of(p.redo.recvs, r, d.hidden * element));
    out.activations.grow(moved);
    out.halo.grow(of(backward ? p.halo.exchange.sends : p.halo.exchange.recvs, r, d.channels() * between));
    const gdn::chain_plan& chain = backward ? p.reverse_chain : p.chain;
    out.pieces = std::max(out.pieces, static_cast<index_t>(chain.published.size()));
    out.folds = std::max(out.folds, static_cast<index_t>(chain.links.size()));
    if (options.share == gdn::share::relay) {
      if (r == ranks.front()) walk(p, backward, d.state_size() * accumulated, out);
      continue;
    }
    rounds.resize(std::max(rounds.size(), chain.rounds.size()));
    far_round.resize(rounds.size(), 0);
    for (std::size_t i = 0; i < chain.rounds.size(); ++i) {
      const load l = of(chain.rounds[i].exchange.recvs, r, accumulated);
      rounds[i].grow(l);
      if (l.far > 0) far_round[i] = 1;
    }
  }
  for (const load& l : rounds) out.state.add(l);
  out.rounds += static_cast<index_t>(rounds.size());
  out.far_rounds += static_cast<index_t>(std::count(far_round.begin(), far_round.end(), 1));
  return out;
}

std::string to_json(const summary& s) {
  char text[512];
  std::snprintf(text, sizeof text,
                "{\"activations\": [%.0f, %.0f, %lld], \"halo\": [%.0f, %.0f, %lld], \"state\": [%.0f, %.0f, %lld], "
                "\"rounds\": %lld, \"far_rounds\": %lld, \"pieces\": %lld, \"folds\": %lld}",
                s.activations.near, s.activations.far, static_cast<long long>(s.activations.messages), s.halo.near, s.halo.far,
                static_cast<long long>(s.halo.messages), s.state.near, s.state.far, static_cast<long long>(s.state.messages),
                static_cast<long long>(s.rounds), static_cast<long long>(s.far_rounds), static_cast<long long>(s.pieces),
                static_cast<long long>(s.folds));
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  std::string ranks = "2,4,8,64,512,4096";
  index_t tokens = 32768, document = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--ranks") == 0) ranks = argv[i + 1];
    if (std::strcmp(argv[i], "--tokens") == 0) tokens = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--node") == 0) node = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--document") == 0) document = std::atoll(argv[i + 1]);
  }
  const std::vector<std::pair<const char*, gdn::layer_dims>> models = {
      {"35b", {.hidden = 2048, .key_heads = 16, .value_heads = 32, .key_dim = 128, .value_dim = 128}},
      {"122b", {.hidden = 3072, .key_heads = 16, .value_heads = 64, .key_dim = 128, .value_dim = 128}},
      {"397b", {.hidden = 4096, .key_heads = 16, .value_heads = 64, .key_dim = 128, .value_dim = 128}}};
  for (char* at = ranks.data(); at != nullptr && *at != 0;) {
    const int P = static_cast<int>(std::strtol(at, &at, 10));
    at = *at == ',' ? at + 1 : nullptr;
    const index_t all = tokens * P;
    std::vector<index_t> cu = {0};
    while (cu.back() < all) cu.push_back(document > 0 ? std::min(all, cu.back() + document) : all);
    const gdn::packing pack = gdn::packing::from_cu_seqlens(cu, {}, 1, all);
    for (const auto& [model, d] : models) {
      for (const bool zigzag : {false, true}) {
        const gdn::fragment_table table = zigzag ? gdn::zigzag_layout{all, P}.fragments() : gdn::contiguous_layout{all, P}.fragments();
        for (const auto strategy : {gdn::strategy::reshard, gdn::strategy::in_place}) {
          if (!zigzag && strategy == gdn::strategy::in_place) continue;  // nothing to reshard
          for (const auto& [share, name] : {std::pair{gdn::share::all_gather, "all-gather"}, {gdn::share::prefix_scan, "prefix-scan"},
                                            {gdn::share::relay, "relay"}}) {
            gdn::plan_options options;
            options.strategy = strategy;
            options.share = share;
            std::printf("{\"model\": \"%s\", \"ranks\": %d, \"tokens\": %lld, \"document\": %lld, \"layout\": \"%s\", \"strategy\": \"%s\", "
                        "\"share\": \"%s\", \"hidden\": %lld, \"state_bytes\": %lld, \"forward\": %s, \"backward\": %s}\n",
                        model, P, static_cast<long long>(all), static_cast<long long>(document), zigzag ? "zigzag" : "contiguous",
                        strategy == gdn::strategy::reshard ? "reshard" : "in-place", name, static_cast<long long>(d.hidden),
                        static_cast<long long>(d.state_size() * 4), to_json(look_at(d, table, pack, options, P, false)).c_str(),
                        to_json(look_at(d, table, pack, options, P, true)).c_str());
            std::fflush(stdout);
          }
        }
      }
    }
  }
}
