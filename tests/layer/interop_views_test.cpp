// SPDX-License-Identifier: Apache-2.0
// The public functions take what a program already has: Kokkos Views, and matrices of its own.
#include <vector>

#include <gdn/comm/self.hpp>
#include <gdn/kokkos/kokkos.hpp>
#include <gdn/layer/decode.hpp>
#include <gdn/layer/requirements.hpp>
#include <support/block.hpp>
#include <support/layer_case.hpp>

namespace user {

/// Knows nothing of gdn.
class matrix {
 public:
  matrix(int rows, int columns) : rows_(rows), columns_(columns), values_(static_cast<std::size_t>(rows * columns)) {}
  double* begin() { return values_.data(); }
  const double* begin() const { return values_.data(); }
  int rows() const { return rows_; }
  int columns() const { return columns_; }
  std::vector<double>& values() { return values_; }

 private:
  int rows_, columns_;
  std::vector<double> values_;
};
/// What is written must be mutable through a const handle.
struct matrix_handle {
  matrix* of;
};

}  // namespace user

template <>
struct gdn::tensor_traits<user::matrix> {
  static auto ref(const user::matrix& m) { return make_tensor(m.begin(), m.rows(), m.columns()); }
};
template <>
struct gdn::tensor_traits<user::matrix_handle> {
  static auto ref(const user::matrix_handle& m) { return make_tensor(m.of->begin(), m.of->rows(), m.of->columns()); }
};

namespace gdn_test {
namespace {

constexpr gdn::layer_dims dims{.hidden = 6, .key_heads = 1, .value_heads = 2, .key_dim = 4, .value_dim = 3, .conv_width = 4};

TEST(interop, ForwardBackwardAndDecodeTakeViewsAndMatrices) {
  using view = Kokkos::View<double**, Kokkos::LayoutRight, Kokkos::HostSpace>;
  random_source random(91);
  const layer_batch b = random_batch(random, dims, gdn::packing::rows_of(1, 20));
  const layer_result want = run_layer<double>(b, on_one_rank(b, {.final_state = true}));
  const owned_layer<double> owned(b);
  const gdn::kokkos::backend<> be;
  gdn::self_communicator self;
  any_communicator comm(self);  // the layer is compiled once for these
  const gdn::host_stream s;

  const gdn::cp_plan plan = gdn::plan_layer(dims, gdn::contiguous_layout{20, 1}, b.pack, {.final_state = true}, 0);
  const poisoned_block tables(gdn::resident_requirement<gdn::host_memory>(plan));
  auto tables_memory = tables.workspace();
  const auto resident = gdn::upload(be, plan, tables_memory, s);
  const auto need = gdn::requirements<double>(be, dims, resident, gdn::keep_policy::everything);
  const poisoned_block tape_block(need.tape), block({std::max(need.forward.bytes, need.backward.bytes)});
  auto tape_memory = tape_block.workspace();
  auto tape = gdn::make_tape<double>(be, dims, resident, gdn::keep_policy::everything, tape_memory);
  auto ws = block.workspace();

  const view y("y", 20, 6), dy("dy", 20, 6);
  const Kokkos::View<double****, Kokkos::LayoutRight, Kokkos::HostSpace> state("state", 1, 2, 4, 3), d_state("d state", 1, 2, 4, 3);
  const Kokkos::View<double***, Kokkos::LayoutRight, Kokkos::HostSpace> conv("conv", 1, dims.channels(), 4),
      d_conv("d conv", 1, dims.channels(), 4);
  user::matrix x(20, 6), dx(20, 6);
  std::copy(b.x.begin(), b.x.end(), x.begin());
  std::copy(b.dy.begin(), b.dy.end(), dy.data());
  std::copy(b.d_final.begin(), b.d_final.end(), d_state.data());
  std::copy(b.d_final_conv.begin(), b.d_final_conv.end(), d_conv.data());
  const gdn::sequence_states<double> states{{}, {}, gdn::canonical(state), gdn::canonical(conv)};
  memory_block measure;
  gdn::layer_gradients<double>::carve(measure, dims);
  const poisoned_block gradient_block(measure.peak());
  auto gradient_memory = gradient_block.workspace();
  const auto grad = gdn::layer_gradients<double>::carve(gradient_memory, dims);
  grad.for_each([](auto, const auto& g) { std::fill_n(g.data(), g.size(), 0.0); });

  gdn::forward(be, comm, owned.layer(), resident, x, y, states, tape, ws, s);
  gdn::backward(be, comm, owned.layer(), resident, dy, user::matrix_handle{&dx},
                {gdn::canonical(d_state), gdn::canonical(d_conv), {}, {}}, grad, tape, ws, s);
  EXPECT_EQ(values(y.data(), y.data() + y.size()), want.y);
  EXPECT_EQ(values(state.data(), state.data() + state.size()), want.final_);
  EXPECT_EQ(dx.values(), want.dx);
  std::size_t i = 0;
  grad.for_each([&](auto, const auto& g) { EXPECT_EQ(values(g.data(), g.data() + g.size()), want.gradients[i++]); });

  // A row of a matrix, decoded into a row of a view.
  const poisoned_block decode_block(gdn::decode_requirement<double>(be, dims, 1));
  auto decode_ws = decode_block.workspace();
  const std::int32_t slot = 0;
  user::matrix token(1, 6);
  const auto into = Kokkos::subview(y, Kokkos::pair(3, 4), Kokkos::ALL);
  gdn::decode_step(be, owned.layer(), token, into, gdn::layer_state<double>{gdn::canonical(state), gdn::canonical(conv)},
                   gdn::make_tensor(&slot, 1), decode_ws, s);
  EXPECT_NE(values(&y(3, 0), &y(3, 0) + 6), values(want.y.begin() + 18, want.y.begin() + 24));
  for (int c = 0; c < 6; ++c) {
    EXPECT_TRUE(std::isfinite(y(3, c)));
    EXPECT_EQ(y(2, c), want.y[static_cast<std::size_t>(12 + c)]) << "other rows stay";
  }
}

}  // namespace
}  // namespace gdn_test
