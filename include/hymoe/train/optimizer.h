#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "hymoe/config/fields.h"
#include "hymoe/io/safetensors.h"

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

/// AdamW (Loshchilov and Hutter, 2019) over the parameters that require a gradient: frozen ones have no
/// state. Moments are fp32, and so is a master copy of every parameter that is not. Parameters without a
/// gradient are an error: an expert that got no row has a zero gradient, none means a parameter that the loss
/// does not reach.
class AdamW {
 public:
  AdamW(const OptimizerConfig& config, const NamedTensors& parameters);

  /// Global L2 norm of the gradients. Throws Error naming the first parameter whose gradient is not finite.
  double grad_norm() const;
  /// One step with gradients scaled by min(1, grad_clip / grad_norm); frees the gradients.
  void step(double lr, double grad_norm);

  int64_t num_steps() const { return num_steps_; }
  /// Bytes of moments and master weights.
  int64_t state_bytes() const;

  /// "exp_avg.<parameter>", "exp_avg_sq.<parameter>" and, where kept, "master.<parameter>", viewing the live
  /// state.
  NamedTensors state() const;
  /// Copies the tensors of state() back. `find` returns the tensor of a name or throws.
  void load_state(int64_t num_steps, const std::function<Tensor(const std::string&)>& find);

 private:
  // Parameters that share hyper-parameters and dtype layout, as the fused kernel wants them.
  struct ParamGroup {
    double weight_decay = 0;
    std::vector<Tensor> params, targets, exp_avg, exp_avg_sq, steps;  // targets: fp32, what the update writes
    std::vector<std::string> names;
  };

  OptimizerConfig config_;
  std::vector<ParamGroup> groups_;
  int64_t num_steps_ = 0;
};

}  // namespace hymoe
