// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Carries out an exchange plan: rows of any width, one message per peer.

#include <span>
#include <string_view>
#include <vector>

#include <gdn/concepts/backend.hpp>
#include <gdn/plan/resident.hpp>

namespace gdn {
inline namespace v0 {

namespace detail {

/// Where the message of one peer lies: in the tensor itself if it is one run, else packed in the workspace. What a
/// rank receives from itself is read where it was sent.
template <class T, memory_kind Memory>
struct message_buffer {
  int peer = 0;
  index_t first = 0, runs = 0;  // of the plan's list
  index_t rows = 0;
  tensor_ref<T, 2, Memory> packed;  // without data where the tensor itself serves
  bool direct = false;
};

template <class T, memory_kind Memory>
std::vector<message_buffer<T, Memory>> message_buffers(const std::vector<run>& runs, index_t width, bool always_pack,
                                                       int self, workspace<Memory>& ws) {
  std::vector<message_buffer<T, Memory>> out;
  for_each_peer(std::span<const run>(runs), [&](int peer, std::size_t first, std::size_t n, index_t rows) {
    message_buffer<T, Memory> m{peer, static_cast<index_t>(first), static_cast<index_t>(n), rows, {}, false};
    m.direct = n == 1 && !always_pack;
    if (!m.direct && peer != self) m.packed = ws.template take<T>(rows, width);
    out.push_back(m);
  });
  return out;
}

/// The plan may be for another batch than the tensors.
inline void expects_rows_of(const std::vector<run>& runs, index_t rows, std::string_view what) {
  for (const run& r : runs) {
    expects<shape_error>(0 <= r.local && r.count <= rows - r.local, "rows", r.local, "to", r.local + r.count,
                         "are to be", what, ", the tensor has", rows);
  }
}

template <class T, class Backend, class Comm, class Arrive>
void exchange(const Backend& be, Comm& comm, const resident_exchange<typename Backend::memory_type>& ex,
              tensor_ref<const T, 2, typename Backend::memory_type> src, index_t width, bool add,
              workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s, Arrive&& arrive,
              tensor_ref<T, 2, typename Backend::memory_type> dst) {
  using memory = typename Backend::memory_type;
  if (ex.plan.empty()) return;
  const auto gapless = [&](const auto& t) {
    return t.stride(1) == 1 && t.extent(1) == width && (t.extent(0) <= 1 || t.stride(0) == width);
  };
  expects<shape_error>(gapless(src) && gapless(dst), "rows to be exchanged must be of one width, without gaps");
  expects_rows_of(ex.plan.sends, src.extent(0), "sent");
  expects_rows_of(ex.plan.recvs, dst.extent(0), "received");
  const scoped_mark scope(ws);
  const auto outgoing = message_buffers<T, memory>(ex.plan.sends, width, false, -1, ws);
  const auto incoming = message_buffers<T, memory>(ex.plan.recvs, width, add, comm.rank(), ws);

  std::vector<send_op> sends;
  std::vector<recv_op> recvs;
  tensor_ref<const T, 2, memory> to_self;
  for (const auto& m : outgoing) {
    tensor_ref<const T, 2, memory> message = m.packed;
    if (m.direct) {
      message = gdn::rows(src, ex.plan.sends[static_cast<std::size_t>(m.first)].local, m.rows);
    } else {
      be.gather_rows(src, gdn::rows(ex.sends, m.first, m.runs), m.packed, s);
    }
    if (m.peer == comm.rank()) {
      to_self = message;
    } else {
      sends.push_back({message.data(), static_cast<std::size_t>(m.rows * width) * sizeof(T), m.peer});
    }
  }
  for (const auto& m : incoming) {
    if (m.peer == comm.rank()) continue;
    T* at = m.direct ? gdn::rows(dst, ex.plan.recvs[static_cast<std::size_t>(m.first)].local, m.rows).data()
                     : m.packed.data();
    recvs.push_back({at, static_cast<std::size_t>(m.rows * width) * sizeof(T), m.peer});
  }
  if (!sends.empty() || !recvs.empty()) comm.exchange(sends, recvs, s);

  for (const auto& m : incoming) {  // by peer: the order in which sums are taken
    const auto runs = gdn::rows(ex.recvs, m.first, m.runs);
    if (m.peer == comm.rank()) {
      arrive(to_self, runs);
    } else if (!m.direct) {
      arrive(tensor_ref<const T, 2, memory>(m.packed), runs);
    }
  }
}

}  // namespace detail

/// Bytes of workspace that exchange_rows and exchange_rows_add take for rows of `width` elements of T.
template <class T, memory_kind Memory>
memory_requirement exchange_scratch(const exchange_plan& plan, index_t width, bool add, int rank) {
  workspace<Memory> measure;
  detail::message_buffers<T, Memory>(plan.sends, width, false, -1, measure);
  detail::message_buffers<T, Memory>(plan.recvs, width, add, rank, measure);
  return measure.peak();
}

/// Moves rows of `src` [R, width] to rows of `dst` [R', width] on this and other ranks, as the plan says. A peer whose
/// rows are one run is served straight from `src` and into `dst`; others are packed. Rows that no run names are left
/// alone. Nothing happens, on no rank, where the plan is empty.
/// Enqueued on the stream. @throws shape_error if the plan names rows that the tensors do not have, comm_error,
/// workspace_error
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, T>
void exchange_rows(const Backend& be, Comm& comm, const resident_exchange<typename Backend::memory_type>& ex,
                   tensor_ref<const T, 2, typename Backend::memory_type> src,
                   tensor_ref<T, 2, typename Backend::memory_type> dst,
                   workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  detail::exchange<T>(be, comm, ex, src, dst.extent(1), false, ws, s,
                      [&](auto message, auto runs) { be.scatter_rows(message, runs, dst, s); }, dst);
}

/// The adjoint of an exchange that copies rows to several readers: what arrives is *added* to `dst`, in the order of
/// the ranks it comes from.
template <class T, communicator Comm, class Backend>
  requires compatible<Backend, Comm> && row_ops<Backend, T>
void exchange_rows_add(const Backend& be, Comm& comm, const resident_exchange<typename Backend::memory_type>& ex,
                       tensor_ref<const T, 2, typename Backend::memory_type> src,
                       tensor_ref<T, 2, typename Backend::memory_type> dst,
                       workspace<typename Backend::memory_type>& ws, typename Backend::stream_type s) {
  detail::exchange<T>(be, comm, ex, src, dst.extent(1), true, ws, s,
                      [&](auto message, auto runs) { be.scatter_add_rows(message, runs, dst, s); }, dst);
}

}  // namespace v0
}  // namespace gdn
