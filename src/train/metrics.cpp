#include "hymoe/train/metrics.h"

#include <algorithm>
#include <cmath>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"

namespace hymoe {
namespace {

std::filesystem::path without_rows_after(const std::filesystem::path& path, int64_t last_step) {
  if (!std::filesystem::exists(path)) return path;
  std::string kept;
  LineReader lines(path);
  for (std::string line; lines.next(line);) {
    const auto row = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    // A killed writer may leave half a line: it is past the last checkpoint in any case.
    if (row.is_object() && row.value("step", last_step + 1) <= last_step) kept += line + "\n";
  }
  write_file_atomic(path, kept);
  return path;
}

double entropy(const Tensor& share) { return -at::xlogy(share, share).sum().item<double>(); }

// Of two variables with these counts together [A, B]; 0 where one of them never varies.
double mutual_information(const Tensor& counts) {
  const Tensor share = counts / counts.sum().clamp_min(1);
  const double a = entropy(share.sum(1)), b = entropy(share.sum(0)), least = std::min(a, b);
  return least > 0 ? std::max(0.0, a + b - entropy(share)) / least : 0;
}

}  // namespace

LoadSummary summarize(const BranchLoad& load) {
  const Tensor counts = load.rows_per_expert.to(at::kCPU, at::kDouble);
  const double total = counts.sum().item<double>();
  const auto experts = static_cast<double>(counts.numel());
  LoadSummary summary;
  summary.dead_experts = (counts == 0).sum().item<int64_t>();
  if (total > 0) {
    const Tensor relative = counts * (experts / total);
    summary.load = relative.max().item<double>();
    summary.entropy = experts > 1 ? entropy(counts / total) / std::log(experts) : 1.0;
    summary.cv = std::sqrt((relative - 1).square().mean().item<double>());
    const Tensor parts = at::quantile(relative, at::tensor({0.1, 0.5, 0.9}, at::kDouble));
    summary.p10 = parts[0].item<double>();
    summary.p50 = parts[1].item<double>();
    summary.p90 = parts[2].item<double>();
  }
  if (load.joint.defined()) summary.overlap = mutual_information(load.joint.to(at::kCPU, at::kDouble));
  const double rows = load.rows.item<double>();
  summary.coverage = rows > 0 ? load.covered.item<double>() / rows : 0.0;
  return summary;
}

std::string load_name(const LayerLoad& load) {
  return "layers." + std::to_string(load.layer) + "." + load.load.name;
}

MetricsLog::MetricsLog(const std::filesystem::path& run_folder, int64_t last_step)
    : lines_(without_rows_after(run_folder / "metrics.jsonl", last_step)), events_(run_folder) {}

void MetricsLog::write(const nlohmann::ordered_json& row) {
  lines_.write(row);
  const auto step = row.at("step").get<int64_t>();
  std::vector<std::pair<std::string, double>> scalars;
  for (const auto& [key, value] : row.items()) {
    if (value.is_number() && key != "step") scalars.emplace_back(key, value.get<double>());
    if (!value.is_array()) continue;
    std::string text;
    for (size_t i = 0; i < value.size(); ++i) {
      if (value[i].is_number()) scalars.emplace_back(key + "/" + std::to_string(i), value[i].get<double>());
      if (value[i].is_string()) text += "- " + value[i].get<std::string>() + "\n";
    }
    if (!text.empty()) events_.write_text(step, key, text);
  }
  events_.write(step, scalars);
}

}  // namespace hymoe
