#pragma once

#include <filesystem>

namespace hymoe {

// Writes `run_folder/report.html`, a page that needs no network and no other file, from the run's
// metrics.jsonl and, where there is one, receipt.json: loss curves, losses a language first and last, expert
// × language heat maps, throughput.
void write_report(const std::filesystem::path& run_folder);

}  // namespace hymoe
