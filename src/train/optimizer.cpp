#include "hymoe/train/optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/grad_mode.h>

#include "hymoe/config/error.h"
#include "hymoe/ops/adamw.h"
#include "hymoe/train/gradient_buckets.h"

namespace hymoe {
namespace {

Tensor elements(const Tensor& tensor, ElementRange range) {
  if (range.begin == 0 && range.end == tensor.numel()) return tensor;
  return tensor.view(-1).slice(0, range.begin, range.end);
}

}  // namespace

AdamW::AdamW(const OptimizerConfig& config, const NamedTensors& parameters) : config_(config), buckets_(1) {
  for (const auto& [name, parameter] : parameters) {
    const ElementRange all{0, parameter.numel()};
    if (!parameter.requires_grad()) continue;
    add(buckets_[0], {{.name = name, .shape = parameter.sizes().vec()}, parameter, all, all});
  }
}

AdamW::AdamW(const OptimizerConfig& config, GradientBuckets& buckets)
    : config_(config), buckets_(buckets.buckets().size()), gradients_(&buckets) {
  for (size_t i = 0; i < buckets_.size(); ++i) {
    for (const auto& slot : buckets.buckets()[i].slots) {
      const ElementRange all{0, slot.of.parameter.numel()};
      const ElementRange updated = buckets.sharded() ? slot.part : all;
      if (updated.begin == updated.end) continue;
      add(buckets_[i],
          {slot.of.shard, slot.of.parameter, updated, slot.counted ? slot.part : ElementRange{}});
    }
  }
}

void AdamW::add(Bucket& bucket, Piece piece) {
  const torch::NoGradGuard no_grad;
  const bool decays = piece.parameter.dim() >= 2;
  ParamGroup& group = bucket[decays ? 0 : 1];
  group.weight_decay = decays ? config_.weight_decay : 0;
  const Tensor target = elements(piece.parameter.detach(), piece.updated).to(at::kFloat);  // fp32: itself
  group.targets.push_back(target);
  group.exp_avg.push_back(at::zeros_like(target));
  group.exp_avg_sq.push_back(at::zeros_like(target));
  group.pieces.push_back(std::move(piece));
}

double AdamW::grad_norm() const {
  // In double, so that the norm does not depend on who owns what. On CPUs the kernel casts its input before
  // it sums: by chunks, for a matrix in double may not fit.
  constexpr int64_t kChunk = 1 << 22;
  std::vector<Tensor> chunks;
  std::vector<const std::string*> names;
  for (const Bucket& bucket : buckets_) {
    for (const ParamGroup& group : bucket) {
      for (const Piece& piece : group.pieces) {
        const Tensor& grad = piece.parameter.grad();
        TORCH_CHECK(grad.defined(), "AdamW: parameter ", piece.shard.name,
                    " has no gradient: the loss does not depend on it");
        for (int64_t begin = piece.owned.begin; begin < piece.owned.end; begin += kChunk) {
          chunks.push_back(elements(grad, {begin, std::min(begin + kChunk, piece.owned.end)}));
          names.push_back(&piece.shard.name);
        }
      }
    }
  }
  double squares = 0;
  std::string not_finite;
  if (!chunks.empty()) {  // one wait for the device
    const Tensor norms = at::stack(at::_foreach_norm(chunks, 2, at::kDouble)).cpu();
    squares = norms.square().sum().item<double>();
    const double* norm = norms.const_data_ptr<double>();
    for (size_t i = 0; i < names.size() && not_finite.empty(); ++i) {
      if (!std::isfinite(norm[i])) not_finite = *names[i];
    }
  }
  if (gradients_ != nullptr && gradients_->mesh().world.size() > 1) {
    Tensor sum = at::full({1}, squares, gradients_->options().dtype(at::kDouble));
    const Where where("the norm of the gradients");
    gradients_->mesh().world.all_reduce_sum(sum);
    squares = sum.item<double>();
  }
  if (!not_finite.empty()) throw Error("gradient of " + not_finite + " is not finite");
  if (!std::isfinite(squares)) throw Error("a gradient on another rank is not finite");
  return std::sqrt(squares);
}

void AdamW::step(double lr, double grad_norm) {
  const torch::NoGradGuard no_grad;
  ++num_steps_;
  const bool clip = config_.grad_clip > 0 && grad_norm > config_.grad_clip;
  std::vector<Pending> gathers;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    for (ParamGroup& group : buckets_[i]) update(group, lr, clip ? grad_norm / config_.grad_clip : 1);
    if (gradients_ == nullptr) continue;
    gathers.push_back(gradients_->start_gather(i));
    gradients_->release(i);
  }
  for (Pending& gather : gathers) gather.wait();
}

void AdamW::update(ParamGroup& group, double lr, double scale) {
  const ops::AdamWStep step{.step = num_steps_,
                            .lr = lr,
                            .beta1 = config_.beta1,
                            .beta2 = config_.beta2,
                            .eps = config_.eps,
                            .weight_decay = group.weight_decay,
                            .scale = scale};
  for (size_t i = 0; i < group.pieces.size(); ++i) {
    const Piece& piece = group.pieces[i];
    const bool master = piece.parameter.scalar_type() != at::kFloat;
    ops::adamw_step(step, elements(piece.parameter.grad(), piece.updated), group.targets[i], group.exp_avg[i],
                    group.exp_avg_sq[i],
                    master ? elements(piece.parameter.detach(), piece.updated) : Tensor());
    if (gradients_ == nullptr) piece.parameter.mutable_grad().reset();
  }
}

int64_t AdamW::state_bytes() const {
  int64_t bytes = 0;
  for (const TensorPart& part : state()) bytes += static_cast<int64_t>(part.values.nbytes());
  return bytes;
}

std::vector<TensorPart> AdamW::state() const { return parts(&Piece::updated); }

std::vector<TensorPart> AdamW::owned_state() const { return parts(&Piece::owned); }

std::vector<TensorPart> AdamW::parts(ElementRange Piece::*range) const {
  std::vector<TensorPart> all;
  for (const Bucket& bucket : buckets_) {
    for (const ParamGroup& group : bucket) {
      for (size_t i = 0; i < group.pieces.size(); ++i) {
        const Piece& piece = group.pieces[i];
        const auto [begin, end] = piece.*range;
        if (begin == end) continue;
        const auto add = [&](const char* kind, const Tensor& values) {
          Shard shard = piece.shard;
          shard.name = kind + shard.name;
          const int64_t first = begin - piece.updated.begin;
          all.push_back({std::move(shard), begin, values.view(-1).slice(0, first, first + end - begin)});
        };
        add("exp_avg.", group.exp_avg[i]);
        add("exp_avg_sq.", group.exp_avg_sq[i]);
        if (piece.parameter.scalar_type() != at::kFloat) add("master.", group.targets[i]);
      }
    }
  }
  return all;
}

}  // namespace hymoe
