// SPDX-License-Identifier: Apache-2.0
// A communicator of your own: ranks that leave copies of their messages in mailboxes, and count what they receive.
// Checks that a layer on three such ranks computes what one rank does, and receives as many bytes as its plan says.

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/requirements.hpp>

#include "support.hpp"

namespace {

using gdn::index_t;
using T = double;

/// What the ranks share. A state other than `ok` is that of a rank that failed, or has left.
struct post_office {
  explicit post_office(std::size_t ranks) : states(ranks, gdn::comm_state::ok), boxes(ranks * ranks) {}
  std::mutex mutex;  // guards all
  std::condition_variable news;
  std::vector<gdn::comm_state> states;
  std::vector<std::deque<std::vector<std::byte>>> boxes;  // [from][to]
};

class mailbox_communicator {
 public:
  using memory_type = gdn::host_memory;  // the backend's must be the same
  using stream_type = gdn::host_stream;

  mailbox_communicator(std::shared_ptr<post_office> office, int rank) : office_(std::move(office)), rank_(rank) {}
  mailbox_communicator(const mailbox_communicator&) = delete;
  mailbox_communicator& operator=(const mailbox_communicator&) = delete;
  ~mailbox_communicator() { abort(); }  // waits for nobody; who still waits for this rank is told

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return static_cast<int>(office_->states.size()); }
  gdn::comm_state state() const noexcept {
    const std::lock_guard lock(office_->mutex);
    return mine();
  }

  void exchange(std::span<const gdn::send_op> sends, std::span<const gdn::recv_op> recvs, gdn::host_stream) {
    std::unique_lock lock(office_->mutex);
    gdn::expects<gdn::comm_error>(mine() == gdn::comm_state::ok, "rank", rank_, "has failed or was aborted before");
    for (const gdn::send_op& m : sends) {
      const auto* from = static_cast<const std::byte*>(m.data);
      box(rank_, m.peer).emplace_back(from, from + m.bytes);
    }
    office_->news.notify_all();
    for (const gdn::recv_op& m : recvs) {
      auto& in = box(m.peer, rank_);
      office_->news.wait(lock, [&] {
        return !in.empty() || state_of(m.peer) != gdn::comm_state::ok || mine() != gdn::comm_state::ok;
      });
      if (mine() != gdn::comm_state::ok) throw gdn::comm_error(gdn::say("rank", rank_, "was aborted"));
      if (in.empty() || in.front().size() != m.bytes) {
        mine() = gdn::comm_state::failed;  // from now on, for good
        office_->news.notify_all();
        throw gdn::comm_error(gdn::say("rank", rank_, "expects", m.bytes, "bytes from rank", m.peer,
                                       in.empty() ? "which failed or left" : "which sends another number"));
      }
      std::copy(in.front().begin(), in.front().end(), static_cast<std::byte*>(m.data));
      in.pop_front();
      received_ += static_cast<index_t>(m.bytes);
    }
  }

  void abort() noexcept {
    const std::lock_guard lock(office_->mutex);
    if (mine() == gdn::comm_state::ok) mine() = gdn::comm_state::aborted;
    office_->news.notify_all();
  }

  index_t received() const noexcept { return received_; }

 private:
  gdn::comm_state& state_of(int rank) const { return office_->states[static_cast<std::size_t>(rank)]; }
  gdn::comm_state& mine() const { return state_of(rank_); }
  std::deque<std::vector<std::byte>>& box(int from, int to) {
    gdn::expects<gdn::comm_error>(0 <= from && from < size() && 0 <= to && to < size(), "no such rank");
    return office_->boxes[static_cast<std::size_t>(from * size() + to)];
  }

  std::shared_ptr<post_office> office_;
  int rank_;
  index_t received_ = 0;
};
static_assert(gdn::communicator<mailbox_communicator>);
static_assert(gdn::compatible<gdn::kokkos::backend<>, mailbox_communicator>);

constexpr gdn::layer_dims dims{.hidden = 16, .key_heads = 2, .value_heads = 2, .key_dim = 8, .value_dim = 8};
constexpr index_t tokens = 50;

/// This rank's rows of y, and the bytes that it receives for them.
template <gdn::communicator Comm>
index_t run(Comm& comm, const gdn::gated_delta_net<T>& layer, const std::vector<T>& x, std::vector<T>& y) {
  const gdn::kokkos::backend be;
  const gdn::contiguous_layout layout{tokens, comm.size()};
  const auto plan = gdn::plan_layer(dims, layout, gdn::packing::rows_of(1, tokens), {}, comm.rank());
  example::block plan_memory;
  const auto resident = example::allocate(plan_memory, [&](auto& ws) { return gdn::upload(be, plan, ws, {}); });
  const example::block scratch(gdn::requirements<T>(be, dims, resident, gdn::keep_policy::nothing).forward);
  auto ws = scratch.over();
  const index_t first = gdn::positions(layout, comm.rank()).front() * dims.hidden;
  const auto rows = [&](auto& v) { return gdn::make_tensor(v.data() + first, plan.caller_rows, dims.hidden); };
  gdn::prefill(be, comm, layer, resident, rows(x), rows(y), {}, ws, {});
  return plan.forward_traffic(dims.hidden, sizeof(T), sizeof(gdn::accumulate_t<T>)).total();
}

}  // namespace

int main() {
  const Kokkos::ScopeGuard kokkos;
  example::block weights;
  const auto layer = example::random_layer(dims, weights);
  const auto x = example::random_values(tokens * dims.hidden, 100);
  std::vector<T> one(x.size());
  std::vector<T> three(x.size());

  gdn::self_communicator self;
  run(self, layer, x, one);

  const auto office = std::make_shared<post_office>(3);
  std::vector<index_t> planned(3);
  std::vector<index_t> received(3);
  {
    std::vector<std::jthread> ranks;
    for (int r = 0; r < 3; ++r) {
      ranks.emplace_back([&, r, at = static_cast<std::size_t>(r)] {
        mailbox_communicator comm(office, r);
        planned[at] = run(comm, layer, x, three);
        received[at] = comm.received();
      });
    }
  }
  std::printf("bytes received: %lld %lld %lld\n", static_cast<long long>(received[0]),
              static_cast<long long>(received[1]), static_cast<long long>(received[2]));
  return example::expect_at_most("outputs", example::difference(three, one), 1e-12) && received == planned ? 0 : 1;
}
