// SPDX-License-Identifier: Apache-2.0
// What is particular to the Kokkos backend: its executor, its refusals, and that it allocates nothing.

#include <array>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <gdn/kokkos/kokkos.hpp>
#include <kokkos/setup.hpp>
#include <support/host_tensor.hpp>

// Clang's thread sanitizer brings an operator new of its own, which cannot be replaced.
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define GDN_TEST_HAS_OTHER_NEW
#endif
#endif

#ifndef GDN_TEST_HAS_OTHER_NEW
namespace {
thread_local bool count_allocations = false;
thread_local int allocations = 0;
void* allocate(std::size_t bytes) {
  if (count_allocations) ++allocations;
  if (void* p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
}  // namespace

void* operator new(std::size_t bytes) {
  return allocate(bytes);
}
void* operator new[](std::size_t bytes) {
  return allocate(bytes);
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete[](void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}
void operator delete[](void* p, std::size_t) noexcept {
  std::free(p);
}
#endif

namespace gdn_test {
namespace {

using gdn::conv_segment;
using gdn::run;
using gdn::shape_error;
using testing::HasSubstr;

template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  }
  return "no error";
}

TEST(KokkosBackend, TakesAnInstanceOrTheDefaultOne) {
  const gdn::kokkos::backend<> standard;
  EXPECT_EQ(standard.chosen_rule(), gdn::kokkos::rule::chunked);
  const gdn::kokkos::backend own(Kokkos::DefaultHostExecutionSpace{}, gdn::kokkos::rule::recurrent);
  static_assert(std::is_same_v<decltype(own), decltype(standard)>);
  EXPECT_EQ(own.chosen_rule(), gdn::kokkos::rule::recurrent);
  EXPECT_TRUE(own.instance() == Kokkos::DefaultHostExecutionSpace{});
  EXPECT_EQ(own.name(), "kokkos");
  own.synchronize({});
}

TEST(KokkosBackend, UploadCopiesATable) {
  const std::vector<run> host = {{1, 2, 3, 4}, {5, 6, 7, 8}};
  std::vector<run> table(2);
  const gdn::kokkos::backend<> be;
  be.upload(std::span(host), gdn::make_tensor(table.data(), 2), {});
  EXPECT_EQ(table, host);
  EXPECT_THROW(be.upload(std::span(host), gdn::make_tensor(table.data(), 1), {}), shape_error);
}

TEST(KokkosBackend, RowsOfStructuresMove) {
  const gdn::kokkos::backend<> be;
  std::vector<run> a = {{1, 2, 3, 4}, {5, 6, 7, 8}}, b(2);
  const std::array<run, 1> runs = {run{0, 1, 1, 0}};
  be.gather_rows(gdn::make_tensor(a.data(), 2, 1), gdn::make_tensor(runs.data(), 1), gdn::make_tensor(b.data(), 2, 1),
                 {});
  EXPECT_EQ(b[0], a[1]);
  std::vector<std::int32_t> n = {1, 2}, sum = {1 << 24, 1};
  be.scatter_add_rows(gdn::make_tensor(n.data(), 2, 1), gdn::make_tensor(runs.data(), 1),
                      gdn::make_tensor(sum.data(), 2, 1), {});
  EXPECT_EQ(sum, (std::vector<std::int32_t>{1 << 24, 2}));
}

TEST(KokkosBackend, RefusesRunsOutsideTheRows) {
  const gdn::kokkos::backend<> be;
  host_tensor<float, 2> local({4, 2}), packed({3, 2});
  for (const run r : {run{0, 3, 2, 0}, run{0, -1, 1, 0}, run{0, 0, 2, 2}, run{0, 0, -1, 0}}) {
    const auto runs = gdn::make_tensor(&r, 1);
    EXPECT_THROW(be.gather_rows(local.ref(), runs, packed.ref(), {}), shape_error);
    EXPECT_THROW(be.scatter_rows(packed.ref(), runs, local.ref(), {}), shape_error);
    EXPECT_THROW(be.scatter_add_rows(packed.ref(), runs, local.ref(), {}), shape_error);
  }
}

TEST(KokkosBackend, RefusesSegmentsThatDoNotTileTheRows) {
  const gdn::kokkos::backend<> be;
  host_tensor<float, 2> x({5, 2}), y({5, 2}), halo({3, 2}), w({2, 4});
  const auto text = [&](std::vector<conv_segment> s) {
    return message_of<shape_error>([&] {
      be.causal_conv1d_forward(gdn::make_tensor(std::as_const(s).data(), s.size()), x.ref(), halo.ref(), w.ref(),
                               gdn::activation::silu, y.ref(), {});
    });
  };
  EXPECT_EQ(text({{0, 2, 0}, {2, 3, -1}}), "no error");
  EXPECT_THAT(text({{0, 2, -1}, {3, 2, -1}}), HasSubstr("segment 1 has 2 rows from 3"));
  EXPECT_THAT(text({{0, 4, -1}}), HasSubstr("segments cover 4 of 5 rows"));
  EXPECT_THAT(text({{0, 5, 1}}), HasSubstr("segment 0 reads 3 halo rows from 1 of a buffer of 3"));
}

TEST(KokkosBackend, NamesWhatDoesNotFit) {
  const gdn::kokkos::backend<> be;
  host_tensor<float, 2> x({5, 3}), w({4, 3}), y({5, 5});
  EXPECT_THAT(message_of<shape_error>([&] { be.linear_forward(x.ref(), w.ref(), y.ref(), no_scratch(), {}); }),
              HasSubstr("y axis 1 must be 4 is 5"));
  host_tensor<float, 2> wide({1, 5000});
  const std::array<conv_segment, 1> s = {conv_segment{0, 1, -1}};
  EXPECT_THAT(message_of<gdn::backend_error>([&] {
                host_tensor<float, 2> one({1, 1});
                be.causal_conv1d_forward(gdn::make_tensor(s.data(), 1), one.ref(), one.ref(), wide.ref(),
                                         gdn::activation::none, one.ref(), {});
              }),
              HasSubstr("width of 5000"));
  host_tensor<float, 3> states({2, 1, 4});
  host_tensor<float, 2> one({1, 1}), out({1, 1}), w1({1, 4});
  const std::int32_t slot = 2;
  EXPECT_THAT(message_of<shape_error>([&] {
                be.causal_conv1d_step(one.ref(), states.ref(), gdn::make_tensor(&slot, 1), w1.ref(),
                                      gdn::activation::none, out.ref(), {});
              }),
              HasSubstr("slot 2 of sequence 0 must lie in -1 to 1"));
}

#ifndef GDN_TEST_HAS_OTHER_NEW
template <class Exec>
void expect_no_allocation(const gdn::kokkos::backend<Exec>& be) {
  random_source random(1);
  const auto x = random_tensor<float, 2>(random, {200, 300}), w = random_tensor<float, 2>(random, {250, 300});
  const auto taps = random_tensor<float, 2>(random, {300, 4});
  host_tensor<float, 2> y({200, 250}), dx({200, 300}), dw({250, 300}), dtaps({300, 4}), none({0, 300}), halo;
  const std::array<conv_segment, 2> segments = {conv_segment{0, 150, -1}, conv_segment{150, 50, -1}};
  const auto table = gdn::make_tensor(segments.data(), 2);
  const std::array<run, 1> runs = {run{0, 10, 100, 20}};
  const auto all = [&] {
    be.linear_forward(x.ref(), w.ref(), y.ref(), no_scratch(), {});
    be.linear_backward_input(y.ref(), w.ref(), dx.ref(), true, no_scratch(), {});
    be.linear_backward_weight(y.ref(), x.ref(), dw.ref(), no_scratch(), {});
    be.causal_conv1d_forward(table, x.ref(), none.ref(), taps.ref(), gdn::activation::silu, dx.ref(), {});
    be.causal_conv1d_backward(table, x.ref(), none.ref(), taps.ref(), gdn::activation::silu, x.ref(), dx.ref(),
                              none.ref(), dtaps.ref(), no_scratch(), {});
    be.scatter_add_rows(x.ref(), gdn::make_tensor(runs.data(), 1), dx.ref(), {});
    be.copy_rows(x.ref(), dx.ref(), {});
    be.synchronize({});
  };
  all();  // the first parallel region of a thread makes its pool
  allocations = 0;
  count_allocations = true;
  all();
  count_allocations = false;
  EXPECT_EQ(allocations, 0);
}

/// Seen from the calling thread, which also works in a pool.
TEST(KokkosBackend, CallsAllocateNothing) {
#ifdef KOKKOS_ENABLE_SERIAL
  expect_no_allocation(gdn::kokkos::backend(Kokkos::Serial()));
#endif
#ifdef KOKKOS_ENABLE_OPENMP
  expect_no_allocation(gdn::kokkos::backend(Kokkos::OpenMP(2)));
#endif
}
#endif

}  // namespace
}  // namespace gdn_test
