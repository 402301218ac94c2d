// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The command line of gdn-run as plain values.

#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include <gdn/core/dtype.hpp>
#include <gdn/plan/cp_plan.hpp>

namespace gdn_run {

enum class comm_kind { threads, mpi, local, nccl };
enum class backend_kind { kokkos, cuda };
enum class layout_kind { contiguous, zigzag, zigzag_documents, interleaved, seq_index };
enum class rule_kind { chunked, recurrent };
enum class product_kind { ieee, tf32 };

struct options {
  std::string bundle;  ///< path
  int ranks = 1;       ///< P
  bool ranks_given = false;
  bool processes = false;  ///< the ranks are processes of an MPI job; set by the job, not the command line
  comm_kind comm = comm_kind::threads;
  backend_kind backend = backend_kind::kokkos;
  layout_kind layout = layout_kind::contiguous;
  gdn::strategy strategy = gdn::strategy::reshard;
  gdn::share share = gdn::share::all_gather;
  gdn::dtype dtype = gdn::dtype::f32;  ///< f64, f32, f16 or bf16
  rule_kind rule = rule_kind::chunked;
  product_kind products = product_kind::ieee;  ///< of float matrices on a GPU
  bool grad = true;                 ///< run the backward pass if the bundle asks for it
  bool decode = true;               ///< decode if the bundle asks for it
  std::optional<double> tolerance;  ///< for every tensor, in place of the defaults
  std::optional<double> deadline;   ///< seconds that a rank of `--comm mpi` or `nccl` waits for another
  std::string out;                  ///< path, empty if nothing is written
  std::string json;                 ///< path, empty if nothing is written
  int repeat = 1;
};

/// Bad usage; the text names the option, the value and the rule.
class usage_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What a command line asks for: a run, or only a text to print.
struct command {
  std::optional<options> run;
  std::string text;  ///< of --help or --version
};

/// @param arguments without the program's name
/// @throws usage_error
command parse_command(std::span<const std::string> arguments);

/// As the option is written: "zigzag-documents".
std::string to_text(layout_kind layout);

}  // namespace gdn_run
