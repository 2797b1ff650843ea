#include "hymoe/train/plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "hymoe/config/config.h"
#include "hymoe/model/freeze.h"
#include "hymoe/model/outline.h"
#include "hymoe/model/pretrained.h"
#include "hymoe/model/sharding.h"
#include "train/plan_setting.h"

namespace hymoe {
namespace {

// GPUs: peak without sparsity, NVLink one way, one adapter of 200 (a100) or 400 Gbit/s (h100) a GPU, as data
// sheets have them. core: large fp32 products and Gloo's all-reduce over loopback on one virtual machine.
// Efficiencies, latencies and the network between CPUs are guesses, to be replaced by one's own measurement.
const std::map<std::string, HardwareConfig>& machines() {
  static const std::map<std::string, HardwareConfig> all = {
      {"a100", {"a100", 312e12, 0.45, 80e9, 300e9, 25e9, 10e-6, 8}},
      {"h100", {"h100", 989e12, 0.4, 80e9, 450e9, 50e9, 10e-6, 8}},
      {"core", {"core", 100e9, 0.7, 4e9, 0.5e9, 0.1e9, 100e-6, 8}}};
  return all;
}

MeshConfig resolve(const PlanConfig& config) {
  MeshConfig mesh = config.parallel;
  if (mesh.dp == 0)
    mesh.dp = config.processes > 0 ? std::max<int64_t>(1, config.processes / (mesh.ep * mesh.tp)) : 1;
  return mesh;
}

int64_t divide(const std::string& key, const std::string& what, int64_t all, int64_t by) {
  if (all % by == 0) return all / by;
  throw ConfigError(key, "must divide " + what + ", " + std::to_string(all) + ", got " + std::to_string(by));
}

// The part of a parameter that a row meets.
double share_of(const std::string& name, const ModelConfig& model) {
  for (const BranchConfig& branch : model.moe.branches) {
    if (name.find(".mlp." + branch.name + ".experts.") == std::string::npos) continue;
    const auto experts = static_cast<double>(branch.num_experts);
    return std::min(branch.router.experts_per_unit(), experts) / experts;
  }
  return 1;
}

// A product costs 2 a weight and row forward, 2 for the gradient of its input, 2 for that of a weight that
// trains, and with recomputation the forward again.
void count_products(const ParameterShard& parameter, PlanSetting& s) {
  const std::string& name = parameter.shard.name;
  if (name.ends_with("_positions.weight")) return;  // looked up
  if (name == "model.embed_tokens.weight" && !s.model.tie_embeddings) return;
  const double ranks = parameter.expert ? static_cast<double>(s.ep.size) : 1;
  const double flops =
      2 * s.rows * ranks * share_of(name, s.model) * static_cast<double>(parameter.parameter.numel());
  const bool again = s.config.recompute && name.starts_with("model.layers.");
  s.forward += flops;
  s.backward += flops * (1 + (parameter.parameter.requires_grad() ? 1 : 0) + (again ? 1 : 0));
  if (name.find(".shared_expert.") != std::string::npos) s.shared += flops;
}

void count_parameters(PlanSetting& s) {
  Transformer rank = outline(s.model, planned_mesh(s.mesh, s.world.size));
  freeze_parameters(rank);
  const std::string output = s.model.tie_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  for (const ParameterShard& parameter : parameter_shards(rank)) {
    const auto numel = static_cast<double>(parameter.parameter.numel());
    const bool trains = parameter.parameter.requires_grad();
    s.local += numel;
    count_products(parameter, s);
    if (parameter.shard.name == output) {
      s.output = numel;
      s.trainable_output = trains ? numel : 0;
    }
    if (!trains) continue;
    s.trainable[parameter.expert] += std::ceil(numel / 64) * 64;
    s.largest_gradient = std::max(s.largest_gradient, numel);
  }
  // Causal attention: two products with the keys that a query sees, and twice as much backward.
  const double attention = 2 * s.rows * s.model.attention_span(s.config.data.seq_len) /
                           static_cast<double>(s.tp.size) *
                           static_cast<double>(s.model.num_heads * s.model.head_size());
  s.forward += attention;
  s.backward += attention * (s.config.recompute ? 3 : 2);
}

}  // namespace

HardwareConfig HardwareConfig::filled() const {
  HardwareConfig all = machines().at(kind);
  for (const auto member : {&HardwareConfig::flops, &HardwareConfig::efficiency, &HardwareConfig::memory,
                            &HardwareConfig::inside, &HardwareConfig::between, &HardwareConfig::latency}) {
    if (this->*member > 0) all.*member = this->*member;
  }
  if (node > 0) all.node = node;
  return all;
}

PlanConfig load_plan_config(const std::filesystem::path& path, const std::vector<std::string>& overrides) {
  PlanConfig base;
  base.init = read_config<PlanConfig>(path, overrides).init;
  if (!base.init.empty()) base.model = read_model_config(base.init);
  return load_config<PlanConfig>(path, overrides, base);
}

PlanSetting::PlanSetting(const PlanConfig& config)
    : config(config), model(config.model), hardware(config.hardware.filled()), mesh(resolve(config)) {
  tp = {"tp", mesh.tp, 1};
  ep = {"ep", mesh.ep, mesh.tp};
  dp = {"dp", mesh.dp, mesh.ep * mesh.tp};
  data = {"data", mesh.dp * mesh.ep, mesh.tp};
  world = {"world", config.processes > 0 ? config.processes : mesh.dp * mesh.ep * mesh.tp, 1};
  const int64_t of_rank = divide("parallel", "data.batch_size", config.data.batch_size, data.size);
  const int64_t micro = config.micro_batch > 0 ? config.micro_batch : of_rank;
  micro_batches = divide("micro_batch", "the rows of a rank", of_rank, micro);
  rows = static_cast<double>(micro * config.data.seq_len);
  const bool half = config.dtype == "bfloat16";
  type_bytes = half ? 2 : 4;
  gradient_bytes = half && config.optimizer.gradient_dtype == "bfloat16" ? 2 : 4;
  layers = static_cast<double>(model.num_layers);
  moe_layers = static_cast<double>(model.moe_layers.size());
}

double PlanSetting::on_node(const Span& group) const {
  return static_cast<double>(std::clamp<int64_t>(hardware.node / group.stride, 1, group.size));
}

double Plan::memory_of(const std::string& kind) const {
  double bytes = 0;
  for (const auto& [name, of] : memory) bytes += name == kind ? of : 0;
  return bytes;
}

double Plan::memory_bytes() const {
  double bytes = 0;
  for (const auto& [name, of] : memory) bytes += of;
  return bytes;
}

Plan plan(const PlanConfig& config) {
  PlanSetting s(config);
  Plan plan;
  const Transformer whole = outline(config.model);
  plan.num_params = whole->num_params();
  plan.num_active_params = whole->num_active_params();
  plan.flops_per_token = whole->flops_per_token(config.data.seq_len);
  count_parameters(s);
  plan.mesh = s.mesh;
  plan.processes = s.world.size;
  plan.nodes = (s.world.size + s.hardware.node - 1) / s.hardware.node;
  plan.hardware = s.hardware;
  plan.micro_batches = s.micro_batches;
  plan.rows = static_cast<int64_t>(s.rows);
  plan.local_params = static_cast<int64_t>(s.local);
  plan_memory(s, plan);
  plan_traffic(s, plan);
  plan.compute_seconds = static_cast<double>(s.micro_batches) * s.seconds(s.forward + s.backward);
  plan.step_seconds = plan.compute_seconds;
  for (const PlannedTraffic& traffic : plan.traffic) plan.step_seconds += traffic.exposed;
  const double tokens = static_cast<double>(config.data.batch_size * config.data.seq_len);
  plan.tokens_per_second = tokens / plan.step_seconds;
  plan.flops_used =
      plan.tokens_per_second * plan.flops_per_token / (s.hardware.flops * static_cast<double>(s.world.size));
  return plan;
}

nlohmann::ordered_json plan_json(const Plan& plan) {
  nlohmann::ordered_json json{
      {"parallel", {{"dp", plan.mesh.dp}, {"ep", plan.mesh.ep}, {"tp", plan.mesh.tp}}},
      {"processes", plan.processes},
      {"nodes", plan.nodes},
      {"hardware", to_json(plan.hardware)},
      {"parameters", plan.num_params},
      {"active_parameters", plan.num_active_params},
      {"flops_per_token", plan.flops_per_token},
      {"parameters_a_rank", plan.local_params},
      {"micro_batches", plan.micro_batches},
      {"rows_a_micro_batch", plan.rows}};
  for (const auto& [kind, bytes] : plan.memory) json["memory"][kind] = bytes;
  json["memory"]["total"] = plan.memory_bytes();
  json["communication"] = nlohmann::ordered_json::array();
  for (const PlannedTraffic& t : plan.traffic) {
    json["communication"].push_back({{"what", t.name},
                                     {"group", t.group},
                                     {"operation", t.operation},
                                     {"bytes", t.bytes},
                                     {"wire_bytes", t.wire},
                                     {"seconds", t.seconds},
                                     {"exposed_seconds", t.exposed}});
  }
  json["compute_seconds"] = plan.compute_seconds;
  json["step_seconds"] = plan.step_seconds;
  json["tokens_per_second"] = plan.tokens_per_second;
  json["flops_used"] = plan.flops_used;
  return json;
}

}  // namespace hymoe
