// SPDX-License-Identifier: Apache-2.0
// gdn-run: runs a layer bundle over several ranks and compares the results.

#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <gdn/core/error.hpp>
#include <gdn/io/file.hpp>

#include "bundle.hpp"
#include "job.hpp"
#include "options.hpp"
#include "report.hpp"
#include "run.hpp"

namespace {

using gdn_run::ending;

bool same_file(const std::string& a, const std::string& b) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  return fs::equivalent(a, b, ignored) || fs::weakly_canonical(fs::absolute(a, ignored), ignored) ==
                                              fs::weakly_canonical(fs::absolute(b, ignored), ignored);
}

/// The file that an option names.
gdn::replacement_file create(const char* option, const std::string& path) {
  try {
    return gdn::replacement_file(path);
  } catch (const gdn::metadata_error& e) {
    throw gdn::metadata_error(std::string(option) + ": " + e.what());
  }
}

/// Refuses, before the work, what could not be written after it; devices and pipes are left alone.
void expects_writable(const char* option, const std::string& path, const std::vector<std::string>& others) {
  std::error_code ignored;
  const std::filesystem::file_status status = std::filesystem::status(path, ignored);
  const bool special = std::filesystem::exists(status) && !std::filesystem::is_regular_file(status) &&
                       !std::filesystem::is_directory(status);
  if (path.empty() || special) return;
  for (const std::string& other : others) {
    if (!other.empty() && same_file(path, other)) {
      throw gdn::metadata_error(std::string(option) + " is '" + path + "', which another argument names, too");
    }
  }
  create(option, path);
}

/// What a step did, or why it could not.
template <class F>
ending attempt(F&& step) {
  try {
    return step();
  } catch (const gdn_run::usage_error& e) {
    return {gdn_run::bad_input, e.what()};
  } catch (const gdn::metadata_error& e) {
    return {gdn_run::bad_input, e.what()};
  } catch (const gdn::shape_error& e) {
    return {gdn_run::bad_input, e.what()};
  } catch (const std::bad_alloc&) {
    return {gdn_run::failed, "out of memory"};
  } catch (const std::exception& e) {
    return {gdn_run::failed, e.what()};
  }
}

/// Compares and writes; only on the root.
ending conclude(const gdn_run::options& o, const gdn_run::bundle& b, const gdn_run::run_result& r) {
  const std::vector<gdn_run::comparison> table = gdn_run::compare_all(o, b, r);
  // Neither file gets its name before both are complete.
  std::optional<gdn::replacement_file> out;
  std::optional<gdn::replacement_file> json;
  if (!o.out.empty()) gdn_run::write_results(out.emplace(create("--out", o.out)), o, r);
  if (!o.json.empty()) json.emplace(create("--json", o.json)).write(gdn_run::to_json(r, table));
  if (json) json->commit();
  if (out) out->commit();
  return {gdn_run::all_within_limits(table) ? gdn_run::within_limits : gdn_run::out_of_limits,
          gdn_run::to_text(o, b, r, table)};
}

/// The steps of a run; behind each all processes know how it went on the others.
ending run(gdn_run::options o, gdn_run::job& job) {
  ending e = job.agree(attempt([&] {
    job.adopt(o);
    return ending{};
  }));
  if (!e.goes_on()) return e;

  std::optional<gdn_run::bundle> b;
  gdn::fragment_table layout;
  std::uint64_t fingerprint = 0;
  e = attempt([&] {
    b = gdn_run::load_bundle(o.bundle);
    gdn::raise(exceeds_backend(o, *b));
    layout = gdn_run::make_layout_table(o, *b);
    if (job.root()) {
      expects_writable("--out", o.out, {o.bundle, o.json});
      expects_writable("--json", o.json, {o.bundle, o.out});
    }
    if (const auto found = exceeds_memory(o, *b)) throw gdn::backend_error(found->text);
    job.expect_work(seconds_of_work(o, *b));
    if (o.processes) fingerprint = gdn_run::fingerprint(o, *b);
    return ending{};
  });
  e = job.agree(std::move(e), fingerprint);
  if (!e.goes_on()) return e;

  gdn_run::run_result r;
  e = job.agree(attempt([&] {
    r = gdn_run::run_layer(o, *b, layout);
    return ending{};
  }));
  if (!e.goes_on()) return e;
  return job.agree(attempt([&] { return job.root() ? conclude(o, *b, r) : ending{}; }));
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
  gdn_run::command command;
  const ending parsed = attempt([&] {
    command = gdn_run::parse_command(arguments);
    return ending{gdn_run::within_limits, command.text};
  });
  const std::unique_ptr<gdn_run::job> job = gdn_run::make_job(arguments, command.run);
  ending e = job->agree(parsed, command.run ? 1 : 2);
  if (e.goes_on() && command.run) e = run(*command.run, *job);
  return job->finish(e);
}
