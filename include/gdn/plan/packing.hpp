// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Packing: which rows of a batch are tokens of which document, from masks, lengths or cu_seqlens.

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <gdn/core/error.hpp>
#include <gdn/core/types.hpp>

namespace gdn {
inline namespace v0 {

/// Rows [row, row + count) of the batch are tokens [token, token + count) of the stream.
struct token_run {
  index_t row = 0;
  index_t token = 0;
  index_t count = 0;
  constexpr bool operator==(const token_run&) const = default;
};

/// A batch of B rows of S tokens as one *stream* of its valid tokens, row by row; padding is not in the stream, so it
/// can neither read nor feed anything. Document n is the tokens [cu_seqlens[n], cu_seqlens[n + 1]) of the stream,
/// possibly none. Documents are numbered through all rows, so two rows never share one by accident.
struct packing {
  index_t batch = 1;
  index_t row_length = 0;
  std::vector<token_run> runs;             ///< ascending, never touching
  std::vector<index_t> cu_seqlens = {0};   ///< [N + 1]

  index_t rows() const noexcept { return batch * row_length; }
  index_t tokens() const noexcept { return cu_seqlens.back(); }
  index_t documents() const noexcept { return static_cast<index_t>(cu_seqlens.size()) - 1; }
  /// True if every row is a token: nothing is unpadded or repadded.
  bool dense() const noexcept { return tokens() == rows(); }
  bool operator==(const packing&) const = default;

  /// No padding, one document per row.
  static packing rows_of(index_t batch, index_t row_length) {
    expects<metadata_error>(batch >= 0 && row_length >= 0, "a batch cannot have", batch, "rows of", row_length);
    packing p{batch, row_length, {}, {0}};
    if (p.rows() > 0) p.runs.push_back({0, 0, p.rows()});
    for (index_t b = 0; b < batch; ++b) p.cu_seqlens.push_back((b + 1) * row_length);
    return p;
  }

  /// From an indexed mask [B, S]: 1, 2, 3 .. per document of a row, ascending, each in one piece; 0 is padding. Ids
  /// may skip numbers. If no id exceeds 1 it is a 0/1 mask: one document per row, an empty one where all is padding.
  /// @throws metadata_error naming the row and position of the first broken rule
  static packing from_mask(std::span<const index_t> mask, index_t batch, index_t row_length);

  /// From right-padded rows: row b has `lengths[b]` tokens and then padding.
  static packing from_lengths(std::span<const index_t> lengths, index_t row_length);

  /// From cumulative lengths over the rows `indices` of the flattened batch (ascending), or over all B * S rows if
  /// `indices` is empty. Equal neighbours in `cu` are an empty document.
  /// @throws metadata_error unless `cu` starts at 0, never decreases, and ends at |indices| or B * S
  static packing from_cu_seqlens(std::span<const index_t> cu, std::span<const index_t> indices, index_t batch,
                                 index_t row_length);

  /// The flat row of each token, [tokens()]: the map of unpad (gather) and of repad (scatter).
  std::vector<index_t> indices() const {
    std::vector<index_t> out;
    out.reserve(static_cast<std::size_t>(tokens()));
    for (const token_run& r : runs) {
      for (index_t i = 0; i < r.count; ++i) out.push_back(r.row + i);
    }
    return out;
  }

  /// [begin, end) of each document in rows of the batch. A document must be one piece there (every mask says so).
  std::vector<std::pair<index_t, index_t>> document_rows() const;
};

inline std::optional<diagnostic> validate_mask(std::span<const index_t> mask, index_t batch, index_t row_length) {
  const auto entries = static_cast<index_t>(mask.size());
  const bool fits = batch > 0 && row_length > 0 ? entries % batch == 0 && entries / batch == row_length  // no overflow
                                                : batch >= 0 && row_length >= 0 && entries == 0;
  if (!fits) {
    return diagnostic{say("the mask has", mask.size(), "entries, the batch", batch, "x", row_length)};
  }
  for (index_t b = 0; b < batch; ++b) {
    index_t last = 0;     // the id of the document before
    bool inside = false;  // whether the previous position belongs to it
    for (index_t s = 0; s < row_length; ++s) {
      const index_t id = mask[static_cast<std::size_t>(b * row_length + s)];
      if (id < 0) return diagnostic{say("mask row", b, "position", s, "is", id, "; ids must not be negative")};
      if (id == 0) {
        inside = false;
        continue;
      }
      if (id < last) {
        return diagnostic{say("mask row", b, "position", s, "is", id, "after", last, "; ids must not descend")};
      }
      if (id == last && !inside) {
        return diagnostic{say("mask row", b, "position", s, ": document", id, "comes in two pieces")};
      }
      last = id;
      inside = true;
    }
  }
  return std::nullopt;
}

inline packing packing::from_mask(std::span<const index_t> mask, index_t batch, index_t row_length) {
  raise(validate_mask(mask, batch, row_length));
  packing p{batch, row_length, {}, {0}};
  const bool indexed = std::any_of(mask.begin(), mask.end(), [](index_t id) { return id > 1; });
  index_t token = 0;
  for (index_t b = 0; b < batch; ++b) {
    index_t last = 0;
    for (index_t s = 0; s < row_length; ++s) {
      const index_t row = b * row_length + s;
      const index_t id = mask[static_cast<std::size_t>(row)];
      if (id == 0) continue;
      if (id != last && last != 0) p.cu_seqlens.push_back(token);
      last = id;
      if (!p.runs.empty() && p.runs.back().row + p.runs.back().count == row) {
        ++p.runs.back().count;
      } else {
        p.runs.push_back({row, token, 1});
      }
      ++token;
    }
    if (last != 0 || !indexed) p.cu_seqlens.push_back(token);
  }
  return p;
}

inline packing packing::from_lengths(std::span<const index_t> lengths, index_t row_length) {
  packing p{static_cast<index_t>(lengths.size()), row_length, {}, {0}};
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    expects<metadata_error>(0 <= lengths[b] && lengths[b] <= row_length, "row", b, "has length", lengths[b],
                            "; lengths must lie in 0 to", row_length);
    const index_t row = static_cast<index_t>(b) * row_length;
    const index_t token = p.cu_seqlens.back();
    if (!p.runs.empty() && p.runs.back().row + p.runs.back().count == row) {
      p.runs.back().count += lengths[b];
    } else if (lengths[b] > 0) {
      p.runs.push_back({row, token, lengths[b]});
    }
    p.cu_seqlens.push_back(token + lengths[b]);
  }
  return p;
}

/// The first rule that cumulative lengths break, if any.
inline std::optional<diagnostic> validate_cu_seqlens(std::span<const index_t> cu, index_t total) {
  if (cu.empty()) return diagnostic{"cu_seqlens is empty; it must start at 0"};
  if (cu.front() != 0) return diagnostic{say("cu_seqlens[0] must be 0, is", cu.front())};
  for (std::size_t i = 1; i < cu.size(); ++i) {
    if (cu[i] < cu[i - 1]) {
      return diagnostic{say("cu_seqlens must not decrease, but position", i, "is", cu[i], "after", cu[i - 1])};
    }
  }
  if (cu.back() != total) return diagnostic{say("cu_seqlens must end at", total, ", ends at", cu.back())};
  return std::nullopt;
}

/// The first rule that a packing breaks, if any; the functions that make one never break any.
inline std::optional<diagnostic> validate_packing(const packing& p) {
  if (p.batch < 0 || p.row_length < 0) return diagnostic{say("a batch cannot have", p.batch, "rows of", p.row_length)};
  index_t row = -1;  // the end of the run before
  index_t token = 0;
  for (std::size_t i = 0; i < p.runs.size(); ++i) {
    const token_run& r = p.runs[i];
    if (r.row <= row || r.count <= 0 || r.row >= p.rows() || r.count > p.rows() - r.row) {
      return diagnostic{say("run", i, "has", r.count, "rows from row", r.row, "on; runs must ascend within", p.rows(),
                            "rows without touching")};
    }
    if (r.token != token) return diagnostic{say("run", i, "begins at token", r.token, ", must begin at", token)};
    row = r.row + r.count;
    token += r.count;
  }
  return validate_cu_seqlens(p.cu_seqlens, token);
}

inline packing packing::from_cu_seqlens(std::span<const index_t> cu, std::span<const index_t> indices, index_t batch,
                                        index_t row_length) {
  expects<metadata_error>(batch >= 0 && row_length >= 0, "a batch cannot have", batch, "rows of", row_length);
  packing p{batch, row_length, {}, {cu.begin(), cu.end()}};
  if (indices.empty() && !(cu.size() >= 1 && cu.back() == 0)) {
    raise(validate_cu_seqlens(cu, p.rows()));
    if (p.rows() > 0) p.runs.push_back({0, 0, p.rows()});
    return p;
  }
  raise(validate_cu_seqlens(cu, static_cast<index_t>(indices.size())));
  index_t last = -1;
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const index_t row = indices[i];
    expects<metadata_error>(row > last && row < p.rows(), "indices must ascend within 0 to", p.rows() - 1,
                            ", but position", i, "is", row, "after", last);
    if (!p.runs.empty() && row == last + 1) {
      ++p.runs.back().count;
    } else {
      p.runs.push_back({row, static_cast<index_t>(i), 1});
    }
    last = row;
  }
  return p;
}

inline std::vector<std::pair<index_t, index_t>> packing::document_rows() const {
  std::vector<std::pair<index_t, index_t>> out;
  std::size_t r = 0;
  for (index_t n = 0; n < documents(); ++n) {
    const index_t lo = cu_seqlens[static_cast<std::size_t>(n)];
    const index_t hi = cu_seqlens[static_cast<std::size_t>(n) + 1];
    if (lo == hi) {  // an empty document lies where the one before ended
      const index_t at = out.empty() ? 0 : out.back().second;
      out.emplace_back(at, at);
      continue;
    }
    while (runs[r].token + runs[r].count <= lo) ++r;
    expects<metadata_error>(hi <= runs[r].token + runs[r].count, "document", n,
                            "is interrupted by padding; it must be one piece here");
    const index_t begin = runs[r].row + lo - runs[r].token;
    out.emplace_back(begin, begin + hi - lo);
  }
  return out;
}

}  // namespace v0
}  // namespace gdn
