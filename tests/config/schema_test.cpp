#include "hymoe/config/schema.h"

#include <algorithm>
#include <sstream>

#include <gtest/gtest.h>

#include "config/example.h"
#include "hymoe/config/config.h"

namespace hymoe {
namespace {

const SchemaEntry& entry_of(const std::vector<SchemaEntry>& entries, const std::string& path) {
  const auto found =
      std::find_if(entries.begin(), entries.end(), [&](const auto& e) { return e.path == path; });
  if (found == entries.end()) throw std::runtime_error("no entry " + path);
  return *found;
}

TEST(Describe, NamesEveryKeyWithTypeDefaultAndLimits) {
  const std::vector<SchemaEntry> entries = describe<ExampleConfig>();
  EXPECT_EQ(entries.front().path, "name");
  const SchemaEntry& top_k = entry_of(entries, "model.branches.<n>.router.top_k");
  EXPECT_EQ(top_k.type, "integer");
  EXPECT_EQ(top_k.value, "2");
  EXPECT_EQ(top_k.constraint, "at least 1, at most 64");
  EXPECT_EQ(top_k.help, "experts a unit goes to");
  EXPECT_EQ(entry_of(entries, "lr").value, "3.0e-04");
  EXPECT_EQ(entry_of(entries, "lr").constraint, "more than 0");
  EXPECT_EQ(entry_of(entries, "languages").value, "[python, rust]");
  EXPECT_EQ(entry_of(entries, "languages").type, "list of text");
  EXPECT_EQ(entry_of(entries, "table").type, "list of lists of numbers");
  EXPECT_EQ(entry_of(entries, "pools").type, "mapping of names to mappings");
  EXPECT_EQ(entry_of(entries, "note").type, "text or null");
  EXPECT_EQ(entry_of(entries, "note").value, "null");
  EXPECT_EQ(entry_of(entries, "model").type, "mapping");
  EXPECT_EQ(entry_of(entries, "model").value, "");
  EXPECT_EQ(entry_of(entries, "model.branches").type, "list of mappings");
  EXPECT_EQ(entry_of(entries, "model.branches").value, "2 entries");
  EXPECT_EQ(entry_of(entries, "model.extra").value, "null");
  EXPECT_EQ(entry_of(entries, "model.extra.num_experts").constraint, "one of 1, 4, 8, 16, 32");
  EXPECT_EQ(entry_of(entries, "pools").value, "{}");
  EXPECT_EQ(entry_of(entries, "pools.<name>.router.kind").value, "topk");
}

TEST(HelpText, FitsTheTerminalAndNamesEveryKey) {
  const std::string text = help_text<ExampleConfig>();
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    EXPECT_LE(line.size(), 110u) << line;
    EXPECT_FALSE(line.ends_with(' ')) << line;
  }
  for (const SchemaEntry& entry : describe<ExampleConfig>()) {
    const std::string key = entry.path.substr(entry.path.rfind('.') + 1);
    EXPECT_NE(text.find("  " + key + " "), std::string::npos) << key;
  }
  EXPECT_NE(text.find("\nmodel.branches.<n>.router: where its units go\n"), std::string::npos) << text;
  EXPECT_NE(text.find("experts a unit goes to (at least 1, at most 64)"), std::string::npos) << text;
}

TEST(MarkdownReference, IsATableAStruct) {
  const std::string text = markdown_reference<ExampleConfig>("Configuration");
  EXPECT_TRUE(text.starts_with("# Configuration\n\n| key | type | default | allowed | meaning |\n|---|"));
  EXPECT_NE(text.find("\n## `model.branches.<n>.router`\n\nwhere its units go\n"), std::string::npos);
  EXPECT_NE(text.find("\n| `top_k` | integer | `2` | at least 1, at most 64 | experts a unit goes to |\n"),
            std::string::npos);
  EXPECT_NE(text.find("pooled vector \\| window"), std::string::npos);
  EXPECT_EQ(text.find("\n\n\n"), std::string::npos);
}

TEST(Difference, NamesOldAndNewValues) {
  const ExampleConfig a;
  ExampleConfig b;
  b.lr = 1e-3;
  b.name = "other";
  b.model.branches[1].router.top_k = 4;
  b.model.branches.push_back({.name = "c"});
  b.mixture["x.y"] = 0.5;
  const auto lines = config_difference(to_json(a), to_json(b));
  const auto has = [&](const std::string& line) {
    return std::find(lines.begin(), lines.end(), line) != lines.end();
  };
  EXPECT_TRUE(has("lr: 0.0003 → 0.001"));
  EXPECT_TRUE(has("name: \"run\" → \"other\""));
  EXPECT_TRUE(has("model.branches.1.router.top_k: 2 → 4"));
  EXPECT_TRUE(has("model.branches.2.name: (none) → \"c\""));
  EXPECT_TRUE(has("mixture.\"x.y\": (none) → 0.5"));
  EXPECT_EQ(std::count_if(lines.begin(), lines.end(), [](const auto& l) { return l.starts_with("mixture"); }),
            1);
  EXPECT_TRUE(config_difference(to_json(a), to_json(a)).empty());
}

}  // namespace
}  // namespace hymoe
