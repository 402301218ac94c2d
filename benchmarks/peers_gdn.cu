// SPDX-License-Identifier: Apache-2.0
// gdn's delta rule behind a C interface over device pointers, for peers.py: K = V = 128, bf16, states in float.
// Every call enqueues on the stream, allocates nothing and returns 0, or prints what went wrong and returns 1.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <span>
#include <utility>
#include <vector>

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>

namespace {

using gdn::bfloat16;
using gdn::index_t;
using device = gdn::device_memory;
template <class T>
auto tensor(T* data, auto... extents) {
  return gdn::make_tensor<device>(data, extents...);
}

constexpr index_t dim = 128;

/// Sizes, tables and scratch of packed sequences.
struct rule {
  gdn::cuda::backend be;
  gdn::cuda::stream setup;
  gdn::delta_rule_problem<bfloat16, device> problem;
  gdn::cuda::device_block table{{0}}, prepared{{0}}, scratch{{0}};
  index_t sequences = 0;

  rule(index_t key_heads, index_t value_heads, std::span<const index_t> lengths) {
    problem.key_heads = key_heads;
    problem.value_heads = value_heads;
    problem.key_dim = problem.value_dim = dim;
    problem.scale = 1 / std::sqrt(static_cast<float>(dim));
    std::vector<gdn::rule_segment> segments;
    for (const index_t n : lengths) {
      const auto at = static_cast<std::int32_t>(segments.size());
      segments.push_back({problem.tokens, n, problem.chunks, at, at, at, at});
      problem.tokens += n;
      problem.chunks += (n + problem.chunk - 1) / problem.chunk;
      problem.longest = std::max(problem.longest, n);
    }
    sequences = static_cast<index_t>(segments.size());
    table = gdn::cuda::device_block({segments.size() * sizeof(gdn::rule_segment)});
    const auto uploaded = tensor(static_cast<gdn::rule_segment*>(table.data()), sequences);
    gdn::cuda::copy_to_device<gdn::rule_segment>(segments, uploaded, setup);
    problem.segments = uploaded;
    prepared = gdn::cuda::device_block({static_cast<std::size_t>(be.delta_rule_prepared(problem)) * sizeof(float)});
    scratch = gdn::cuda::device_block({be.delta_rule_scratch(problem).bytes + 256});
  }

  auto keys(auto* p) const { return tensor(p, problem.tokens, problem.key_heads, dim); }
  auto values(auto* p) const { return tensor(p, problem.tokens, problem.value_heads, dim); }
  auto gates(auto* p) const { return tensor(p, problem.tokens, problem.value_heads); }
  auto states(auto* p) const { return tensor(p, sequences, problem.value_heads, dim, dim); }
  gdn::summaries_ref<bfloat16, device> inverses() const {
    return tensor(static_cast<float*>(prepared.data()), be.delta_rule_prepared(problem));
  }
};

template <class F>
int guarded(F&& f) {
  try {
    std::forward<F>(f)();
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "gdn: %s\n", e.what());
    return 1;
  }
}

}  // namespace

extern "C" {

void* gdn_rule_create(index_t key_heads, index_t value_heads, const index_t* lengths, index_t sequences) {
  rule* made = nullptr;
  guarded([&] { made = new rule(key_heads, value_heads, {lengths, static_cast<std::size_t>(sequences)}); });
  return made;
}

void gdn_rule_destroy(void* r) {
  delete static_cast<rule*>(r);
}

/// What forward and backward share of a chunk, kept in the rule, then forward.
int gdn_rule_forward(void* handle, const bfloat16* q, const bfloat16* k, const bfloat16* v, const float* g,
                     const bfloat16* beta, const float* h0, bfloat16* o, float* ht, cudaStream_t stream) {
  return guarded([&] {
    const rule& r = *static_cast<rule*>(handle);
    const gdn::cuda::stream_ref s(stream);
    auto ws = r.scratch.workspace();
    const gdn::delta_rule_inputs<bfloat16, device> in{r.keys(q), r.keys(k), r.values(v), r.gates(g), r.gates(beta)};
    r.be.delta_rule_prepare(r.problem, in, r.inverses(), s);
    r.be.delta_rule_forward(r.problem, in, r.inverses(), r.states(h0), r.values(o), r.states(ht), ws, s);
  });
}

/// Needs what the last forward of this rule left.
int gdn_rule_backward(void* handle, const bfloat16* q, const bfloat16* k, const bfloat16* v, const float* g,
                      const bfloat16* beta, const float* h0, const bfloat16* d_o, const float* dht, bfloat16* dq,
                      bfloat16* dk, bfloat16* dv, float* dg, float* d_beta, float* dh0, cudaStream_t stream) {
  return guarded([&] {
    const rule& r = *static_cast<rule*>(handle);
    const gdn::cuda::stream_ref s(stream);
    auto ws = r.scratch.workspace();
    const gdn::delta_rule_inputs<bfloat16, device> in{r.keys(q), r.keys(k), r.values(v), r.gates(g), r.gates(beta)};
    r.be.delta_rule_backward(r.problem, in, r.inverses(), r.states(h0), r.values(d_o), r.states(dht),
                             {r.keys(dq), r.keys(dk), r.values(dv), r.gates(dg), r.gates(d_beta)}, r.states(dh0), ws,
                             s);
  });
}

/// One token of each of `batch` sequences; their states [batch, Hv, K, V], float or bf16, are changed in place.
int gdn_step(int bf16_state, index_t batch, index_t key_heads, index_t value_heads, const bfloat16* q,
             const bfloat16* k, const bfloat16* v, const float* g, const bfloat16* beta, void* pool,
             const std::int32_t* slots, bfloat16* o, cudaStream_t stream) {
  return guarded([&] {
    static const gdn::cuda::backend be;
    const auto keys = [&](auto* p) { return tensor(p, batch, key_heads, dim); };
    const auto values = [&](auto* p) { return tensor(p, batch, value_heads, dim); };
    const auto gates = [&](auto* p) { return tensor(p, batch, value_heads); };
    const gdn::delta_rule_inputs<bfloat16, device> in{keys(q), keys(k), values(v), gates(g), gates(beta)};
    const auto step = [&](auto* states) {
      be.delta_rule_step(1 / std::sqrt(static_cast<float>(dim)), in, tensor(states, batch, value_heads, dim, dim),
                         tensor(slots, batch), values(o), gdn::cuda::stream_ref(stream));
    };
    bf16_state != 0 ? step(static_cast<bfloat16*>(pool)) : step(static_cast<float*>(pool));
  });
}

}  // extern "C"
