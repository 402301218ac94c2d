// SPDX-License-Identifier: Apache-2.0
// gdn-run: runs a layer bundle over several ranks and compares the results.

#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <gdn/core/error.hpp>
#include <gdn/io/file.hpp>

#include "bundle.hpp"
#include "options.hpp"
#include "report.hpp"
#include "run.hpp"

namespace {

enum exit_status { within_limits = 0, out_of_limits = 1, bad_input = 2, failed = 3 };

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

int run(const gdn_run::options& o) {
  const gdn_run::bundle b = gdn_run::load_bundle(o.bundle);
  const gdn::fragment_table layout = gdn_run::make_layout_table(o, b);
  expects_writable("--out", o.out, {o.bundle, o.json});
  expects_writable("--json", o.json, {o.bundle, o.out});
  if (const auto found = exceeds_memory(o, b)) throw gdn::backend_error(found->text);

  const gdn_run::run_result r = gdn_run::run_layer(o, b, layout);
  const std::vector<gdn_run::comparison> table = gdn_run::compare_all(o, b, r);
  // Neither file gets its name before both are complete.
  std::optional<gdn::replacement_file> out;
  std::optional<gdn::replacement_file> json;
  if (!o.out.empty()) gdn_run::write_results(out.emplace(create("--out", o.out)), o, r);
  if (!o.json.empty()) json.emplace(create("--json", o.json)).write(gdn_run::to_json(r, table));
  if (json) json->commit();
  if (out) out->commit();
  std::fputs(gdn_run::to_text(o, b, r, table).c_str(), stdout);
  return gdn_run::all_within_limits(table) ? within_limits : out_of_limits;
}

/// One line, whatever a file's name or a message holds.
int fail(exit_status status, std::string_view text) {
  std::string line = "gdn-run: ";
  for (const char c : text) line += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  std::fputs((line + "\n").c_str(), stderr);
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
    const gdn_run::command command = gdn_run::parse_command(arguments);
    if (command.run) return run(*command.run);
    std::fputs(command.text.c_str(), stdout);
    return within_limits;
  } catch (const gdn_run::usage_error& e) {
    return fail(bad_input, e.what());
  } catch (const gdn::metadata_error& e) {
    return fail(bad_input, e.what());
  } catch (const gdn::shape_error& e) {
    return fail(bad_input, e.what());
  } catch (const std::bad_alloc&) {
    return fail(failed, "out of memory");
  } catch (const std::exception& e) {
    return fail(failed, e.what());
  }
}
