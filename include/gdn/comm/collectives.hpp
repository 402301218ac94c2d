// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Collectives over exchange: concatenation and its adjoint, sums in the order of the ranks, checks of plans.

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <type_traits>
#include <vector>

#include <gdn/comm/exchange_rows.hpp>
#include <gdn/core/error.hpp>
#include <gdn/plan/cp_plan.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {

/// Every rank's bytes to every other rank, over host memory; sizes are known to all.
template <communicator Comm>
  requires(Comm::memory_type::host_accessible)
void share_bytes(Comm& comm, const void* mine, std::size_t bytes, std::span<void* const> theirs,
                 std::span<const std::size_t> sizes, typename Comm::stream_type s) {
  std::vector<send_op> sends;
  std::vector<recv_op> recvs;
  for (int r = 0; r < comm.size(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    if (r == comm.rank()) {
      if (bytes > 0) std::memcpy(theirs[i], mine, bytes);
      continue;
    }
    if (bytes > 0) sends.push_back({mine, bytes, r});
    if (sizes[i] > 0) recvs.push_back({theirs[i], sizes[i], r});
  }
  if (!sends.empty() || !recvs.empty()) comm.exchange(sends, recvs, s);
}

/// One fixed-size value of every rank, in their order.
template <class V, communicator Comm>
std::vector<V> share_value(Comm& comm, const V& mine, typename Comm::stream_type s) {
  std::vector<V> all(static_cast<std::size_t>(comm.size()));
  std::vector<void*> at;
  for (V& v : all) at.push_back(&v);
  share_bytes(comm, &mine, sizeof(V), at, std::vector<std::size_t>(all.size(), sizeof(V)), s);
  return all;
}

}  // namespace detail

/// Compares the digests of all ranks' plans: 8 bytes each, once per plan. Communicators promise nothing when sizes
/// differ, so this is where different masks, layouts or options are found.
/// @tparam T the layer's type, which a plan does not know; with `void` it is not compared
/// @throws metadata_error on *every* rank if any two differ
template <class T = void, communicator Comm>
void check_same_plan(Comm& comm, const cp_plan& plan, typename Comm::stream_type s) {
  detail::hasher h;
  h.add(plan.digest());
  if constexpr (!std::is_void_v<T>) {  // the bytes of a one are different in every floating type
    const auto one = std::bit_cast<std::array<unsigned char, sizeof(T)>>(static_cast<T>(1.0F));
    for (const unsigned char byte : one) h.add(byte);
  }
  const auto digests = detail::share_value(comm, h.value(), s);
  for (std::size_t r = 1; r < digests.size(); ++r) {
    expects<metadata_error>(digests[r] == digests[0], "the plans of ranks 0 and", r,
                            "differ: they were made from different layouts, documents, sizes, types or options");
  }
}

/// The common layout, from the positions that each rank holds: how `seq_index` enters when a rank knows only its own.
/// Any number of positions per rank, also none.
/// @throws metadata_error on every rank unless all together are 0 .. n - 1, naming the first bad position
template <communicator Comm>
explicit_layout gather_layout(Comm& comm, std::span<const index_t> local_positions, typename Comm::stream_type s) {
  const auto counts = detail::share_value(comm, static_cast<std::uint64_t>(local_positions.size()), s);
  std::vector<std::vector<index_t>> of_rank;
  std::vector<std::size_t> sizes;
  for (const std::uint64_t n : counts) {
    of_rank.emplace_back(static_cast<std::size_t>(n));
    sizes.push_back(static_cast<std::size_t>(n) * sizeof(index_t));
  }
  std::vector<void*> at;
  for (auto& p : of_rank) at.push_back(p.data());
  detail::share_bytes(comm, local_positions.data(), local_positions.size_bytes(), at, sizes, s);
  return from_positions(of_rank);
}

/// The positions in a `seq_index` [L] or [B, L]; rows must agree, and L must be the local length. NeMo's
/// `_extract_local_seq_index` reads the first row only, and takes another layout in silence if the length is wrong.
/// @throws metadata_error naming the length, or the first place where a row differs
inline std::vector<index_t> local_positions(std::span<const index_t> seq_index, index_t batch, index_t local_length) {
  const auto n = static_cast<std::size_t>(local_length);
  expects<metadata_error>(local_length >= 0 && batch >= 1 &&
                              (seq_index.size() == n || seq_index.size() == n * static_cast<std::size_t>(batch)),
                          "seq_index has", seq_index.size(), "entries; it must have", local_length, "or", batch, "x",
                          local_length);
  for (std::size_t i = n; i < seq_index.size(); ++i) {
    expects<metadata_error>(seq_index[i] == seq_index[i % n], "seq_index row", i / n, "position", i % n, "is",
                            seq_index[i], ", in row 0 it is", seq_index[i % n], "; the rows must agree");
  }
  return {seq_index.begin(), seq_index.begin() + static_cast<std::ptrdiff_t>(n)};
}

// ---- concatenation --------------------------------------------------------------------------------------------------

namespace detail {

/// Each rank's part of the axis, as rows of the flattened tensor: [outer, extent, inner].
struct concat_shape {
  index_t outer = 1, inner = 1, total = 0;
  std::vector<index_t> begin;  // of each rank's part, and the end
};

template <class T, int R, class M>
concat_shape shape_along(const tensor_ref<T, R, M>& t, int axis, std::span<const index_t> extents) {
  expects<shape_error>(-R <= axis && axis < R, "a tensor of", R, "axes has no axis", axis);
  if (axis < 0) axis += R;
  concat_shape c;
  for (int i = 0; i < R; ++i) (i < axis ? c.outer : c.inner) *= i == axis ? 1 : t.extent(i);
  c.begin = {0};
  for (const index_t n : extents) c.begin.push_back(c.begin.back() + n);
  c.total = c.begin.back();
  return c;
}

/// [outer, n * inner] of rank r within the whole.
template <class T, class M>
tensor_ref<T, 2, M> part_of(tensor_ref<T, 2, M> whole, const concat_shape& c, std::size_t r) {
  return columns(whole, c.begin[r] * c.inner, (c.begin[r + 1] - c.begin[r]) * c.inner);
}

}  // namespace detail

/// Concatenates the ranks' tensors along `axis`, in their order; parts may differ in extent along it.
///
/// @param local   [.., extents[rank], ..] contiguous
/// @param extents of the axis on every rank
/// @param whole   [.., sum of extents, ..] contiguous, written
/// @param ws      a copy of what is received where `axis` is not the first
/// This gathers the whole sequence on every rank: the layer never does. It serves comparisons and callers' own needs.
template <class T, int R, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, T>
void all_gather_concat(const Backend& be, Comm& comm,
                       tensor_ref<const T, R, typename Backend::memory_type> local, std::span<const index_t> extents,
                       int axis, tensor_ref<T, R, typename Backend::memory_type> whole,
                       workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  expects<shape_error>(static_cast<int>(extents.size()) == comm.size(), "extents of", extents.size(),
                       "ranks are given, the group has", comm.size());
  const auto c = detail::shape_along(local, axis, extents);
  const auto me = static_cast<std::size_t>(comm.rank());
  expects<shape_error>(local.size() == c.outer * extents[me] * c.inner && is_contiguous(local), "rank", me,
                       "must have", extents[me], "of the axis, contiguous");
  expects<shape_error>(whole.size() == c.outer * c.total * c.inner && is_contiguous(whole),
                       "the result must have", c.total, "of the axis, contiguous");
  const scoped_mark scope(ws);
  const auto out = make_tensor<memory>(whole.data(), c.outer, c.total * c.inner);
  std::vector<send_op> sends;
  std::vector<recv_op> recvs;
  std::vector<tensor_ref<T, 2, memory>> arrived(extents.size());
  for (std::size_t r = 0; r < extents.size(); ++r) {
    const index_t width = extents[r] * c.inner;
    const int peer = static_cast<int>(r);
    if (r == me) {
      if (local.size() > 0) be.copy_rows(make_tensor<memory>(local.data(), c.outer, width), detail::part_of(out, c, r), s);
      continue;
    }
    if (local.size() > 0) sends.push_back({local.data(), static_cast<std::size_t>(local.size()) * sizeof(T), peer});
    if (c.outer * width == 0) continue;
    arrived[r] = c.outer == 1 ? detail::part_of(out, c, r) : ws.template take<T>(c.outer, width);
    recvs.push_back({arrived[r].data(), static_cast<std::size_t>(c.outer * width) * sizeof(T), peer});
  }
  if (!sends.empty() || !recvs.empty()) comm.exchange(sends, recvs, s);
  for (std::size_t r = 0; c.outer > 1 && r < extents.size(); ++r) {
    if (arrived[r].data() != nullptr) {
      be.copy_rows(tensor_ref<const T, 2, memory>(arrived[r]), detail::part_of(out, c, r), s);
    }
  }
}

/// The adjoint: this rank's part of the sum, over all ranks in their order, of their gradients of the whole. In
/// accumulate_t if T is; moves a reduce-scatter's bytes, not an all-reduce's.
/// @param whole [.., sum of extents, ..] this rank's gradient of the result; not changed
/// @param local [.., extents[rank], ..] written
template <class T, int R, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, T>
void all_gather_concat_adjoint(const Backend& be, Comm& comm,
                               tensor_ref<const T, R, typename Backend::memory_type> whole,
                               std::span<const index_t> extents, int axis,
                               tensor_ref<T, R, typename Backend::memory_type> local,
                               workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  expects<shape_error>(static_cast<int>(extents.size()) == comm.size(), "extents of", extents.size(),
                       "ranks are given, the group has", comm.size());
  const auto c = detail::shape_along(whole, axis, extents);
  const auto me = static_cast<std::size_t>(comm.rank());
  expects<shape_error>(whole.size() == c.outer * c.total * c.inner && is_contiguous(whole), "the gradient must have",
                       c.total, "of the axis, contiguous");
  expects<shape_error>(local.size() == c.outer * extents[me] * c.inner && is_contiguous(local), "rank", me,
                       "must have", extents[me], "of the axis, contiguous");
  const scoped_mark scope(ws);
  const auto in = make_tensor<memory>(whole.data(), c.outer, c.total * c.inner);
  const index_t mine = c.outer * extents[me] * c.inner;
  const auto parts = ws.template take<T>(comm.size(), mine);  // [P, own part], in the order of the sum
  std::vector<send_op> sends;
  std::vector<recv_op> recvs;
  for (std::size_t r = 0; r < extents.size(); ++r) {
    const index_t width = extents[r] * c.inner;
    const int peer = static_cast<int>(r);
    const auto from = detail::part_of(in, c, r);
    if (r == me) {
      if (mine > 0) be.copy_rows(from, make_tensor<memory>(parts.data() + peer * mine, c.outer, width), s);
      continue;
    }
    if (mine > 0) recvs.push_back({parts.data() + peer * mine, static_cast<std::size_t>(mine) * sizeof(T), peer});
    if (c.outer * width == 0) continue;
    const T* at = from.data();
    if (c.outer > 1) {
      const auto packed = ws.template take<T>(c.outer, width);
      be.copy_rows(from, packed, s);
      at = packed.data();
    }
    sends.push_back({at, static_cast<std::size_t>(c.outer * width) * sizeof(T), peer});
  }
  if (!sends.empty() || !recvs.empty()) comm.exchange(sends, recvs, s);
  if (mine == 0) return;
  std::vector<run> order;
  for (int r = 0; r < comm.size(); ++r) order.push_back({r, 0, 1, r});
  const auto table = ws.template take<run>(comm.size());
  be.upload(std::span<const run>(order), table, s);
  const auto sum = make_tensor<memory>(local.data(), 1, mine);
  be.fill_zero(sum, s);
  be.scatter_add_rows(tensor_ref<const T, 2, memory>(parts), tensor_ref<const run, 1, memory>(table), sum, s);
}

// ---- parameter gradients --------------------------------------------------------------------------------------------

namespace detail {
/// Equal parts of a tensor's elements, one for each rank.
inline std::vector<index_t> equal_parts(index_t n, int world) {
  std::vector<index_t> out;
  for (int r = 0; r < world; ++r) out.push_back(n / world + (r < n % world ? 1 : 0));
  return out;
}
}  // namespace detail

/// Bytes of workspace that all_reduce_sum takes for n elements.
template <class T, memory_kind Memory>
memory_requirement all_reduce_scratch(index_t n, int world) {
  workspace<Memory> measure;
  measure.template take<T>((n + world - 1) / world);
  measure.template take<T>(world, (n + world - 1) / world);
  measure.template take<run>(world);
  return measure.peak();
}

/// Replaces `t` by the sum over the ranks, in their order, so every rank has the same bits on every run: a
/// reduce-scatter and an all-gather.
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, T>
void all_reduce_sum(const Backend& be, Comm& comm, tensor_ref<T, 1, typename Backend::memory_type> t,
                    workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  using memory = typename Backend::memory_type;
  if (comm.size() == 1) return;
  const std::vector<index_t> parts = detail::equal_parts(t.extent(0), comm.size());
  const scoped_mark scope(ws);
  const auto own = ws.template take<T>(parts[static_cast<std::size_t>(comm.rank())]);
  all_gather_concat_adjoint<T, 1>(be, comm, tensor_ref<const T, 1, memory>(t), parts, 0, own, ws, s);
  all_gather_concat<T, 1>(be, comm, tensor_ref<const T, 1, memory>(own), parts, 0, t, ws, s);
}

// ---- states ---------------------------------------------------------------------------------------------------------

/// Which final states go where when document n is to be continued on rank targets[n]: source rows are plan.leaving,
/// destination rows the documents that go to this rank, ascending.
/// @throws metadata_error unless every document has a target within the group
inline exchange_plan plan_delivery(const cp_plan& plan, std::span<const int> targets) {
  expects<metadata_error>(static_cast<index_t>(targets.size()) == plan.documents(), "targets of", targets.size(),
                          "documents are given, the plan has", plan.documents());
  run_list sends;
  run_list recvs;
  index_t leaving = 0;
  index_t arriving = 0;
  for (index_t n = 0; n < plan.documents(); ++n) {
    const int to = targets[static_cast<std::size_t>(n)];
    expects<metadata_error>(0 <= to && to < plan.world, "document", n, "goes to rank", to, "of", plan.world);
    const int from = plan.last_rank(n);
    if (from == plan.rank) sends.add(to, leaving++, 1);
    if (to == plan.rank) recvs.add(from, arriving++, 1);
  }
  return {std::move(sends).finish(), std::move(recvs).finish()};
}

}  // namespace v0
}  // namespace gdn
