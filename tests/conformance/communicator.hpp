// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every communicator must do: numbered as in the contract of the concept.
///
/// A `Group` says how to run the ranks and where their messages lie:
///   using communicator = ...;
///   static constexpr int most_ranks = ...;                  of one group
///   template <class F> static void run(int ranks, F&& f);   f(communicator&) on every rank; throws what one of them
///   threw static stream_type stream(communicator&);               on which a rank works static void
///   synchronize(stream_type); class buffer { explicit buffer(const std::vector<std::byte>&); void* data();
///   std::vector<std::byte> host() const; };

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <gdn/concepts/communicator.hpp>
#include <gdn/core/error.hpp>
#include <support/deadline.hpp>
#include <support/random.hpp>

namespace gdn_test {

using bytes = std::vector<std::byte>;

/// The content of message `n` from one rank to another.
inline bytes message_of(int from, int to, std::uint64_t n, std::size_t size) {
  bytes out(size);
  std::uint64_t h = (static_cast<std::uint64_t>(from) << 40U) ^ (static_cast<std::uint64_t>(to) << 20U) ^ n;
  for (std::byte& b : out) {
    h = h * 6364136223846793005U + 1442695040888963407U;
    b = static_cast<std::byte>(h >> 56U);
  }
  return out;
}

template <class Group>
class communicator_conformance : public testing::Test {
 protected:
  using communicator = typename Group::communicator;
  static_assert(gdn::communicator<communicator>);

  /// Messages of one rank in one call of exchange, with what is expected to arrive.
  class exchange_of {
   public:
    void send(int peer, const bytes& content) {
      buffers_.push_back(std::make_unique<typename Group::buffer>(content));
      sends_.push_back({buffers_.back()->data(), content.size(), peer});
    }
    void receive(int peer, bytes expected) {
      buffers_.push_back(std::make_unique<typename Group::buffer>(bytes(expected.size())));
      recvs_.push_back({buffers_.back()->data(), expected.size(), peer});
      expected_.push_back({buffers_.back().get(), std::move(expected)});
    }
    void shuffle(random_source& random) {
      std::shuffle(sends_.begin(), sends_.end(), random.engine());
      std::shuffle(recvs_.begin(), recvs_.end(), random.engine());
    }
    void run(communicator& comm) {
      const auto stream = Group::stream(comm);
      comm.exchange(sends_, recvs_, stream);
      Group::synchronize(stream);
    }
    void check() const {
      for (const auto& [buffer, content] : expected_) EXPECT_TRUE(buffer->host() == content);
    }

   private:
    std::vector<std::unique_ptr<typename Group::buffer>> buffers_;
    std::vector<gdn::send_op> sends_;
    std::vector<gdn::recv_op> recvs_;
    std::vector<std::pair<typename Group::buffer*, bytes>> expected_;
  };

  static int ranks(int wanted) { return std::min(wanted, Group::most_ranks); }

  deadline deadline_{std::chrono::seconds(60)};
};
TYPED_TEST_SUITE_P(communicator_conformance);

TYPED_TEST_P(communicator_conformance, RanksAreNumberedFromZero) {
  using comm_type = typename TypeParam::communicator;
  for (const int n : {1, 2, 5, 64}) {
    const int size = this->ranks(n);
    TypeParam::run(size, [&](comm_type& comm) {
      const int me = comm.rank(), next = (me + 1) % size, previous = (me + size - 1) % size;
      EXPECT_EQ(comm.size(), size);
      EXPECT_EQ(comm.state(), gdn::comm_state::ok);
      ASSERT_TRUE(0 <= me && me < size);
      typename TestFixture::exchange_of e;  // ranks may have no memory in common in which to count them
      e.send(next, message_of(me, next, 0, 16));
      e.receive(previous, message_of(previous, me, 0, 16));
      e.run(comm);
      e.check();
    });
  }
}

// 1. A rank with empty lists returns at once, though its peers never call.
TYPED_TEST_P(communicator_conformance, EmptyListsWaitForNobody) {
  using comm_type = typename TypeParam::communicator;
  TypeParam::run(this->ranks(4), [&](comm_type& comm) {
    for (int i = 0; comm.rank() == 0 && i < 100; ++i) comm.exchange({}, {}, TypeParam::stream(comm));
    EXPECT_EQ(comm.state(), gdn::comm_state::ok);
  });
}

// 1. Only the ranks that exchange messages wait for each other, and each pair as often as it likes.
TYPED_TEST_P(communicator_conformance, PairsExchangeWithoutTheOthers) {
  using comm_type = typename TypeParam::communicator;
  if (TypeParam::most_ranks < 2) GTEST_SKIP() << "has no peers";
  TypeParam::run(this->ranks(7), [&](comm_type& comm) {
    const int me = comm.rank(), peer = me ^ 1;
    if (peer >= comm.size()) return;  // the last one has no peer, and is gone
    for (std::uint64_t n = 0; n < static_cast<std::uint64_t>(5 + 20 * (me / 2)); ++n) {
      typename TestFixture::exchange_of e;
      e.send(peer, message_of(me, peer, n, 16));
      e.receive(peer, message_of(peer, me, n, 16));
      e.run(comm);
      e.check();
    }
  });
}

// 1. Messages of a pair are matched in the order of the calls, whatever the others do.
TYPED_TEST_P(communicator_conformance, MessagesArriveInOrder) {
  using comm_type = typename TypeParam::communicator;
  if (TypeParam::most_ranks < 3) GTEST_SKIP() << "has no peers";
  constexpr std::uint64_t rounds = 50;
  TypeParam::run(3, [&](comm_type& comm) {
    const int me = comm.rank();
    for (std::uint64_t n = 0; n < rounds; ++n) {
      typename TestFixture::exchange_of e;
      if (me == 0) {  // sends to both, one ahead of the other
        e.send(1, message_of(0, 1, n, 8 + n));
        if (n % 2 == 1) e.send(2, message_of(0, 2, n, 8));
      } else if (me == 1) {
        e.receive(0, message_of(0, 1, n, 8 + n));
      } else if (n % 2 == 1) {
        e.receive(0, message_of(0, 2, n, 8));
      }
      e.run(comm);
      e.check();
    }
  });
}

// 2. Messages to oneself are copies.
TYPED_TEST_P(communicator_conformance, MessagesToOneselfAreCopies) {
  using comm_type = typename TypeParam::communicator;
  TypeParam::run(this->ranks(3), [&](comm_type& comm) {
    const int me = comm.rank();
    for (const std::size_t size : {1U, 7U, 4096U}) {
      typename TestFixture::exchange_of e;
      e.send(me, message_of(me, me, size, size));
      e.receive(me, message_of(me, me, size, size));
      e.run(comm);
      e.check();
    }
  });
}

// A chain in which everyone receives from the left before anything could be sent on would not end if calls were
// carried out one message at a time.
TYPED_TEST_P(communicator_conformance, RingsOfAnySizeTurn) {
  using comm_type = typename TypeParam::communicator;
  for (int size = 1; size <= this->ranks(16); ++size) {
    TypeParam::run(size, [&](comm_type& comm) {
      const int me = comm.rank(), right = (me + 1) % size, left = (me + size - 1) % size;
      for (std::uint64_t n = 0; n < 5; ++n) {
        typename TestFixture::exchange_of e;
        e.send(right, message_of(me, right, n, 64 * 1024));
        e.receive(left, message_of(left, me, n, 64 * 1024));
        e.run(comm);
        e.check();
      }
    });
  }
}

// Any pattern of messages, listed in any order, with sizes from a common plan.
TYPED_TEST_P(communicator_conformance, RandomExchangesDeliverEveryMessage) {
  using comm_type = typename TypeParam::communicator;
  for (std::uint64_t n = 0; n < 60 && !this->HasFailure(); ++n) {
    random_source random(n);
    const int size = this->ranks(static_cast<int>(random.between(1, 16)));
    constexpr std::uint64_t rounds = 8;
    std::vector<std::map<std::pair<int, int>, std::size_t>> plan(rounds);
    for (auto& round : plan) {
      const int density = static_cast<int>(random.between(1, 4));
      for (int from = 0; from < size; ++from) {
        for (int to = 0; to < size; ++to) {
          if (random.coin(density)) round[{from, to}] = static_cast<std::size_t>(random.between(1, 300));
        }
      }
    }
    SCOPED_TRACE(testing::Message() << "case " << n << ", GDN_SEED=" << seed() << ", " << size << " ranks");
    TypeParam::run(size, [&](comm_type& comm) {
      const int me = comm.rank();
      random_source order(n * 1000 + static_cast<std::uint64_t>(me));
      for (std::uint64_t round = 0; round < rounds; ++round) {
        typename TestFixture::exchange_of e;
        for (const auto& [pair, length] : plan[round]) {
          const auto [from, to] = pair;
          if (from == me) e.send(to, message_of(from, to, round, length));
          if (to == me) e.receive(from, message_of(from, to, round, length));
        }
        e.shuffle(order);
        e.run(comm);
        e.check();
      }
    });
  }
}

// 5. and 6. After abort() the state stays, and every exchange throws before it touches a buffer.
TYPED_TEST_P(communicator_conformance, AbortIsSticky) {
  using comm_type = typename TypeParam::communicator;
  TypeParam::run(this->ranks(2), [&](comm_type& comm) {
    comm.abort();
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(comm.state(), gdn::comm_state::aborted);
      typename TestFixture::exchange_of e;
      e.send(comm.rank(), bytes(4, std::byte{1}));
      e.receive(comm.rank(), bytes(4));  // the buffer stays zero
      EXPECT_THROW(e.run(comm), gdn::comm_error);
      e.check();
      EXPECT_THROW(comm.exchange({}, {}, TypeParam::stream(comm)), gdn::comm_error);
    }
    comm.abort();
    EXPECT_EQ(comm.state(), gdn::comm_state::aborted);
  });
}

// A peer that does not exist is an error of the rank that names it.
TYPED_TEST_P(communicator_conformance, RejectsPeersOutsideTheGroup) {
  using comm_type = typename TypeParam::communicator;
  for (const bool sending : {true, false}) {
    for (const int beyond : {-1, 0, 7}) {
      TypeParam::run(this->ranks(2), [&](comm_type& comm) {
        const int peer = beyond < 0 ? -1 : comm.size() + beyond;
        typename TestFixture::exchange_of e;
        sending ? e.send(peer, bytes(4)) : e.receive(peer, bytes(4));
        EXPECT_THROW(e.run(comm), gdn::comm_error);
        EXPECT_EQ(comm.state(), gdn::comm_state::failed);
      });
    }
  }
}

REGISTER_TYPED_TEST_SUITE_P(communicator_conformance, RanksAreNumberedFromZero, EmptyListsWaitForNobody,
                            PairsExchangeWithoutTheOthers, MessagesArriveInOrder, MessagesToOneselfAreCopies,
                            RingsOfAnySizeTurn, RandomExchangesDeliverEveryMessage, AbortIsSticky,
                            RejectsPeersOutsideTheGroup);

/// A group whose memory is the host's.
template <class Communicator>
struct host_group {
  using communicator = Communicator;
  static gdn::host_stream stream(Communicator&) { return {}; }
  static void synchronize(gdn::host_stream) {}
  class buffer {
   public:
    explicit buffer(const bytes& content) : content_(content) {}
    void* data() { return content_.data(); }
    bytes host() const { return content_; }

   private:
    bytes content_;
  };
};

}  // namespace gdn_test
