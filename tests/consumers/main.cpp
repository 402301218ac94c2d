// SPDX-License-Identifier: Apache-2.0
// What a project that uses gdn looks like: the same program in each of the folders beside this file but mpi. It runs a
// layer on one rank and on two, and compares.
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/comm/threads.hpp>

#include "layer.hpp"

int main() {
  const Kokkos::ScopeGuard kokkos;
  const consumer::problem p;
  std::vector<double> one(p.x.size()), two(p.x.size());
  gdn::self_communicator self;
  consumer::run(self, p.layer, p.x, one);
  gdn::run_on_threads(2, [&](gdn::thread_communicator& comm) { consumer::run(comm, p.layer, p.x, two); });
  return consumer::compare(one, two);
}
