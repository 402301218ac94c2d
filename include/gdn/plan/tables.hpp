// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The entries of a plan's tables: what backends read, on the host or uploaded.

#include <cstdint>

#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {

/// Local rows [local, local + count) go to or come from `peer`; in the message they start at row `packed`.
struct run {
  int peer = 0;
  index_t local = 0;
  index_t count = 0;
  index_t packed = 0;
  constexpr bool operator==(const run&) const = default;
};

/// Rows [begin, begin + count) of one document; its W - 1 rows of history start at row `halo` of the halo buffer,
/// oldest first, or are zero (-1).
struct conv_segment {
  index_t begin = 0;
  index_t count = 0;
  index_t halo = -1;
  constexpr bool operator==(const conv_segment&) const = default;
};

/// Rows [begin, begin + count) of this rank: consecutive tokens of one document. The other numbers are places in
/// buffers of states; -1 means that there is none (a state or gradient of zero that comes in, or one that nobody
/// reads going out).
struct rule_segment {
  index_t begin = 0;
  index_t count = 0;
  index_t chunk_begin = 0;  ///< of its chunks of `delta_rule_problem::chunk` tokens; the last may be shorter
  std::int32_t h0 = -1;     ///< state before the segment
  std::int32_t ht = -1;     ///< state after it, written by forward
  std::int32_t dh0 = -1;    ///< gradient of h0, written by backward
  std::int32_t dht = -1;    ///< gradient that arrives at the state after it
  constexpr bool operator==(const rule_segment&) const = default;
};

/// A segment whose effect on the state others read: S_out = M S_in + E. Places count elements of the buffer of
/// summaries; E is [Hv, K, V] at `bias`, M is [Hv, K, K] at `transition`, or is not wanted (-1). Backward reads the M
/// that forward left at `own_transition` of the tape.
struct published_summary {
  std::int32_t segment = 0;
  std::int32_t start = -1;  ///< the state from which E starts: a given one for the first of a chain, else none
  index_t bias = 0;
  index_t transition = -1;
  index_t own_transition = -1;
  constexpr bool operator==(const published_summary&) const = default;
};

/// (M, E) of the later run applied to the earlier one: E <- M2 E1 + E2 and, if wanted, M <- M2 M1.
/// Elements of one buffer; no output may overlap an input.
struct compose_item {
  index_t later_bias = 0, later_transition = 0;
  index_t earlier_bias = 0, earlier_transition = -1;
  index_t bias = 0, transition = -1;
  constexpr bool operator==(const compose_item&) const = default;
};

/// One summary that a fold reads; the first of a fold has no transition, since a chain starts from a state.
struct fold_link {
  index_t bias = 0;
  index_t transition = -1;
  constexpr bool operator==(const fold_link&) const = default;
};

/// State `target` <- the links [begin, begin + count) applied in order: S <- bias of the first, then S <- M S + E.
struct fold_item {
  index_t begin = 0;
  index_t count = 0;
  index_t target = 0;
  constexpr bool operator==(const fold_item&) const = default;
};

}  // namespace v0
}  // namespace gdn
