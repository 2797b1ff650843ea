#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/config/error.h"

namespace hymoe {

void ConfigArguments::add_to(CLI::App& command, bool required) {
  auto* config = command.add_option("config", path, "YAML or JSON file");
  if (required) config->required();
  command.add_option("overrides", overrides, "settings over those of the file, as key.path=value");
}

OutputFile::OutputFile(const std::string& path) {
  if (!path.empty()) file_.emplace(path);
}

void OutputFile::write(const nlohmann::ordered_json& record) {
  const std::string line = record.dump() + "\n";
  if (file_) {
    file_->write(line);
  } else {
    std::cout << line;
  }
}

void OutputFile::close() {
  if (file_) file_->commit();
  std::cout.flush();
}

std::string text_of(const nlohmann::json& record, const std::string& where) {
  const auto text = record.find("text");
  if (text == record.end() || !text->is_string()) throw DataError(where, "expected a \"text\" string");
  return text->get<std::string>();
}

Progress::Progress(bool enabled)
    : enabled_(enabled), terminal_(isatty(STDERR_FILENO) != 0), last_(std::chrono::steady_clock::now()) {}

void Progress::show(const std::string& text) {
  constexpr auto kPause = std::chrono::seconds(10);
  if (!enabled_) return;
  if (terminal_) {
    std::cerr << "\r\033[K" << text << std::flush;
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < kPause) return;
  last_ = now;
  std::cerr << text << std::endl;
}

void Progress::show(const char* phase, int64_t done, int64_t total) {
  show(std::string(phase) + " " + std::to_string(done) + "/" + std::to_string(total));
}

void Progress::clear() {
  if (enabled_ && terminal_) std::cerr << "\r\033[K" << std::flush;
}

void print_comparison(const Comparison& comparison) {
  if (comparison.sample_tokens == 0) {
    std::printf("  nothing measured    there is no sample\n");
    return;
  }
  std::printf("  loss on the sample  %.6f -> %.6f nats a token (%lld tokens)\n", comparison.loss_before,
              comparison.loss_after, static_cast<long long>(comparison.sample_tokens));
  std::printf("  largest difference of a logit  %.3g\n", comparison.max_logit_difference);
}

std::string format_bytes(double bytes) {
  std::array<char, 32> text{};
  if (std::abs(bytes) >= 1 << 30) {
    std::snprintf(text.data(), text.size(), "%.2f GiB", bytes / (1 << 30));
  } else {
    std::snprintf(text.data(), text.size(), "%.1f MiB", bytes / (1 << 20));
  }
  return text.data();
}

std::string format_count(double count) {
  std::array<char, 32> text{};
  const char* unit = "";
  for (const char* larger : {"k", "M", "B"}) {
    if (count < 1000) break;
    count /= 1000;
    unit = larger;
  }
  std::snprintf(text.data(), text.size(), *unit ? "%.1f%s" : "%.0f%s", count, unit);
  return text.data();
}

}  // namespace hymoe
