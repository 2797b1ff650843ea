#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/comm/mesh.h"
#include "hymoe/config/fields.h"
#include "hymoe/train/trainer.h"

namespace hymoe {

/// What a rank computes with and what joins it to the others; a number that is 0 is that of `kind`.
struct HardwareConfig {
  std::string kind = "h100";
  double flops = 0;
  double efficiency = 0;
  double memory = 0;
  double inside = 0;
  double between = 0;
  double latency = 0;
  int64_t node = 0;

  static auto fields() {
    using C = HardwareConfig;
    return hymoe::fields(
        field("kind", &C::kind,
              "where the numbers come from that are not given; core: one of a CPU, over Gloo")
            .one_of({"a100", "h100", "core"}),
        field("flops", &C::flops, "of a rank a second, at best; 0 here and below: that of kind").at_least(0),
        field("efficiency", &C::efficiency, "share of flops that training reaches while it computes")
            .at_least(0)
            .at_most(1),
        field("memory", &C::memory, "bytes a rank").at_least(0),
        field("inside", &C::inside, "bytes a second that a rank sends to ranks of its node").at_least(0),
        field("between", &C::between, "bytes a second that a rank sends to ranks of other nodes").at_least(0),
        field("latency", &C::latency, "seconds a message takes at least").at_least(0),
        field("node", &C::node, "ranks a node").at_least(0));
  }
  /// With the numbers of `kind` in place of zeros.
  HardwareConfig filled() const;
};

/// A training config, how many processes shall share it, and on what.
struct PlanConfig : TrainConfig {
  int64_t processes = 0;
  HardwareConfig hardware = {};

  static auto fields() {
    auto all = TrainConfig::fields();
    for (auto& field : hymoe::fields(
             hymoe::field("processes", &PlanConfig::processes, "ranks in all; 0: dp·ep·tp, dp at least 1")
                 .at_least(0),
             hymoe::field("hardware", &PlanConfig::hardware, "what they run on")))
      all.push_back(std::move(field));
    return all;
  }
};

/// Reads it as load_train_config does.
PlanConfig load_plan_config(const std::filesystem::path& path,
                            const std::vector<std::string>& overrides = {});

/// What a rank hands to collectives of one kind in a step.
struct PlannedTraffic {
  std::string name;
  std::string group;      // of Mesh
  std::string operation;  // as in Group::traffic()
  double bytes = 0;       // as Group::traffic() counts them
  double wire = 0;     // bytes that leave the rank: 2·(n - 1)/n of an all-reduce's, (n - 1)/n of the others'
  double seconds = 0;  // on the way
  double exposed = 0;  // of these, while nothing is computed
};

/// A run in numbers, for one rank where nothing else is said; all ranks have the same.
struct Plan {
  MeshConfig mesh = {};
  int64_t processes = 1;
  int64_t nodes = 1;
  HardwareConfig hardware = {};  // filled
  int64_t micro_batches = 1;     // a step
  int64_t rows = 0;              // tokens of a micro-batch
  int64_t num_params = 0;        // of the model, as Transformer counts them
  int64_t num_active_params = 0;
  double flops_per_token = 0;
  int64_t local_params = 0;                                 // on this rank
  std::vector<std::pair<std::string, double>> memory = {};  // bytes by kind
  std::vector<PlannedTraffic> traffic = {};
  double compute_seconds = 0;  // of a step
  double step_seconds = 0;
  double tokens_per_second = 0;  // of all ranks
  double flops_used = 0;         // share of all ranks' flops that the model's are

  double memory_bytes() const;  // all kinds together
  double memory_of(const std::string& kind) const;
};

/// Counts a run without allocating it (outline). Loads are taken as even, every window as full. Activations
/// are what the CPU's operations keep; others may keep more. Throws ConfigError for a config that does not
/// divide among the ranks.
Plan plan(const PlanConfig& config);

nlohmann::ordered_json plan_json(const Plan& plan);

}  // namespace hymoe
