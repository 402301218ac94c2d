// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Random batches in random layouts: what the laws of the plans are tested on.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gdn/plan/cp_plan.hpp>
#include <support/explicit_layout.hpp>
#include <support/random.hpp>

namespace gdn_test {

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define GDN_TEST_SANITIZED
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define GDN_TEST_SANITIZED
#endif

/// Number of random cases of a law; GDN_CASES multiplies it. Sanitizers make do with fewer.
inline std::uint64_t cases(std::uint64_t n) {
  static const std::uint64_t factor = [] {
    const char* text = std::getenv("GDN_CASES");
    return text != nullptr ? std::strtoull(text, nullptr, 0) : std::uint64_t{1};
  }();
#ifdef GDN_TEST_SANITIZED
  n = std::max<std::uint64_t>(n / 10, 50);
#endif
  return n * factor;
}

/// Rows [0, rows) dealt out to `world` ranks, some of which may be empty.
struct random_layout {
  std::string name;
  gdn::explicit_layout layout;
};

/// Random ranges of random ranks in random order.
inline gdn::explicit_layout random_ranges(random_source& random, index_t rows, int world) {
  std::vector<std::pair<index_t, index_t>> pieces;
  index_t at = 0;
  for (const index_t n : random.lengths(rows, random.between(1, 3 * world))) {
    if (n > 0) pieces.emplace_back(at, at + n);
    at += n;
  }
  std::shuffle(pieces.begin(), pieces.end(), random.engine());
  std::vector<std::vector<std::pair<index_t, index_t>>> of_rank(static_cast<std::size_t>(world));
  const index_t used = random.between(1, world);  // the ranks behind stay empty
  for (const auto& p : pieces) of_rank[static_cast<std::size_t>(random.between(0, used - 1))].push_back(p);
  std::shuffle(of_rank.begin(), of_rank.end(), random.engine());
  return gdn::from_ranges(of_rank);
}

inline gdn::explicit_layout random_positions(random_source& random, index_t rows, int world) {
  const std::vector<index_t> order = random.permutation(rows);
  std::vector<std::vector<index_t>> of_rank;
  std::size_t at = 0;
  for (const index_t n : random.lengths(rows, world)) {
    const auto begin = order.begin() + static_cast<std::ptrdiff_t>(at);
    of_rank.emplace_back(begin, begin + n);
    at += static_cast<std::size_t>(n);
  }
  return gdn::from_positions(of_rank);
}

/// Blocks of `block` rows, dealt out in turn.
inline gdn::explicit_layout block_cyclic(index_t rows, index_t block, int world) {
  std::vector<std::vector<std::pair<index_t, index_t>>> of_rank(static_cast<std::size_t>(world));
  for (index_t at = 0; at < rows; at += block) {
    of_rank[static_cast<std::size_t>(at / block % world)].emplace_back(at, std::min(rows, at + block));
  }
  return gdn::from_ranges(of_rank);
}

inline random_layout any_layout(random_source& random, index_t rows, int world) {
  switch (random.between(0, 5)) {
    case 0:
      return {"zigzag", explicit_of(gdn::zigzag_layout{rows / (2 * world) * (2 * world), world})};
    case 1:
      return {"interleaved", explicit_of(gdn::interleaved_layout{rows, world})};
    case 2:
      return {"positions", random_positions(random, rows, world)};
    case 3:
      return {"ranges", random_ranges(random, rows, world)};
    case 4:
      return {"block-cyclic", block_cyclic(rows, random.between(1, 4), world)};
    default:
      return {"contiguous", explicit_of(gdn::contiguous_layout{rows, world})};
  }
}

/// An indexed mask with padding before, between and behind the documents of each row.
inline std::vector<index_t> random_mask(random_source& random, index_t batch, index_t row_length) {
  std::vector<index_t> mask;
  for (index_t b = 0; b < batch; ++b) {
    index_t id = 0;
    for (const index_t n : random.lengths(row_length, random.between(1, 6))) {
      id += random.between(1, 2);
      mask.insert(mask.end(), static_cast<std::size_t>(n), random.coin(3) ? 0 : id);
    }
  }
  return mask;
}

struct random_packing {
  std::string name;
  gdn::packing pack;
};

inline std::vector<index_t> cumulative(const std::vector<index_t>& lengths) {
  std::vector<index_t> cu = {0};
  for (const index_t n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

inline random_packing any_packing(random_source& random, index_t batch, index_t row_length) {
  switch (random.between(0, 5)) {
    case 0:
      return {"rows", gdn::packing::rows_of(batch, row_length)};
    case 1:
      return {"mask", gdn::packing::from_mask(random_mask(random, batch, row_length), batch, row_length)};
    case 2: {
      std::vector<index_t> mask;
      for (index_t b = 0; b < batch; ++b) {  // padding on the left, on the right, on both sides, or everywhere
        const auto n = random.lengths(row_length, 3);
        for (std::size_t i = 0; i < 3; ++i) mask.insert(mask.end(), static_cast<std::size_t>(n[i]), i == 1 ? 1 : 0);
      }
      return {"0/1 mask", gdn::packing::from_mask(mask, batch, row_length)};
    }
    case 3: {
      std::vector<index_t> lengths;
      for (index_t b = 0; b < batch; ++b) lengths.push_back(random.between(0, row_length));
      return {"lengths", gdn::packing::from_lengths(lengths, row_length)};
    }
    case 4: {  // documents may be empty, and reach over the end of a row
      const auto cu = cumulative(random.lengths(batch * row_length, random.between(1, 7)));
      return {"cu_seqlens", gdn::packing::from_cu_seqlens(cu, {}, batch, row_length)};
    }
    default: {  // documents may be empty, and interrupted by padding
      std::vector<index_t> indices;
      for (index_t i = 0; i < batch * row_length; ++i) {
        if (!random.coin(4)) indices.push_back(i);
      }
      const auto cu = cumulative(random.lengths(static_cast<index_t>(indices.size()), random.between(1, 7)));
      return {"cu_seqlens with indices", gdn::packing::from_cu_seqlens(cu, indices, batch, row_length)};
    }
  }
}

/// One batch in one layout, without the choices that a plan leaves open.
struct plan_case {
  std::string name;
  int world = 1;
  gdn::fragment_table rows;
  gdn::packing pack;
  gdn::plan_shape shape;

  gdn::cp_plan plan(const gdn::plan_options& options, int rank) const {
    return gdn::plan_context_parallel(rows, pack, shape, 3, options, world, rank);
  }
  std::vector<gdn::cp_plan> plans(const gdn::plan_options& options) const {
    std::vector<gdn::cp_plan> out;
    for (int r = 0; r < world; ++r) out.push_back(plan(options, r));
    return out;
  }
};

inline std::ostream& operator<<(std::ostream& out, const plan_case& c) {
  out << c.name << ", GDN_SEED=" << seed() << ": " << c.world << " ranks, batch " << c.pack.batch << " x "
      << c.pack.row_length << ", W " << c.shape.conv_width << ", cu";
  for (const index_t n : c.pack.cu_seqlens) out << ' ' << n;
  out << ", runs";
  for (const gdn::token_run& r : c.pack.runs) out << ' ' << r.row << '+' << r.count;
  out << ", fragments";
  for (const gdn::fragment& f : c.rows) out << ' ' << f.begin << '+' << f.count << '@' << f.rank << ':' << f.local;
  return out;
}

/// Per-document zigzag of a stream of documents with padding between them, over the rows of a batch as one row.
inline plan_case per_document_case(random_source& random, int world) {
  std::vector<index_t> mask;
  for (index_t id = 1, n = random.between(1, 5); id <= n; ++id) {
    mask.insert(mask.end(), static_cast<std::size_t>(2 * world * random.between(0, 3)), id);
    if (random.coin(3)) mask.insert(mask.end(), static_cast<std::size_t>(random.between(0, 5)), 0);
  }
  plan_case c;
  c.name = "per-document zigzag";
  c.world = world;
  const auto length = static_cast<index_t>(mask.size());
  c.pack = gdn::packing::from_mask(mask, 1, length);
  c.rows = gdn::per_document_zigzag(c.pack.document_rows(), length, world).fragments();
  return c;
}

inline plan_case any_case(random_source& random) {
  const int world = static_cast<int>(random.between(1, 8));
  plan_case c;
  if (random.coin(8)) {
    c = per_document_case(random, world);
  } else {
    const index_t batch = random.between(1, 3);
    // Short rows make pieces shorter than W; long ones make documents of many pieces.
    const index_t row_length = random.coin(4) ? random.between(1, 8) : random.between(1, 48);
    const bool per_row = random.coin(3);
    const auto [layout_name, layout] =
        per_row ? random_layout{"ranges of the batch", random_ranges(random, batch * row_length, world)}
                : any_layout(random, row_length, world);
    const index_t length = per_row ? row_length : layout.size();
    const auto [packing_name, pack] = any_packing(random, batch, length);
    c.name = layout_name + ", " + packing_name;
    c.world = world;
    c.rows = per_row ? layout.table : gdn::batch_table(layout.table, layout.rows, world, batch);
    c.pack = pack;
  }
  c.shape.conv_width = random.between(1, 6);
  c.shape.chunk = random.between(1, 5);
  c.shape.summary = {random.between(1, 2), random.between(1, 2), random.between(1, 3)};
  c.shape.hidden = random.coin(4) ? 1 : 1000;  // rows are cheap, or so dear that any number of pieces stays in place
  return c;
}

inline constexpr gdn::strategy strategies[] = {gdn::strategy::reshard, gdn::strategy::in_place};
inline constexpr gdn::share shares[] = {gdn::share::all_gather, gdn::share::prefix_scan, gdn::share::relay};

}  // namespace gdn_test
