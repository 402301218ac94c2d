// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on one GPU: prepare, forward and backward at the sequence sets of FlashQLA's benchmarks, and the
// summaries of one document's part on one of several ranks.
//   cuda_rule_bench --benchmark_filter='forward/16,32/'

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <support/cuda_rule_problem.cuh>

#include "cuda_timing.cuh"

namespace {

using gdn::index_t;
using gdn_bench::device;
using gdn_bench::setup;
using problem = gdn_test::rule_problem_on_device<gdn::bfloat16>;
using shape = gdn_test::rule_shape;

/// The last problem stays, for the benchmarks of one set follow each other and its data are drawn on the host.
class problems {
 public:
  problems(const gdn::cuda::backend& be, gdn::cuda::stream_ref s) : be_(be), s_(s) {}

  const problem& of(const shape& sizes) {
    const key mine{{sizes.key_heads, sizes.value_heads, sizes.K, sizes.V}, sizes.lengths};
    if (!problem_ || mine != key_) {
      problem_.reset();  // first, since both may not fit
      problem_.emplace(be_, sizes, s_);
      problem_->forward();  // leaves what backward reads
      key_ = mine;
    }
    return *problem_;
  }

 private:
  using key = std::pair<std::vector<index_t>, std::vector<index_t>>;
  const gdn::cuda::backend& be_;
  gdn::cuda::stream_ref s_;
  key key_;
  std::optional<problem> problem_;
};

/// E and M of a document that came from another rank and goes on to the next, or the same of its gradients.
class summaries {
 public:
  summaries(const gdn::cuda::backend& be, const problem& p, gdn::cuda::stream_ref s)
      : be_(be), p_(p), rule_(p.p_), s_(s), memory_([&](gdn::workspace<device>& ws) { carve(ws); }) {
    rule_.chained = true;
    const gdn::published_summary summary{0, -1, 0, bias_, bias_};
    gdn::cuda::copy_to_device<gdn::published_summary>({&summary, 1}, table_, s);
    summarise();  // leaves what summarise_gradient reads
  }

  void summarise() const {
    auto ws = p_.memory_[1].workspace();
    be_.delta_rule_summarise(rule_, p_.in_, p_.prepared_, table_, p_.h0_, own_, ws, s_);
  }
  void summarise_gradient() const {
    auto ws = p_.memory_[1].workspace();
    be_.delta_rule_summarise_gradient(rule_, p_.in_, p_.prepared_, p_.o_, p_.ht_, table_, own_, gradients_, ws, s_);
  }

 private:
  void carve(gdn::workspace<device>& ws) {
    bias_ = rule_.value_heads * rule_.key_dim * rule_.value_dim;
    const index_t size = bias_ + rule_.value_heads * rule_.key_dim * rule_.key_dim;
    own_ = ws.take<float>(size);
    gradients_ = ws.take<float>(size);
    table_ = ws.take<gdn::published_summary>(1);
  }

  const gdn::cuda::backend& be_;
  const problem& p_;
  gdn::delta_rule_problem<gdn::bfloat16, device> rule_;
  gdn::cuda::stream_ref s_;
  index_t bias_ = 0;
  gdn::summaries_ref<gdn::bfloat16, device> own_, gradients_;
  gdn::tensor_ref<gdn::published_summary, 1, device> table_;
  gdn_bench::memory memory_;
};

problems& made() {
  static problems p(setup().be, setup().s);
  return p;
}

std::string label(const char* what, const shape& sizes, const std::string& name) {
  return std::string(what) + "/" + std::to_string(sizes.key_heads) + "," + std::to_string(sizes.value_heads) + "/" +
         name;
}

}  // namespace

int main(int argc, char** argv) {
  const auto add = [](const std::string& name, const shape& sizes, auto call) {  // call(problem)() is what is timed
    gdn_bench::add(name, [=](benchmark::State& state) {
      auto& [be, s, watch] = setup();
      const problem& p = made().of(sizes);
      const auto work = call(p);
      gdn_bench::report(state, watch, s, 0, 0, work);
      state.counters["tokens/s"] =
          benchmark::Counter(static_cast<double>(p.tokens()), benchmark::Counter::kIsIterationInvariantRate);
    })->Unit(benchmark::kMillisecond);
  };
  const auto add_all = [&](const std::string& name, const shape& sizes) {
    const auto add_call = [&](const char* what, void (problem::*call)() const) {
      add(label(what, sizes, name), sizes, [call](const problem& p) { return [&p, call] { (p.*call)(); }; });
    };
    add_call("prepare", &problem::prepare);
    add_call("forward", &problem::forward);
    add_call("backward", &problem::backward);
  };

  const auto equal = [](index_t n, index_t length) {
    return std::vector<index_t>(static_cast<std::size_t>(n), length);
  };
  // FlashQLA's: the sets of its forward, among which are those of its backward.
  const std::pair<std::string, std::vector<index_t>> sets[] = {{"1x32768", {32768}},
                                                               {"1x16384", {16384}},
                                                               {"1x8192", {8192}},
                                                               {"1x4096", {4096}},
                                                               {"1x2048", {2048}},
                                                               {"28672+4096", {28672, 4096}},
                                                               {"24576+8192", {24576, 8192}},
                                                               {"16384+16384", {16384, 16384}},
                                                               {"8192+24576", {8192, 24576}},
                                                               {"4096+28672", {4096, 28672}},
                                                               {"12288+4096", {12288, 4096}},
                                                               {"6144+2048", {6144, 2048}},
                                                               {"4096+4096", {4096, 4096}},
                                                               {"2048+6144", {2048, 6144}},
                                                               {"1024+7168", {1024, 7168}},
                                                               {"8192x4", equal(4, 8192)},
                                                               {"4096x8", equal(8, 4096)},
                                                               {"2048x4", equal(4, 2048)},
                                                               {"1024x8", equal(8, 1024)}};
  const std::pair<index_t, index_t> heads[] = {{16, 32}, {16, 64}, {16, 48}, {16, 16}, {4, 16}, {2, 8},
                                               {8, 32},  {8, 24},  {32, 32}, {8, 16},  {4, 8},  {2, 4}};
  for (const auto& [Hk, Hv] : heads) {
    for (const auto& [name, lengths] : sets) add_all(name, {Hk, Hv, lengths});
  }
  // Long keys, which no published model has: K x V behind the set.
  for (const index_t V : {128, 256}) {
    const std::string sizes = "/256x" + std::to_string(V);
    add_all("1x8192" + sizes, {8, 16, {8192}, 256, V});
    add_all("2048x8" + sizes, {8, 16, equal(8, 2048), 256, V});
  }
  for (const index_t Hv : {32, 64}) {
    for (const index_t tokens : {32768, 8192}) {
      const shape sizes{16, Hv, {tokens}};
      const auto add_call = [&](const char* what, void (summaries::*call)() const) {
        add(label(what, sizes, "1x" + std::to_string(tokens)), sizes, [call](const problem& p) {
          return [all = std::make_shared<summaries>(setup().be, p, setup().s), call] { ((*all).*call)(); };
        });
      };
      add_call("summarise", &summaries::summarise);
      add_call("summarise_gradient", &summaries::summarise_gradient);
    }
  }
  return gdn_bench::run(argc, argv);
}
