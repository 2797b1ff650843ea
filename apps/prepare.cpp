#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/config/config.h"
#include "hymoe/data/prepare.h"

namespace hymoe {
namespace {

void print_table(const Manifest& manifest) {
  std::printf("%-12s %10s %12s %10s %12s  %s\n", "language", "documents", "tokens", "held out", "MB of text",
              "left out");
  for (const auto& [language, record] : manifest.languages) {
    const auto split = [&](const char* name) {
      const auto found = record.splits.find(name);
      return found == record.splits.end() ? SplitRecord{} : found->second;
    };
    std::string skipped;
    for (const auto& [reason, count] : record.skipped) {
      skipped += (skipped.empty() ? "" : ", ") + std::to_string(count) + " " + reason;
    }
    std::printf("%-12s %10lld %12lld %10lld %12.1f  %s\n", language.c_str(),
                static_cast<long long>(split("train").documents),
                static_cast<long long>(split("train").tokens),
                static_cast<long long>(split("valid").documents),
                static_cast<double>(split("train").bytes + split("valid").bytes) * 1e-6, skipped.c_str());
  }
}

}  // namespace

void add_prepare(CLI::App& program) {
  auto* command = program.add_subcommand(
      "prepare", "Turn folders, JSONL and text into tokenised, deduplicated token files");
  auto arguments = std::make_shared<ConfigArguments>();
  auto json = std::make_shared<bool>(false);
  auto quiet = std::make_shared<bool>(false);
  arguments->add_to(*command);
  command->add_flag("--json", *json, "print the manifest as JSON");
  command->add_flag("--quiet", *quiet, "print nothing");
  command->callback([=] {
    const auto config = load_config<PrepareConfig>(arguments->path, arguments->overrides);
    Progress progress(!*quiet && !*json);
    const PrepareReport report = prepare(config, [&](const char* phase, int64_t done, int64_t total) {
      const std::string of = total > 0 ? " of " + format_bytes(static_cast<double>(total)) : "";
      progress.show(std::string(phase) + " " + format_bytes(static_cast<double>(done)) + of);
    });
    progress.clear();
    if (*json) {
      std::cout << report.manifest.to_json().dump(2) << std::endl;
    } else if (!*quiet) {
      print_table(report.manifest);
      std::printf("%s: %s read, %.1f s looking, %.1f s tokenising\n", config.output.c_str(),
                  format_bytes(static_cast<double>(report.bytes_read)).c_str(), report.scan_seconds,
                  report.encode_seconds);
    }
  });
}

}  // namespace hymoe
