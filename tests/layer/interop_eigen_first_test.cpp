// SPDX-License-Identifier: Apache-2.0
// A program that uses Eigen itself, and includes it first: gdn changes none of Eigen's settings, and both compute the
// same as in a program without the other. Another file of this program includes gdn first.
#include <Eigen/Dense>

#ifdef EIGEN_DONT_PARALLELIZE
#error "nobody asked for this"
#endif

namespace host {

/// Large enough that Eigen uses its threads outside of parallel regions.
Eigen::MatrixXd product(const Eigen::MatrixXd& a, const Eigen::MatrixXd& b) { return a * b; }
Eigen::MatrixXd numbers(Eigen::Index n) {
  Eigen::MatrixXd m(n, n);
  for (Eigen::Index i = 0; i < n; ++i) {
    for (Eigen::Index j = 0; j < n; ++j) m(i, j) = static_cast<double>((i * 7 + j * 13) % 11) - 5;
  }
  return m;
}

}  // namespace host

#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/kokkos/kokkos.hpp>

#ifdef EIGEN_DONT_PARALLELIZE
#error "gdn changed how the program's own products are compiled"
#endif

#include <gtest/gtest.h>

#include <support/layer_case.hpp>

namespace gdn_test {
namespace {

/// y = x w^T by gdn, compiled in this file.
std::vector<double> projected(const std::vector<double>& x, const std::vector<double>& w, index_t rows, index_t in, index_t out) {
  std::vector<double> y(static_cast<std::size_t>(rows * out));
  gdn::workspace<gdn::host_memory> none;
  gdn::kokkos::backend<>().linear_forward(gdn::make_tensor(x.data(), rows, in), gdn::make_tensor(w.data(), out, in),
                                          gdn::make_tensor(y.data(), rows, out), none, {});
  return y;
}

TEST(interop, AProgramThatIncludesEigenFirstKeepsItsOwnProducts) {
  const int threads = Eigen::nbThreads();
  const Eigen::MatrixXd a = host::numbers(300), b = host::numbers(300).transpose();
  const Eigen::MatrixXd before = host::product(a, b);  // integers, so every order of sums gives the same
  random_source random(92);
  const layer_batch batch = random_batch(
      random, {.hidden = 40, .key_heads = 2, .value_heads = 4, .key_dim = 16, .value_dim = 16}, gdn::packing::rows_of(1, 90));
  const layer_result first = run_layer<double>(batch, on_one_rank(batch));
  const Eigen::MatrixXd after = host::product(a, b);
  EXPECT_EQ(before, after);
  EXPECT_EQ(Eigen::nbThreads(), threads) << "gdn leaves Eigen's number of threads alone";
  for (Eigen::Index i = 0; i < 300; i += 37) {
    for (Eigen::Index j = 0; j < 300; j += 41) {
      double sum = 0;
      for (Eigen::Index k = 0; k < 300; ++k) sum += a(i, k) * b(k, j);
      EXPECT_EQ(before(i, j), sum);
    }
  }
  // gdn's own products: the same bits whatever the program told Eigen.
  std::vector<double> x, w;
  for (const double v : random_values(random, 90 * 70)) x.push_back(v);
  for (const double v : random_values(random, 130 * 70)) w.push_back(v);
  const auto y = projected(x, w, 90, 70, 130);
  Eigen::setNbThreads(1);
  EXPECT_EQ(projected(x, w, 90, 70, 130), y);
  EXPECT_TRUE(same_bits(run_layer<double>(batch, on_one_rank(batch)), first));
  Eigen::setNbThreads(4);
  EXPECT_EQ(projected(x, w, 90, 70, 130), y);
  EXPECT_TRUE(same_bits(run_layer<double>(batch, on_one_rank(batch)), first));
  EXPECT_EQ(host::product(a, b), before);
  Eigen::setNbThreads(0);
}

}  // namespace
}  // namespace gdn_test
