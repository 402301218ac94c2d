// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The operators under context parallelism on the device, compiled once per type, for suites that a host compiler
///        compiles.

#include <array>
#include <vector>

#include <cp/cp_run.hpp>
#include <gdn/core/storage.hpp>

namespace gdn_test {

/// As run_conv() and run_rule(), by threads that share one device.
template <class T>
conv_answers run_conv_on_device(const conv_numbers& n, const stream_spread& s);
template <class T>
rule_stream_answers run_rule_on_device(const rule_stream& n, const stream_spread& s, std::vector<message_counts>* counts);

extern template conv_answers run_conv_on_device<float>(const conv_numbers&, const stream_spread&);
extern template conv_answers run_conv_on_device<gdn::bfloat16>(const conv_numbers&, const stream_spread&);
extern template conv_answers run_conv_on_device<gdn::float16>(const conv_numbers&, const stream_spread&);
extern template rule_stream_answers run_rule_on_device<float>(const rule_stream&, const stream_spread&,
                                                              std::vector<message_counts>*);
extern template rule_stream_answers run_rule_on_device<gdn::bfloat16>(const rule_stream&, const stream_spread&,
                                                                      std::vector<message_counts>*);
extern template rule_stream_answers run_rule_on_device<gdn::float16>(const rule_stream&, const stream_spread&,
                                                                     std::vector<message_counts>*);

/// What the suites take: a type, computed on the device.
template <class T>
struct on_device {
  using value_type = T;
  static index_t head_size(index_t n) {
    constexpr std::array<index_t, 5> sizes = {16, 64, 48, 80, 144};
    return sizes[static_cast<std::size_t>(n) % sizes.size()];
  }
  static conv_answers conv(const conv_numbers& n, const stream_spread& s) { return run_conv_on_device<T>(n, s); }
  static rule_stream_answers rule(const rule_stream& n, const stream_spread& s,
                                  std::vector<message_counts>* counts = nullptr) {
    return run_rule_on_device<T>(n, s, counts);
  }
};

}  // namespace gdn_test
