#include "growth/grown_names.h"

#include <algorithm>
#include <regex>

#include "hymoe/config/error.h"

namespace hymoe {

TensorName parse_name(const std::string& name) {
  static const std::regex layer(R"(model\.layers\.(\d+)\.(.+))");
  static const std::regex expert(R"(((?:mlp|block_sparse_moe)\.(?:([^.]+)\.)?experts\.)(\d+)(\..+))");
  static const std::regex stacked(R"((?:mlp|block_sparse_moe)\.(?:([^.]+)\.)?experts\.[^0-9].*)");
  static const std::regex router(R"(mlp\.([^.]+)\.router\.(?:predictor\.)?(?:weight|bias))");
  static const std::regex gate(R"((?:mlp|block_sparse_moe)\.gate\.weight)");
  static const std::regex cutoff(R"(mlp\.([^.]+)\.router\.cutoff(_steps)?)");
  TensorName parsed;
  std::smatch match;
  if (!std::regex_match(name, match, layer)) return parsed;
  parsed.layer = std::stoll(match[1]);
  parsed.rest = match[2];
  if (std::regex_match(parsed.rest, match, expert)) {
    parsed.kind = TensorName::Kind::kExpert;
    parsed.head = match[1];
    parsed.pool = match[2];
    parsed.expert = std::stoll(match[3]);
    parsed.tail = match[4];
  } else if (std::regex_match(parsed.rest, match, stacked)) {
    parsed.kind = TensorName::Kind::kStacked;
    parsed.pool = match[1];
  } else if (std::regex_match(parsed.rest, match, router)) {
    parsed.kind = TensorName::Kind::kRouter;
    parsed.pool = match[1];
  } else if (std::regex_match(parsed.rest, match, gate)) {
    parsed.kind = TensorName::Kind::kRouter;
  } else if (std::regex_match(parsed.rest, match, cutoff)) {
    parsed.kind = match[2].matched ? TensorName::Kind::kSteps : TensorName::Kind::kCutoff;
    parsed.pool = match[1];
  }
  return parsed;
}

std::string layer_prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

bool is_output(const TensorName& name) {
  static const std::regex output(R"((?:.*\.)?(?:o_proj|down_proj|w2)(?:\.weight|\.bias)?)");
  return std::regex_match(name.rest, output);
}

GrownLayer grown_expert(int64_t e, int64_t experts, const GrowConfig& config) {
  const bool append = config.order == "append";
  return {.source = append ? e % experts : e / config.experts,
          .copy = append ? e >= experts : e % config.experts > 0};
}

std::vector<GrownLayer> layer_map(int64_t n, const GrowConfig& config) {
  const int64_t a = config.first, c = config.last, wanted = config.num_layers > 0 ? config.num_layers : n;
  const int64_t middle = n - a - c, added = wanted - n;
  const auto text = [](int64_t number) { return std::to_string(number); };
  const auto refuse = [&](const std::string& expected) {
    throw ConfigError("num_layers", expected + ", got " + text(wanted));
  };
  if (added < 0) refuse("expected at least the " + text(n) + " that there are");
  if (added > 0 && middle < 1)
    throw ConfigError("first", "first and last leave none of " + text(n) + " layers to copy");
  std::vector<int64_t> sources;
  if (added > 0 && config.depth == "stack") {
    if ((added + c) % (n - a) != 0)
      refuse("stacking gives " + text(n - c) + " + a multiple of " + text(n - a) + " layers");
    for (int64_t j = 0; j < wanted; ++j) sources.push_back(j < n - c ? j : a + (j - (n - c)) % (n - a));
  } else {
    if (added > 0 && config.depth == "identity" && middle % added != 0)
      refuse("identity adds a divisor of the " + text(middle) + " layers that may be copied");
    // A layer of the middle comes before its copy: with identity the places of a group are its layers, then
    // the last one again.
    const int64_t group = added > 0 && config.depth == "identity" ? middle / added : 0;
    for (int64_t j = 0; j < wanted; ++j) {
      const int64_t place = j - a;
      if (place < 0 || place >= middle + added) {
        sources.push_back(place < 0 ? j : j - added);
      } else if (group > 0) {
        sources.push_back(a + place / (group + 1) * group + std::min(place % (group + 1), group - 1));
      } else {
        sources.push_back(a + place * middle / (middle + added));
      }
    }
  }
  std::vector<GrownLayer> layers;
  std::vector<bool> seen(n);
  for (const int64_t source : sources) {
    layers.push_back({source, seen[source]});
    seen[source] = true;
  }
  return layers;
}

}  // namespace hymoe
