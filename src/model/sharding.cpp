#include "hymoe/model/sharding.h"

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <string_view>
#include <utility>

namespace hymoe {
namespace {

struct Branch {
  std::string prefix;  // of its parameters' names
  const BranchConfig* config;
};

std::vector<Branch> branches_of(const ModelConfig& config) {
  std::vector<Branch> branches;
  for (const int64_t layer : config.moe_layers) {
    for (const BranchConfig& branch : config.moe.branches) {
      branches.push_back({"model.layers." + std::to_string(layer) + ".mlp." + branch.name + ".", &branch});
    }
  }
  return branches;
}

// A shard, and where the number of its expert stands in its name when it is one of a list.
struct Named {
  ParameterShard of = {};
  size_t number_at = std::string::npos, number_end = 0;
  int64_t first = 0, count = 0, all = 0;  // experts of this rank, and of the whole pool

  bool numbered() const { return number_at != std::string::npos; }
  std::string with_number(int64_t expert) const {
    return of.shard.name.substr(0, number_at) + std::to_string(expert) + of.shard.name.substr(number_end);
  }
};

void place_expert(Named& named, const Branch& branch, size_t rest_at, const Mesh& mesh) {
  std::string& name = named.of.shard.name;
  const Split ep{mesh.ep.rank(), mesh.ep.size()}, tp{mesh.tp.rank(), mesh.tp.size()};
  const std::string_view rest = std::string_view(name).substr(rest_at);
  named.of.expert = true;
  int64_t number = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
  if (error == std::errc() && end != rest.data() + rest.size() && *end == '.') {
    named.all = branch.config->num_experts;
    named.count = named.all / ep.size;
    named.first = ep.rank * named.count;
    named.number_at = rest_at;
    named.number_end = static_cast<size_t>(end - name.data());
    name = named.with_number(named.first + number);
    named.number_end = name.find('.', rest_at);
    return;
  }
  const bool sliced = branch.config->experts == "swiglu";
  if (sliced && rest == "gate_up_proj") {
    named.of.shard.splits = {ep, {tp.rank, tp.size, 2}};
  } else if (sliced && rest == "down_proj") {
    named.of.shard.splits = {ep, {}, tp};
  } else {
    named.of.shard.splits = {ep};
  }
}

std::vector<Split> splits_of(std::string_view name, const ModelConfig& config, const Split& tp) {
  const auto is_one_of = [&](std::initializer_list<std::string_view> ends) {
    return std::any_of(ends.begin(), ends.end(), [&](auto end) { return name.ends_with(end); });
  };
  if (is_one_of({"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", ".q_proj.weight",
                 ".k_proj.weight", ".v_proj.weight", ".q_proj.bias", ".k_proj.bias", ".v_proj.bias",
                 ".gate_proj.weight", ".up_proj.weight", ".gate_proj.bias", ".up_proj.bias"})) {
    return {tp};
  }
  if (config.qk_norm == "projection" && is_one_of({".q_norm.weight", ".k_norm.weight"})) return {tp};
  if (is_one_of({".o_proj.weight", ".down_proj.weight"})) return {{}, tp};
  return {};
}

std::vector<Named> named_shards(const TransformerImpl& model) {
  const Mesh& mesh = model.mesh();
  const std::vector<Branch> branches = branches_of(model.config());
  std::vector<Named> all;
  for (const auto& item : model.named_parameters()) {
    Named named{{.shard = {.name = item.key()}, .parameter = item.value()}};
    Shard& shard = named.of.shard;
    const auto branch = std::find_if(branches.begin(), branches.end(),
                                     [&](const Branch& b) { return item.key().starts_with(b.prefix); });
    if (branch == branches.end()) {
      shard.splits = splits_of(shard.name, model.config(), {mesh.tp.rank(), mesh.tp.size()});
    } else if (const std::string pool = branch->prefix + "experts."; item.key().starts_with(pool)) {
      place_expert(named, *branch, pool.size(), mesh);
    }
    shard.shape = item.value().sizes().vec();
    for (size_t d = 0; d < shard.splits.size(); ++d) shard.shape[d] *= shard.splits[d].size;
    named.of.tp_copy = shard.splits.size() <= (named.of.expert ? 1 : 0);
    all.push_back(std::move(named));
  }
  return all;
}

}  // namespace

std::vector<ParameterShard> parameter_shards(const TransformerImpl& model) {
  std::vector<ParameterShard> shards;
  for (Named& named : named_shards(model)) shards.push_back(std::move(named.of));
  return shards;
}

std::vector<WholeParameter> whole_parameters(const TransformerImpl& model) {
  const std::vector<Named> local = named_shards(model);
  std::vector<WholeParameter> whole;
  for (size_t i = 0; i < local.size();) {
    const Named& named = local[i];
    if (!named.numbered() || named.count == named.all) {
      whole.push_back({named.of.shard.name, named.of.shard.shape, static_cast<int64_t>(i)});
      ++i;
      continue;
    }
    // All of a list's experts, which are made alike, in the place of this rank's.
    size_t end = i;
    const auto in_pool = [&](const Named& other) {
      return other.number_at == named.number_at &&
             other.of.shard.name.starts_with(named.of.shard.name.substr(0, named.number_at));
    };
    while (end < local.size() && in_pool(local[end])) ++end;
    const size_t per_expert = (end - i) / static_cast<size_t>(named.count);
    for (int64_t expert = 0; expert < named.all; ++expert) {
      const int64_t here = expert - named.first;
      for (size_t j = i; j < i + per_expert; ++j) {
        const bool is_here = here >= 0 && here < named.count;
        whole.push_back({local[j].with_number(expert), local[j].of.shard.shape,
                         is_here ? static_cast<int64_t>(j) + here * static_cast<int64_t>(per_expert) : -1});
      }
    }
    i = end;
  }
  return whole;
}

std::vector<ParameterShard> parameter_shards(const Transformer& model) { return parameter_shards(*model); }
std::vector<WholeParameter> whole_parameters(const Transformer& model) { return whole_parameters(*model); }

}  // namespace hymoe
