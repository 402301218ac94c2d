// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  One rank's part of a layer to be timed, forward and backward, and NeMo's way around the same layer.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <vector>

#include <gdn/cuda/backend.cuh>
#include <gdn/cuda/memory.hpp>
#include <gdn/layer/requirements.hpp>

#include "scaling_ranks.hpp"

namespace gdn_bench {

using gdn::device_memory;
using layer_type = gdn::bfloat16;
using accumulated = gdn::accumulate_t<layer_type>;
using rows_ref = gdn::tensor_ref<layer_type, 2, device_memory>;

__device__ inline float uniform_of(std::uint64_t n) {  // -1 to 1
  n = (n + 0x9e3779b97f4a7c15U) * 0xbf58476d1ce4e5b9U;
  n = (n ^ (n >> 27U)) * 0x94d049bb133111ebU;
  return static_cast<float>(static_cast<std::uint32_t>(n >> 32U)) * (2.0F / 4294967296.0F) - 1.0F;
}
template <class E>
__global__ void fill_kernel(E* to, index_t n, float middle, float reach, std::uint64_t seed) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    to[i] = static_cast<E>(middle + reach * uniform_of(seed * 0x100000001b3U + static_cast<std::uint64_t>(i)));
  }
}
template <class E>
void fill(E* to, index_t n, float middle, float reach, std::uint64_t seed, gdn::cuda::stream_ref s) {
  if (n > 0) fill_kernel<<<1024, 256, 0, s.get()>>>(to, n, middle, reach, seed);
  gdn::cuda::check(cudaGetLastError(), "fill_kernel");
}

/// Bytes that a layout of tensors takes; it is run again on memory of that size.
template <class F>
gdn::memory_requirement measured(F&& carve) {
  gdn::workspace<device_memory> measure;
  carve(measure);
  return measure.peak();
}

class layer_under_test {
 public:
  layer_under_test(const gdn::cuda::backend& be, const gdn::layer_dims& d, const gdn::fragment_table& table,
                   const gdn::packing& pack, const gdn::plan_options& options, int world, int rank, gdn::cuda::stream_ref s)
      : be_(be),
        dims_(d),
        plan_(gdn::plan_context_parallel(table, pack, gdn::shape_of(d), d.channels(), options, world, rank)),
        tables_(gdn::resident_requirement<device_memory>(plan_)) {
    auto tables = tables_.workspace();
    resident_ = gdn::upload(be_, plan_, tables, s);
    need_ = gdn::requirements<layer_type>(be_, dims_, resident_, gdn::keep_policy::everything);
  }

  const gdn::cp_plan& plan() const { return plan_; }
  index_t received_by_plan() const {
    return gdn::forward_traffic<layer_type, device_memory>(dims_, plan_).total() +
           gdn::backward_traffic<layer_type, device_memory>(dims_, plan_).total();
  }
  /// Of tape, scratch, weights, gradients, and the caller's rows.
  std::size_t bytes() const {
    return need_.tape.bytes + scratch_bytes() + measured([this](auto& m) { carve(m); }).bytes;
  }

  void allocate(gdn::cuda::stream_ref s) {
    tape_memory_ = gdn::cuda::device_block(need_.tape);
    scratch_ = gdn::cuda::device_block({scratch_bytes()});
    io_ = gdn::cuda::device_block(measured([this](auto& m) { carve(m); }));
    auto ws = io_.workspace();
    carve(ws);
    auto tape_ws = tape_memory_.workspace();
    tape_ = gdn::make_tape<layer_type>(be_, dims_, resident_, gdn::keep_policy::everything, tape_ws);
    std::uint64_t seed = 1;
    weights_.for_each([&](std::string_view name, const auto& w) {
      const bool decay = name == "A_log" || name == "dt_bias";
      fill(w.data(), w.size(), decay ? (name == "A_log" ? 1.0F : -3.0F) : 0.0F, decay ? 1.0F : 0.02F, ++seed, s);
    });
    gradients_.for_each([&](std::string_view, const auto& g) { fill(g.data(), g.size(), 0, 0, 0, s); });
    fill(x_.data(), x_.size(), 0, 1, 101 + static_cast<std::uint64_t>(plan_.rank), s);
    fill(dy_.data(), dy_.size(), 0, 1, 1001 + static_cast<std::uint64_t>(plan_.rank), s);
  }

  template <class Comm>
  void forward(Comm& comm, const rows_ref& x, const rows_ref& y, gdn::cuda::stream_ref s) {
    auto ws = scratch_.workspace();
    gdn::forward(be_, comm, layer(), resident_, x, y, {}, tape_, ws, s);
  }
  template <class Comm>
  void backward(Comm& comm, const rows_ref& dy, const rows_ref& dx, gdn::cuda::stream_ref s) {
    auto ws = scratch_.workspace();
    gdn::backward(be_, comm, layer(), resident_, dy, dx, {}, gradients_, tape_, ws, s);
  }
  template <class Comm>
  void pass(Comm& comm, gdn::cuda::stream_ref s) {
    forward(comm, x_, y_, s);
    backward(comm, dy_, dx_, s);
  }

  const rows_ref& x() const { return x_; }
  const rows_ref& y() const { return y_; }
  const rows_ref& dy() const { return dy_; }
  const rows_ref& dx() const { return dx_; }

 private:
  gdn::gated_delta_net<layer_type, device_memory> layer() const { return {dims_, weights_}; }
  std::size_t scratch_bytes() const { return std::max(need_.forward.bytes, need_.backward.bytes); }
  void carve(gdn::workspace<device_memory>& m) const {
    auto& self = const_cast<layer_under_test&>(*this);
    self.weights_ = gdn::parameter_storage<layer_type, device_memory>::carve(m, dims_);
    self.gradients_ = gdn::layer_gradients<layer_type, device_memory>::carve(m, dims_);
    for (rows_ref* t : {&self.x_, &self.y_, &self.dy_, &self.dx_}) *t = m.template take<layer_type>(plan_.caller_rows, dims_.hidden);
  }

  const gdn::cuda::backend& be_;
  gdn::layer_dims dims_;
  gdn::cp_plan plan_;
  gdn::cuda::device_block tables_;
  gdn::resident_plan<device_memory> resident_;
  gdn::layer_requirements need_;
  gdn::cuda::device_block tape_memory_{{}}, scratch_{{}}, io_{{}};
  gdn::layer_tape<layer_type, device_memory> tape_;
  gdn::parameter_storage<layer_type, device_memory> weights_;
  gdn::layer_gradients<layer_type, device_memory> gradients_;
  rows_ref x_, y_, dy_, dx_;
};

/// What NeMo does around the operators when a layout is not contiguous: all ranks gather the whole sequence, sort it,
/// and keep their contiguous slice; the result is gathered, and each rank picks its rows. Backward is the adjoint: sums
/// over the ranks of gradients of the whole sequence, here as reduce-scatters (NeMo all-reduces, which moves more).
class gathering {
 public:
  /// @param table of the layout, L rows on every rank
  gathering(const gdn::cuda::backend& be, const gdn::fragment_table& table, index_t hidden, int world, int rank,
            gdn::cuda::stream_ref s)
      : be_(be), hidden_(hidden), world_(world), rank_(rank), rows_(gdn::local_rows(table, rank)) {
    std::vector<gdn::run> sort, pick, sum;
    index_t picked = 0;
    for (const gdn::fragment& f : table) {  // runs: from row `local`, `count` rows, to row `packed`
      sort.push_back({0, f.rank * rows_ + f.local, f.count, f.begin});
    }
    std::vector<gdn::fragment> own;
    for (const gdn::fragment& f : table) {
      if (f.rank == rank) own.push_back(f);
    }
    std::sort(own.begin(), own.end(), [](const auto& a, const auto& b) { return a.local < b.local; });
    for (const gdn::fragment& f : own) {
      pick.push_back({0, f.begin, f.count, picked});
      picked += f.count;
    }
    for (int r = 0; r < world; ++r) sum.push_back({r, 0, 1, r});
    memory_ = gdn::cuda::device_block(measured([&](auto& m) { carve(m, sort.size(), pick.size()); }));
    auto ws = memory_.workspace();
    carve(ws, sort.size(), pick.size());
    be.upload<gdn::run>(sort, sort_, s);
    be.upload<gdn::run>(pick, pick_, s);
    be.upload<gdn::run>(sum, sum_, s);
  }

  static std::size_t bytes(index_t tokens, index_t hidden) {  // beside tables
    return static_cast<std::size_t>(3 * tokens * hidden) * sizeof(layer_type);
  }

  template <class Comm>
  void pass(Comm& comm, layer_under_test& layer, gdn::cuda::stream_ref s) {
    const rows_ref mine = gdn::rows(sorted_, rank_ * rows_, rows_);
    gather(comm, layer.x(), s);
    be_.gather_rows<layer_type>(whole_, sort_, sorted_, s);
    layer.forward(comm, mine, layer.y(), s);
    gather(comm, layer.y(), s);
    be_.gather_rows<layer_type>(whole_, pick_, layer.dx(), s);  // y in the caller's layout

    be_.fill_zero<layer_type>(whole_, s);
    be_.scatter_rows<layer_type>(layer.dy(), pick_, whole_, s);
    reduce_scatter(comm, layer.dx(), s);
    layer.backward(comm, layer.dx(), layer.y(), s);
    be_.fill_zero<layer_type>(sorted_, s);
    be_.copy_rows<layer_type>(layer.y(), mine, s);
    be_.scatter_rows<layer_type>(sorted_, sort_, whole_, s);
    reduce_scatter(comm, layer.dx(), s);
  }

 private:
  void carve(gdn::workspace<device_memory>& m, std::size_t sort, std::size_t pick) {
    whole_ = m.take<layer_type>(world_ * rows_, hidden_);
    sorted_ = m.take<layer_type>(world_ * rows_, hidden_);
    parts_ = m.take<layer_type>(world_, rows_ * hidden_);
    sort_ = m.take<gdn::run>(static_cast<index_t>(sort));
    pick_ = m.take<gdn::run>(static_cast<index_t>(pick));
    sum_ = m.take<gdn::run>(world_);
  }
  std::size_t part_bytes() const { return static_cast<std::size_t>(rows_ * hidden_) * sizeof(layer_type); }
  layer_type* part_of(const rows_ref& t, int r) const { return t.data() + r * rows_ * hidden_; }

  template <class Comm>
  void gather(Comm& comm, const rows_ref& mine, gdn::cuda::stream_ref s) {
    std::vector<gdn::send_op> sends;
    std::vector<gdn::recv_op> recvs;
    for (int r = 0; r < world_; ++r) {
      if (r == rank_) continue;
      sends.push_back({mine.data(), part_bytes(), r});
      recvs.push_back({part_of(whole_, r), part_bytes(), r});
    }
    be_.copy_rows<layer_type>(mine, gdn::rows(whole_, rank_ * rows_, rows_), s);
    comm.exchange(sends, recvs, s);
  }
  /// The sum over the ranks of their `whole_`, this rank's rows of it.
  template <class Comm>
  void reduce_scatter(Comm& comm, const rows_ref& mine, gdn::cuda::stream_ref s) {
    std::vector<gdn::send_op> sends;
    std::vector<gdn::recv_op> recvs;
    for (int r = 0; r < world_; ++r) {
      if (r == rank_) continue;
      sends.push_back({part_of(whole_, r), part_bytes(), r});
      recvs.push_back({part_of(parts_, r), part_bytes(), r});
    }
    const auto flat = [&](layer_type* at) { return gdn::make_tensor<device_memory>(at, index_t{1}, rows_ * hidden_); };
    be_.copy_rows<layer_type>(flat(part_of(whole_, rank_)), flat(part_of(parts_, rank_)), s);
    comm.exchange(sends, recvs, s);
    be_.fill_zero<layer_type>(flat(mine.data()), s);
    be_.scatter_add_rows<layer_type>(parts_, sum_, flat(mine.data()), s);
  }

  const gdn::cuda::backend& be_;
  index_t hidden_;
  int world_, rank_;
  index_t rows_;
  gdn::cuda::device_block memory_{{}};
  rows_ref whole_, sorted_;  // [S, hid] by rank, and in the order of the sequence
  rows_ref parts_;           // [P, L hid]
  gdn::tensor_ref<gdn::run, 1, device_memory> sort_, pick_, sum_;
};

}  // namespace gdn_bench
