// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <string>
#include <type_traits>

#include <conformance/communicator.hpp>

#include "group.hpp"

namespace {

using namespace gdn_test;

template <std::size_t Piece>
struct mpi_group : host_group<gdn::mpi::mpi_communicator> {
  static constexpr const int& most_ranks = processes;
  template <class F>
  static void run(int ranks, F&& f) {
    run_on_processes(ranks, {.piece = Piece}, f, Piece > 100);
  }
};

using whole = mpi_group<std::size_t{1} << 30U>;
using pieces = mpi_group<100>;  // longer messages are split
using groups = testing::Types<whole, pieces>;
struct group_names {
  template <class Group>
  static std::string GetName(int) {
    return std::is_same_v<Group, whole> ? "whole" : "pieces";
  }
};
INSTANTIATE_TYPED_TEST_SUITE_P(mpi, communicator_conformance, groups, group_names);

}  // namespace
