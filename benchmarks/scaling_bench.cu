// SPDX-License-Identifier: Apache-2.0
// A layer over several GPUs, bf16, forward and backward, against one GPU, the plan's bytes, and NeMo's way to gather.
//
//   scaling_bench --comm nccl --ranks 1,2,4,8                 a thread and a GPU for each rank
//   mpirun -n 8 scaling_bench --comm nccl                     a process and a GPU for each rank
//   scaling_bench --comm local --ranks 1,2 --tokens 2048      threads that share a GPU: shows bytes, not scaling
//
// Options, lists separated by commas: --models 35b,122b,397b  --tokens 32768 (of each rank; with --strong: of all)
// --layouts contiguous,zigzag  --strategies reshard,in-place  --shares all-gather,prefix-scan,relay
// --documents one,mixed (or their length)  --repeat 10  --strong  --no-gather  --deadline 120  --json FILE
//
// A line is what the slowest rank needs, the median of the repetitions. "in exchanges" is how long its stream was there:
// messages, and waiting for ranks that come later. "weak" is the time of one GPU with as many tokens per rank over this
// time; with --strong it is the time of one GPU with all tokens over P times this time. "gather" is the same layer on the
// same communicator, where every rank gathers the whole sequence.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gdn/comm/abort_guard.hpp>
#include <gdn/comm/threads.hpp>
#include <gdn/cuda/local.hpp>
#if defined(GDN_BENCH_NCCL)
#include <gdn/nccl/communicator.hpp>
#endif
#if defined(GDN_BENCH_NCCL) && defined(GDN_BENCH_MPI)
#include <mpi.h>
#endif

#include "scaling_layer.cuh"

namespace {

using gdn::index_t;
using gdn_bench::device_communicator;
using gdn_bench::layer_type;
using gdn_bench::layer_under_test;

struct settings {
  std::string comm = "nccl";
  std::vector<std::string> ranks = {"1"}, models = {"35b"}, layouts = {"contiguous", "zigzag"},
                           strategies = {"reshard", "in-place"}, shares = {"all-gather", "prefix-scan", "relay"},
                           documents = {"one", "mixed"};
  index_t tokens = 32768;
  int repeat = 10;
  int deadline = 120;  // seconds
  bool strong = false, gather = true;
  std::string json;
};

[[noreturn]] void refuse(const std::string& text) {
  std::fprintf(stderr, "scaling_bench: %s\n", text.c_str());
  std::exit(2);
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> out(1);
  for (const char c : list) {
    if (c == ',') {
      out.emplace_back();
    } else {
      out.back() += c;
    }
  }
  return out;
}

settings parse(int argc, char** argv) {
  settings o;
  std::map<std::string, std::function<void(const std::string&)>> options = {
      {"--comm", [&](const auto& v) { o.comm = v; }},
      {"--ranks", [&](const auto& v) { o.ranks = split(v); }},
      {"--models", [&](const auto& v) { o.models = split(v); }},
      {"--layouts", [&](const auto& v) { o.layouts = split(v); }},
      {"--strategies", [&](const auto& v) { o.strategies = split(v); }},
      {"--shares", [&](const auto& v) { o.shares = split(v); }},
      {"--documents", [&](const auto& v) { o.documents = split(v); }},
      {"--tokens", [&](const auto& v) { o.tokens = std::atoll(v.c_str()); }},
      {"--repeat", [&](const auto& v) { o.repeat = std::atoi(v.c_str()); }},
      {"--deadline", [&](const auto& v) { o.deadline = std::atoi(v.c_str()); }},
      {"--json", [&](const auto& v) { o.json = v; }}};
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--strong" || name == "--no-gather") {
      (name == "--strong" ? o.strong : o.gather) = name == "--strong";
      continue;
    }
    const auto at = options.find(name);
    if (at == options.end() || i + 1 == argc) refuse(name + " is no option, or lacks its value");
    at->second(argv[++i]);
  }
  if (o.comm != "local" && o.comm != "nccl") refuse("--comm is '" + o.comm + "'; it must be local or nccl");
  if (o.tokens < 1 || o.repeat < 1) refuse("--tokens and --repeat must be at least 1");
  return o;
}

/// The published geometries: K = V = 128, W = 4.
gdn::layer_dims dims_of(const std::string& model) {
  gdn::layer_dims d{.hidden = 0, .key_heads = 16, .value_heads = 64, .key_dim = 128, .value_dim = 128};
  if (model == "35b") d.hidden = 2048, d.value_heads = 32;
  if (model == "122b") d.hidden = 3072;
  if (model == "397b") d.hidden = 4096;
  if (d.hidden == 0) refuse("there is no model " + model);
  return d;
}

gdn::packing documents_of(const std::string& kind, index_t tokens) {
  if (kind == "one") return gdn::packing::rows_of(1, tokens);
  std::vector<index_t> lengths = {16384, 700, 4097, 64, 9000, 2048, 33, 12000};
  if (kind != "mixed") lengths = {std::atoll(kind.c_str())};
  if (lengths[0] < 1) refuse("there are no documents " + kind);
  std::vector<index_t> cu = {0};
  for (std::size_t i = 0; cu.back() < tokens; ++i) cu.push_back(std::min(tokens, cu.back() + lengths[i % lengths.size()]));
  return gdn::packing::from_cu_seqlens(cu, {}, 1, tokens);
}

struct setup {
  std::string model, layout, strategy, share, documents;
  index_t tokens = 0;  // of all ranks
};

gdn::fragment_table table_of(const setup& c, int world) {
  if (c.layout == "contiguous") return gdn::contiguous_layout{c.tokens, world}.fragments();
  if (c.layout == "zigzag") return gdn::zigzag_layout{c.tokens, world}.fragments();
  refuse("there is no layout " + c.layout);
}
gdn::plan_options options_of(const setup& c) {
  gdn::plan_options o;
  if (c.strategy != "reshard" && c.strategy != "in-place") refuse("there is no strategy " + c.strategy);
  o.strategy = c.strategy == "reshard" ? gdn::strategy::reshard : gdn::strategy::in_place;
  const std::map<std::string, gdn::share> shares = {
      {"all-gather", gdn::share::all_gather}, {"prefix-scan", gdn::share::prefix_scan}, {"relay", gdn::share::relay}};
  if (!shares.contains(c.share)) refuse("there is no share " + c.share);
  o.share = shares.at(c.share);
  return o;
}

/// Of the slowest rank, and the rank that receives most; negative where it does not fit the GPU.
struct figures {
  double ms = -1, exchanges_ms = 0;
  double bytes = 0, predicted = 0;
  bool fits() const { return ms >= 0; }
};

/// The median over the repetitions of what the slowest rank needs for `pass`.
template <class Pass>
figures timed(device_communicator& comm, int repeat, gdn::cuda::stream_ref s, Pass&& pass) {
  gdn_bench::timed_communicator timer(comm);
  const gdn_bench::time_stamp begin, end;
  std::vector<double> times, exchanges;
  figures out;
  for (int i = -2; i < repeat; ++i) {  // twice to warm up
    static_cast<void>(gdn_bench::largest(comm, {0}, s));  // all begin together
    begin.record(s);
    pass(timer);
    end.record(s);
    comm.synchronize(s);
    const auto received = timer.take();
    const auto most = gdn_bench::largest(
        comm, {end.milliseconds_since(begin), received.milliseconds, static_cast<double>(received.bytes)}, s);
    out.bytes = most[2];
    if (i < 0) continue;
    times.push_back(most[0]);
    exchanges.push_back(most[1]);
  }
  const auto median = [](std::vector<double>& v) {
    std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
    return v[v.size() / 2];
  };
  out.ms = median(times);
  out.exchanges_ms = median(exchanges);
  return out;
}

struct comparison {
  figures layer, gather;
};

/// One rank's part of a setup.
comparison measure(const settings& o, const setup& c, bool with_gather, device_communicator& comm) {
  const gdn::cuda::stream stream;
  const gdn::cuda::stream_ref s = stream;
  const gdn::cuda::backend be;
  const gdn::layer_dims d = dims_of(c.model);
  const gdn::packing pack = documents_of(c.documents, c.tokens);
  const gdn::fragment_table table = table_of(c, comm.size());
  const auto fits = [&](std::size_t bytes) {
    std::size_t free = 0, total = 0;
    gdn::cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    const std::size_t ranks = o.comm == "local" ? static_cast<std::size_t>(comm.size()) : 1;  // on this GPU
    const double lacking = ranks * (bytes + (std::size_t{256} << 20U)) > free ? 1 : 0;
    return gdn_bench::largest(comm, {lacking}, s)[0] == 0;
  };
  comparison out;
  {
    layer_under_test layer(be, d, table, pack, options_of(c), comm.size(), comm.rank(), s);
    if (fits(layer.bytes())) {
      layer.allocate(s);
      const gdn::abort_guard guard(comm);
      out.layer = timed(comm, o.repeat, s, [&](auto& timer) { layer.pass(timer, s); });
      out.layer.predicted = gdn_bench::largest(comm, {static_cast<double>(layer.received_by_plan())}, s)[0];
    }
  }
  if (with_gather && comm.size() > 1) {
    const auto sorted = gdn::contiguous_layout{c.tokens, comm.size()}.fragments();
    layer_under_test layer(be, d, sorted, pack, {}, comm.size(), comm.rank(), s);
    if (fits(layer.bytes() + gdn_bench::gathering::bytes(c.tokens, d.hidden))) {
      layer.allocate(s);
      gdn_bench::gathering nemo(be, table, d.hidden, comm.size(), comm.rank(), s);
      const gdn::abort_guard guard(comm);
      out.gather = timed(comm, o.repeat, s, [&](auto& timer) { nemo.pass(timer, layer, s); });
    }
  }
  return out;
}

/// One rank, on the GPU of the calling thread.
figures alone(const settings& o, setup c) {
  c.layout = "contiguous";
  auto group = gdn::cuda::local_communicator::make_group(1);
  device_communicator comm(group[0]);
  return measure(o, c, false, comm).layer;
}

class report {
 public:
  report(const settings& o, bool speaks) : speaks_(speaks) {
    if (!speaks_) return;
    if (!o.json.empty() && (json_ = std::fopen(o.json.c_str(), "w")) == nullptr) refuse("cannot write " + o.json);
    std::printf("%-5s %2s %-10s %-8s %-11s %-6s %8s %9s %11s %8s %9s %9s %6s %9s %9s %9s\n", "model", "P", "layout", "strategy",
                "share", "docs", "tokens", "ms", "tokens/s", "in exch.", "MiB recv", "MiB plan", o.strong ? "strong" : "weak",
                "gather ms", "in exch.", "MiB recv");
  }
  report(const report&) = delete;
  report& operator=(const report&) = delete;
  ~report() {
    if (json_ != nullptr) std::fclose(json_);
  }
  bool sound() const { return sound_; }

  void add(const settings& o, const setup& c, int ranks, const comparison& r, const figures& one) {
    sound_ = sound_ && (!r.layer.fits() || r.layer.bytes == r.layer.predicted);
    if (!speaks_) return;
    constexpr double mib = 1 << 20;
    const double tokens = static_cast<double>(c.tokens);
    const auto cell = [](bool known, const char* form, double v) {
      std::array<char, 32> text{};
      if (!known) return std::string("-");
      std::snprintf(text.data(), text.size(), form, v);
      return std::string(text.data());
    };
    const bool f = r.layer.fits(), g = r.gather.fits();
    const double efficiency = one.ms / (o.strong ? ranks * r.layer.ms : r.layer.ms);
    std::printf("%-5s %2d %-10s %-8s %-11s %-6s %8lld %9s %11s %8s %9s %9s %6s %9s %9s %9s%s\n", c.model.c_str(), ranks,
                c.layout.c_str(), c.strategy.c_str(), c.share.c_str(), c.documents.c_str(), static_cast<long long>(c.tokens),
                cell(f, "%.3f", r.layer.ms).c_str(), cell(f, "%.0f", tokens / r.layer.ms * 1000).c_str(),
                cell(f, "%.3f", r.layer.exchanges_ms).c_str(), cell(f, "%.3f", r.layer.bytes / mib).c_str(),
                cell(f, "%.3f", r.layer.predicted / mib).c_str(), cell(f && one.fits(), "%.3f", efficiency).c_str(),
                cell(g, "%.3f", r.gather.ms).c_str(), cell(g, "%.3f", r.gather.exchanges_ms).c_str(),
                cell(g, "%.3f", r.gather.bytes / mib).c_str(),
                f && r.layer.bytes != r.layer.predicted ? "  NOT WHAT THE PLAN SAYS" : "");
    std::fflush(stdout);
    if (json_ == nullptr || !f) return;
    std::fprintf(json_,
                 "{\"comm\": \"%s\", \"model\": \"%s\", \"ranks\": %d, \"layout\": \"%s\", \"strategy\": \"%s\", \"share\": \"%s\", "
                 "\"documents\": \"%s\", \"tokens\": %lld, \"ms\": %.6f, \"exchanges_ms\": %.6f, \"bytes\": %.0f, \"one_gpu_ms\": %.6f, "
                 "\"gather_ms\": %.6f, \"gather_exchanges_ms\": %.6f, \"gather_bytes\": %.0f}\n",
                 o.comm.c_str(), c.model.c_str(), ranks, c.layout.c_str(), c.strategy.c_str(), c.share.c_str(),
                 c.documents.c_str(), static_cast<long long>(c.tokens), r.layer.ms, r.layer.exchanges_ms, r.layer.bytes, one.ms,
                 r.gather.ms, r.gather.exchanges_ms, r.gather.bytes);
    std::fflush(json_);
  }

 private:
  bool speaks_;
  bool sound_ = true;
  std::FILE* json_ = nullptr;
};

/// All setups for P ranks, of which the calling thread is one.
void run_rank(const settings& o, device_communicator& comm, report& out) {
  const int P = comm.size();
  for (const std::string& model : o.models) {
    for (const std::string& documents : o.documents) {
      setup c{model, "", "", "", documents, o.strong ? o.tokens : o.tokens * P};
      setup single{model, "contiguous", "reshard", "all-gather", documents, o.tokens};
      const figures one = alone(o, single);  // every rank on its GPU; those that share one disturb each other
      bool gathers = o.gather;
      for (const std::string& layout : o.layouts) {
        for (const std::string& strategy : o.strategies) {
          if (layout == "contiguous" && strategy != o.strategies.front()) continue;  // nothing to reshard
          for (const std::string& share : o.shares) {
            if (P == 1 && share != o.shares.front()) continue;  // nothing to share
            c.layout = layout, c.strategy = strategy, c.share = share;
            const comparison r = measure(o, c, gathers && strategy == o.strategies.front(), comm);
            gathers = false;
            if (comm.rank() == 0) out.add(o, c, P, r, one);
          }
        }
        gathers = o.gather;
      }
    }
  }
}

int run_threads(const settings& o) {
  report out(o, true);
  for (const std::string& text : o.ranks) {
    const int ranks = std::atoi(text.c_str());
    if (ranks < 1) refuse("--ranks has '" + text + "'; it must be a list of integers from 1 on");
    const auto on_rank = [&](auto& comm) {
      device_communicator mine(comm);
      run_rank(o, mine, out);
    };
    if (o.comm == "local") {
      gdn::run_on_threads<gdn::cuda::local_communicator>(ranks, on_rank);
      continue;
    }
#if defined(GDN_BENCH_NCCL)
    gdn::run_on_threads<gdn::nccl::nccl_communicator>(
        ranks,
        [&](gdn::nccl::nccl_communicator& comm) {
          gdn::cuda::check(cudaSetDevice(comm.device()), "cudaSetDevice");
          on_rank(comm);
        },
        std::chrono::seconds(o.deadline));
#else
    refuse("this scaling_bench was built without NCCL");
#endif
  }
  return out.sound() ? 0 : 1;
}

#if defined(GDN_BENCH_NCCL) && defined(GDN_BENCH_MPI)
int run_process(const settings& o) {
  int level = 0, rank = 0, size = 1, devices = 0, on_machine = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm machine = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &machine);
  MPI_Comm_rank(machine, &on_machine);
  gdn::cuda::check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  gdn::cuda::check(cudaSetDevice(on_machine % devices), "cudaSetDevice");
  ncclUniqueId id{};
  if (rank == 0) id = gdn::nccl::make_unique_id();
  MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
  gdn::nccl::nccl_communicator comm(id, rank, size, {std::chrono::seconds(o.deadline)});
  report out(o, rank == 0);
  device_communicator mine(comm);
  run_rank(o, mine, out);
  comm.finalize(std::chrono::seconds(10));
  MPI_Finalize();
  return out.sound() ? 0 : 1;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const settings o = parse(argc, argv);
  try {
#if defined(GDN_BENCH_NCCL) && defined(GDN_BENCH_MPI)
    const bool launched = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMI_SIZE") != nullptr;
    if (launched && o.comm == "nccl") return run_process(o);
#endif
    return run_threads(o);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "scaling_bench: %s\n", e.what());
    std::_Exit(3);  // peers that are lost hold up MPI_Finalize
  }
}
