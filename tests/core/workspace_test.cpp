// SPDX-License-Identifier: Apache-2.0
#include <gdn/core/workspace.hpp>

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include <support/errors.hpp>
#include <support/random.hpp>

namespace {

using namespace gdn_test;
using gdn::host_memory;
using gdn::workspace;
using gdn::workspace_error;

/// Memory at an alignment of 256 bytes.
class block {
 public:
  explicit block(std::size_t bytes) : memory_(bytes + 256) {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data());
    begin_ = memory_.data() + (256 - at % 256) % 256;
  }
  std::byte* begin() const { return begin_; }

 private:
  std::vector<std::byte> memory_;
  std::byte* begin_;
};

/// Takes and frees at random, as layers do; what it takes, it fills.
void carve(workspace<host_memory>& ws, std::uint64_t n, int depth = 0) {
  random_source random(n);
  const gdn::scoped_mark scope(ws);
  for (gdn::index_t i = random.between(0, 4); i >= 0; --i) {
    const auto a = ws.take<float>(random.between(0, 50), 3);
    const auto b = ws.take<char>(random.between(0, 700));
    if (!ws.measuring()) {
      for (gdn::index_t k = 0; k < b.size(); ++k) b.data()[k] = 'x';
      for (gdn::index_t k = 0; k < a.size(); ++k) a.data()[k] = 1;
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.data()) % 256, 0U);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data()) % 256, 0U);
    } else {
      EXPECT_EQ(a.data(), nullptr);
    }
    if (depth < 3 && random.coin()) carve(ws, n * 7 + static_cast<std::uint64_t>(i), depth + 1);
  }
}

TEST(workspace, MeasuresExactlyWhatIsUsed) {
  for (std::uint64_t n = 0; n < 300; ++n) {
    workspace<host_memory> measure;
    EXPECT_TRUE(measure.measuring());
    carve(measure, n);
    const gdn::memory_requirement need = measure.peak();
    EXPECT_EQ(need.alignment, 256U);
    const block memory(need.bytes);
    workspace<host_memory> real(memory.begin(), need.bytes);
    EXPECT_FALSE(real.measuring());
    carve(real, n);
    EXPECT_EQ(real.peak(), need);
    EXPECT_EQ(real.used(), 0U);  // all was freed
    if (need.bytes > 0) {
      workspace<host_memory> less(memory.begin(), need.bytes - 1);
      EXPECT_THROW(carve(less, n), workspace_error);
    }
  }
}

TEST(workspace, TakesTensorsOneBehindTheOther) {
  const block memory(1024);
  workspace<host_memory> ws(memory.begin(), 1024);
  const auto a = ws.take<double>(2, 3);
  const auto b = ws.take<char>(1);
  const auto empty = ws.take<int>(0, 5);
  const auto c = ws.take<float>(64);
  EXPECT_EQ(a.extent(1), 3);
  EXPECT_EQ(a.stride(0), 3);
  EXPECT_EQ(reinterpret_cast<std::byte*>(a.data()), memory.begin());
  EXPECT_EQ(reinterpret_cast<std::byte*>(b.data()), memory.begin() + 256);
  EXPECT_EQ(empty.size(), 0);
  EXPECT_EQ(reinterpret_cast<std::byte*>(c.data()), memory.begin() + 512);
  EXPECT_EQ(ws.used(), 768U);
}

TEST(workspace, NamesWhatItHasAndWhatIsNeeded) {
  const block memory(512);
  workspace<host_memory> ws(memory.begin(), 512);
  ws.take<char>(200);
  EXPECT_EQ(text_of<workspace_error>([&] { ws.take<double>(100); }),
            "the workspace has 512 bytes, and 1280 or more are needed; ask requirements()");
  EXPECT_EQ(ws.used(), 256U);  // nothing was taken
  EXPECT_NO_THROW(ws.take<char>(256));
  EXPECT_THROW(ws.take<char>(1), workspace_error);
}

TEST(workspace, RejectsNegativeExtents) {
  workspace<host_memory> measure;
  for (const gdn::index_t n : {-1, -300}) {
    EXPECT_EQ(text_of<gdn::shape_error>([&] { measure.take<float>(2, n); }),
              gdn::say("a tensor of a workspace cannot have extent", n));
    EXPECT_THROW(measure.take<float>(n, n), gdn::shape_error);  // of positive size
  }
  EXPECT_EQ(measure.peak().bytes, 0U);
}

TEST(workspace, RejectsMemoryThatIsMisalignedOrMissing) {
  const block memory(512);
  EXPECT_EQ(text_of<workspace_error>([&] { workspace<host_memory>(memory.begin() + 8, 100); }),
            "a workspace must be aligned to 256 bytes");
  EXPECT_EQ(text_of<workspace_error>([] { workspace<host_memory>(nullptr, 100); }),
            "a workspace of 100 bytes has no memory");
  workspace<host_memory> none(nullptr, 0);
  EXPECT_FALSE(none.measuring());
  EXPECT_EQ(none.take<int>(0).size(), 0);
  EXPECT_THROW(none.take<int>(1), workspace_error);
}

TEST(workspace, AMarkFreesWhatWasTakenAfterIt) {
  const block memory(1024);
  workspace<host_memory> ws(memory.begin(), 1024);
  ws.take<char>(1);
  const auto mark = ws.mark();
  const auto first = ws.take<char>(600);
  ws.release(mark);
  EXPECT_EQ(ws.used(), 256U);
  const auto second = ws.take<char>(10);
  EXPECT_EQ(first.data(), second.data());
  EXPECT_EQ(ws.peak().bytes, 1024U);  // of the largest moment, not of the last
}

TEST(workspace, AMarkFreesWhenAnErrorLeavesItsScope) {
  const block memory(512);
  workspace<host_memory> ws(memory.begin(), 512);
  try {
    const gdn::scoped_mark scope(ws);
    ws.take<char>(1);
    ws.take<char>(1000);
  } catch (const workspace_error&) {
  }
  EXPECT_EQ(ws.used(), 0U);
  static_assert(!std::is_copy_constructible_v<gdn::scoped_mark<host_memory>>);
}

TEST(workspace, OfOtherMemoryOnlyCountsItsPointers) {
  alignas(256) static std::byte somewhere[512];
  workspace<gdn::device_memory> ws(somewhere, 512);
  const auto t = ws.take<float>(3);
  static_assert(std::is_same_v<decltype(t)::memory_type, gdn::device_memory>);
  EXPECT_EQ(static_cast<void*>(t.data()), somewhere);
}

}  // namespace
