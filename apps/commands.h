#pragma once

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/config/config.h"
#include "hymoe/io/file.h"

namespace CLI {
class App;
}

namespace hymoe {

// Each adds its command to the program; the command's callback does the work and throws what goes wrong.
void add_config(CLI::App& program);
void add_eval(CLI::App& program);
void add_export(CLI::App& program);
void add_generate(CLI::App& program);
void add_grow(CLI::App& program);
void add_inspect(CLI::App& program);
void add_plan(CLI::App& program);
void add_prepare(CLI::App& program);
void add_score(CLI::App& program);
void add_tokenize(CLI::App& program);
void add_train(CLI::App& program);
void add_upcycle(CLI::App& program);

// `[CONFIG] [key=value …]` of the commands that take a config.
struct ConfigArguments {
  std::string path;  // empty: all defaults
  std::vector<std::string> overrides;

  // Adds both to a command. With `required`, CONFIG must be given.
  void add_to(CLI::App& command, bool required = true);

  // The config, where the file may be left out: defaults and overrides then.
  template <typename Config>
  Config load() const {
    const bool is_file =
        !path.empty() && (path.find('=') == std::string::npos || std::filesystem::exists(path));
    if (is_file) return load_config<Config>(path, overrides);
    std::vector<std::string> all = overrides;
    if (!path.empty()) all.insert(all.begin(), path);  // an override that stands where the file would
    return parse_config<Config>("{}", "command line", all);
  }
};

// Result lines of a command: into a file that appears when complete, or to standard output.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path);
  void write(const nlohmann::ordered_json& record);
  void close();

 private:
  std::optional<AtomicFile> file_;
};

// The "text" of an input record. Throws DataError naming `where`.
std::string text_of(const nlohmann::json& record, const std::string& where);

// A line that overwrites itself on a terminal; where standard error is none, a line now and then.
class Progress {
 public:
  explicit Progress(bool enabled);
  void show(const std::string& text);
  void show(const char* phase, int64_t done, int64_t total);
  void clear();

 private:
  bool enabled_, terminal_;
  std::chrono::steady_clock::time_point last_;
};

struct Comparison;
// The lines of a receipt on what was measured, or that nothing was.
void print_comparison(const Comparison& comparison);

// "%.2f"-like text of a byte count: "1.25 GiB".
std::string format_bytes(double bytes);
// 135123456 -> "135.1M".
std::string format_count(double count);

}  // namespace hymoe
