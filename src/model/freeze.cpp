#include "hymoe/model/freeze.h"

#include <algorithm>
#include <set>

#include "hymoe/config/error.h"
#include "hymoe/model/sharding.h"

namespace hymoe {

bool name_matches(std::string_view pattern, std::string_view name) {
  // Greedy with one step back: after a mismatch the latest * takes one character more.
  size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p;
      ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

std::vector<std::string> frozen_parameters(const Transformer& model) {
  const auto& patterns = model->config().freeze;
  std::vector<bool> used(patterns.size());
  std::vector<std::string> frozen;
  for (const WholeParameter& whole : whole_parameters(model)) {
    bool any = false;
    for (size_t i = 0; i < patterns.size(); ++i) {
      if (!name_matches(patterns[i], whole.name)) continue;
      used[i] = any = true;
    }
    if (any) frozen.push_back(whole.name);
  }
  const auto unused = std::find(used.begin(), used.end(), false);
  if (unused != used.end()) {
    const auto i = static_cast<size_t>(unused - used.begin());
    throw ConfigError("freeze." + std::to_string(i), "'" + patterns[i] + "' names no parameter of the model");
  }
  return frozen;
}

std::vector<std::string> freeze_parameters(Transformer& model) {
  const auto frozen = frozen_parameters(model);
  const std::set<std::string> names(frozen.begin(), frozen.end());
  for (ParameterShard& shard : parameter_shards(model)) {
    if (names.contains(shard.shard.name)) shard.parameter.set_requires_grad(false);
  }
  return frozen;
}

}  // namespace hymoe
