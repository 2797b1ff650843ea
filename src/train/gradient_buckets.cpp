#include "hymoe/train/gradient_buckets.h"

#include <algorithm>
#include <map>
#include <utility>

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

namespace hymoe {
namespace {

// Parts of a bucket begin at multiples of so many elements: the vectors of the optimizer's kernel fall on the
// same elements whoever updates them, so that sharding changes no bit.
constexpr int64_t kAlign = 64;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Tensor slice(const Tensor& flat, const GradientBuckets::Slot& slot) {
  return flat.narrow(0, slot.at, slot.of.parameter.numel()).view(slot.of.parameter.sizes());
}

// The elements of a slot in the rank's of `size` equal parts of `numel`.
ElementRange part_of(const GradientBuckets::Slot& slot, int64_t numel, const Group& group) {
  const int64_t part = numel / group.size(), from = group.rank() * part - slot.at;
  const int64_t end = slot.of.parameter.numel();
  return {std::clamp<int64_t>(from, 0, end), std::clamp<int64_t>(from + part, 0, end)};
}

}  // namespace

struct GradientBuckets::Arrival : torch::autograd::PostAccumulateGradHook {
  Arrival(GradientBuckets& of, size_t bucket_index, size_t slot_index)
      : buckets(of), bucket(bucket_index), slot(slot_index) {}
  void operator()(const torch::autograd::Variable&) override { buckets.arrived(bucket, slot); }

  GradientBuckets& buckets;
  size_t bucket, slot;
};

GradientBuckets::GradientBuckets(const std::vector<ParameterShard>& parameters, const Mesh& mesh,
                                 const OptimizerConfig& config)
    : mesh_(mesh), sharded_(config.shard), wide_(config.gradient_dtype == "float32") {
  const auto bytes = static_cast<int64_t>(config.bucket_mb * (1 << 20));
  std::map<std::pair<bool, at::ScalarType>, Bucket> open;  // experts, whose last gradients come first, first
  for (auto of = parameters.rbegin(); of != parameters.rend(); ++of) {
    const Group& group = of->expert ? mesh.dp : mesh.data;
    Slot slot{.of = *of, .counted = !of->tp_copy || mesh.tp.rank() == 0};
    if (!of->parameter.requires_grad()) {
      slot.part = part_of(slot, round_up(of->parameter.numel(), kAlign * group.size()), group);
      frozen_.push_back(std::move(slot));
      continue;
    }
    Bucket& bucket = open[{!of->expert, of->parameter.scalar_type()}];
    bucket.group = group;
    slot.at = bucket.numel;
    bucket.numel += round_up(of->parameter.numel(), kAlign);
    bucket.slots.push_back(std::move(slot));
    if (bucket.numel * of->parameter.element_size() >= bytes) close(std::exchange(bucket, {}));
  }
  for (auto& [key, bucket] : open) {
    if (!bucket.slots.empty()) close(std::move(bucket));
  }
}

GradientBuckets::~GradientBuckets() {
  for (const Bucket& bucket : buckets_) {
    for (const Slot& slot : bucket.slots)
      torch::autograd::impl::set_post_acc_grad_hooks(slot.of.parameter, nullptr);
  }
}

void GradientBuckets::close(Bucket bucket) {
  const torch::NoGradGuard no_grad;
  bucket.numel = round_up(bucket.numel, kAlign * bucket.group.size());
  if (sharded_ && bucket.group.size() > 1)
    bucket.parameters = at::empty({bucket.numel}, bucket.slots[0].of.parameter.options());
  for (size_t i = 0; i < bucket.slots.size(); ++i) {
    Slot& slot = bucket.slots[i];
    Tensor& parameter = slot.of.parameter;
    slot.part = part_of(slot, bucket.numel, bucket.group);
    if (bucket.parameters.defined()) {
      Tensor place = slice(bucket.parameters, slot);
      place.copy_(parameter);
      parameter.set_data(place);
    }
    torch::autograd::impl::set_post_acc_grad_hooks(parameter,
                                                   std::make_unique<Arrival>(*this, buckets_.size(), i));
  }
  buckets_.push_back(std::move(bucket));
}

void GradientBuckets::before_backward(bool last) {
  last_ = last;
  for (Bucket& bucket : buckets_) bucket.ready = 0;
}

void GradientBuckets::arrived(size_t index, size_t place) {
  Bucket& bucket = buckets_[index];
  Slot& slot = bucket.slots[place];
  if (!slot.arrived) {
    slot.arrived = true;
    Tensor& grad = slot.of.parameter.mutable_grad();
    const bool half = grad.scalar_type() == at::kBFloat16 || grad.scalar_type() == at::kHalf;
    const at::ScalarType dtype = wide_ && half ? at::kFloat : grad.scalar_type();
    if (bucket.group.size() == 1) {
      grad = grad.to(dtype);
    } else {
      if (!bucket.gradients.defined())
        bucket.gradients = at::empty({bucket.numel}, grad.options().dtype(dtype));
      Tensor view = slice(bucket.gradients, slot);
      view.copy_(grad);
      grad = view;
    }
  }
  ++bucket.ready;
  if (last_) start_next();
}

void GradientBuckets::start_next() {
  while (next_ < buckets_.size() && buckets_[next_].ready == buckets_[next_].slots.size()) {
    Bucket& bucket = buckets_[next_++];
    if (bucket.group.size() == 1) continue;
    const Where where("gradients up to " + bucket.slots.back().of.shard.name);
    bucket.sum = sharded_ ? bucket.group.start_reduce_scatter_sum(bucket.gradients)
                          : bucket.group.start_all_reduce_sum(bucket.gradients);
  }
}

void GradientBuckets::finish() {
  for (Bucket& bucket : buckets_) {
    for (const Slot& slot : bucket.slots) {
      TORCH_CHECK(slot.arrived, "GradientBuckets: parameter ", slot.of.shard.name,
                  " has no gradient: the loss does not depend on it");
    }
    bucket.ready = bucket.slots.size();  // also where the last micro-batch gave none
  }
  start_next();
  next_ = 0;
  for (Bucket& bucket : buckets_) bucket.sum.wait();
}

Pending GradientBuckets::start_gather(size_t index) {
  Bucket& bucket = buckets_[index];
  if (!bucket.parameters.defined()) return {};
  const Where where("parameters up to " + bucket.slots.back().of.shard.name);
  return bucket.group.start_all_gather(bucket.parameters);
}

void GradientBuckets::release(size_t index) {
  Bucket& bucket = buckets_[index];
  bucket.gradients.reset();
  for (Slot& slot : bucket.slots) {
    slot.of.parameter.mutable_grad().reset();
    slot.arrived = false;
  }
}

at::TensorOptions GradientBuckets::options() const {
  return (buckets_.empty() ? frozen_.at(0) : buckets_[0].slots[0]).of.parameter.options();
}

std::vector<TensorPart> GradientBuckets::owned_parameters() const {
  std::vector<TensorPart> parts;
  const auto add = [&](const Slot& slot) {
    const auto [begin, end] = slot.part;
    if (!slot.counted || begin == end) return;
    parts.push_back({slot.of.shard, begin, slot.of.parameter.detach().view(-1).slice(0, begin, end)});
  };
  for (const Bucket& bucket : buckets_) std::for_each(bucket.slots.begin(), bucket.slots.end(), add);
  std::for_each(frozen_.begin(), frozen_.end(), add);
  return parts;
}

}  // namespace hymoe
