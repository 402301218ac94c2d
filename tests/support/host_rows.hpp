// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The row operations and the composition of summaries, in plain loops: a backend for tests of what moves rows.

#include <algorithm>
#include <span>
#include <vector>

#include <gdn/concepts/backend.hpp>
#include <gdn/core/workspace.hpp>

namespace gdn_test {

using gdn::index_t;

struct host_rows {
  using memory_type = gdn::host_memory;
  using stream_type = gdn::host_stream;
  template <class T>
  using rows = gdn::tensor_ref<T, 2>;
  using runs = gdn::tensor_ref<const gdn::run, 1>;

  template <class T>
  void copy_rows(rows<const T> src, rows<T> dst, stream_type) const {
    for (index_t i = 0; i < dst.extent(0); ++i) copy(src, i, dst, i);
  }
  template <class T>
  void gather_rows(rows<const T> src, runs table, rows<T> dst, stream_type) const {
    for_each(table, [&](index_t local, index_t packed) { copy(src, local, dst, packed); });
  }
  template <class T>
  void scatter_rows(rows<const T> src, runs table, rows<T> dst, stream_type) const {
    for_each(table, [&](index_t local, index_t packed) { copy(src, packed, dst, local); });
  }
  template <class T>
  void scatter_add_rows(rows<const T> src, runs table, rows<T> dst, stream_type) const {
    for_each(table, [&](index_t local, index_t packed) {
      for (index_t j = 0; j < dst.extent(1); ++j) dst(local, j) += src(packed, j);
    });
  }
  template <class T>
  void fill_zero(rows<T> t, stream_type) const {
    for (index_t i = 0; i < t.extent(0); ++i) {
      for (index_t j = 0; j < t.extent(1); ++j) t(i, j) = T{};
    }
  }
  template <class T>
  void swap_axes(gdn::tensor_ref<const T, 3> src, gdn::tensor_ref<T, 3> dst, stream_type) const {
    for (index_t n = 0; n < dst.extent(0); ++n) {
      for (index_t i = 0; i < dst.extent(1); ++i) {
        for (index_t j = 0; j < dst.extent(2); ++j) dst(n, i, j) = src(n, j, i);
      }
    }
  }
  template <class Entry>
  void upload(std::span<const Entry> host, gdn::tensor_ref<Entry, 1> table, stream_type) const {
    std::copy(host.begin(), host.end(), table.data());
  }
  /// For summaries of one head with K = V = 1.
  template <class A>
  void compose(index_t, index_t, index_t, gdn::tensor_ref<const gdn::compose_item, 1> items,
               gdn::tensor_ref<A, 1> summaries, stream_type) const {
    for (index_t i = 0; i < items.size(); ++i) {
      const gdn::compose_item& c = items(i);
      summaries(c.bias) = summaries(c.later_transition) * summaries(c.earlier_bias) + summaries(c.later_bias);
      if (c.transition >= 0) {
        summaries(c.transition) = summaries(c.later_transition) * summaries(c.earlier_transition);
      }
    }
  }

 private:
  template <class T>
  static void copy(rows<const T> src, index_t from, rows<T> dst, index_t to) {
    for (index_t j = 0; j < dst.extent(1); ++j) dst(to, j) = src(from, j);
  }
  template <class F>
  static void for_each(runs table, F f) {
    for (index_t i = 0; i < table.size(); ++i) {
      for (index_t k = 0; k < table(i).count; ++k) f(table(i).local + k, table(i).packed + k);
    }
  }
};
static_assert(gdn::row_ops<host_rows, float> && gdn::row_ops<host_rows, double> && gdn::row_ops<host_rows, long>);

/// Memory of a workspace, at its alignment.
class host_block {
 public:
  explicit host_block(gdn::memory_requirement need) : bytes_(need.bytes), memory_(need.bytes + 256) {}
  gdn::workspace<gdn::host_memory> workspace() {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data());
    return {memory_.data() + (256 - at % 256) % 256, bytes_};
  }

 private:
  std::size_t bytes_;
  std::vector<std::byte> memory_;
};

}  // namespace gdn_test
