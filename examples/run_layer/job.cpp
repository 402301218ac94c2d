// SPDX-License-Identifier: Apache-2.0
#include "job.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <thread>

#include <unistd.h>

#include <gdn/core/error.hpp>

namespace gdn_run {
namespace {

/// Whether a launcher started this process as one that is not its first.
bool is_follower() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMI_RANK"}) {
    if (const char* rank = std::getenv(name)) return std::strcmp(rank, "0") != 0;
  }
  return false;
}

/// Whether a launcher started this process as one of several.
bool is_launched() { return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMI_SIZE") != nullptr; }

bool names_comm(std::span<const std::string> arguments, const std::string& kind) {
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--comm=" + kind) return true;
    if (arguments[i] == "--comm" && i + 1 < arguments.size() && arguments[i + 1] == kind) return true;
  }
  return false;
}

std::uint64_t mix(std::uint64_t h, std::span<const std::byte> bytes) {
  for (std::size_t i = 0; i < bytes.size(); i += sizeof h) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min(sizeof word, bytes.size() - i));
    h = (h ^ word) * 0x9e3779b97f4a7c15U;
    h ^= h >> 32U;
  }
  return h;
}

}  // namespace

std::string error_line(std::string_view text) {
  std::string line = "gdn-run: ";
  for (const char c : text) line += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  return line + "\n";
}

int job::finish(const ending& e) {
  if (e.status == bad_input && is_follower()) {
    // The first process says it; were this one to end before, its launcher would end that one.
    std::signal(SIGTERM, [](int) { _exit(bad_input); });
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    return e.status;
  }
  if (e.goes_on()) {
    std::fputs(e.text.c_str(), stdout);
  } else {
    std::fputs(error_line(e.text).c_str(), stderr);
  }
  return e.status;
}

void job::adopt(options& o) {
  if (o.comm != comm_kind::nccl) return;
  if (is_launched()) throw usage_error("--comm nccl under an MPI launcher needs a gdn-run that was built with MPI");
  expects_devices(o);
}

std::unique_ptr<job> make_job(std::span<const std::string> arguments, const std::optional<options>& parsed) {
  const bool mpi = parsed ? parsed->comm == comm_kind::mpi : names_comm(arguments, "mpi");
  const bool nccl = parsed ? parsed->comm == comm_kind::nccl : names_comm(arguments, "nccl");
#if defined(GDN_RUN_MPI)
  if (mpi || (nccl && is_launched())) return join_mpi_job(parsed && parsed->deadline ? *parsed->deadline : 0);
#else
  static_cast<void>(mpi), static_cast<void>(nccl);
#endif
  return std::make_unique<job>();
}

std::uint64_t fingerprint(const options& o, const bundle& b) {
  const std::string text =
      gdn::say(o.ranks, static_cast<int>(o.layout), static_cast<int>(o.strategy), static_cast<int>(o.share),
               static_cast<int>(o.dtype), static_cast<int>(o.rule), static_cast<int>(o.products), o.grad, o.decode, o.repeat);
  return mix(mix(b.file.file.bytes().size(), std::as_bytes(std::span(text))), b.file.file.bytes());
}

double seconds_of_work(const options& o, const bundle& b) {
  constexpr double operations = 5e8, bytes = 5e7;  // per second, of a slow machine
  const auto real = [](index_t n) { return static_cast<double>(n); };
  const gdn::layer_dims& d = b.dims();
  const double tokens = real(b.batch) * (real(b.seq) + real(b.decode_tokens));
  const double weights = real(d.hidden) * (real(d.channels()) + 2 * real(d.values()) + 2 * real(d.value_heads));
  const double rule = 10 * real(d.value_heads) * real(d.key_dim) * real(d.value_dim);
  // Starting CUDA and NCCL takes a few seconds where processes share a GPU.
  return 2 * tokens * (weights + rule) * (o.grad ? 4 : 1) / operations +
         static_cast<double>(b.file.file.bytes().size()) / bytes + (o.comm == comm_kind::nccl ? 15 : 0);
}

#if !defined(GDN_RUN_MPI)
void run_mpi_rank(const options&, const std::function<void(host_communicator&)>&) {
  throw gdn::comm_error("this gdn-run was built without MPI");
}
job_place place_in_job() { return {}; }
void note_consequence() noexcept {}
void broadcast(std::span<std::byte>) {}
std::chrono::milliseconds patience(const options& o) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(o.deadline.value_or(60) * 1000));
}
#endif

#if !defined(GDN_RUN_NCCL)
void expects_devices(const options&) {}
#endif

}  // namespace gdn_run
