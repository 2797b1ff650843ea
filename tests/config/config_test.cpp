#include "hymoe/config/config.h"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>

#include <gtest/gtest.h>

#include "config/example.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

ExampleConfig rich_config() {
  ExampleConfig config;
  config.name = "a \"b\"\n\t: #é😀\\ \x7f\x01";
  config.lr = 0.1 + 0.2;
  config.languages = {"",      "true", "NO",        "1e3", "null", "~",  " x ", "a: b", "- c",
                      "plain", "c++",  "/path/x.y", "0x1", ".5",   "<<", "=",   "@a",   "2020-01-01"};
  config.mixture = {{"a.b", 1e-5}, {"inf", std::numeric_limits<double>::infinity()},
                    {"", 1e300},   {"null", 5e-324},
                    {"1", -0.0},   {"<<", 1.0 / 3.0}};
  config.settings = {{"a", "1"}, {"b c", "x\ny"}};
  config.pools = {{"p", {.name = "q", .router = {.layers = {1, 2}}}}, {"empty", {}}};
  config.flags = {true, false};
  config.table = {{}, {1, -2.5}, {1e22}};
  config.note = "null";
  config.model.extra = ExampleBranch{.name = "e", .num_experts = 32, .router = {.z_loss = 0.5}};
  return config;
}

TEST(Write, YamlRoundTripsExactly) {
  for (const ExampleConfig& config : {ExampleConfig{}, rich_config()}) {
    const std::string yaml = to_yaml(config);
    const ExampleConfig again = parse(yaml);
    EXPECT_EQ(to_yaml(again), yaml);
    EXPECT_EQ(again.name, config.name);
    EXPECT_EQ(again.lr, config.lr);
    EXPECT_EQ(again.languages, config.languages);
    EXPECT_EQ(again.mixture, config.mixture);
    EXPECT_EQ(again.table, config.table);
    EXPECT_EQ(again.note, config.note);
    EXPECT_EQ(again.pools.size(), config.pools.size());
    EXPECT_EQ(again.model.branches.size(), config.model.branches.size());
  }
}

TEST(Write, YamlIsPlainToRead) {
  ExampleConfig config;
  config.lr = 1e-5;
  config.mixture = {{"rust", 1.0}};
  config.table = {{1, 2}};
  config.model.branches.pop_back();
  EXPECT_EQ(to_yaml(config), R"(name: run
lr: 1.0e-05
languages: [python, rust]
mixture:
  rust: 1.0
settings: {}
pools: {}
flags: []
table:
  - [1.0, 2.0]
note: null
model:
  dim: 64
  tied: true
  branches:
    - name: token
      num_experts: 8
      router:
        kind: topk
        top_k: 2
        score: previous
        z_loss: null
        layers: []
  extra: null
)");
}

TEST(Write, JsonRoundTripsExactly) {
  for (const ExampleConfig& config : {ExampleConfig{}, rich_config()}) {
    const nlohmann::json json = nlohmann::json::parse(to_json(config).dump());
    EXPECT_EQ(to_yaml(from_json<ExampleConfig>(json, "j")), to_yaml(config));
  }
  const nlohmann::json json = to_json(ExampleConfig{});
  EXPECT_TRUE(json["model"]["dim"].is_number_integer());
  EXPECT_TRUE(json["lr"].is_number_float());
  EXPECT_TRUE(json["note"].is_null());
  EXPECT_EQ(json["model"]["branches"][1]["router"]["kind"], "segment");
}

TEST(Write, DoublesReadBackTheSame) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) {
    const uint64_t bits = random();
    double value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isfinite(value)) continue;
    ExampleConfig config;
    config.lr = std::abs(value);
    EXPECT_EQ(parse("lr: " + format_scalar(config.lr)).lr, config.lr);
  }
}

TEST(FromJson, NamesItsSource) {
  EXPECT_EQ(error_of([] {
              from_json<ExampleConfig>({{"model", {{"dim", 2.5}}}}, "state.json");
            }),
            "state.json: model.dim: wanted an integer, got 2.5");
  EXPECT_EQ(error_of([] {
              from_json<ExampleConfig>({{"nmae", "x"}}, "state.json");
            }),
            "state.json: nmae: unknown key, did you mean name?");
}

TEST(Check, ConfigsBuiltInCode) {
  check_config(ExampleConfig{});
  EXPECT_EQ(error_of([] { check_config(ExampleConfig{.lr = -1}); }), "lr: wanted more than 0, got -1.0");
  ExampleConfig config;
  config.pools["p"].router.top_k = 9;
  EXPECT_EQ(error_of([&] { check_config(config); }),
            "pools.p.router.top_k: wanted at most num_experts = 8, got 9");
  EXPECT_EQ(error_of([] { check_config(ExampleModel{.branches = {}}); }),
            "branches: wanted at least one branch, got none");
}

class File : public testing::Test {
 protected:
  std::string write(const std::string& name, const std::string& text) const {
    return folder_.file(name, text).string();
  }

  TemporaryFolder folder_;
};

TEST_F(File, LoadsYamlAndJson) {
  EXPECT_EQ(load_config<ExampleConfig>(write("a.yaml", "\xEF\xBB\xBFname: x\r\nlr: 1\r\n"), {"lr=2"}).lr, 2);
  EXPECT_EQ(load_config<ExampleConfig>(write("a.json", R"({"name": "x"})")).name, "x");
  const std::string path = write("b.yaml", "name: x\nmodle: 3\n");
  EXPECT_EQ(error_of([&] { load_config<ExampleConfig>(path); }),
            path + ":2: modle: unknown key, did you mean model?");
}

TEST_F(File, SaysWhyItCannotBeRead) {
  const std::string missing = (folder_ / "missing.yaml").string();
  EXPECT_EQ(error_of([&] { load_config<ExampleConfig>(missing); }),
            missing + ": wanted a config file, got none of this name");
  EXPECT_EQ(error_of([&] { load_config<ExampleConfig>(folder_.path()); }),
            folder_.path().string() + ": wanted a config file, got a folder");
  const std::string large = write("large.yaml", std::string((16 << 20) + 1, '#'));
  EXPECT_EQ(error_of([&] { load_config<ExampleConfig>(large); }),
            large + ": wanted a config file of at most 16 MiB, got a larger one");
  const std::string locked = write("locked.yaml", "name: x");
  std::filesystem::permissions(locked, std::filesystem::perms::none);
  if (access(locked.c_str(), R_OK) == 0) return;  // root reads it all the same
  EXPECT_EQ(error_of([&] { load_config<ExampleConfig>(locked); }),
            locked + ": cannot be read: Permission denied");
}

// Whatever the text, it is read or refused in one line.
TEST(Fuzz, MutatedTextsParseOrThrow) {
  const std::vector<std::string> seeds = {to_yaml(rich_config()), to_json(rich_config()).dump(2),
                                          to_yaml(ExampleConfig{}),
                                          "a: &x [1, *x]\nb: {c: !!str d, ? e : f}\n--- |\n  g\n...\n"};
  const std::string pieces[] = {"\n",      "  ",   ":",   ": ",  "- ",      "[",      "]",
                                "{",       "}",    "&a ", "*a",  "!",       "!!int ", "|\n",
                                ">",       "'",    "\"",  "#",   "%",       "---\n",  "...\n",
                                "? ",      "<<: ", "~",   "\\u", "\\ud800", "\t",     "\r",
                                ",",       "@",    "`",   "=",   "1e9",     "\xff",   std::string(1, '\0'),
                                "\xC2\x85"};
  std::mt19937 random(7);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  int parsed = 0, refused = 0;
  for (int i = 0; i < 4000; ++i) {
    std::string text = seeds[below(seeds.size())];
    for (size_t edits = 1 + below(3); edits > 0; --edits) {
      const size_t at = below(text.size() + 1);
      switch (below(4)) {
        case 0:
          text.insert(at, pieces[below(std::size(pieces))]);
          break;
        case 1:
          text.erase(at, 1 + below(8));
          break;
        case 2:
          text.insert(at, text.substr(below(text.size() + 1), below(40)));
          break;
        default:
          if (at < text.size()) text[at] = static_cast<char>(below(8) ? 32 + below(95) : below(256));
      }
    }
    try {
      const ExampleConfig config = parse(text);
      EXPECT_EQ(to_yaml(parse(to_yaml(config))), to_yaml(config));
      ++parsed;
    } catch (const ConfigError& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
      ++refused;
    }
  }
  EXPECT_GT(parsed, 100);
  EXPECT_GT(refused, 1000);
}

TEST(Fuzz, MutatedOverridesParseOrThrow) {
  const std::string seeds[] = {
      "model.branches.0.router.top_k=2", "mixture.\"a.b\"=0.5", "languages=[rust, go]",
      "pools.a={router: {z_loss: 0.1}}", "settings.a.b=c",      "note=null"};
  std::mt19937 random(8);
  for (int i = 0; i < 4000; ++i) {
    std::string text = seeds[random() % std::size(seeds)];
    for (int edits = 0; edits < 3; ++edits) {
      const size_t at = random() % (text.size() + 1);
      const std::string piece(1, ".=\"\\[]{}: 0a-\n"[random() % 14]);
      if (random() % 2)
        text.insert(at, piece);
      else
        text.erase(at, 1);
    }
    try {
      parse("", {text});
    } catch (const ConfigError& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace hymoe
