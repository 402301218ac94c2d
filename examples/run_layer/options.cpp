// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <gdn/core/error.hpp>
#include <gdn/version.hpp>

namespace gdn_run {
namespace {

constexpr int max_ranks = 64;
constexpr int max_repeat = 1'000'000;

template <class T>
struct choice {
  const char* name;
  T value;
  bool built = true;  // known to this program, but not in it yet
};

#if defined(GDN_RUN_CUDA)
constexpr bool cuda = true;
#else
constexpr bool cuda = false;
#endif
#if defined(GDN_RUN_MPI)
constexpr bool mpi = true;
#else
constexpr bool mpi = false;
#endif
#if defined(GDN_RUN_NCCL)
constexpr bool nccl = true;
#else
constexpr bool nccl = false;
#endif

constexpr std::array<choice<comm_kind>, 4> comms = {{{"threads", comm_kind::threads},
                                                     {"mpi", comm_kind::mpi, mpi},
                                                     {"local", comm_kind::local, cuda},
                                                     {"nccl", comm_kind::nccl, nccl}}};
constexpr std::array<choice<backend_kind>, 2> backends = {
    {{"kokkos", backend_kind::kokkos}, {"cuda", backend_kind::cuda, cuda}}};
constexpr std::array<choice<layout_kind>, 5> layouts = {{{"contiguous", layout_kind::contiguous},
                                                         {"zigzag", layout_kind::zigzag},
                                                         {"zigzag-documents", layout_kind::zigzag_documents},
                                                         {"interleaved", layout_kind::interleaved},
                                                         {"seq-index", layout_kind::seq_index}}};
constexpr std::array<choice<gdn::strategy>, 2> strategies = {
    {{"reshard", gdn::strategy::reshard}, {"in-place", gdn::strategy::in_place}}};
constexpr std::array<choice<gdn::share>, 3> shares = {
    {{"all-gather", gdn::share::all_gather}, {"prefix-scan", gdn::share::prefix_scan}, {"relay", gdn::share::relay}}};
constexpr std::array<choice<gdn::dtype>, 4> types = {{{"f32", gdn::dtype::f32},
                                                      {"f64", gdn::dtype::f64},
                                                      {"bf16", gdn::dtype::bf16},
                                                      {"f16", gdn::dtype::f16}}};
constexpr std::array<choice<rule_kind>, 2> rules = {
    {{"chunked", rule_kind::chunked}, {"recurrent", rule_kind::recurrent}}};

constexpr std::array<choice<product_kind>, 2> products = {
    {{"ieee", product_kind::ieee}, {"tf32", product_kind::tf32}}};

template <class T, std::size_t N>
std::string names(const std::array<choice<T>, N>& choices) {
  std::string out;
  for (const choice<T>& c : choices) out += (out.empty() ? "" : ", ") + std::string(c.name);
  return out;
}

/// An option with a fixed set of values, the first of which is the default.
template <class T, std::size_t N>
class choice_option {
 public:
  choice_option(CLI::App& app, std::string name, const std::array<choice<T>, N>& choices, const std::string& meaning)
      : name_(std::move(name)), choices_(choices), text_(choices[0].name) {
    app.add_option(name_, text_, meaning + ": " + names(choices))->type_name("")->capture_default_str();
  }
  T value() const {
    const auto at = std::find_if(choices_.begin(), choices_.end(), [&](const auto& c) { return text_ == c.name; });
    if (at == choices_.end()) throw usage_error(name_ + " is '" + text_ + "'; it must be one of " + names(choices_));
    if (!at->built) throw usage_error(name_ + " " + text_ + " is not part of this gdn-run yet");
    return at->value;
  }
  const std::string& text() const { return text_; }

 private:
  std::string name_;
  const std::array<choice<T>, N>& choices_;
  std::string text_;
};

template <class T>
bool parse_all(std::string_view text, T& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size();
}

int integer(const char* name, const std::string& text, int most) {
  int value = 0;
  if (!parse_all(text, value) || value < 1 || value > most) {
    throw usage_error(gdn::say(name, "is '" + text + "'; it must be an integer from 1 to", most));
  }
  return value;
}

double positive(const char* name, const std::string& text) {
  double value = 0;
  if (!parse_all(text, value) || !std::isfinite(value) || value <= 0) {
    throw usage_error(gdn::say(name, "is '" + text + "'; it must be a finite number above 0"));
  }
  return value;
}

std::string version_text() {
  return gdn::say("gdn-run", std::to_string(GDN_VERSION_MAJOR) + "." + std::to_string(GDN_VERSION_MINOR) + "." +
                                 std::to_string(GDN_VERSION_PATCH));
}

}  // namespace

std::string to_text(layout_kind layout) {
  return layouts[static_cast<std::size_t>(layout)].name;
}

command parse_command(std::span<const std::string> arguments) {
  CLI::App app(
      "Runs the Gated DeltaNet layer of BUNDLE, a safetensors file with weights, input and expected results, with its\n"
      "sequence spread over ranks, and compares the results.\n"
      "Exit status: 0 all within their limits, 1 a tensor out of its limit, 2 bad usage or input, 3 a failed run.",
      "gdn-run");
  options o;
  std::string ranks = "1";
  std::string repeat = "1";
  std::string tolerance;
  std::string deadline;
  bool no_grad = false;
  bool no_decode = false;

  app.set_version_flag("--version", version_text());
  const CLI::Option* bundle = app.add_option("BUNDLE", o.bundle, "The bundle")->type_name("");
  const CLI::Option* ranks_option =
      app.add_option("--ranks", ranks, "Number of ranks P, 1 to 64; under mpirun its number of processes")
          ->type_name("P")
          ->capture_default_str();
  const choice_option comm(app, "--comm", comms, "How ranks talk");
  const choice_option backend(app, "--backend", backends, "What computes");
  const choice_option layout(app, "--layout", layouts, "Which rank holds which tokens");
  const choice_option strategy(app, "--strategy", strategies,
                               "Whether tokens move to contiguous pieces, or the pieces are run where they are");
  const choice_option share(app, "--share", shares, "How the state summaries travel");
  const choice_option type(app, "--dtype", types, "Of weights and activations");
  const choice_option rule(app, "--rule", rules, "Form of the gated delta rule");
  const choice_option product(app, "--products", products,
                              "How --backend cuda multiplies the f32 matrices of the projections");
  app.add_flag("--no-grad", no_grad, "Leave the backward pass of the bundle out");
  app.add_flag("--no-decode", no_decode, "Leave the decoded tokens of the bundle out");
  const CLI::Option* tolerance_option =
      app.add_option("--tolerance", tolerance, "Limit of rms(error)/rms(expected) for every tensor; otherwise by dtype")
          ->type_name("X");
  const CLI::Option* out =
      app.add_option("--out", o.out, "Write the results to this safetensors file")->type_name("FILE");
  const CLI::Option* json =
      app.add_option("--json", o.json, "Write the table and the figures to this file")->type_name("FILE");
  app.add_option("--repeat", repeat, "Run N times; the fastest time of each phase counts")
      ->type_name("N")
      ->capture_default_str();

  const CLI::Option* deadline_option =
      app.add_option("--deadline", deadline,
                     "Seconds that --comm mpi or nccl waits for a rank from which nothing comes; otherwise 5 and what the "
                     "work may take")
          ->type_name("X");

  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());  // as CLI11 wants them
  try {
    app.parse(std::move(reversed));
  } catch (const CLI::CallForHelp&) {
    return {std::nullopt, app.help()};
  } catch (const CLI::CallForVersion&) {
    return {std::nullopt, version_text() + "\n"};
  } catch (const CLI::ParseError& e) {
    throw usage_error(e.what());
  }

  o.ranks = integer("--ranks", ranks, max_ranks);
  o.repeat = integer("--repeat", repeat, max_repeat);
  o.ranks_given = ranks_option->count() > 0;
  if (deadline_option->count() > 0) o.deadline = positive("--deadline", deadline);
  if (tolerance_option->count() > 0) o.tolerance = positive("--tolerance", tolerance);
  o.comm = comm.value();
  o.backend = backend.value();
  o.layout = layout.value();
  o.strategy = strategy.value();
  o.share = share.value();
  o.dtype = type.value();
  o.rule = rule.value();
  o.products = product.value();
  o.grad = !no_grad;
  o.decode = !no_decode;
  if (o.backend == backend_kind::cuda) {
    if (app.count("--comm") == 0) o.comm = comm_kind::local;
    if (o.comm == comm_kind::threads || o.comm == comm_kind::mpi) {
      throw usage_error("--comm " + comm.text() + " moves host memory; --backend cuda needs local or nccl");
    }
    if (o.dtype == gdn::dtype::f64) throw usage_error("--dtype f64 is of --backend kokkos only");
    if (o.rule == rule_kind::recurrent) throw usage_error("--rule recurrent is of --backend kokkos only");
  } else if (o.comm == comm_kind::local || o.comm == comm_kind::nccl) {
    throw usage_error("--comm " + comm.text() + " moves device memory; it needs --backend cuda");
  }
  if (o.products == product_kind::tf32 && (o.backend != backend_kind::cuda || o.dtype != gdn::dtype::f32)) {
    throw usage_error("--products tf32 is of --backend cuda and --dtype f32 only");
  }
  if (o.deadline && o.comm != comm_kind::mpi && o.comm != comm_kind::nccl) {
    throw usage_error("--deadline is of --comm mpi and nccl only");
  }
  // Last: where an option lacks its value, the bundle's name was taken for it, and the option is to blame.
  if (bundle->count() == 0) throw usage_error("BUNDLE is missing; one file must be named");
  if (o.bundle.empty()) throw usage_error("BUNDLE is ''; it must name a file");
  if (out->count() > 0 && o.out.empty()) throw usage_error("--out is ''; it must name a file");
  if (json->count() > 0 && o.json.empty()) throw usage_error("--json is ''; it must name a file");
  return {std::move(o), {}};
}

}  // namespace gdn_run
