// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Ranks as processes of an MPI job: context parallelism over host memory, on one machine or many.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <mpi.h>

#include <gdn/comm/back_off.hpp>
#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>

namespace gdn {
inline namespace v0 {
namespace mpi {

/// @throws comm_error with MPI's own text, naming the call
inline void check(int code, std::string_view call) {
  if (code == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING + 1> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) length = 0;
  throw comm_error(say(call, "failed:", std::string_view(text.data(), static_cast<std::size_t>(length))));
}

namespace detail {

using gdn::detail::back_off;

/// Waits for one request, no longer than `deadline` unless that is zero.
inline bool completes(MPI_Request& request, std::chrono::milliseconds deadline, std::string_view call) {
  const auto begin = std::chrono::steady_clock::now();
  back_off pause;
  for (;;) {
    int done = 0;
    check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), call);
    if (done != 0) return true;
    if (deadline.count() > 0 && std::chrono::steady_clock::now() - begin > deadline) return false;
    pause();
  }
}

}  // namespace detail

struct options {
  /// Longest wait for peers in which nothing arrives and nothing is taken; zero waits for ever.
  std::chrono::milliseconds deadline{0};
  /// Messages travel in pieces of at most that many bytes, for MPI 3 counts in int. The same on all ranks.
  std::size_t piece = std::size_t{1} << 30U;
};

/// A rank of an MPI communicator, over host memory. An exchange returns when MPI has taken what it sends and what it
/// receives has arrived.
///
/// The host calls MPI_Init_thread, with MPI_THREAD_FUNNELED or more, and MPI_Finalize. Messages travel on a duplicate of
/// the host's communicator, so they never meet the host's own; errors of MPI on it are returned and become comm_error.
///
/// A rank that fails, aborts or is destroyed sends its peers a notice, which ends their waiting for it. Where a deadline
/// is set, so does waiting longer than that. A process that was killed sends nothing: the launcher ends the others, as
/// mpirun does, or their deadline.
///
/// abort() may come from any thread. From the one that uses the communicator peers hear of it at once; otherwise from that
/// one, as soon as it waits, exchanges or destroys the communicator, for a thread level may forbid another to call MPI.
///
/// MPI cannot take back a message under way. Buffers of a *failed* exchange may be read or written until MPI_Finalize: a
/// host that goes on after a failure keeps them until then.
class mpi_communicator {
 public:
  using memory_type = host_memory;
  using stream_type = host_stream;

  /// Collective over `host`, which stays the caller's. Its end is also proof that every rank has arrived.
  /// @throws comm_error if MPI is not there, has too low a thread level, or a rank does not come before the deadline
  explicit mpi_communicator(MPI_Comm host, options o = {}) : options_(o) {
    expects_usable_mpi();
    expects<comm_error>(0 < o.piece && o.piece <= INT_MAX, "the largest piece is", o.piece, "; it must be 1 to", INT_MAX);
    expects<comm_error>(host != MPI_COMM_NULL, "gdn::mpi needs a communicator, not MPI_COMM_NULL");
    int is_inter = 0;
    check(MPI_Comm_test_inter(host, &is_inter), "MPI_Comm_test_inter");
    expects<comm_error>(is_inter == 0, "gdn::mpi needs an intracommunicator");
    check(MPI_Comm_rank(host, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(host, &size_), "MPI_Comm_size");
    peers_.resize(static_cast<std::size_t>(size_));
    meet(host);
  }
  mpi_communicator(const mpi_communicator&) = delete;
  mpi_communicator& operator=(const mpi_communicator&) = delete;

  /// Tells the peers and leaves: waits for nobody. Unless all peers have left before, MPI keeps the duplicate until
  /// MPI_Finalize, for a message that came late would be taken for one of a later communicator; finalize() avoids that.
  /// Does nothing after MPI_Finalize.
  ~mpi_communicator() {
    if (comm_ != MPI_COMM_NULL) finalize(std::chrono::milliseconds(0));
    if (!telling_.empty()) static_cast<void>(notices_.release());  // what MPI has not sent it may still read
  }

  /// Leaves together with the peers: tells them, and waits until all have told this rank. Gives MPI its communicator back.
  /// Later exchanges throw.
  /// @return whether all left in time and none had failed; otherwise as the destructor
  bool finalize(std::chrono::milliseconds deadline) noexcept {
    int over = 1;
    if (comm_ == MPI_COMM_NULL) return true;
    if (MPI_Finalized(&over) != MPI_SUCCESS || over != 0) return false;
    const bool sound = state_ == comm_state::ok;
    tell();
    const auto begin = std::chrono::steady_clock::now();
    detail::back_off pause;
    for (;;) {
      int sent = 0;
      listen();
      if (MPI_Testall(static_cast<int>(telling_.size()), telling_.data(), &sent, MPI_STATUSES_IGNORE) != MPI_SUCCESS) {
        break;
      }
      if (sent != 0) {
        telling_.clear();
        notices_.reset();
      }
      if (sent != 0 && sound && all_have_left()) {
        static_cast<void>(MPI_Comm_free(&comm_));
        break;
      }
      if (!sound || std::chrono::steady_clock::now() - begin >= deadline) break;
      pause();
    }
    comm_state ok = comm_state::ok;
    state_.compare_exchange_strong(ok, comm_state::aborted);
    return comm_ == MPI_COMM_NULL;
  }

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  comm_state state() const noexcept { return state_; }
  /// The rank whose failure, abort or leaving ended an exchange of this rank, or -1.
  int failed_peer() const noexcept { return failed_peer_; }

  void exchange(std::span<const send_op> sends, std::span<const recv_op> recvs, host_stream) {
    user_ = std::this_thread::get_id();
    ++exchanges_;
    if (state_ != comm_state::ok) {
      tell();
      throw comm_error(say("rank", rank_, "cannot exchange: its communicator has",
                           state_ == comm_state::aborted ? "been aborted" : "failed"));
    }
    std::vector<message> messages;
    std::vector<piece> pieces;
    std::vector<MPI_Request> requests;
    try {
      list(sends, recvs, messages, pieces);
      post(messages, pieces, requests);
      wait(messages, pieces, requests);
    } catch (...) {
      comm_state ok = comm_state::ok;
      state_.compare_exchange_strong(ok, comm_state::failed);
      tell();
      withdraw(messages, pieces, requests);
      throw;
    }
  }

  void abort() noexcept {
    comm_state ok = comm_state::ok;
    state_.compare_exchange_strong(ok, comm_state::aborted);
    int finalized = 1;
    if (std::this_thread::get_id() != user_) return;
    if (MPI_Finalized(&finalized) == MPI_SUCCESS && finalized == 0) tell();
  }

 private:
  static constexpr int data_tag = 1;
  static constexpr int notice_tag = 2;

  /// What a rank says when it goes: how many messages it had by then sent to the reader, and received from it.
  struct notice {
    std::uint64_t state = 0;  // comm_state; ok where the rank just left
    std::uint64_t sent = 0;
    std::uint64_t received = 0;
  };
  struct peer {
    std::uint64_t sent = 0;      // messages to it that MPI has taken
    std::uint64_t received = 0;  // messages from it that have arrived
    bool gone = false;
    notice last;
  };
  struct message {
    std::byte* data = nullptr;  // of a send never written
    std::size_t bytes = 0;
    int peer = 0;
    bool receiving = false;
    std::uint64_t number = 0;  // among those of this pair and direction, from 1
    std::size_t open = 0;      // pieces under way
  };
  struct piece {
    std::size_t message = 0;
    std::size_t begin = 0;
    int bytes = 0;
  };

  static std::string_view name_of_level(int level) {
    switch (level) {
      case MPI_THREAD_SINGLE: return "MPI_THREAD_SINGLE";
      case MPI_THREAD_FUNNELED: return "MPI_THREAD_FUNNELED";
      case MPI_THREAD_SERIALIZED: return "MPI_THREAD_SERIALIZED";
      case MPI_THREAD_MULTIPLE: return "MPI_THREAD_MULTIPLE";
      default: return "an unknown thread level";
    }
  }

  void expects_usable_mpi() {
    int is = 0;
    check(MPI_Initialized(&is), "MPI_Initialized");
    expects<comm_error>(is != 0, "MPI is not initialised: the host calls MPI_Init_thread before gdn::mpi is used");
    check(MPI_Finalized(&is), "MPI_Finalized");
    expects<comm_error>(is == 0, "MPI was finalised before this communicator was made");
    int level = 0;
    check(MPI_Query_thread(&level), "MPI_Query_thread");
    expects<comm_error>(level >= MPI_THREAD_FUNNELED, "MPI was initialised with", name_of_level(level),
                        "; gdn::mpi needs MPI_THREAD_FUNNELED or more");
    check(MPI_Is_thread_main(&is), "MPI_Is_thread_main");
    expects<comm_error>(is != 0 || level > MPI_THREAD_FUNNELED,
                        "MPI_THREAD_FUNNELED lets only the thread that initialised MPI use gdn::mpi");
  }

  /// Makes the duplicate, for which every rank must come.
  void meet(MPI_Comm host) {
    auto duplicate = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Comm_idup(host, duplicate.get(), &request), "MPI_Comm_idup");
    bool done = false;
    try {
      done = detail::completes(request, options_.deadline, "MPI_Comm_idup");
    } catch (...) {
      static_cast<void>(duplicate.release());  // MPI writes there, should the others still come
      throw;
    }
    if (!done) {
      static_cast<void>(duplicate.release());
      throw comm_error(say("rank", rank_, "waited", options_.deadline.count(), "ms for the", size_,
                           "ranks of the group, but not all of them came"));
    }
    comm_ = *duplicate;
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }

  peer& at(int rank) { return peers_[static_cast<std::size_t>(rank)]; }

  /// Checks what is asked for, carries out copies, and cuts the rest into pieces: receives first.
  void list(std::span<const send_op> sends, std::span<const recv_op> recvs, std::vector<message>& messages,
            std::vector<piece>& pieces) {
    std::vector<const send_op*> to_self;
    std::vector<const recv_op*> from_self;
    const auto check_peer = [&](int p) {
      expects<comm_error>(0 <= p && p < size_, "rank", rank_, "has no peer", p, "in a group of", size_);
    };
    for (const recv_op& r : recvs) {
      check_peer(r.peer);
      if (r.peer == rank_) {
        from_self.push_back(&r);
      } else {
        messages.push_back({static_cast<std::byte*>(r.data), r.bytes, r.peer, true});
      }
    }
    for (const send_op& s : sends) {
      check_peer(s.peer);
      if (s.peer == rank_) {
        to_self.push_back(&s);
      } else {
        messages.push_back({static_cast<std::byte*>(const_cast<void*>(s.data)), s.bytes, s.peer, false});
      }
    }
    expects<comm_error>(to_self.size() == from_self.size(), "rank", rank_, "sends itself", to_self.size(),
                        "messages in exchange", exchanges_, "but receives", from_self.size());
    for (std::size_t i = 0; i < to_self.size(); ++i) {
      expects<comm_error>(to_self[i]->bytes == from_self[i]->bytes, "rank", rank_, "sends itself", to_self[i]->bytes,
                          "bytes in exchange", exchanges_, "but receives", from_self[i]->bytes);
      if (to_self[i]->bytes > 0) std::memcpy(from_self[i]->data, to_self[i]->data, to_self[i]->bytes);
    }
    std::vector<peer> counted = peers_;
    for (std::size_t i = 0; i < messages.size(); ++i) {
      message& m = messages[i];
      peer& p = counted[static_cast<std::size_t>(m.peer)];
      m.number = m.receiving ? ++p.received : ++p.sent;
      for (std::size_t begin = 0; begin == 0 || begin < m.bytes; begin += options_.piece) {
        pieces.push_back({i, begin, static_cast<int>(std::min(options_.piece, m.bytes - begin))});
        ++m.open;
      }
    }
  }

  void post(const std::vector<message>& messages, const std::vector<piece>& pieces, std::vector<MPI_Request>& requests) {
    requests.reserve(pieces.size());
    for (const piece& p : pieces) {
      const message& m = messages[p.message];
      MPI_Request request = MPI_REQUEST_NULL;
      if (m.receiving) {
        check(MPI_Irecv(m.data + p.begin, p.bytes, MPI_BYTE, m.peer, data_tag, comm_, &request), "MPI_Irecv");
      } else {
        check(MPI_Isend(m.data + p.begin, p.bytes, MPI_BYTE, m.peer, data_tag, comm_, &request), "MPI_Isend");
      }
      requests.push_back(request);
    }
  }

  /// Tests, listens to notices and looks at the state and the clock, until all is done or an error says why not.
  void wait(std::vector<message>& messages, const std::vector<piece>& pieces, std::vector<MPI_Request>& requests) {
    const auto n = static_cast<int>(requests.size());
    std::vector<int> which(requests.size());
    std::vector<MPI_Status> statuses(requests.size());
    detail::back_off pause;
    auto progress = std::chrono::steady_clock::now();
    for (std::size_t open = requests.size(); open > 0;) {
      int done = 0;
      const int code = MPI_Testsome(n, requests.data(), &done, which.data(), statuses.data());
      if (code != MPI_ERR_IN_STATUS) check(code, "MPI_Testsome");
      for (int i = 0; i < done; ++i) {
        const piece& p = pieces[static_cast<std::size_t>(which[static_cast<std::size_t>(i)])];
        finish(messages[p.message], p, statuses[static_cast<std::size_t>(i)], code == MPI_ERR_IN_STATUS);
      }
      if (done > 0) {
        open -= static_cast<std::size_t>(done);
        progress = std::chrono::steady_clock::now();
        pause.reset();
        continue;
      }
      listen();
      for (const message& m : messages) {
        if (m.open > 0) expects_possible(m);
      }
      const message& first = *std::find_if(messages.begin(), messages.end(), [](const message& m) { return m.open > 0; });
      expects<comm_error>(state_ == comm_state::ok, "rank", rank_, "was aborted in exchange", exchanges_,
                          "while it waited until rank", first.peer, waited_for(first));
      expects<comm_error>(
          options_.deadline.count() == 0 || std::chrono::steady_clock::now() - progress <= options_.deadline, "rank",
          rank_, "waited", options_.deadline.count(), "ms in exchange", exchanges_, "until rank", first.peer,
          waited_for(first));
      pause();
    }
    // Had a peer failed before its message was read, its buffer may no longer have held the message.
    if (!messages.empty()) listen();
    for (const message& m : messages) {
      if (m.receiving) expects_possible(m);
    }
  }

  void finish(message& m, const piece& p, const MPI_Status& status, bool has_error) {
    const int code = has_error ? status.MPI_ERROR : MPI_SUCCESS;
    int kind = MPI_SUCCESS;
    if (code != MPI_SUCCESS) check(MPI_Error_class(code, &kind), "MPI_Error_class");
    const auto other_size = [&](const auto&... sent) {
      throw comm_error(say("rank", rank_, "expects", m.bytes, "bytes from rank", m.peer, "in exchange", exchanges_,
                           ", which sends", sent...));
    };
    if (m.receiving && kind == MPI_ERR_TRUNCATE) other_size("more");
    check(code, m.receiving ? "MPI_Irecv" : "MPI_Isend");
    if (m.receiving) {
      int bytes = 0;
      check(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count");
      if (bytes != p.bytes) other_size(p.begin + static_cast<std::size_t>(bytes));
    }
    if (--m.open == 0) ++(m.receiving ? at(m.peer).received : at(m.peer).sent);
  }

  static const char* waited_for(const message& m) { return m.receiving ? "sends" : "takes what was sent"; }

  /// Nothing comes from a peer that has gone, but what it had sent before; nor does it take anything.
  void expects_possible(const message& m) {
    const peer& p = at(m.peer);
    if (!p.gone || m.number <= (m.receiving ? p.last.sent : p.last.received)) return;
    failed_peer_ = m.peer;
    const auto how = static_cast<comm_state>(p.last.state);
    throw comm_error(say("rank", rank_, "waited in exchange", exchanges_, "until rank", m.peer, waited_for(m), ", but rank",
                         m.peer, how == comm_state::failed ? "failed" : "left or was aborted"));
  }

  /// Takes the notices that have arrived.
  void listen() noexcept {
    for (;;) {
      int there = 0;
      MPI_Status status;
      if (MPI_Iprobe(MPI_ANY_SOURCE, notice_tag, comm_, &there, &status) != MPI_SUCCESS || there == 0) return;
      notice n;
      const int from = status.MPI_SOURCE;
      if (MPI_Recv(&n, sizeof n, MPI_BYTE, from, notice_tag, comm_, MPI_STATUS_IGNORE) != MPI_SUCCESS) return;
      at(from).gone = true;
      at(from).last = n;
    }
  }

  /// Sends the notice, once. What MPI does not send is left to the deadlines of the peers.
  void tell() noexcept {
    if (comm_ == MPI_COMM_NULL || size_ == 1 || std::exchange(told_, true)) return;
    try {
      notices_ = std::make_unique<notice[]>(peers_.size());
      telling_.reserve(peers_.size());
      const auto how = static_cast<std::uint64_t>(state_.load());
      for (int r = 0; r < size_; ++r) {
        if (r == rank_) continue;
        notice& n = notices_[static_cast<std::size_t>(r)];
        n = {how, at(r).sent, at(r).received};
        MPI_Request request = MPI_REQUEST_NULL;
        if (MPI_Isend(&n, sizeof n, MPI_BYTE, r, notice_tag, comm_, &request) == MPI_SUCCESS) telling_.push_back(request);
      }
    } catch (...) {  // no memory for notices
    }
  }

  /// No message is under way to or from this rank.
  bool all_have_left() const {
    for (int r = 0; r < size_; ++r) {
      const peer& p = peers_[static_cast<std::size_t>(r)];
      if (r == rank_) continue;
      if (!p.gone || static_cast<comm_state>(p.last.state) != comm_state::ok) return false;
      if (p.last.sent != p.received || p.last.received != p.sent) return false;
    }
    return true;
  }

  /// Takes back what can be: receives that have not begun. For others a moment is given.
  static void withdraw(const std::vector<message>& messages, const std::vector<piece>& pieces,
                       std::vector<MPI_Request>& requests) noexcept {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      if (requests[i] != MPI_REQUEST_NULL && messages[pieces[i].message].receiving) {
        static_cast<void>(MPI_Cancel(&requests[i]));
      }
    }
    detail::back_off pause;
    const auto begin = std::chrono::steady_clock::now();
    for (int done = 0; done == 0 && std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(100); pause()) {
      if (MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE) != MPI_SUCCESS) {
        done = 0;
      }
    }
    for (MPI_Request& r : requests) {
      if (r != MPI_REQUEST_NULL) static_cast<void>(MPI_Request_free(&r));
    }
  }

  options options_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  std::atomic<comm_state> state_ = comm_state::ok;  // abort() may come from another thread
  bool told_ = false;
  std::atomic<std::thread::id> user_ = std::this_thread::get_id();  // the thread that used it last
  std::uint64_t exchanges_ = 0;
  int failed_peer_ = -1;
  std::vector<peer> peers_;
  std::unique_ptr<notice[]> notices_;
  std::vector<MPI_Request> telling_;
};
static_assert(communicator<mpi_communicator>);

}  // namespace mpi
}  // namespace v0
}  // namespace gdn
