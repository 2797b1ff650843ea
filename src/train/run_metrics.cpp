#include "train/run.h"

#include <ATen/ops/full.h>

#include "hymoe/io/jsonl.h"
#include "hymoe/model/language_loss.h"

namespace hymoe {
namespace {

// Largest resident set of this process so far, in bytes.
int64_t peak_memory() {
  LineReader lines("/proc/self/status");
  for (std::string line; lines.next(line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  }
  return 0;
}

}  // namespace

void Trainer::Run::log_step() {
  auto nats = interval_.nats.item<double>(), aux_loss = interval_.aux_loss.item<double>();
  sum_loads(interval_.loads, {&nats, &aux_loss}, mesh_.data);
  Tensor peak = at::full({1}, peak_memory(), at::TensorOptions(device_).dtype(at::kLong));
  mesh_.world.all_reduce_max(peak);
  if (is_first()) write_row(step_row(nats, aux_loss, peak.item<int64_t>()));
  interval_ = {};
}

nlohmann::ordered_json Trainer::Run::step_row(double nats, double aux_nats, int64_t peak_memory) const {
  const double lm_loss = nats / static_cast<double>(interval_.targets);
  const double aux_loss = aux_nats / static_cast<double>(interval_.steps);
  const double tokens_per_second = static_cast<double>(interval_.tokens) / interval_.seconds;
  nlohmann::ordered_json row{
      {"step", state_.step},
      {"tokens", state_.tokens},
      {"loss", lm_loss + aux_loss},
      {"lm_loss", lm_loss},
      {"aux_loss", aux_loss},
      {"lr", lr_},
      {"grad_norm", grad_norm_},
      {"tokens_per_second", tokens_per_second},
      {"tflops", tokens_per_second * model_->flops_per_token(config_.data.seq_len) * 1e-12},
      {"peak_memory", peak_memory}};
  for (const LayerLoad& load : interval_.loads) {
    const LoadSummary summary = summarize(load.load);
    const std::string name = load_name(load);
    row["load/" + name] = summary.load;
    row["entropy/" + name] = summary.entropy;
    row["dead_experts/" + name] = summary.dead_experts;
    row["coverage/" + name] = summary.coverage;
    row["load_cv/" + name] = summary.cv;
    row["load_p10/" + name] = summary.p10;
    row["load_p50/" + name] = summary.p50;
    row["load_p90/" + name] = summary.p90;
    if (summary.overlap) row["overlap/" + name] = *summary.overlap;
    for (const auto& [metric, sum] : load.load.metrics)
      row[metric + "/" + name] = sum.item<double>() / load.load.metric_calls.at(metric);
  }
  for (const RouterGradient& router : interval_.routers) {
    row["router_grad/" + router.name] = router.lm;
    row["router_aux_grad/" + router.name] = router.aux;
    if (!router.dead.empty())
      row["warnings"].push_back(router.name +
                                ": the router learns nothing from the language: " + router.dead);
  }
  return row;
}

void Trainer::Run::write_row(const nlohmann::ordered_json& row) {
  log_->write(row);
  if (on_row_) on_row_(row);
}

void Trainer::Run::evaluate_if_due() {
  const bool wanted = state_.step == 0 || state_.step == config_.steps || due(config_.eval.interval);
  if (wanted && config_.eval.tokens > 0 && state_.evaluated < state_.step) evaluate();
}

void Trainer::Run::evaluate() {
  nlohmann::ordered_json row{{"step", state_.step}, {"tokens", state_.tokens}};
  for (const auto& [language, record] : manifest_.languages) {
    if (!record.splits.contains("valid")) continue;
    const EvalBatches batches(config_.data.path, language, config_.data.seq_len, config_.eval.batch_size,
                              config_.eval.tokens, "valid", tokenizer_.fingerprint());
    const auto result = language_loss(model_, batches, token_bytes_, [&](int64_t done) {
      if (on_evaluation_ && is_first()) on_evaluation_(language, done, batches.size());
      return !on_any_rank(stop_was_requested());
    });
    if (!result) return;
    row["loss/" + language] = result->loss;
    row["bits_per_byte/" + language] = result->bits_per_byte;
    for (const LayerLoad& load : result->loads) {
      const Tensor counts = load.load.rows_per_expert.to(at::kCPU);
      row["rows_per_expert/" + language + "/" + load_name(load)] = std::vector<int64_t>(
          counts.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>() + counts.numel());
    }
  }
  state_.evaluated = state_.step;
  if (is_first()) write_row(row);
}

}  // namespace hymoe
