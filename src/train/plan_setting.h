#pragma once

#include <cstdint>

#include "hymoe/train/plan.h"

namespace hymoe {

/// A group of ranks that are `stride` apart in the world.
struct Span {
  const char* name;
  int64_t size, stride;
};

/// What one layer's FFN, dense or MoE, has a row; elements on this rank unless bytes are named.
struct FfnNumbers {
  double rows = 0;          // that go to experts
  double slots = 0;         // columns of expert ids
  double kept = 0;          // that the backward pass needs, in the model's type, of experts and shared expert
  double router_bytes = 0;  // the same of the routers
  bool shared_weight = false;
};

/// What the parts of a plan are made from.
struct PlanSetting {
  explicit PlanSetting(const PlanConfig& config);

  const PlanConfig& config;
  const ModelConfig& model;
  HardwareConfig hardware;
  MeshConfig mesh;
  Span tp, ep, dp, data, world;
  int64_t micro_batches;
  double rows;            // of a micro-batch
  double type_bytes;      // of weights and activations
  double gradient_bytes;  // of gradients that are added up
  double layers, moe_layers;
  // By the walk over the parameters; [1] is what lives under Experts, [0] the rest.
  double local = 0, trainable[2] = {0, 0};       // elements
  double output = 0, trainable_output = 0;       // elements of the output matrix
  double largest_gradient = 0;                   // elements of one parameter
  double forward = 0, backward = 0, shared = 0;  // flops of a micro-batch; of shared experts, forward

  double seconds(double flops) const { return flops / (hardware.flops * hardware.efficiency); }
  /// Ranks of a group on one node.
  double on_node(const Span& group) const;
  FfnNumbers ffn(bool moe) const;
};

void plan_memory(const PlanSetting& setting, Plan& plan);
void plan_traffic(const PlanSetting& setting, Plan& plan);

}  // namespace hymoe
