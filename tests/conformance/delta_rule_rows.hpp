// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The shapes on which flash-linear-attention tests its gated delta rule, with its tolerances (spec 7.2).

#include <cmath>
#include <ostream>
#include <string>
#include <vector>

#include <conformance/delta_rule.hpp>

namespace gdn_test {

struct fla_row {
  std::string name;
  std::vector<index_t> lengths;  // of the sequences of the batch, or of the documents of a row
  index_t H, HV, D;
  double scale = 0;              // 0: D^(-1/2)
  double gate_divisor = 1;
  double no_gate = 0;            // the share of gates that are zero
  index_t chunk = 64;
  /// FLA's limits of rms(error) / rms(reference); those of o and ht, dq, dk, dv, dbeta and dg, dh0.
  double o = 0.005, dq = 0.008, dk = 0.008, dv = 0.008, gates = 0.02, dh0 = 0.008;
};
inline std::ostream& operator<<(std::ostream& out, const fla_row& r) { return out << r.name; }

inline std::vector<index_t> batch_of(index_t B, index_t T) { return std::vector<index_t>(static_cast<std::size_t>(B), T); }

/// The token recurrence, fp32, in FLA with l2norm in the kernel and random initial states.
inline std::vector<fla_row> fla_recurrent_rows() {
  return {{"B1_T63_H1_HV1_D64", batch_of(1, 63), 1, 1, 64, 1, 1},
          {"B2_T500_H4_HV4_D60", batch_of(2, 500), 4, 4, 60, 1, 1},
          {"B2_T1000_H2_HV8_D128", batch_of(2, 1000), 2, 8, 128, 1, 0.1},
          {"B3_T1024_H2_HV2_D128", batch_of(3, 1024), 2, 2, 128, 0.1, 1},
          {"B4_T1024_H3_HV3_D128", batch_of(4, 1024), 3, 3, 128, 1, 10},
          {"B4_T2048_H4_HV4_D64", batch_of(4, 2048), 4, 4, 64, 0.1, 1}};
}
/// Chunks against the recurrence, fp16 in FLA.
inline std::vector<fla_row> fla_chunk_rows() {
  return {{"B4_T1024_H4_HV4_D128_no_gates", batch_of(4, 1024), 4, 4, 128, 0.1, 1, 1},
          {"B2_T75_H4_HV4_D64", batch_of(2, 75), 4, 4, 64, 1, 0.01},
          {"B2_T500_H3_HV3_D60", batch_of(2, 500), 3, 3, 60, 1, 1},
          {"B2_T1000_H3_HV3_D64_half_the_gates", batch_of(2, 1000), 3, 3, 64, 0.1, 1, 0.5},
          {"B3_T1024_H4_HV4_D100", batch_of(3, 1024), 4, 4, 100, 1, 0.1},
          {"B4_T1024_H4_HV4_D128", batch_of(4, 1024), 4, 4, 128, 0.1, 1},
          {"B2_T1500_H4_HV4_D128", batch_of(2, 1500), 4, 4, 128, 0.1, 10},
          {"B4_T2048_H8_HV8_D64", batch_of(4, 2048), 8, 8, 64, 0.1, 1},
          {"B2_T256_H2_HV4_D64", batch_of(2, 256), 2, 4, 64, 1, 1},
          {"B2_T512_H2_HV8_D64", batch_of(2, 512), 2, 8, 64, 1, 0.1},
          {"B2_T1024_H4_HV8_D128", batch_of(2, 1024), 4, 8, 128, 0.1, 1}};
}
inline std::vector<fla_row> fla_chunk_size_rows() {
  std::vector<fla_row> out;
  for (const index_t chunk : {16, 32, 64}) {
    fla_row r{"B2_T500_H2_HV4_D64_chunk" + std::to_string(chunk), batch_of(2, 500), 2, 4, 64, 0, 1, 0, chunk};
    r.dq = r.dk = r.dv = r.gates = r.dh0 = 0.01;
    out.push_back(r);
  }
  return out;
}
inline std::vector<fla_row> fla_varlen_rows() {
  std::vector<fla_row> out = {{"cu_0_15", {15}, 4, 4, 60},
                              {"cu_0_256_500_1000", {256, 244, 500}, 4, 4, 64},
                              {"cu_0_15_100_300_1200_2000", {15, 85, 200, 900, 800}, 4, 4, 100}};
  for (fla_row& r : out) {
    r.dq = r.dv = r.dh0 = 0.007;
    r.gates = 0.015;
  }
  return out;
}

/// FLA's data: uniform positive numbers, so that keys have a cosine of about 0.75; random initial states and gradients
/// of the final ones.
template <class T>
rule_case<T> fla_case(const fla_row& r) {
  random_source random(std::hash<std::string>{}(r.name) % 1000);
  index_t tokens = 0;
  for (const index_t n : r.lengths) tokens += n;
  rule_case<T> c = random_rule_case<T>(random, {tokens, r.H, r.HV, r.D, r.D}, r.chunk);
  std::uniform_real_distribution<float> uniform(0, 1);  // numbers of a float, so that all types start from the same
  const auto next = [&] { return static_cast<double>(uniform(random.engine())); };
  const auto unit = [&](host_tensor<T, 3>& t) {
    std::vector<double> row(static_cast<std::size_t>(r.D));
    for (index_t i = 0; i < t.size() / r.D; ++i) {
      double sum = 0;
      for (double& v : row) {
        v = next();
        sum += v * v;
      }
      for (std::size_t j = 0; j < row.size(); ++j) {
        t.at(i * r.D + static_cast<index_t>(j)) = static_cast<T>(static_cast<float>(row[j] / std::sqrt(sum + 1e-6)));
      }
    }
  };
  unit(c.q);
  unit(c.k);
  c.v.for_each([&](T& v) { v = static_cast<T>(next()); });
  c.d_o.for_each([&](T& v) { v = static_cast<T>(2 * next() - 1); });
  c.beta.for_each([&](T& v) { v = static_cast<T>(static_cast<float>(1 / (1 + std::exp(-next())))); });
  c.g.for_each([&](auto& v) {
    const double g = -std::log1p(std::exp(-next())) / r.gate_divisor;
    v = next() < r.no_gate ? 0 : static_cast<float>(g);
  });
  if (r.scale > 0) c.scale = static_cast<double>(static_cast<float>(r.scale));
  c.cut(r.lengths, rule_case<T>::states::all, random);
  c.h0.for_each([](auto& v) { v = static_cast<float>(v); });
  c.dht.for_each([](auto& v) { v = static_cast<float>(v); });
  return c;
}

}  // namespace gdn_test
