#include <algorithm>
#include <cmath>
#include <string>

#include "hymoe/ops/permute.h"
#include "train/plan_setting.h"

namespace hymoe {
namespace {

constexpr double kFloat = 4, kLong = 8;

class TrafficPlanner {
 public:
  TrafficPlanner(const PlanSetting& setting, Plan& plan)
      : s_(setting),
        plan_(plan),
        micro_(static_cast<double>(setting.micro_batches)),
        dim_(static_cast<double>(setting.model.dim)) {}

  void gradients();
  void exchange();
  void qk_norms();
  void slices();
  void agreement();

 private:
  void add(const char* name, const Span& group, const char* operation, double calls, double bytes_a_call,
           double hidden = 0);
  double seconds(const Span& group, const std::string& operation, double wire) const;

  const PlanSetting& s_;
  Plan& plan_;
  const double micro_, dim_;
};

// A ring of a group's ranks leaves a node by as many adapters as it has ranks there; what goes to all ranks
// at once leaves it by one adapter a rank, for those on other nodes.
double TrafficPlanner::seconds(const Span& group, const std::string& operation, double wire) const {
  const double near = s_.on_node(group), all = static_cast<double>(group.size);
  const HardwareConfig& h = s_.hardware;
  if (near == all) return wire / h.inside;
  if (operation != "all_to_all") return wire / std::min(h.inside, h.between * near);
  return wire / (all - 1) * ((near - 1) / h.inside + (all - near) / h.between);
}

void TrafficPlanner::add(const char* name, const Span& group, const char* operation, double calls,
                         double bytes_a_call, double hidden) {
  if (group.size == 1 || calls == 0 || bytes_a_call == 0) return;
  const auto ranks = static_cast<double>(group.size);
  const double rounds = operation == std::string("all_reduce") ? 2 : 1, bytes = calls * bytes_a_call;
  const double wire = bytes * rounds * (ranks - 1) / ranks;
  const double time =
      seconds(group, operation, wire) + calls * rounds * std::ceil(std::log2(ranks)) * s_.hardware.latency;
  plan_.traffic.push_back({name, group.name, operation, bytes, wire, time, std::max(0.0, time - hidden)});
}

// Once a step, behind the backward pass of the last micro-batch.
void TrafficPlanner::gradients() {
  const double total = s_.trainable[0] + s_.trainable[1];
  for (const bool expert : {false, true}) {
    const Span& group = expert ? s_.dp : s_.data;
    const double unit = 64 * static_cast<double>(group.size);
    const double elements = std::ceil(s_.trainable[expert] / unit) * unit;
    const double buckets = std::ceil(elements * s_.type_bytes / (s_.config.optimizer.bucket_mb * (1 << 20)));
    const double hidden = total > 0 ? s_.seconds(s_.backward) * s_.trainable[expert] / total : 0;
    const bool shard = s_.config.optimizer.shard;
    add(expert ? "gradients of experts" : "gradients", group, shard ? "reduce_scatter" : "all_reduce",
        buckets, elements / buckets * s_.gradient_bytes, hidden);
    if (shard) {
      add(expert ? "weights of experts" : "weights", group, "all_gather", buckets,
          elements / buckets * s_.type_bytes);
    }
  }
}

// Rows to their experts and back, their gradients the same way; what is recomputed travels again.
void TrafficPlanner::exchange() {
  if (s_.moe_layers == 0) return;
  const double calls = micro_ * s_.moe_layers, again = s_.config.recompute ? 1 : 0;
  const double rows = s_.rows * s_.ffn(true).rows, bytes = rows * dim_ * s_.type_bytes;
  const auto packed = s_.mesh.exchange_type();
  const bool narrower = packed && static_cast<double>(c10::elementSize(*packed)) < s_.type_bytes;
  const double forth =
      narrower ? rows * static_cast<double>(ops::packed_row_bytes(s_.model.dim, *packed)) : bytes;
  const double shared = micro_ * s_.seconds(s_.shared);
  int64_t experts = 0;
  for (const BranchConfig& branch : s_.model.moe.branches) experts += branch.num_experts;
  add("rows to experts", s_.ep, "all_to_all", calls * (1 + again), forth, shared * (1 + again));
  add("rows from experts", s_.ep, "all_to_all", calls * (1 + again), bytes);
  add("gradients to experts", s_.ep, "all_to_all", calls, bytes);
  add("gradients from experts", s_.ep, "all_to_all", calls, bytes, 2 * shared);
  add("counts of rows", s_.ep, "all_to_all", calls, static_cast<double>(experts) * kLong);
}

// Gradients of the norms of queries and keys of each head, or mean squares of all heads, and their gradients.
void TrafficPlanner::qk_norms() {
  const double calls = micro_ * 2 * s_.layers, again = s_.config.recompute ? 1 : 0;
  if (s_.model.qk_norm == "head") {
    add("norms of q and k", s_.tp, "all_reduce", calls,
        static_cast<double>(s_.model.head_size()) * s_.type_bytes);
  } else if (s_.model.qk_norm == "projection") {
    add("norms of q and k", s_.tp, "all_reduce", calls * (2 + again), s_.rows * kFloat);
  }
}

void TrafficPlanner::slices() {
  const double row = s_.rows * dim_ * s_.type_bytes, again = s_.config.recompute ? 1 : 0;
  const FfnNumbers ffn = s_.moe_layers > 0 ? s_.ffn(true) : FfnNumbers{};
  const double coefficients = s_.rows * (ffn.slots + (ffn.shared_weight ? 1 : 0)) * kFloat;
  add("attention, FFN: forward", s_.tp, "all_reduce", micro_ * (2 * s_.layers + again * s_.moe_layers), row);
  add("attention, FFN: backward", s_.tp, "all_reduce",
      micro_ * (2 * s_.layers + (s_.model.top_query ? 1 : 0)), row);
  qk_norms();
  add("coefficients of experts", s_.tp, "all_reduce", micro_ * s_.moe_layers, coefficients);
  add("embedding and output", s_.tp, "all_reduce", micro_ * 2, row);
  add("loss", s_.tp, "all_reduce", micro_, 3 * s_.rows * kFloat);
}

// What makes all ranks decide alike.
void TrafficPlanner::agreement() {
  double balance = 0, state = 0;
  for (const BranchConfig& branch : s_.model.moe.branches) {
    const RouterConfig& router = branch.router;
    const auto experts = static_cast<double>(branch.num_experts);
    if (router.chooses_top_k() && router.balance_loss > 0 && router.balance_over == "global_batch")
      balance += experts * kLong;
    if (router.bias_update) state += experts * kLong;
    if (router.kind == "threshold" || (router.kind == "segment" && router.select == "threshold"))
      state += (experts + 1) * kFloat;
  }
  add("counts of choices", s_.data, "all_reduce", micro_ * s_.moe_layers, balance);
  add("state of routers", s_.data, "all_reduce", s_.moe_layers, state);
  add("totals and norm", s_.world, "all_reduce", 2, 2 * kLong);  // three numbers, one
}

}  // namespace

void plan_traffic(const PlanSetting& s, Plan& plan) {
  TrafficPlanner traffic(s, plan);
  traffic.gradients();
  traffic.exchange();
  traffic.slices();
  traffic.agreement();
}

}  // namespace hymoe
