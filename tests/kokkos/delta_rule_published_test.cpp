// SPDX-License-Identifier: Apache-2.0
// flash-linear-attention's shapes, in float and double, against the token recurrence in double. Its limits hold; the
// limit that is checked is stricter: 1e-5 of the reference's size in float.
#include <conformance/delta_rule_rows.hpp>
#include <kokkos/delta_rule_setup.hpp>

namespace gdn_test {
namespace {

class fla_shapes : public testing::TestWithParam<fla_row> {};

template <class Subject>
void expect_row(const fla_row& row, const rule_answers& want, double limit) {
  const auto got = run_rule<Subject>(Subject::make(), fla_case<typename Subject::value_type>(row));
  EXPECT_TRUE(near(got, want, limit)) << row;
  for (const double fla : {row.o, row.dq, row.dk, row.dv, row.gates, row.dh0}) EXPECT_LT(limit, fla);
}

TEST_P(fla_shapes, ChunksAreTheTokenRecurrence) {
  const fla_row& row = GetParam();
  const rule_answers want = by_recurrence(fla_case<double>(row).numbers());
  expect_row<kokkos_setup<float>>(row, want, 1e-5);
  expect_row<kokkos_setup<double>>(row, want, 1e-12);
}

class fla_recurrent_shapes : public testing::TestWithParam<fla_row> {};

TEST_P(fla_recurrent_shapes, FloatsAreCloseToDoubles) {
  const fla_row& row = GetParam();
  const rule_answers want = by_recurrence(fla_case<double>(row).numbers());
  expect_row<recurrent_setup<float>>(row, want, 1e-5);
  expect_row<kokkos_setup<float>>(row, want, 1e-5);
}

const auto name_of = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(chunk, fla_shapes, testing::ValuesIn(fla_chunk_rows()), name_of);
INSTANTIATE_TEST_SUITE_P(chunk_size, fla_shapes, testing::ValuesIn(fla_chunk_size_rows()), name_of);
INSTANTIATE_TEST_SUITE_P(varlen, fla_shapes, testing::ValuesIn(fla_varlen_rows()), name_of);
INSTANTIATE_TEST_SUITE_P(recurrent, fla_recurrent_shapes, testing::ValuesIn(fla_recurrent_rows()), name_of);

}  // namespace
}  // namespace gdn_test
