#include "growth/grown_names.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <string_view>

#include "hymoe/config/error.h"

namespace hymoe {

namespace {

bool take(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// A number and the dot behind it, which something follows; else takes nothing and returns -1.
int64_t take_number(std::string_view& text) {
  int64_t number = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const auto digits = static_cast<size_t>(end - text.data());
  if (error != std::errc() || number < 0 || digits + 1 >= text.size() || text[digits] != '.') return -1;
  text.remove_prefix(digits + 1);
  return number;
}

}  // namespace

TensorName parse_name(const std::string& name) {
  using Kind = TensorName::Kind;
  TensorName parsed;
  std::string_view text = name;
  if (!take(text, "model.layers.")) return parsed;
  parsed.layer = take_number(text);
  if (parsed.layer < 0) return parsed;
  parsed.rest = text;
  const bool ours = take(text, "mlp.");
  if (!ours && !take(text, "block_sparse_moe.")) return parsed;
  if (text == "gate.weight") {
    parsed.kind = Kind::kRouter;
    return parsed;
  }
  if (!text.starts_with("experts.")) {
    parsed.pool = text.substr(0, text.find('.'));
    if (!take(text, parsed.pool + ".")) return parsed;
  }
  if (take(text, "experts.")) {
    const size_t head = parsed.rest.size() - text.size();
    parsed.expert = take_number(text);
    if (parsed.expert >= 0) {
      parsed.kind = Kind::kExpert;
      parsed.head = parsed.rest.substr(0, head);
      parsed.tail = parsed.rest.substr(parsed.rest.size() - text.size() - 1);  // with the dot
    } else if (!text.empty() && std::isdigit(static_cast<unsigned char>(text[0])) == 0) {
      parsed.kind = Kind::kStacked;
    }
  } else if (ours && take(text, "router.")) {
    if (text == "cutoff") parsed.kind = Kind::kCutoff;
    if (text == "cutoff_steps") parsed.kind = Kind::kSteps;
    take(text, "predictor.");
    if (text == "weight" || text == "bias") parsed.kind = Kind::kRouter;
  }
  return parsed;
}

std::string layer_prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

bool is_output(const TensorName& name) {
  std::string_view text = name.rest;
  for (const std::string_view suffix : {".weight", ".bias"}) {
    if (text.ends_with(suffix)) text.remove_suffix(suffix.size());
  }
  text.remove_prefix(text.rfind('.') + 1);  // npos + 1 is 0
  return text == "o_proj" || text == "down_proj" || text == "w2";
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
