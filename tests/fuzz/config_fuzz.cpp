// YAML or JSON of a config, then overrides.
#include "config/example.h"
#include "fuzz/target.h"

namespace hymoe::fuzz {
namespace {

bool read(std::string_view bytes) {
  const std::vector<std::string_view> parts = split_files(bytes);
  const std::vector<std::string> overrides(parts.begin() + 1, parts.end());
  return taken([&] {
    const auto config = parse_config<ExampleConfig>(std::string(parts[0]), "run.yaml", overrides);
    const std::string text = to_yaml(config);
    const nlohmann::json json = to_json(config);
    const auto unchanged = [&](const ExampleConfig& again) { return to_yaml(again) == text; };
    try {
      if (unchanged(parse_config<ExampleConfig>(text, "again.yaml")) &&
          unchanged(from_json<ExampleConfig>(json, "again.json")) &&
          unchanged(parse_config<ExampleConfig>(json.dump(), "again.json")))
        return;
    } catch (const Error& error) {
      broken(std::string("what was written is refused: ") + error.what());
    }
    broken("what was written reads as another config");
  });
}

std::vector<std::string> seeds() {
  const std::string zero(1, '\0');
  return {
      "",
      "name: a b\nlr: 1.5e-3\nlanguages: [c, \"d\"]\nmixture: {c: 0.5}\nflags: [true, false]\nnote: null\n",
      "table:\n- [1, 2.5]\n- []\npools:\n  p: &p\n    num_experts: 4\n    router: {top_k: 1, z_loss: 0.5, "
      "layers: [0, 1]}\n"
      "  q: *p\nmodel:\n  dim: 1e2\n  extra: {name: e}\n",
      R"({"name":"\ud83d\ude00","lr":".inf","settings":{"a.b":1,"c":"true"},"model":{"branches":[{"name":"x"}]}})",
      "--- # c\nnote: |\n  two\n  lines\nname: 'it''s'\n" + zero + "model.branches.2.name=n" + zero +
          "settings.\"a.b\"=1" + zero + "languages=[x]"};
}

const Registration registration({"config", read, seeds});

}  // namespace
}  // namespace hymoe::fuzz
