// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  What every backend's row_ops must do.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include <conformance/fixture.hpp>
#include <conformance/refusals.hpp>

namespace gdn_test {

template <class Subject>
class rows_conformance : public backend_fixture<Subject> {
 public:
  /// Runs whose rows do not overlap on the packed side, nor on the local side unless `overlap`.
  static std::vector<gdn::run> random_runs(random_source& random, index_t local_rows, index_t packed_rows,
                                           bool overlap) {
    std::vector<gdn::run> runs;
    index_t packed = 0, local = 0;
    for (index_t n = random.between(0, 8); n > 0; --n) {
      packed += random.between(0, 2);
      local = overlap ? random.between(0, local_rows) : local + random.between(0, 3);
      const index_t most = std::min(packed_rows - packed, local_rows - local);
      if (most < 0) break;
      const index_t count = random.between(0, std::min<index_t>(most, 12));
      runs.push_back({0, local, count, packed});
      packed += count;
      local += count;
    }
    return runs;
  }
};
TYPED_TEST_SUITE_P(rows_conformance);

TYPED_TEST_P(rows_conformance, CopyRowsCopiesEveryElementAndNothingElse) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; const auto& [rows, width] :
                            {std::pair<index_t, index_t>{0, 3}, {3, 0}, {1, 1}, {5, 7}, {70000, 1}, {300, 257}}) {
    for (const index_t padding : {0, 2}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n << ", padding " << padding);
      random_source random(n);
      const auto src = random_tensor<T, 2>(random, {rows, width}, padding);
      auto dst = this->place(host_tensor<T, 2>({rows, width}, 3 - padding));
      this->backend_.copy_rows(this->place(src).in(), dst.out(), this->stream_);
      this->backend_.synchronize(this->stream_);
      EXPECT_TRUE(same_bits(dst.fetch(), src));
      EXPECT_TRUE(dst.fetch().padding_is_unused());
    }
    ++n;
  }
}

TYPED_TEST_P(rows_conformance, GatherAndScatterMoveTheRowsOfRuns) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; n < 40; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    const index_t width = random.between(1, 9);
    const auto runs = TestFixture::random_runs(random, 40, 50, false);
    const auto table = this->place_table(runs);
    const auto local = random_tensor<T, 2>(random, {40, width}, random.between(0, 2));
    const auto packed = random_tensor<T, 2>(random, {50, width}, random.between(0, 2));
    auto gathered = this->place(packed), scattered = this->place(local);
    this->backend_.gather_rows(this->place(local).in(), table.in(), gathered.out(), this->stream_);
    this->backend_.scatter_rows(this->place(packed).in(), table.in(), scattered.out(), this->stream_);
    this->backend_.synchronize(this->stream_);
    auto want_packed = packed, want_local = local;
    for (const gdn::run& r : runs) {
      for (index_t i = 0; i < r.count; ++i) {
        for (index_t j = 0; j < width; ++j) {
          want_packed(r.packed + i, j) = local(r.local + i, j);
          want_local(r.local + i, j) = packed(r.packed + i, j);
        }
      }
    }
    EXPECT_TRUE(same_bits(gathered.fetch(), want_packed));
    EXPECT_TRUE(same_bits(scattered.fetch(), want_local));
    EXPECT_TRUE(gathered.fetch().padding_is_unused() && scattered.fetch().padding_is_unused());
  }
}

/// The order of the additions shows in the bits.
TYPED_TEST_P(rows_conformance, ScatterAddAddsInTheOrderOfRuns) {
  using T = typename TestFixture::value_type;
  using A = gdn::accumulate_t<T>;
  for (std::uint64_t n = 0; n < 40; ++n) {
    SCOPED_TRACE(testing::Message() << "seed " << seed() << ", case " << n);
    random_source random(n);
    const index_t width = random.between(1, 9);
    const auto runs = TestFixture::random_runs(random, 20, 60, true);
    const auto packed = random_tensor<T, 2>(random, {60, width}, random.between(0, 2));
    auto want = random_tensor<T, 2>(random, {20, width}, random.between(0, 2));
    auto sum = this->place(want);
    this->backend_.scatter_add_rows(this->place(packed).in(), this->place_table(runs).in(), sum.out(), this->stream_);
    this->backend_.synchronize(this->stream_);
    for (const gdn::run& r : runs) {
      for (index_t i = 0; i < r.count; ++i) {
        for (index_t j = 0; j < width; ++j) {
          T& target = want(r.local + i, j);
          target = static_cast<T>(static_cast<A>(target) + static_cast<A>(packed(r.packed + i, j)));
        }
      }
    }
    EXPECT_TRUE(same_bits(sum.fetch(), want));
  }
}

TYPED_TEST_P(rows_conformance, FillZeroCoversNaNAndStaysInside) {
  using T = typename TestFixture::value_type;
  for (const index_t padding : {0, 3}) {
    for (const index_t rows : {0, 1, 9, 40000}) {
      host_tensor<T, 2> t({rows, 5}, padding);
      t.for_each([](T& v) { v = static_cast<T>(std::numeric_limits<double>::quiet_NaN()); });
      auto p = this->place(t);
      this->backend_.fill_zero(p.out(), this->stream_);
      this->backend_.synchronize(this->stream_);
      EXPECT_TRUE(same_bits(p.fetch(), host_tensor<T, 2>({rows, 5})));
      EXPECT_TRUE(p.fetch().padding_is_unused());
    }
  }
}

TYPED_TEST_P(rows_conformance, SwapAxesTransposesEachMatrix) {
  using T = typename TestFixture::value_type;
  for (std::uint64_t n = 0; const std::array<index_t, 3>& e :
                            std::vector<std::array<index_t, 3>>{{1, 1, 1}, {0, 2, 3}, {3, 4, 100}, {2, 65, 33}}) {
    random_source random(n++);
    const auto src = random_tensor<T, 3>(random, e, 2);
    auto dst = this->place(host_tensor<T, 3>({e[0], e[2], e[1]}, 1));
    this->backend_.swap_axes(this->place(src).in(), dst.out(), this->stream_);
    this->backend_.synchronize(this->stream_);
    host_tensor<T, 3> want({e[0], e[2], e[1]});
    for (index_t m = 0; m < e[0]; ++m) {
      for (index_t i = 0; i < e[1]; ++i) {
        for (index_t j = 0; j < e[2]; ++j) want(m, j, i) = src(m, i, j);
      }
    }
    EXPECT_TRUE(same_bits(dst.fetch(), want));
    EXPECT_TRUE(dst.fetch().padding_is_unused());
  }
}

template <class Fixture, class B>
recorder run_rows(const B& be) {
  using T = typename Fixture::value_type;
  recorder record;
  random_source random(3);
  const auto s = Fixture::subject::stream();
  const std::vector<gdn::run> runs = {{0, 100, 900, 0}, {0, 0, 300, 900}, {0, 50, 700, 1200}, {0, 999, 1, 1900}};
  const auto table = Fixture::place_table(runs);
  for (const index_t width : {1, 33}) {
    const auto src = Fixture::place(random_tensor<T, 2>(random, {2000, width}, 1));
    auto sum = Fixture::place(random_tensor<T, 2>(random, {1000, width})),
         packed = Fixture::place(random_tensor<T, 2>(random, {2000, width}));
    be.scatter_add_rows(src.in(), table.in(), sum.out(), s);
    be.gather_rows(sum.in(), table.in(), packed.out(), s);
    be.synchronize(s);
    record(sum);
    record(packed);
  }
  return record;
}
TYPED_TEST_P(rows_conformance, ThreadCountChangesNoBit) {
  TestFixture::expect_same_on_variants([](const auto& be) { return run_rows<TestFixture>(be); });
}
TYPED_TEST_P(rows_conformance, ConcurrentCallsChangeNoBit) {
  TestFixture::expect_same_in_threads([](const auto& be) { return run_rows<TestFixture>(be); });
}

/// Whether runs lie inside the rows is for backends to see that can read the table.
TYPED_TEST_P(rows_conformance, RefusesWhatDoesNotFit) {
  using T = typename TestFixture::value_type;
  const auto& be = this->backend_;
  random_source random(2);
  const auto src = this->place(random_tensor<T, 2>(random, {4, 3}, 1));
  auto dst = this->place(random_tensor<T, 2>(random, {4, 3}, 2));
  const auto table = this->place_table(std::vector<gdn::run>{{0, 0, 1, 0}, {0, 2, 2, 1}});
  const auto checked = [&](auto call, auto... operands) {
    const auto wait = [&](auto... tensors) {
      call(tensors...);
      be.synchronize(this->stream_);
    };
    expect_wrong_operands_refused(wait, operands...);
  };
  checked([&](auto from, auto to) { be.copy_rows(from, to, this->stream_); }, operand{"src", src.in()},
          operand{"dst", dst.out()});
  const operand from{"src", src.in(), 2U};
  const operand to{"dst", dst.out(), 2U};
  const operand runs{"runs", table.in(), 0U};
  checked([&](auto a, auto r, auto b) { be.gather_rows(a, r, b, this->stream_); }, from, runs, to);
  checked([&](auto a, auto r, auto b) { be.scatter_rows(a, r, b, this->stream_); }, from, runs, to);
  checked([&](auto a, auto r, auto b) { be.scatter_add_rows(a, r, b, this->stream_); }, from, runs, to);
  checked([&](auto t) { be.fill_zero(t, this->stream_); }, operand{"t", dst.out(), 0U});
  const auto matrices = this->place(random_tensor<T, 3>(random, {2, 3, 4}, 1));
  auto swapped = this->place(random_tensor<T, 3>(random, {2, 4, 3}));
  checked([&](auto a, auto b) { be.swap_axes(a, b, this->stream_); }, operand{"src", matrices.in()},
          operand{"dst", swapped.out()});
}

REGISTER_TYPED_TEST_SUITE_P(rows_conformance, CopyRowsCopiesEveryElementAndNothingElse,
                            GatherAndScatterMoveTheRowsOfRuns, ScatterAddAddsInTheOrderOfRuns,
                            FillZeroCoversNaNAndStaysInside, SwapAxesTransposesEachMatrix, ThreadCountChangesNoBit,
                            ConcurrentCallsChangeNoBit, RefusesWhatDoesNotFit);

}  // namespace gdn_test
