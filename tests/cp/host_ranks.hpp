// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  Ranks that are threads and compute with the Kokkos backend, for cp_run.hpp.

#include <utility>
#include <vector>

#include <cp/cp_run.hpp>
#include <support/block.hpp>

namespace gdn_test {

struct host_ranks {
  using memory = gdn::host_memory;
  using stream = gdn::host_stream;
  using communicator = gdn::thread_communicator;
  template <class T>
  using api = layer_api<T>;

  template <class U>
  class array {
   public:
    template <class Api>
    array(std::vector<U> from, const Api&) : elements_(std::move(from)) {}
    U* data() const { return const_cast<U*>(elements_.data()); }
    const std::vector<U>& fetch() const { return elements_; }

   private:
    std::vector<U> elements_;
  };
  class block : public poisoned_block {
   public:
    template <class Api>
    block(gdn::memory_requirement need, const Api&) : poisoned_block(need) {}
  };
};

/// One rank in double: what any number of ranks of any type must give.
template <class T>
conv_answers reference(const conv_numbers& n, const stream_spread& s) {
  return run_conv<double, host_ranks>(rounded<T>(n), s.on_one_rank());
}
template <class T>
rule_stream_answers reference(const rule_stream& n, const stream_spread& s) {
  return run_rule<double, host_ranks>(rounded<T>(n), s.on_one_rank());
}

/// What the suites take: a type, and where it is computed.
template <class T>
struct on_host {
  using value_type = T;
  static conv_answers conv(const conv_numbers& n, const stream_spread& s) { return run_conv<T, host_ranks>(n, s); }
  static rule_stream_answers rule(const rule_stream& n, const stream_spread& s,
                                  std::vector<message_counts>* counts = nullptr) {
    return run_rule<T, host_ranks>(n, s, counts);
  }
};

}  // namespace gdn_test
