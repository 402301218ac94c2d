// SPDX-License-Identifier: Apache-2.0
#pragma once
/// @file  The processes that run gdn-run together: this one alone, or those of an mpirun, of which the first speaks and
/// which all end with the same code.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "bundle.hpp"
#include "host_ranks.hpp"
#include "options.hpp"

namespace gdn_run {

enum exit_status { within_limits = 0, out_of_limits = 1, bad_input = 2, failed = 3 };

/// How the program, or a step of it, ended: with a text for standard output, or from bad_input on a line for standard
/// error.
struct ending {
  exit_status status = within_limits;
  std::string text;
  bool goes_on() const noexcept { return status == within_limits || status == out_of_limits; }
};

/// This process alone.
class job {
 public:
  job() = default;
  job(const job&) = delete;
  job& operator=(const job&) = delete;
  virtual ~job() = default;

  /// Whether this process speaks and writes for all.
  virtual bool root() const noexcept { return true; }
  /// Puts the number of processes in the place of --ranks.
  /// @throws usage_error if --ranks was given and differs, or this process alone has too few GPUs for it
  virtual void adopt(options& o);
  /// The processes may be apart by that much work from now on.
  virtual void expect_work(double /*seconds*/) {}
  /// Every process says how a step ended on it; all go on, or all get the ending of one that cannot. Where the steps ended
  /// well, each keeps its own.
  /// @param fingerprint must be the same on all: of what they are about to do
  virtual ending agree(ending mine, std::uint64_t /*fingerprint*/ = 0) { return mine; }
  /// Prints the text and returns the code for exit, once all have come here.
  virtual int finish(const ending& e);
};

/// @param parsed empty if the command line was refused; it may still name mpi or nccl
std::unique_ptr<job> make_job(std::span<const std::string> arguments, const std::optional<options>& parsed);

/// What two processes must have in common to run together: options, and the bytes of the bundle.
std::uint64_t fingerprint(const options& o, const bundle& b);

/// How long a rank waits for another: `--deadline`, or 5 seconds and what the work may take.
std::chrono::milliseconds patience(const options& o);

/// Where this process stands among those of the MPI job that make_job joined.
struct job_place {
  int rank = 0;
  int size = 1;
  int on_machine = 0;  ///< its number among those of its machine
};
job_place place_in_job();

/// The error that this process is about to report is a consequence of another's.
void note_consequence() noexcept;

/// Rank 0's bytes, on all processes of the job. @throws gdn::comm_error if they do not come in time
void broadcast(std::span<std::byte> bytes);

/// @throws usage_error if `--comm nccl` has more ranks in one process than there are GPUs
void expects_devices(const options& o);

/// Seconds that reading the bundle and the run may take at most on a slow machine, roughly.
double seconds_of_work(const options& o, const bundle& b);

/// One line, whatever a file's name or a message holds.
std::string error_line(std::string_view text);

/// Runs f on this process' rank of the job that make_job joined.
void run_mpi_rank(const options& o, const std::function<void(host_communicator&)>& f);

/// The job of an MPI launcher, or of one process without it.
std::unique_ptr<job> join_mpi_job(double deadline_seconds);

}  // namespace gdn_run
