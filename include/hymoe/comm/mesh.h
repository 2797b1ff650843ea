#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "hymoe/comm/group.h"
#include "hymoe/config/fields.h"

namespace hymoe {

/// How many ranks share the work in which way: dp·ep·tp of them in all.
struct MeshConfig {
  int64_t dp = 0;
  int64_t ep = 1;
  int64_t tp = 1;
  std::string exchange = "full";

  static auto fields() {
    return hymoe::fields(
        field("dp", &MeshConfig::dp, "replicas of everything; 0: what the number of processes leaves")
            .at_least(0),
        field("ep", &MeshConfig::ep,
              "ranks that share the experts of every MoE layer, each with its own documents")
            .at_least(1),
        field("tp", &MeshConfig::tp, "ranks that share every matrix, and see the same documents").at_least(1),
        field(
            "exchange", &MeshConfig::exchange,
            "type in which rows travel to the experts of other ranks, where it is narrower than the model's; "
            "full: the model's. Results and gradients always travel in the model's")
            .one_of({"full", "bfloat16", "float8"}));
  }
  void check() const {}
  /// The type that `exchange` names; none: the model's.
  std::optional<at::ScalarType> exchange_type() const {
    if (exchange == "full") return std::nullopt;
    return exchange == "float8" ? at::kFloat8_e4m3fn : at::kBFloat16;
  }
};

/// This rank's place among all ranks: rank = (dp·|ep| + ep)·|tp| + tp, so that tp ranks are neighbours.
struct Mesh {
  Group dp = {};       // the ranks that hold the same weights
  Group ep = {};       // those that hold one replica's experts together
  Group tp = {};       // those that hold one slice each of every matrix
  Group data = {};     // dp and ep together: each rank has its own documents
  Group world = {};    // all
  Group control = {};  // all, on the CPU, for a thread of its own: writing of checkpoints
  std::optional<at::ScalarType> exchange = {};  // MeshConfig::exchange_type
};

/// The mesh of a rank whose others are not there: places and sizes, for plans. A collective of its groups
/// throws Error. Throws ConfigError as World does.
Mesh planned_mesh(const MeshConfig& config, int64_t processes, int64_t rank = 0);

}  // namespace hymoe
