// SPDX-License-Identifier: Apache-2.0
#include <conformance/communicator.hpp>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>

namespace {

using namespace gdn_test;

struct self_group : host_group<gdn::self_communicator> {
  static constexpr int most_ranks = 1;
  template <class F>
  static void run(int, F&& f) {
    gdn::self_communicator comm;
    f(comm);
  }
};

struct thread_group : host_group<gdn::thread_communicator> {
  static constexpr int most_ranks = 64;
  template <class F>
  static void run(int ranks, F&& f) {
    gdn::run_on_threads(ranks, f);
  }
};

INSTANTIATE_TYPED_TEST_SUITE_P(self, communicator_conformance, self_group);
INSTANTIATE_TYPED_TEST_SUITE_P(threads, communicator_conformance, thread_group);

}  // namespace
