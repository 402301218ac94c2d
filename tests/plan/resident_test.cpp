// SPDX-License-Identifier: Apache-2.0
#include <gdn/plan/resident.hpp>
#include <plan/random_case.hpp>
#include <support/host_rows.hpp>

#include <gtest/gtest.h>

namespace {

using namespace gdn_test;

template <class Entry>
void expect_same(const gdn::tensor_ref<const Entry, 1>& table, const std::vector<Entry>& entries) {
  ASSERT_EQ(table.size(), static_cast<index_t>(entries.size()));
  EXPECT_TRUE(std::equal(entries.begin(), entries.end(), table.data()));
}
void expect_same(const gdn::resident_exchange<gdn::host_memory>& exchange, const gdn::exchange_plan& plan) {
  EXPECT_EQ(exchange.plan, plan);
  expect_same(exchange.sends, plan.sends);
  expect_same(exchange.recvs, plan.recvs);
}
void expect_same(const gdn::resident_chain<gdn::host_memory>& chain, const gdn::chain_plan& plan) {
  expect_same(chain.published, plan.published);
  expect_same(chain.folds, plan.folds);
  expect_same(chain.links, plan.links);
  EXPECT_EQ(chain.elements, plan.elements);
  EXPECT_EQ(chain.published_elements, plan.published_elements);
  ASSERT_EQ(chain.rounds.size(), plan.rounds.size());
  for (std::size_t i = 0; i < plan.rounds.size(); ++i) {
    expect_same(chain.rounds[i].exchange, plan.rounds[i].exchange);
    expect_same(chain.rounds[i].compose, plan.rounds[i].compose);
  }
}

TEST(resident_plan, HoldsTheTablesOfThePlanInTheMemoryThatWasPredicted) {
  for (std::uint64_t n = 0; n < cases(100); ++n) {
    random_source random(n);
    const plan_case c = any_case(random);
    for (const gdn::share share : shares) {
      const gdn::cp_plan plan = c.plan({gdn::strategy::in_place, share, random.coin(), random.coin()}, 0);
      const auto need = gdn::resident_requirement<gdn::host_memory>(plan);
      host_block block(need);
      auto memory = block.workspace();
      const auto resident = gdn::upload(host_rows{}, plan, memory, {});
      EXPECT_EQ(memory.peak(), need);
      expect_same(resident.undo, plan.undo);
      expect_same(resident.redo, plan.redo);
      expect_same(resident.halo, plan.halo.exchange);
      expect_same(resident.halo_adjoint, plan.halo.exchange.inverse());
      expect_same(resident.conv_segments, plan.conv_segments);
      expect_same(resident.rule_segments, plan.rule_segments);
      expect_same(resident.chain, plan.chain);
      expect_same(resident.reverse_chain, plan.reverse_chain);
      EXPECT_EQ(resident.host.digest(), plan.digest());
    }
  }
}

TEST(resident_plan, NeedsAllOfItsMemory) {
  random_source random(1);
  const gdn::cp_plan plan = any_case(random).plan({}, 0);
  auto need = gdn::resident_requirement<gdn::host_memory>(plan);
  ASSERT_GT(need.bytes, 0U);
  need.bytes -= 1;
  host_block block(need);
  auto memory = block.workspace();
  EXPECT_THROW(gdn::upload(host_rows{}, plan, memory, {}), gdn::workspace_error);
}

}  // namespace
