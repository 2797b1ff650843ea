#include <iostream>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "eval_config.h"
#include "hymoe/config/config.h"
#include "hymoe/config/schema.h"
#include "hymoe/data/prepare.h"
#include "hymoe/growth/grow.h"
#include "hymoe/growth/upcycle.h"
#include "hymoe/train/plan.h"
#include "hymoe/train/trainer.h"

namespace hymoe {
namespace {

// The config files that commands take.
struct ConfigKind {
  const char* name;
  std::string (*help)();
  std::string (*reference)(const std::string& title);
  nlohmann::json (*resolve)(const std::string& path, const std::vector<std::string>& overrides);
  std::string (*resolved_yaml)(const std::string& path, const std::vector<std::string>& overrides);
};

template <class T>
T load(const std::string& path, const std::vector<std::string>& overrides) {
  if constexpr (std::is_same_v<T, TrainConfig>) return load_train_config(path, overrides);
  if constexpr (std::is_same_v<T, PlanConfig>) return load_plan_config(path, overrides);
  return load_config<T>(path, overrides);
}

template <class T>
ConfigKind kind(const char* name) {
  return {name, help_text<T>, markdown_reference<T>,
          [](const auto& path, const auto& overrides) { return to_json(load<T>(path, overrides)); },
          [](const auto& path, const auto& overrides) { return to_yaml(load<T>(path, overrides)); }};
}

// What it takes beside the keys of train.
ConfigKind plan_kind() {
  ConfigKind plan = kind<PlanConfig>("plan");
  plan.reference = [](const std::string& title) {
    return "# " + title +
           "\n\nAll of `hymoe train`; `processes`, the ranks in all (0: dp·ep·tp, dp at least 1); and\n\n#" +
           markdown_reference<HardwareConfig>("`hardware`");
  };
  return plan;
}

const std::vector<ConfigKind>& kinds() {
  static const std::vector<ConfigKind> all = {kind<PrepareConfig>("prepare"),
                                              kind<UpcycleConfig>("upcycle"),
                                              kind<GrowConfig>("grow"),
                                              kind<TrainConfig>("train"),
                                              plan_kind(),
                                              kind<EvalCommandConfig>("eval")};
  return all;
}

const ConfigKind& find_kind(const std::string& name) {
  for (const ConfigKind& kind : kinds()) {
    if (kind.name == name) return kind;
  }
  throw ConfigError("", "expected prepare, upcycle, grow, train, plan or eval, got '" + name + "'");
}

void print_reference() {
  std::cout
      << "# Configuration\n\nEvery key of the files that `hymoe prepare`, `upcycle`, `grow`, `train`, `plan` "
         "and "
         "`eval` "
         "take, in YAML or "
         "JSON. What a file leaves\nout has the default given here; an unknown key is an error. On the "
         "command line "
         "`key.path=value` goes over the file:\n`schedule.lr=1e-4`, `model.moe.branches.0.router.top_k=2`, "
         "`data.weights={rust: 2, go: 1}`.\n\nThis page is printed by `hymoe config --markdown`.\n";
  for (const ConfigKind& kind : kinds())
    std::cout << "\n" << kind.reference("hymoe " + std::string(kind.name));
}

}  // namespace

void add_config(CLI::App& program) {
  auto* command = program.add_subcommand(
      "config", "Print every setting of a command, a resolved config, or what differs");
  auto name = std::make_shared<std::string>();
  auto arguments = std::make_shared<ConfigArguments>();
  auto other = std::make_shared<std::string>();
  auto markdown = std::make_shared<bool>(false);
  auto json = std::make_shared<bool>(false);
  command->add_option("command", *name, "whose config: prepare, upcycle, grow, train, plan or eval");
  arguments->add_to(*command, /*required=*/false);
  command->add_option("--diff", *other, "print what differs from this config file");
  command->add_flag("--markdown", *markdown, "print the reference of all configs, docs/configuration.md");
  command->add_flag("--json", *json, "print the resolved config as JSON");
  command->footer(
      "hymoe config train                 every setting of hymoe train\n"
      "hymoe config train run.yaml lr=…   the config with all defaults filled in\n"
      "hymoe config train a.yaml --diff b.yaml");
  command->callback([=] {
    if (*markdown) return print_reference();
    if (name->empty()) throw CLI::RequiredError("command");
    const ConfigKind& kind = find_kind(*name);
    if (arguments->path.empty()) {
      std::cout << kind.help();
    } else if (!other->empty()) {
      for (const auto& line :
           config_difference(kind.resolve(arguments->path, arguments->overrides), kind.resolve(*other, {}))) {
        std::cout << line << "\n";
      }
    } else if (*json) {
      std::cout << kind.resolve(arguments->path, arguments->overrides).dump(2) << "\n";
    } else {
      std::cout << kind.resolved_yaml(arguments->path, arguments->overrides);
    }
  });
}

}  // namespace hymoe
