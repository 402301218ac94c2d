// SPDX-License-Identifier: Apache-2.0
#include <conformance/communicator.hpp>

#include <gdn/nccl/communicator_ref.hpp>

#include "group.hpp"

namespace {

using namespace gdn_test;

/// Work on one stream of this process; a test asks for it again.
const gdn::cuda::stream& test_stream() {
  static const gdn::cuda::stream s;
  return s;
}

struct nccl_group {
  using communicator = gdn::nccl::nccl_communicator;
  using buffer = device_bytes;
  static constexpr const int& most_ranks = processes;
  template <class F>
  static void run(int ranks, F&& f) {
    run_on_lasting_group(ranks, f);
  }
  static gdn::cuda::stream_ref stream(communicator&) { return test_stream(); }
  static void synchronize(gdn::cuda::stream_ref s) { gdn::cuda::check(cudaStreamSynchronize(s.get()), "cudaStreamSynchronize"); }
};

INSTANTIATE_TYPED_TEST_SUITE_P(nccl, communicator_conformance, nccl_group);

}  // namespace
