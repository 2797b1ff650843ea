#include "train/run.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <torch/types.h>

#include "hymoe/config/error.h"
#include "hymoe/model/language_loss.h"

namespace hymoe {
namespace {

int64_t real_rows(const Batch& batch) {
  const int64_t rows = batch.tokens.numel();
  return batch.padding.defined() ? rows - batch.padding.sum().item<int64_t>() : rows;
}

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// A seed of its own for every (seed, step, micro-batch), by the finaliser of splitmix64: a run needs no state
// of a generator to go on, and ranks draw what one process would.
uint64_t mixed(int64_t seed, int64_t step, int64_t number) {
  uint64_t x = static_cast<uint64_t>(seed);
  for (const int64_t next : {step, number}) {
    x += 0x9e3779b97f4a7c15 * (static_cast<uint64_t>(next) + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    x ^= x >> 31;
  }
  return x;
}

}  // namespace

std::vector<Trainer::Run::MicroBatch> Trainer::Run::micro_batches() const {
  std::vector<MicroBatch> all;
  for (int64_t number = mesh_.data.rank(); number < parts_; number += mesh_.data.size()) {
    Batch batch = batches_.at(state_.step, number, parts_);
    const int64_t rows = real_rows(batch);
    all.push_back({std::move(batch), number, rows});
  }
  return all;
}

// One small sum a step; a wish to stop on one rank stops all before the same step.
Trainer::Run::StepTotals Trainer::Run::totals_of(const std::vector<MicroBatch>& micro_batches) const {
  int64_t targets = 0, rows = 0;
  for (const MicroBatch& each : micro_batches) {
    targets += (each.batch.targets >= 0).sum().item<int64_t>();
    rows += each.rows;
  }
  Tensor sum = at::tensor({targets, rows, int64_t{stop_was_requested()}}, at::kLong).to(device_);
  const Where where("step " + std::to_string(state_.step + 1));
  mesh_.world.all_reduce_sum(sum);
  sum = sum.to(at::kCPU);
  const auto* values = sum.const_data_ptr<int64_t>();
  const int64_t copies = mesh_.tp.size();  // its ranks see the same rows
  return {values[0] / copies, values[1] / copies, values[2] > 0};
}

bool Trainer::Run::on_any_rank(bool here) const {
  Tensor any = at::full({1}, int64_t{here}, at::TensorOptions(device_).dtype(at::kLong));
  mesh_.world.all_reduce_max(any);
  return any.item<int64_t>() > 0;
}

// False: all ranks stop before the step.
bool Trainer::Run::train_step() {
  const Stopwatch watch;
  const std::vector<MicroBatch> micro_batches = this->micro_batches();
  const StepTotals totals = totals_of(micro_batches);
  if (totals.stop) return false;
  // Fresh copies of one expert are equal until the first step, so the first look is at the second.
  const int64_t step = state_.step + 1, interval = config_.diagnose_interval;
  bool diagnose = interval > 0 && (step == 2 || step % interval == 0);
  std::vector<Tensor> losses;  // stay on the device: the host does not wait for a micro-batch
  for (const MicroBatch& each : micro_batches) {
    gradients_->before_backward(/*last=*/losses.size() + 1 == micro_batches.size());
    losses.push_back(backward(each, totals, diagnose));
    diagnose = false;
  }
  gradients_->finish();
  find_norm(micro_batches, losses);
  lr_ = learning_rate(config_.schedule, state_.step, config_.steps);
  optimizer_->step(lr_, grad_norm_);
  model_->end_step(mesh_.data);
  ++state_.step;
  const int64_t tokens = config_.data.batch_size * config_.data.seq_len;
  state_.tokens += tokens;
  interval_.steps += 1;
  interval_.targets += totals.targets;
  interval_.tokens += tokens;
  interval_.seconds += watch.seconds();
  return true;
}

// What is not finite on one rank makes the norm so on all, and all look for it together.
void Trainer::Run::find_norm(const std::vector<MicroBatch>& micro_batches,
                             const std::vector<Tensor>& losses) {
  const std::string step = "step " + std::to_string(state_.step + 1) + ": ";
  try {
    grad_norm_ = optimizer_->grad_norm();
  } catch (const CommError&) {
    throw;
  } catch (const Error& error) {
    const auto bad = std::find_if(losses.begin(), losses.end(),
                                  [](const Tensor& loss) { return !std::isfinite(loss.item<double>()); });
    const bool here = bad != losses.end();
    if (!on_any_rank(here)) throw Error(step + error.what());
    const Batch& batch = micro_batches[here ? bad - losses.begin() : 0].batch;
    throw Error(
        step +
        (here ? "loss is " + std::to_string(bad->item<double>()) : "a loss on another rank is not finite") +
        ": " + model_->first_non_finite(batch.tokens.flatten(), packing_of(batch)));
  }
}

Packing Trainer::Run::packing_of(const Batch& batch) const {
  return {.offsets = batch.offsets,
          .padding = batch.padding.defined() ? batch.padding.to(device_) : Tensor(),
          .prior = prior_rows(batch)};
}

// [T] bool: rows of documents in prior_languages.
Tensor Trainer::Run::prior_rows(const Batch& batch) const {
  if (!prior_language_.defined()) return {};
  const Tensor& language = batch.document_language;
  const Tensor known = prior_language_.index_select(0, language.clamp_min(0)).logical_and(language >= 0);
  return known.repeat_interleave(batch.offsets.diff()).to(device_);
}

// The loss.
Tensor Trainer::Run::backward(const MicroBatch& micro_batch, const StepTotals& totals, bool diagnose) {
  torch::manual_seed(mixed(config_.seed, state_.step, micro_batch.number));
  const Batch& batch = micro_batch.batch;
  const Tensor tokens = batch.tokens.flatten();
  // Every row of the step weighs the same, on whatever rank and in whichever micro-batch it is.
  const double share = static_cast<double>(micro_batch.rows) / static_cast<double>(totals.rows);
  const Tensor weights = at::full({tokens.numel()}, 1.0 / static_cast<double>(totals.targets), at::kFloat);
  const LossOutput out = model_->loss(tokens, batch.targets.flatten(), packing_of(batch), weights);
  const Tensor loss = out.loss + share * out.aux_loss;
  if (diagnose) interval_.routers = router_gradients(model_, out);
  loss.backward();
  const auto add = [](Tensor& sum, const Tensor& value) { sum = sum.defined() ? sum + value : value; };
  add(interval_.nats, out.nll.sum(at::kDouble));
  add(interval_.aux_loss, out.aux_loss.detach().to(at::kDouble) * share);
  add_loads(interval_.loads, out.loads);
  return loss.detach();
}

}  // namespace hymoe
