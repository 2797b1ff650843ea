#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <torch/types.h>

#include "hymoe/config/fields.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/io/shard.h"

namespace hymoe {
using at::Tensor;

struct OptimizerConfig {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  double grad_clip = 1.0;
  bool shard = false;
  double bucket_mb = 25;
  std::string gradient_dtype = "float32";

  static auto fields() {
    return hymoe::fields(
        field("beta1", &OptimizerConfig::beta1, "decay of the first moment").at_least(0.0).below(1.0),
        field("beta2", &OptimizerConfig::beta2, "decay of the second moment").at_least(0.0).below(1.0),
        field("eps", &OptimizerConfig::eps, "added to the root of the second moment").above(0.0),
        field("weight_decay", &OptimizerConfig::weight_decay,
              "decoupled; on matrices, not on norms, biases and vectors")
            .at_least(0.0),
        field("grad_clip", &OptimizerConfig::grad_clip, "largest global gradient norm; 0 clips nothing")
            .at_least(0.0),
        field("shard", &OptimizerConfig::shard,
              "ranks keep moments and masters of a part of the parameters each (ZeRO-1)"),
        field("bucket_mb", &OptimizerConfig::bucket_mb,
              "MiB of parameters whose gradients ranks add up at a time, during the backward pass")
            .above(0.0),
        field("gradient_dtype", &OptimizerConfig::gradient_dtype,
              "in which gradients of bfloat16 weights are added up over micro-batches and ranks")
            .one_of({"float32", "bfloat16"}));
  }
};

/// Elements [begin, end) of a flattened tensor.
struct ElementRange {
  int64_t begin = 0, end = 0;
};

class GradientBuckets;

/// AdamW (Loshchilov and Hutter, 2019) over the parameters that require a gradient: frozen ones have no
/// state. Moments are fp32, and so is a master copy of every parameter that is not. Parameters without a
/// gradient are an error: an expert that got no row has a zero gradient, none means a parameter that the loss
/// does not reach.
class AdamW {
 public:
  /// All of `parameters`, by one process alone.
  AdamW(const OptimizerConfig& config, const NamedTensors& parameters);
  /// What `buckets` hold, which lives longer, by all ranks together; sharded, each updates its parts alone
  /// and then they exchange these. Whether sharded or not, the bits are the same.
  AdamW(const OptimizerConfig& config, GradientBuckets& buckets);

  /// Global L2 norm of the gradients, every parameter counted once. Throws Error naming the first parameter
  /// whose gradient is not finite; the other ranks throw too.
  double grad_norm() const;
  /// One step with gradients scaled by min(1, grad_clip / grad_norm); frees the gradients.
  void step(double lr, double grad_norm);

  int64_t num_steps() const { return num_steps_; }
  /// Bytes of moments and master weights on this rank.
  int64_t state_bytes() const;

  /// "exp_avg.<parameter>", "exp_avg_sq.<parameter>" and, where kept, "master.<parameter>", viewing the live
  /// state: all that this rank keeps.
  std::vector<TensorPart> state() const;
  /// Of these, what this rank writes: the ranks' parts together have every element once.
  std::vector<TensorPart> owned_state() const;
  /// Goes on after `num_steps` steps, whose state() has been filled in.
  void resume_at(int64_t num_steps) { num_steps_ = num_steps; }

 private:
  // Elements of a parameter: those that this rank updates, and those of them that it counts and writes.
  struct Piece {
    Shard shard;
    Tensor parameter;
    ElementRange updated, owned;
  };
  // Pieces that share hyper-parameters.
  struct ParamGroup {
    double weight_decay = 0;
    std::vector<Piece> pieces;
    std::vector<Tensor> targets, exp_avg, exp_avg_sq;  // targets: fp32, what the update writes
  };
  using Bucket = std::array<ParamGroup, 2>;  // with and without decay

  void add(Bucket& bucket, Piece piece);
  void update(ParamGroup& group, double lr, double scale);
  std::vector<TensorPart> parts(ElementRange Piece::*range) const;

  OptimizerConfig config_;
  std::vector<Bucket> buckets_;
  GradientBuckets* gradients_ = nullptr;
  int64_t num_steps_ = 0;
};

}  // namespace hymoe
