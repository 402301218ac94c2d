// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Launches of the delta rule: persistent blocks, each with scratch of its own.

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include <gdn/concepts/operands.hpp>
#include <gdn/core/workspace.hpp>
#include <gdn/cuda/delta_rule.cuh>
#include <gdn/cuda/delta_rule_step.cuh>
#include <gdn/cuda/head_sizes.hpp>
#include <gdn/cuda/mma_gated.cuh>
#include <gdn/cuda/mma_gradients.cuh>
#include <gdn/cuda/mma_pieces.cuh>
#include <gdn/cuda/mma_prepare.cuh>
#include <gdn/cuda/mma_reverse_scan.cuh>
#include <gdn/cuda/mma_scan.cuh>
#include <gdn/cuda/rows.cuh>

namespace gdn {
inline namespace v0 {
namespace cuda::detail {

template <class T>
using problem_ref = const delta_rule_problem<T, device_memory>&;
template <class T>
using rule_inputs_ref = const delta_rule_inputs<T, device_memory>&;

/// What launches depend on.
struct device_limits {
  index_t sm_count = 0;
  index_t shared = 0;  ///< bytes of shared memory that a block can have
};
inline constexpr index_t most_shared = 227 * 1024;  ///< of those on any device

template <class T>
void check_problem(problem_ref<T> p, rule_inputs_ref<T> in) {
  expects<backend_error>(1 <= p.chunk && p.chunk <= max_chunk, "the chunk length must lie in 1 to", max_chunk, ", is",
                         p.chunk);
  expects_head_sizes(p.key_dim, p.value_dim);
  expects_rule_inputs(in, p.tokens, p.key_heads, p.value_heads, p.key_dim, p.value_dim);
}

/// Blocks that run at once, and their scratch.
struct block_scratch {
  float* data = nullptr;
  index_t stride = 0;
  index_t blocks = 0;
};

inline block_scratch take_blocks(device_limits device, index_t items, index_t elements, workspace<device_memory>& ws) {
  block_scratch b;
  b.blocks = std::min<index_t>(items, 4 * device.sm_count);
  b.stride = divide_up(elements, 32) * 32;
  b.data = ws.take<float>(b.blocks, b.stride).data();
  return b;
}

template <class T>
index_t scan_elements(problem_ref<T> p) {
  return p.key_dim * scan_columns + cta_chunk<T>::elements(p.chunk, p.key_dim, scan_columns);
}
template <class T>
index_t gradient_elements(problem_ref<T> p) {
  return cta_chunk<T>::elements(p.chunk, p.key_dim, p.value_dim) + 4 * p.chunk * p.key_dim + 2 * p.chunk * p.value_dim +
         5 * p.chunk * p.chunk;
}
template <class T>
index_t state_elements(problem_ref<T> p) {
  return p.chunks * p.value_heads * p.key_dim * p.value_dim;
}
template <class T>
index_t scan_blocks(problem_ref<T> p, index_t columns) {
  return p.value_heads * divide_up(columns, scan_columns);
}

/// Shared memory of the largest of the tensor cores' kernels, its static part included.
template <int Key, int Stages>
inline constexpr index_t gradients_mma_need = gradients_shared<Key, Stages>::bytes + sizeof(gradient_sums) +
                                              sizeof(chunk_gates);

/// True if the tensor cores' kernels do this: 16-bit types, chunks of 64 tokens, K and V multiples of 16; on devices
/// with the shared memory of sm_80 at least, and of sm_90 for K above 128.
template <class T>
bool fits_mma(device_limits device, problem_ref<T> p) {
  const index_t need = with_key_width(p.key_dim, [](auto key) { return gradients_mma_need<key(), 1>; });
  return sizeof(T) == 2 && device.shared >= need && p.chunk == mma_chunk && p.key_dim % 16 == 0 &&
         p.value_dim % 16 == 0;
}
/// Those kernels move rows in pieces of 16 bytes.
template <class T>
void check_pieces(std::string_view name, const tensor_ref<T, 3, device_memory>& t) {
  constexpr index_t piece = 16 / sizeof(T);
  expects<backend_error>(
      reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0 && t.stride(0) % piece == 0 && t.stride(1) % piece == 0 &&
          t.stride(2) == 1,
      "rows of", name, "must start at multiples of 16 bytes, with no gaps in them; the strides are", t.stride(0),
      t.stride(1), "and", t.stride(2), "elements");
}
template <class T>
void check_pieces(rule_inputs_ref<T> in) {
  check_pieces("q", in.q);
  check_pieces("k", in.k);
  check_pieces("v", in.v);
}

/// The most that any call takes: backward keeps the states before all chunks, their gradients, and those between
/// pieces.
template <class T>
memory_requirement delta_rule_scratch(device_limits device, problem_ref<T> p) {
  workspace<device_memory> backward;
  if (fits_mma<T>(device, p)) {
    const auto pieces = cut_segments(device.sm_count, p);
    take_gated(p, true, backward);
    backward.take<T>(2, mma_state_elements(p));
    backward.take<float>(piece_rows(pieces, p), p.value_dim);
    return backward.peak();
  }
  constexpr index_t all = index_t{1} << 40;
  workspace<device_memory> forward;
  take_blocks(device, all, scan_elements<T>(p), forward);
  backward.take<float>(2, state_elements<T>(p));
  take_blocks(device, all, std::max(scan_elements<T>(p), gradient_elements<T>(p)), backward);
  return {std::max(forward.peak().bytes, backward.peak().bytes)};
}

/// The chunk inverses, in the layer's type.
template <class T>
const T* inverses_of(const_summaries_ref<T, device_memory> prepared) {
  return reinterpret_cast<const T*>(prepared.data());
}
template <class T>
index_t inverse_elements(problem_ref<T> p) {
  return divide_up(p.chunks * p.value_heads * p.chunk * p.chunk * static_cast<index_t>(sizeof(T)), sizeof(float));
}

/// What follows the inverses begins at a multiple of 64 elements.
template <class T>
index_t inverses_end(problem_ref<T> p) {
  return divide_up(inverse_elements<T>(p), 64) * 64;
}
/// Behind the inverses: what is known of pieces. prepare() has no workspace: without tensor cores its scratch is there,
/// three matrices of one chunk per block.
template <class T>
index_t delta_rule_prepared(device_limits device, problem_ref<T> p) {
  if (fits_mma<T>(device, p)) return inverses_end<T>(p) + piece_elements(cut_segments(device.sm_count, p), p);
  return inverses_end<T>(p) +
         std::min<index_t>(p.chunks * p.value_heads, 4 * device.sm_count) * (p.chunk * (p.key_dim + 2 * p.chunk));
}
template <class T>
segment_pieces pieces_of(device_limits device, problem_ref<T> p, summaries_ref<T, device_memory> prepared) {
  return place_pieces(cut_segments(device.sm_count, p), p, prepared.data() + inverses_end<T>(p));
}

template <class T>
void delta_rule_prepare(device_limits device, problem_ref<T> p, rule_inputs_ref<T> in,
                        summaries_ref<T, device_memory> prepared, stream_ref s) {
  check_problem<T>(p, in);
  T* inverses = reinterpret_cast<T*>(prepared.data());
  if constexpr (sizeof(T) == 2) {
    if (fits_mma<T>(device, p)) {
      check_pieces("k", in.k);
      with_key_width(p.key_dim, [&](auto key) {
        launch("delta_rule_prepare", prepare_mma_kernel<T, key()>, grid_of(p.chunks, p.key_heads), prepare_mma_threads,
               prepare_shared<key()>::bytes, s, p, in, inverses);
      });
      return;
    }
  }
  launch("delta_rule_prepare", prepare_kernel<T>,
         grid_of(std::min<index_t>(p.chunks * p.value_heads, 4 * device.sm_count)), cta_threads, 0, s, p, in, inverses,
         prepared.data() + inverses_end<T>(p), p.chunk * (p.key_dim + 2 * p.chunk));
}

/// What the walks over segments need of every chunk, taken from `ws`.
template <class T, bool Scores>
gated_chunks<T> make_gated(problem_ref<T> p, rule_inputs_ref<T> in, const T* inverses, workspace<device_memory>& ws,
                           stream_ref s) {
  check_pieces<T>(in);
  const gated_chunks<T> gated = take_gated(p, Scores, ws);
  with_key_width(p.key_dim, [&](auto key) {
    launch("delta_rule_gates", gated_mma_kernel<T, key(), Scores>, grid_of(p.chunks, p.key_heads), gated_mma_threads,
           gated_mma_shared<key()>, s, p, in, inverses, gated);
  });
  return gated;
}

/// The walks over all pieces, from the states that are known of them.
template <class T, scan Mode>
void run_scan_mma(problem_ref<T> p, rule_inputs_ref<T> in, const gated_chunks<T>& gated, const segment_pieces& pieces,
                  const scan_targets<T>& to, T* states, stream_ref s) {
  with_key_width(p.key_dim, [&](auto key) {
    launch("delta_rule_scan", scan_mma_kernel<T, key(), Mode>,
           flat_grid(mma_blocks(p.value_dim), p.value_heads, p.segments.extent(0) * pieces.count), scan_mma_threads,
           scan_shared<key(), Mode == scan::output>::bytes, s, p, in, gated, pieces, to, states);
  });
}
template <class T, bool Summary>
void run_reverse_scan_mma(problem_ref<T> p, rule_inputs_ref<T> in, const gated_chunks<T>& gated,
                          const segment_pieces& pieces, const reverse_targets<T>& to, bool chained,
                          tensor_ref<T, 3, device_memory> d_v, T* d_states, stream_ref s) {
  check_pieces("d_o", to.d_o);
  if (!Summary) check_pieces("dv", d_v);
  const index_t units = Summary && !pieces.cut() ? to.table.extent(0) : p.segments.extent(0) * pieces.count;
  with_key_width(p.key_dim, [&](auto key) {
    launch("delta_rule_reverse_scan", reverse_scan_mma_kernel<T, key(), Summary>,
           flat_grid(mma_blocks(p.value_dim), p.value_heads, units), scan_mma_threads, scan_shared<key(), true>::bytes,
           s, p, in, gated, pieces, to, d_v, d_states, chained);
  });
}

/// E and M of all pieces, or of published segments where nothing is cut.
template <class T>
void run_summary_mma(problem_ref<T> p, rule_inputs_ref<T> in, const gated_chunks<T>& gated,
                     const segment_pieces& pieces, const scan_targets<T>& to, bool chained, stream_ref s) {
  const index_t units = pieces.cut() ? p.segments.extent(0) * pieces.count : to.table.extent(0);
  with_key_width(p.key_dim, [&](auto key) {
    launch("delta_rule_summary", summary_mma_kernel<T, key()>,
           flat_grid(mma_blocks(p.value_dim) + mma_blocks(p.key_dim), p.value_heads, units), scan_mma_threads,
           scan_shared<key(), false>::bytes, s, p, in, gated, pieces, to, chained);
  });
}
/// The states between pieces, or going back the gradients, in scratch of the call's own.
template <class T, bool Back>
void run_fold_pieces(problem_ref<T> p, const segment_pieces& pieces, const_states_ref<T, device_memory> given,
                     bool apply_given, stream_ref s) {
  launch("fold_pieces", p.key_dim <= 128 ? fold_pieces_kernel<T, Back, 128> : fold_pieces_kernel<T, Back, 256>,
         flat_grid(algebra_blocks(p.value_dim), p.value_heads, p.segments.extent(0)), algebra_threads, 0, s, p, pieces,
         given, apply_given);
}
template <class T, bool Back>
void run_join_pieces(problem_ref<T> p, const segment_pieces& pieces, const_states_ref<T, device_memory> given,
                     tensor_ref<const published_summary, 1, device_memory> table, float* summaries, stream_ref s) {
  const index_t columns = algebra_blocks(p.value_dim) + (Back ? 0 : algebra_blocks(p.key_dim));  // M^T is copied
  launch("join_pieces", p.key_dim <= 128 ? join_pieces_kernel<T, Back, 128> : join_pieces_kernel<T, Back, 256>,
         flat_grid(columns, p.value_heads, table.extent(0)), algebra_threads, 0, s, p, pieces, given, table, summaries);
}

template <class T, scan Mode>
void run_scan(device_limits device, problem_ref<T> p, rule_inputs_ref<T> in, const scan_targets<T>& to, index_t items,
              workspace<device_memory>& ws, stream_ref s) {
  if (items == 0) return;
  const scoped_mark scope(ws);
  const block_scratch b = take_blocks(device, items, scan_elements<T>(p), ws);
  launch("delta_rule_scan", scan_kernel<T, Mode>, grid_of(b.blocks), cta_threads, 0, s, p, in, to, b.data, b.stride);
}

template <class T>
void delta_rule_summarise(device_limits device, problem_ref<T> p, rule_inputs_ref<T> in,
                          summaries_ref<T, device_memory> prepared,
                          tensor_ref<const published_summary, 1, device_memory> table,
                          const_states_ref<T, device_memory> h0, summaries_ref<T, device_memory> summaries,
                          workspace<device_memory>& ws, stream_ref s) {
  check_problem<T>(p, in);
  const scan_targets<T> to{inverses_of<T>(prepared), h0, {}, {}, table, summaries.data(), nullptr};
  if constexpr (sizeof(T) == 2) {
    if (fits_mma<T>(device, p)) {
      // Without a chain between ranks forward makes its own pieces, from states that it knows.
      const auto pieces = p.chained ? pieces_of<T>(device, p, prepared) : segment_pieces{};
      if (table.extent(0) == 0 && !pieces.cut()) return;
      const scoped_mark scope(ws);
      const auto gated = make_gated<T, false>(p, in, to.prepared, ws, s);
      run_summary_mma<T>(p, in, gated, pieces, to, p.chained, s);
      if (pieces.cut()) run_join_pieces<T, false>(p, pieces, h0, table, summaries.data(), s);
      return;
    }
  }
  run_scan<T, scan::bias>(device, p, in, to, table.extent(0) * scan_blocks<T>(p, p.value_dim), ws, s);
  run_scan<T, scan::transition>(device, p, in, to, table.extent(0) * scan_blocks<T>(p, p.key_dim), ws, s);
}

template <class T>
void delta_rule_forward(device_limits device, problem_ref<T> p, rule_inputs_ref<T> in,
                        summaries_ref<T, device_memory> prepared, const_states_ref<T, device_memory> h0,
                        tensor_ref<T, 3, device_memory> o, states_ref<T, device_memory> ht,
                        workspace<device_memory>& ws, stream_ref s) {
  check_problem<T>(p, in);
  const scan_targets<T> to{inverses_of<T>(prepared), h0, o, ht, {}, nullptr, nullptr};
  if constexpr (sizeof(T) == 2) {
    if (fits_mma<T>(device, p)) {
      check_pieces("o", o);
      const scoped_mark scope(ws);
      auto pieces = pieces_of<T>(device, p, prepared);
      const auto gated = make_gated<T, true>(p, in, to.prepared, ws, s);
      if (pieces.cut()) {
        pieces.between = ws.take<float>(piece_rows(pieces, p), p.value_dim).data();
        if (!p.chained) run_summary_mma<T>(p, in, gated, pieces, to, false, s);
        run_fold_pieces<T, false>(p, pieces, h0, p.chained, s);
      }
      run_scan_mma<T, scan::output>(p, in, gated, pieces, to, nullptr, s);
      return;
    }
  }
  run_scan<T, scan::output>(device, p, in, to, p.segments.extent(0) * scan_blocks<T>(p, p.value_dim), ws, s);
}

template <class T>
void delta_rule_summarise_gradient(device_limits device, problem_ref<T> p, rule_inputs_ref<T> in,
                                   summaries_ref<T, device_memory> prepared, tensor_ref<const T, 3, device_memory> d_o,
                                   const_states_ref<T, device_memory> dht,
                                   tensor_ref<const published_summary, 1, device_memory> table,
                                   const_summaries_ref<T, device_memory> own, summaries_ref<T, device_memory> summaries,
                                   workspace<device_memory>& ws, stream_ref s) {
  check_problem<T>(p, in);
  const reverse_targets<T> to{inverses_of<T>(prepared), d_o, dht, table, summaries.data(), nullptr, {}};
  const bool mma = fits_mma<T>(device, p);
  if constexpr (sizeof(T) == 2) {
    const auto pieces = p.chained ? pieces_of<T>(device, p, prepared) : segment_pieces{};
    if (mma && (table.extent(0) > 0 || pieces.cut())) {
      const scoped_mark scope(ws);
      const auto gated = make_gated<T, true>(p, in, to.prepared, ws, s);
      run_reverse_scan_mma<T, true>(p, in, gated, pieces, to, p.chained, {}, nullptr, s);
      if (pieces.cut()) run_join_pieces<T, true>(p, pieces, dht, table, summaries.data(), s);
    }
  }
  if (table.extent(0) == 0) return;
  if (!mma) {
    const scoped_mark scope(ws);
    const block_scratch b =
        take_blocks(device, table.extent(0) * scan_blocks<T>(p, p.value_dim), scan_elements<T>(p), ws);
    launch("delta_rule_summarise_gradient", reverse_scan_kernel<T, true>, grid_of(b.blocks), cta_threads, 0, s, p, in,
           to, b.data, b.stride);
  }
  launch("transpose_own", transpose_own_kernel<float>, grid_of(table.extent(0), p.value_heads), 256, 0, s, table,
         p.key_dim, own.data(), summaries.data());
}

template <class T>
void delta_rule_backward(device_limits device, problem_ref<T> p, rule_inputs_ref<T> in,
                         summaries_ref<T, device_memory> prepared, const_states_ref<T, device_memory> h0,
                         tensor_ref<const T, 3, device_memory> d_o, const_states_ref<T, device_memory> dht,
                         const delta_rule_gradients<T, device_memory>& out, states_ref<T, device_memory> dh0,
                         workspace<device_memory>& ws, stream_ref s) {
  check_problem<T>(p, in);
  if (p.tokens == 0) return;
  const scoped_mark scope(ws);
  if constexpr (sizeof(T) == 2) {
    if (fits_mma<T>(device, p)) {
      check_pieces("dq", out.q);
      check_pieces("dk", out.k);
      const auto states = ws.take<T>(2, mma_state_elements(p));
      T* d_states = states.data() + mma_state_elements(p);
      const T* inverses = inverses_of<T>(prepared);
      auto pieces = pieces_of<T>(device, p, prepared);
      if (pieces.cut()) pieces.between = ws.take<float>(piece_rows(pieces, p), p.value_dim).data();
      const auto gated = make_gated<T, true>(p, in, inverses, ws, s);

      if (pieces.cut()) run_fold_pieces<T, false>(p, pieces, h0, p.chained, s);
      run_scan_mma<T, scan::states>(p, in, gated, pieces, {inverses, h0, {}, {}, {}, nullptr, nullptr}, states.data(),
                                    s);

      const reverse_targets<T> to{inverses, d_o, dht, {}, nullptr, nullptr, dh0};
      if (pieces.cut()) {
        if (!p.chained) run_reverse_scan_mma<T, true>(p, in, gated, pieces, to, false, {}, nullptr, s);
        run_fold_pieces<T, true>(p, pieces, dht, p.chained, s);
      }
      run_reverse_scan_mma<T, false>(p, in, gated, pieces, to, p.chained, out.v, d_states, s);
      with_key_width(p.key_dim, [&](auto key) {
        const auto run = [&](auto stages) {
          launch("delta_rule_gradients", gradients_mma_kernel<T, key(), stages()>, grid_of(p.chunks, p.key_heads),
                 gradients_mma_threads, gradients_shared<key(), stages()>::bytes, s, p, in, inverses,
                 static_cast<const T*>(states.data()), static_cast<const T*>(d_states), d_o, out);
        };
        if constexpr (gradients_mma_need<key(), 2> <= most_shared) {
          if (device.shared >= gradients_mma_need<key(), 2>) return run(std::integral_constant<int, 2>{});
        }
        run(std::integral_constant<int, 1>{});
      });
      return;
    }
  }
  const auto states = ws.take<float>(2, state_elements<T>(p));
  float* d_states = states.data() + state_elements<T>(p);
  const index_t items = p.segments.extent(0) * scan_blocks<T>(p, p.value_dim);
  run_scan<T, scan::states>(device, p, in, {inverses_of<T>(prepared), h0, {}, {}, {}, nullptr, states.data()}, items,
                            ws, s);
  {
    const scoped_mark inner(ws);
    const block_scratch b = take_blocks(device, items, scan_elements<T>(p), ws);
    const reverse_targets<T> to{inverses_of<T>(prepared), d_o, dht, {}, nullptr, d_states, dh0};
    launch("delta_rule_reverse_scan", reverse_scan_kernel<T, false>, grid_of(b.blocks), cta_threads, 0, s, p, in, to,
           b.data, b.stride);
  }
  const block_scratch b = take_blocks(device, p.chunks * p.key_heads, gradient_elements<T>(p), ws);
  launch("delta_rule_gradients", chunk_gradients_kernel<T>, grid_of(b.blocks), cta_threads, 0, s, p, in,
         inverses_of<T>(prepared), static_cast<const float*>(states.data()), static_cast<const float*>(d_states), d_o,
         out, b.data, b.stride);
}

}  // namespace cuda::detail
}  // namespace v0
}  // namespace gdn
