// SPDX-License-Identifier: Apache-2.0
// gdn-run as one process of an MPI job.
#if defined(GDN_RUN_MPI)

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <mpi.h>
#include <sys/time.h>
#include <unistd.h>

#include <gdn/core/error.hpp>
#include <gdn/mpi/communicator.hpp>

#include "job.hpp"

namespace gdn_run {
namespace {

using clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int max_ranks = 64;
constexpr double base_patience = 5;  // seconds

// ---- the end of a process whose job comes apart: what signal handlers may touch and call ------------------------------

struct last_words {
  volatile std::sig_atomic_t code = failed;
  volatile std::sig_atomic_t settled = 0;  // the job has agreed on the code, and its line is written
  volatile std::sig_atomic_t rank = 0;
  volatile std::sig_atomic_t processes = 0;
  std::array<volatile std::sig_atomic_t, max_ranks> process{};  // 0 on other machines
  std::array<char, 512> claim{};                                // a file that only one process can create; or empty
};
last_words last;

/// Text in a fixed buffer.
class short_text {
 public:
  short_text& operator<<(const char* text) noexcept {
    while (*text != 0 && size_ < buffer_.size()) buffer_[size_++] = *text++;
    return *this;
  }
  short_text& operator<<(int number) noexcept {
    std::array<char, 12> digits{};
    std::size_t n = digits.size() - 1;
    do digits[--n] = static_cast<char>('0' + number % 10);
    while ((number /= 10) > 0);
    return *this << digits.data() + n;
  }
  void print() const noexcept {
    if (write(STDERR_FILENO, buffer_.data(), size_) < 0) return;
  }

 private:
  std::array<char, 512> buffer_{};
  std::size_t size_ = 0;
};

/// True in one process of the job only (of those on one machine): the one that writes the line.
bool may_speak() noexcept {
  if (last.claim[0] == 0) return last.rank == 0;
  const int file = open(last.claim.data(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
  if (file >= 0) close(file);
  return file >= 0 || (errno != EEXIST && last.rank == 0);
}

[[noreturn]] void end_alone(std::string_view text) noexcept {
  std::signal(SIGTERM, SIG_IGN);
  std::signal(SIGALRM, SIG_IGN);
  if (last.settled == 0 && may_speak()) std::fputs(error_line(text).c_str(), stderr);
  _exit(last.code);
}

extern "C" void gdn_run_on_signal(int signal) {
  if (last.settled != 0) _exit(last.code);
  // Who died is looked for first: those that speak later find others gone, which ended as this one does.
  int dead = -1;
  for (int r = 0; r < last.processes; ++r) {
    const auto process = static_cast<pid_t>(last.process[static_cast<std::size_t>(r)]);
    if (process > 0 && dead < 0 && kill(process, 0) != 0 && errno == ESRCH) dead = r;
  }
  if (may_speak()) {
    short_text line;
    if (signal == SIGALRM) {
      line << "gdn-run: rank " << last.rank << " waited in MPI's start, but not every process of the job came\n";
    } else if (dead >= 0) {
      line << "gdn-run: rank " << dead << " (process " << last.process[static_cast<std::size_t>(dead)]
           << ") was killed or left, and the MPI launcher ended the others\n";
    } else if (last.processes == 0) {
      line << "gdn-run: rank " << last.rank << " was ended by the launcher in MPI's start: not every process of the job came\n";
    } else {
      line << "gdn-run: rank " << last.rank << " was ended by signal " << signal
           << ", as the MPI launcher does when a process of the job ends badly\n";
    }
    line.print();
  }
  _exit(last.code);
}

void set_alarm(double seconds) {
  const auto whole = static_cast<time_t>(seconds);
  itimerval timer{};
  timer.it_value.tv_sec = whole;
  timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - static_cast<double>(whole)) * 1e6);
  setitimer(ITIMER_REAL, &timer, nullptr);
}

int number_in(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? static_cast<int>(std::strtol(text, nullptr, 10)) : otherwise;
}

/// What the launcher tells before MPI has started.
void prepare_last_words() {
  last.rank = number_in("OMPI_COMM_WORLD_RANK", 0);
  const char* folder = std::getenv("PMIX_SERVER_TMPDIR");  // of this job, on this machine; its launcher removes it
  if (folder != nullptr && std::strlen(folder) + 32 < last.claim.size()) {
    std::snprintf(last.claim.data(), last.claim.size(), "%s/gdn-run.has-spoken", folder);
  }
  struct sigaction action{};
  action.sa_handler = gdn_run_on_signal;
  sigfillset(&action.sa_mask);
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGALRM, &action, nullptr);
}

// ---- the job --------------------------------------------------------------------------------------------------------

/// How a step ended on one process, or on all.
struct report {
  std::int32_t status = within_limits;
  std::int32_t consequence = 0;  // of another rank's failure
  std::uint64_t fingerprint = 0;
  std::array<char, 1008> text{};
};

class mpi_job;
mpi_job* joined = nullptr;

class mpi_job final : public job {
 public:
  explicit mpi_job(double deadline) : fixed_(deadline > 0), patience_(fixed_ ? deadline : base_patience) {
    prepare_last_words();
    const int expected = number_in("OMPI_COMM_WORLD_SIZE", 1);
    set_alarm(fixed_ ? patience_ : patience_ * std::max(1., expected / 16.));
    int level = MPI_THREAD_SINGLE;
    try {
      gdn::mpi::check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level), "MPI_Init_thread");
      gdn::mpi::check(MPI_Comm_dup(MPI_COMM_WORLD, &comm_), "MPI_Comm_dup");
      gdn::mpi::check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
      gdn::mpi::check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
      gdn::mpi::check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
      exchange_processes();
    } catch (const std::exception& e) {
      end_alone(e.what());
    }
    set_alarm(0);
    joined = this;
  }

  bool root() const noexcept override { return rank_ == 0; }
  void adopt(options& o) override {
    const std::string comm = o.comm == comm_kind::nccl ? "--comm nccl" : "--comm mpi";
    if (size_ > max_ranks) {
      throw usage_error(gdn::say(comm, "has", size_, "processes; there may be 1 to", max_ranks));
    }
    if (o.ranks_given && o.ranks != size_) {
      throw usage_error(gdn::say("--ranks is", o.ranks) +
                        gdn::say("; with", comm, "it must be the number of processes,", size_));
    }
    o.ranks = size_;
    o.processes = true;
  }
  void expect_work(double seconds) override {
    if (!fixed_) patience_ = base_patience + seconds;
  }

  ending agree(ending mine, std::uint64_t fingerprint) override {
    auto own = std::make_unique<report>();
    own->status = mine.status;
    own->consequence = consequence_;
    own->fingerprint = fingerprint;
    mine.text.copy(own->text.data(), own->text.size() - 1);
    try {
      const report all = root() ? collect(std::move(own)) : ask(std::move(own));
      const auto status = static_cast<exit_status>(all.status);
      if (status == within_limits || status == out_of_limits) return {status, std::move(mine.text)};
      last.code = status;
      return {status, all.text.data()};
    } catch (const std::exception& e) {
      end_alone(e.what());
    }
  }

  int finish(const ending& e) override {
    if (root()) {
      if (e.goes_on()) {
        std::fputs(e.text.c_str(), stdout);
        std::fflush(stdout);
      } else if (may_speak()) {
        std::fputs(error_line(e.text).c_str(), stderr);
      }
      last.code = e.status;
      last.settled = 1;
    }
    // Nobody ends before the line is written: a launcher may end the others then.
    char written = 1;
    bool all = false;
    try {
      std::vector<MPI_Request> requests;
      for (int r = 1; root() && r < size_; ++r) {
        gdn::mpi::check(MPI_Isend(&written, 1, MPI_BYTE, r, written_tag, comm_, &requests.emplace_back(MPI_REQUEST_NULL)),
                        "MPI_Isend");
      }
      if (!root()) {
        gdn::mpi::check(MPI_Irecv(&written, 1, MPI_BYTE, 0, written_tag, comm_, &requests.emplace_back(MPI_REQUEST_NULL)),
                        "MPI_Irecv");
      }
      all = wait_for(requests, 2);
    } catch (const std::exception&) {  // the line is written, or rank 0 is lost
    }
    if (!root()) {
      last.code = e.status;
      last.settled = 1;
    }
    if (!all || e.status == failed) _exit(e.status);  // MPI_Finalize may wait for those that are lost
    set_alarm(base_patience);
    MPI_Finalize();
    set_alarm(0);
    return e.status;
  }

  MPI_Comm comm() const noexcept { return comm_; }
  job_place place() const {
    MPI_Comm machine = MPI_COMM_NULL;
    job_place out{rank_, size_, 0};
    gdn::mpi::check(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &machine), "MPI_Comm_split_type");
    gdn::mpi::check(MPI_Comm_rank(machine, &out.on_machine), "MPI_Comm_rank");
    gdn::mpi::check(MPI_Comm_free(&machine), "MPI_Comm_free");
    return out;
  }
  milliseconds deadline() const {
    return milliseconds(static_cast<std::int64_t>(std::clamp(1000 * patience_, 1., 1e12)));
  }
  void note_consequence() noexcept { consequence_ = 1; }

 private:
  static constexpr int report_tag = 1, verdict_tag = 2, written_tag = 3;

  void exchange_processes() {
    std::array<char, MPI_MAX_PROCESSOR_NAME> name{};
    int length = 0;
    gdn::mpi::check(MPI_Get_processor_name(name.data(), &length), "MPI_Get_processor_name");
    std::uint64_t host = 1469598103934665603U;
    for (int i = 0; i < length; ++i) {
      host = (host ^ static_cast<unsigned char>(name[static_cast<std::size_t>(i)])) * 1099511628211U;
    }
    const std::array<std::uint64_t, 2> mine = {host, static_cast<std::uint64_t>(getpid())};
    std::vector<std::array<std::uint64_t, 2>> all(static_cast<std::size_t>(size_));
    gdn::mpi::check(MPI_Allgather(mine.data(), 2, MPI_UINT64_T, all.data(), 2, MPI_UINT64_T, comm_), "MPI_Allgather");
    for (std::size_t r = 0; r < std::min(all.size(), last.process.size()); ++r) {
      last.process[r] = all[r][0] == host ? static_cast<std::sig_atomic_t>(all[r][1]) : 0;
    }
    last.rank = rank_;
    last.processes = std::min(size_, max_ranks);
  }

  /// @param requests done ones become MPI_REQUEST_NULL
  static bool wait_for(std::vector<MPI_Request>& requests, double seconds) {
    const auto begin = clock::now();
    gdn::mpi::detail::back_off pause;
    for (;;) {
      int done = 0;
      const int code = MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
      if (code == MPI_SUCCESS && done != 0) return true;
      if (code != MPI_SUCCESS || std::chrono::duration<double>(clock::now() - begin).count() > seconds) return false;
      pause();
    }
  }

  /// Sends this process' report to the root and gets what all do.
  report ask(std::unique_ptr<report> own) {
    auto verdict = std::make_unique<report>();
    std::vector<MPI_Request> requests(2, MPI_REQUEST_NULL);
    gdn::mpi::check(MPI_Irecv(verdict.get(), sizeof(report), MPI_BYTE, 0, verdict_tag, comm_, &requests[0]), "MPI_Irecv");
    gdn::mpi::check(MPI_Isend(own.get(), sizeof(report), MPI_BYTE, 0, report_tag, comm_, &requests[1]), "MPI_Isend");
    const bool failing = own->status > out_of_limits;
    // The root waits for others, too; and one that fails does not wait for a root that computes.
    if (wait_for(requests, failing ? 2 : patience_ + 1.5)) return *verdict;
    if (failing) end_alone(text_of(*own, rank_));
    end_alone(gdn::say("rank", rank_, "waited for rank 0, which does not answer"));
  }

  /// Gets the reports of all, and tells all what they do.
  report collect(std::unique_ptr<report> own) {
    std::vector<report>* all = new std::vector<report>(static_cast<std::size_t>(size_));  // kept where one is missing
    all->front() = *own;
    std::vector<MPI_Request> requests(all->size(), MPI_REQUEST_NULL);
    for (int r = 1; r < size_; ++r) {
      gdn::mpi::check(MPI_Irecv(&(*all)[static_cast<std::size_t>(r)], sizeof(report), MPI_BYTE, r, report_tag, comm_,
                                &requests[static_cast<std::size_t>(r)]),
                      "MPI_Irecv");
    }
    const auto failing = [&](std::size_t r) {
      return requests[r] == MPI_REQUEST_NULL && (*all)[r].status > out_of_limits;
    };
    const auto begin = clock::now();
    auto limit = begin + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(patience_));
    bool hurries = false;
    gdn::mpi::detail::back_off pause;
    for (;;) {
      int done = 0;
      gdn::mpi::check(MPI_Testall(size_, requests.data(), &done, MPI_STATUSES_IGNORE), "MPI_Testall");
      if (done != 0) break;
      // MPI_Testall leaves requests alone unless all are done.
      for (std::size_t r = 1; r < requests.size(); ++r) {
        if (requests[r] != MPI_REQUEST_NULL) gdn::mpi::check(MPI_Test(&requests[r], &done, MPI_STATUS_IGNORE), "MPI_Test");
      }
      for (std::size_t r = 0; !hurries && r < requests.size(); ++r) {
        if (!failing(r)) continue;
        hurries = true;
        limit = std::min(limit, clock::now() + milliseconds(500));
      }
      if (clock::now() > limit) break;
      pause();
    }
    const report verdict = judge(*all, requests);
    std::vector<report> copies(all->size(), verdict);
    std::vector<MPI_Request> telling;
    for (int r = 1; r < size_; ++r) {
      gdn::mpi::check(MPI_Isend(&copies[static_cast<std::size_t>(r)], sizeof(report), MPI_BYTE, r, verdict_tag, comm_,
                                &telling.emplace_back(MPI_REQUEST_NULL)),
                      "MPI_Isend");
    }
    const bool told = wait_for(telling, 1);
    if (!told) static_cast<void>(new std::vector<report>(std::move(copies)));  // MPI may still read them
    if (std::all_of(requests.begin(), requests.end(), [](MPI_Request r) { return r == MPI_REQUEST_NULL; })) delete all;
    return verdict;
  }

  /// The cause before its consequences, low ranks before high ones.
  report judge(const std::vector<report>& all, const std::vector<MPI_Request>& requests) const {
    report out;
    const auto set = [&](exit_status status, const std::string& text) {
      out.status = status;
      text.copy(out.text.data(), out.text.size() - 1);
    };
    for (const bool consequence : {false, true}) {
      for (std::size_t r = 0; r < all.size(); ++r) {
        if (requests[r] != MPI_REQUEST_NULL || all[r].status <= out_of_limits) continue;
        if ((all[r].consequence != 0) != consequence) continue;
        set(static_cast<exit_status>(all[r].status), text_of(all[r], static_cast<int>(r)));
        return out;
      }
    }
    for (std::size_t r = 0; r < all.size(); ++r) {
      if (requests[r] == MPI_REQUEST_NULL) continue;
      set(failed, gdn::say("rank", r, "does not answer"));
      return out;
    }
    for (std::size_t r = 0; r < all.size(); ++r) {
      if (all[r].fingerprint == all[0].fingerprint) continue;
      set(bad_input, gdn::say("rank", r, "was started with other options or another bundle than rank 0"));
      return out;
    }
    out.status = all[0].status;
    return out;
  }

  static std::string text_of(const report& r, int rank) {
    const std::string text = r.text.data();
    return rank == 0 || text.starts_with("rank ") ? text : gdn::say("rank", rank) + ": " + text;
  }

  bool fixed_;
  double patience_;  // seconds
  int consequence_ = 0;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace

void note_consequence() noexcept {
  if (joined != nullptr) joined->note_consequence();
}

job_place place_in_job() { return joined != nullptr ? joined->place() : job_place{}; }

void broadcast(std::span<std::byte> bytes) {
  if (joined == nullptr) return;
  MPI_Request request = MPI_REQUEST_NULL;
  gdn::mpi::check(MPI_Ibcast(bytes.data(), static_cast<int>(bytes.size()), MPI_BYTE, 0, joined->comm(), &request), "MPI_Ibcast");
  gdn::expects<gdn::comm_error>(gdn::mpi::detail::completes(request, joined->deadline(), "MPI_Ibcast"),
                                "not every process of the job came to the start of NCCL");
}

milliseconds patience(const options& o) {
  if (joined != nullptr) return joined->deadline();
  return milliseconds(static_cast<std::int64_t>(o.deadline.value_or(60) * 1000));
}

std::unique_ptr<job> join_mpi_job(double deadline_seconds) { return std::make_unique<mpi_job>(deadline_seconds); }

void run_mpi_rank(const options&, const std::function<void(host_communicator&)>& f) {
  gdn::mpi::mpi_communicator comm(joined->comm(), {.deadline = joined->deadline()});
  host_communicator_of<gdn::mpi::mpi_communicator> mine(comm);
  try {
    f(mine);
  } catch (const gdn::comm_error&) {
    if (comm.failed_peer() >= 0) joined->note_consequence();
    comm.abort();
    throw;
  } catch (...) {
    comm.abort();
    throw;
  }
}

}  // namespace gdn_run

#endif
