#pragma once

#include <functional>
#include <string>
#include <vector>

#include "hymoe/config/config.h"

namespace hymoe {

struct ExampleRouter {
  std::string kind = "topk";
  int64_t top_k = 2;
  std::string score = "previous";
  std::optional<double> z_loss = {};
  std::vector<int64_t> layers = {};

  static auto fields() {
    return hymoe::fields(
        field("kind", &ExampleRouter::kind, "name of a registered router"),
        field("top_k", &ExampleRouter::top_k, "experts a unit goes to").at_least(1).at_most(64),
        field("score", &ExampleRouter::score, "pooled vector | window").one_of({"own", "previous"}),
        field("z_loss", &ExampleRouter::z_loss, "weight of the z-loss").above(0).below(1),
        field("layers", &ExampleRouter::layers, "layers that have it").at_least(0));
  }
};

struct ExampleBranch {
  std::string name = {};
  int64_t num_experts = 8;
  ExampleRouter router = {};

  static auto fields() {
    return hymoe::fields(
        field("name", &ExampleBranch::name, "unique in its layer"),
        field("num_experts", &ExampleBranch::num_experts, "size of the pool").one_of({1, 4, 8, 16, 32}),
        field("router", &ExampleBranch::router, "where its units go"));
  }
  void check() const {
    if (router.top_k > num_experts) {
      throw ConfigError("router.top_k", "wanted at most num_experts = " + std::to_string(num_experts) +
                                            ", got " + std::to_string(router.top_k));
    }
  }
};

struct ExampleModel {
  int64_t dim = 64;
  bool tied = true;
  std::vector<ExampleBranch> branches = {{.name = "token"},
                                         {.name = "segment", .router = {.kind = "segment"}}};
  std::optional<ExampleBranch> extra = {};

  static auto fields() {
    return hymoe::fields(field("dim", &ExampleModel::dim, "width").at_least(1),
                         field("tied", &ExampleModel::tied, "whether input and output embeddings are one"),
                         field("branches", &ExampleModel::branches, "routers and their experts"),
                         field("extra", &ExampleModel::extra, "one more"));
  }
  void check() const {
    if (branches.empty()) throw ConfigError("branches", "wanted at least one branch, got none");
  }
};

struct ExampleConfig {
  std::string name = "run";
  double lr = 3e-4;
  std::vector<std::string> languages = {"python", "rust"};
  std::map<std::string, double> mixture = {};
  std::map<std::string, std::string> settings = {};
  std::map<std::string, ExampleBranch> pools = {};
  std::vector<bool> flags = {};
  std::vector<std::vector<double>> table = {};
  std::optional<std::string> note = {};
  ExampleModel model = {};

  static auto fields() {
    return hymoe::fields(field("name", &ExampleConfig::name, "name of the run"),
                         field("lr", &ExampleConfig::lr, "peak learning rate").above(0),
                         field("languages", &ExampleConfig::languages, "what to learn"),
                         field("mixture", &ExampleConfig::mixture, "share of a language").at_least(0),
                         field("settings", &ExampleConfig::settings, "whatever a user's own code reads"),
                         field("pools", &ExampleConfig::pools, "pools by name"),
                         field("flags", &ExampleConfig::flags, "switches"),
                         field("table", &ExampleConfig::table, "rows of numbers"),
                         field("note", &ExampleConfig::note, "free text"),
                         field("model", &ExampleConfig::model, "the model"));
  }
};

inline ExampleConfig parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return parse_config<ExampleConfig>(text, "run.yaml", overrides);
}

inline std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "no error";
}

inline std::string parse_error(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return error_of([&] { parse(text, overrides); });
}

inline std::string override_error(const std::string& text) { return parse_error("", {text}); }

}  // namespace hymoe
