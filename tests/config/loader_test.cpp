#include <limits>

#include <gtest/gtest.h>

#include "config/example.h"
#include "hymoe/config/config.h"

namespace hymoe {
namespace {

TEST(Parse, NothingGivesTheDefaults) {
  for (const char* text : {"", "# only a comment\n", "---\n", "null", "{}"}) {
    const ExampleConfig config = parse(text);
    EXPECT_EQ(to_yaml(config), to_yaml(ExampleConfig{})) << text;
  }
}

TEST(Parse, ReadsEveryKindOfField) {
  const ExampleConfig config = parse(R"(
name: trial run
lr: 3e-4
languages: [rust, "go", 'c++']
mixture: {rust: 0.5, go: 1}
settings: {a: 1_000, b: true, c: 1.10, d: text, e: "null"}
pools:
  one:
    num_experts: 16
flags: [true, false, TRUE]
table:
  - [1, 2.5]
  - []
note: ~
model:
  dim: 1e9
  tied: false
  branches:
    - name: only
      router: {top_k: 3, z_loss: 1e-3, layers: [0, 2]}
)");
  EXPECT_EQ(config.name, "trial run");
  EXPECT_EQ(config.lr, 3e-4);
  EXPECT_EQ(config.languages, (std::vector<std::string>{"rust", "go", "c++"}));
  EXPECT_EQ(config.mixture, (std::map<std::string, double>{{"go", 1.0}, {"rust", 0.5}}));
  EXPECT_EQ(config.settings,
            (std::map<std::string, std::string>{
                {"a", "1_000"}, {"b", "true"}, {"c", "1.10"}, {"d", "text"}, {"e", "null"}}));
  EXPECT_EQ(config.pools.at("one").num_experts, 16);
  EXPECT_EQ(config.flags, (std::vector<bool>{true, false, true}));
  EXPECT_EQ(config.table, (std::vector<std::vector<double>>{{1.0, 2.5}, {}}));
  EXPECT_FALSE(config.note);
  EXPECT_EQ(config.model.dim, 1000000000);
  EXPECT_FALSE(config.model.tied);
  ASSERT_EQ(config.model.branches.size(), 1u);
  const ExampleRouter& router = config.model.branches[0].router;
  EXPECT_EQ(router.top_k, 3);
  EXPECT_EQ(router.z_loss, 1e-3);
  EXPECT_EQ(router.layers, (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(router.kind, "topk");
}

TEST(Parse, StartsFromTheConfigItIsGiven) {
  ExampleConfig base;
  base.model.dim = 7;
  base.name = "base";
  const auto config = parse_config<ExampleConfig>("name: new", "x", {}, base);
  EXPECT_EQ(config.name, "new");
  EXPECT_EQ(config.model.dim, 7);
}

TEST(Parse, ReadsJson) {
  const ExampleConfig config = parse(
      "{\n\t\"name\": \"a\\/b \\u00e9 \\ud83d\\ude00 "
      "\\\\ud83d\",\n\t\"lr\":1E-5,\n\t\"model\":{\"dim\":8,\"tied\":false},"
      "\n\t\"languages\":[\"a\",\"b\"]}");
  EXPECT_EQ(config.name, "a/b é 😀 \\ud83d");
  EXPECT_EQ(config.lr, 1e-5);
  EXPECT_EQ(config.model.dim, 8);
  EXPECT_EQ(config.languages.size(), 2u);
  EXPECT_EQ(parse_error("{\n  \"model\": {\n    \"dim\": \"8\"\n  }\n}"),
            "run.yaml:3: model.dim: wanted an integer, got the text \"8\"");
}

TEST(Parse, AliasesAreFine) {
  const ExampleConfig config = parse(
      "model:\n  branches:\n    - name: a\n      router: &r {top_k: 3}\n    - name: b\n      router: *r\n");
  EXPECT_EQ(config.model.branches[1].router.top_k, 3);
  EXPECT_EQ(parse_error("settings: {<<: {a: b}}"), "run.yaml:1: merge keys (<<) are not supported");
  EXPECT_EQ(parse_error("model: &m\n  extra: *m\n"), "run.yaml:2: an alias within what it stands for");
}

TEST(Parse, DepthEnds) {
  EXPECT_EQ(parse_error("table: " + std::string(100, '[')), "run.yaml:1: nested more than 100 deep");
  EXPECT_NE(parse_error("table: " + std::string(90, '[') + std::string(90, ']'))
                .find("wanted a number, got a list"),
            std::string::npos);
}

TEST(Parse, AliasesOfAliasesEnd) {
  std::string text = "a: &a [a, a, a, a, a, a, a, a, a, a]\n";
  for (int i = 1; i < 9; ++i) {
    const std::string name(1, static_cast<char>('a' + i)), before{'*', static_cast<char>('a' + i - 1)};
    text += name + ": &" + name + " [" + before;
    for (int j = 1; j < 10; ++j) text += ", " + before;
    text += "]\n";
  }
  EXPECT_NE(parse_error(text).find("more than 100000 values"), std::string::npos);
}

TEST(Parse, AliasesOfLongTextsEnd) {
  std::string text = "name: &long " + std::string(1 << 20, 'a') + "\nlanguages:\n";
  for (int i = 0; i < 50; ++i) text += "- *long\n";
  EXPECT_EQ(parse_error(text), "no error");
  for (int i = 0; i < 50; ++i) text += "- *long\n";
  EXPECT_NE(parse_error(text).find("more than 100000 values"), std::string::npos);
}

TEST(Parse, UnknownKeyNamesTheNearest) {
  EXPECT_EQ(parse_error("alnugages: []"), "run.yaml:1: alnugages: unknown key, did you mean languages?");
  EXPECT_EQ(parse_error("name: x\nmodel:\n  dmi: 3\n"),
            "run.yaml:3: model.dmi: unknown key, did you mean dim?");
  EXPECT_EQ(parse_error("model:\n  branches:\n    - name: a\n    - router:\n        topk: 1\n"),
            "run.yaml:5: model.branches.1.router.topk: unknown key, did you mean top_k?");
  EXPECT_EQ(
      parse_error("top_k: 3"),
      "run.yaml:1: top_k: unknown key, known here: model, note, pools, table, flags, lr, ...; top_k belongs "
      "to pools.<name>.router");
  EXPECT_EQ(parse_error("model: {lr: 3}"),
            "run.yaml:1: model.lr: unknown key, known here: dim, extra, tied, branches; lr belongs to the "
            "top level");
  EXPECT_EQ(parse_error("\"a\\nb.c\": 1").substr(0, 36), "run.yaml:1: \"a\\nb.c\": unknown key, k");
}

TEST(Parse, WrongTypeSaysWhatCame) {
  const std::string router = "model:\n  branches:\n    - router:\n        ";
  const std::string at = "run.yaml:4: model.branches.0.router.";
  EXPECT_EQ(parse_error(router + "top_k: two"), at + "top_k: wanted an integer, got two");
  EXPECT_EQ(parse_error(router + "top_k: 2.5"), at + "top_k: wanted an integer, got 2.5");
  EXPECT_EQ(parse_error(router + "top_k: \"2\""), at + "top_k: wanted an integer, got the text \"2\"");
  EXPECT_EQ(parse_error(router + "top_k: [2]"), at + "top_k: wanted an integer, got a list");
  EXPECT_EQ(parse_error(router + "top_k:"), at + "top_k: wanted an integer, got nothing");
  EXPECT_EQ(parse_error(router + "layers: 3"), at + "layers: wanted a list, got 3");
  EXPECT_EQ(parse_error(router + "layers:\n          - 1\n          - x"),
            "run.yaml:6: model.branches.0.router.layers.1: wanted an integer, got x");
  EXPECT_EQ(parse_error("lr: true"), "run.yaml:1: lr: wanted a number, got true");
  EXPECT_EQ(parse_error("name: 7"), "run.yaml:1: name: wanted text, got 7 (put it in quotes)");
  EXPECT_EQ(parse_error("name: false"), "run.yaml:1: name: wanted text, got false (put it in quotes)");
  EXPECT_EQ(parse_error("name: ~"), "run.yaml:1: name: wanted text, got nothing");
  EXPECT_EQ(parse_error("model: 3"), "run.yaml:1: model: wanted a mapping, got 3");
  EXPECT_EQ(parse_error("model:\n"), "run.yaml:1: model: wanted a mapping, got nothing");
  EXPECT_EQ(parse_error("mixture: [a]"), "run.yaml:1: mixture: wanted a mapping, got a list");
  EXPECT_EQ(parse_error("model: {tied: yes}"), "run.yaml:1: model.tied: wanted true or false, got yes");
  EXPECT_EQ(parse_error("note: []"), "run.yaml:1: note: wanted text, got a list");
  EXPECT_EQ(parse_error("settings: {a: [1]}"), "run.yaml:1: settings.a: wanted text, got a list");
  EXPECT_EQ(parse_error("- 1"), "run.yaml:1: wanted a mapping, got a list");
  EXPECT_EQ(parse_error("hello"), "run.yaml:1: wanted a mapping, got hello");
}

TEST(Parse, IntegersAreExact) {
  const auto dim = [](const std::string& text) { return parse("model: {dim: " + text + "}").model.dim; };
  EXPECT_EQ(dim("1e9"), 1000000000);
  EXPECT_EQ(dim("1.5e3"), 1500);
  EXPECT_EQ(dim("1E+18"), 1000000000000000000);
  EXPECT_EQ(dim("2.0"), 2);
  EXPECT_EQ(dim("1200e-2"), 12);
  EXPECT_EQ(dim("+5"), 5);
  EXPECT_EQ(dim("9223372036854775807"), std::numeric_limits<int64_t>::max());
  for (const char* text : {"1_000", "0x10", "010", "9223372036854775808", "1e19", "1e-1", "1.05e1", "1e",
                           "e5", "--1", "1e999999999999", ".", "-", "+", "1 000", ".inf"}) {
    EXPECT_NE(parse_error("model: {dim: " + std::string(text) + "}").find("wanted an integer"),
              std::string::npos)
        << text;
  }
}

TEST(Parse, ExponentsOfZeroEnd) {
  EXPECT_NE(parse_error("model: {dim: 0.0e-9223372036854775808}").find("wanted an integer"),
            std::string::npos);
}

TEST(Parse, Numbers) {
  const auto lr = [](const std::string& text) { return parse("lr: " + text).lr; };
  EXPECT_EQ(lr("3e-4"), 3e-4);
  EXPECT_EQ(lr("1"), 1.0);
  EXPECT_EQ(lr(".5"), 0.5);
  EXPECT_EQ(lr("5."), 5.0);
  EXPECT_EQ(lr("+1E3"), 1000.0);
  EXPECT_EQ(lr(".inf"), std::numeric_limits<double>::infinity());
  for (const char* text : {"1_0.0", "inf", "nan", "0x1p3", "1e999", "1,5", "1e-4x", "1:30"}) {
    EXPECT_NE(parse_error("lr: " + std::string(text)).find("wanted a number"), std::string::npos) << text;
  }
}

TEST(Parse, LimitsHold) {
  EXPECT_EQ(parse_error("name: x\nlr: 0"), "run.yaml:2: lr: wanted more than 0, got 0.0");
  EXPECT_EQ(parse_error("lr: .nan"), "run.yaml:1: lr: wanted more than 0, got .nan");
  EXPECT_EQ(parse_error("model: {dim: 0}"), "run.yaml:1: model.dim: wanted at least 1, got 0");
  const std::string router = "model:\n  branches:\n    - router:\n        ";
  const std::string at = "run.yaml:4: model.branches.0.router.";
  EXPECT_EQ(parse_error(router + "top_k: 65"), at + "top_k: wanted at most 64, got 65");
  EXPECT_EQ(parse_error(router + "z_loss: 1"), at + "z_loss: wanted less than 1, got 1.0");
  EXPECT_EQ(parse_error(router + "layers: [0, -1]"), at + "layers.1: wanted at least 0, got -1");
  EXPECT_EQ(parse_error(router + "score: next"), at + "score: wanted one of own, previous, got next");
  EXPECT_EQ(parse_error("mixture:\n  a: 1\n  b.c: -1"),
            "run.yaml:3: mixture.\"b.c\": wanted at least 0, got -1.0");
  EXPECT_EQ(parse_error("pools: {p: {num_experts: 5}}"),
            "run.yaml:1: pools.p.num_experts: wanted one of 1, 4, 8, 16, 32, got 5");
}

TEST(Parse, RulesOfStructsGetPathAndLine) {
  EXPECT_EQ(
      parse_error(
          "model:\n  branches:\n    - name: a\n    - num_experts: 4\n      router:\n        top_k: 5\n"),
      "run.yaml:6: model.branches.1.router.top_k: wanted at most num_experts = 4, got 5");
  EXPECT_EQ(parse_error("model:\n  branches: []\n"),
            "run.yaml:2: model.branches: wanted at least one branch, got none");
  ExampleConfig base;
  base.model.branches = {{.name = "a", .num_experts = 4, .router = {.top_k = 5}}};
  EXPECT_EQ(error_of([&] { parse_config<ExampleConfig>("name: x\nmodel: {dim: 3}", "f", {}, base); }),
            "f:2: model.branches.0.router.top_k: wanted at most num_experts = 4, got 5")
      << "a default's place is that of the mapping around it";
  EXPECT_EQ(parse_error("pools: {p: {router: {top_k: 9}}}", {"pools.p.router.top_k=10"}),
            "command line: pools.p.router.top_k: wanted at most num_experts = 8, got 10");
}

TEST(Parse, DuplicateKeys) {
  EXPECT_EQ(parse_error("model:\n  dim: 1\n  tied: true\n  dim: 2\n"),
            "run.yaml:4: key \"dim\" given twice, first in line 2");
  EXPECT_EQ(parse_error("settings: {a: 1,\n \"a\": 2}"),
            "run.yaml:2: key \"a\" given twice, first in line 1");
}

TEST(Parse, BrokenTextIsOneLine) {
  for (const char* text :
       {"a: [1, 2", "a: 'x\nb: 2", "a: b: c", "\tname: x", "a\n b\n: c", "{\"a\": }", "- a\nb: c", "*x",
        "? [a]\n: b", "!foo a", "name: !bar x", "--- a\n--- b", ", a", "name: x\n]", "{}}"}) {
    const std::string message = parse_error(text);
    EXPECT_TRUE(message.starts_with("run.yaml:")) << text << " gave " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  EXPECT_EQ(parse_error("name: x\nlanguages: [a, b"),
            "run.yaml:2: not valid YAML: end of sequence flow not found");
  EXPECT_EQ(parse_error("name: a\n\xff"), "run.yaml:2: wanted UTF-8 text, got other bytes");
  EXPECT_EQ(parse_error("name: a\n# \x04\nlr: 0"), "run.yaml:2: wanted text, got the control character 4");
  EXPECT_EQ(parse_error("name: x\n---\nlr: 1\n"),
            "run.yaml:2: wanted one document, got more text after its end");
}

TEST(Parse, MessagesStayOneLineAndShort) {
  const std::string text = "model: {dim: \"" + std::string(1000, 'x') + "\\n\"}";
  EXPECT_EQ(parse_error(text),
            "run.yaml:1: model.dim: wanted an integer, got the text \"" + std::string(60, 'x') + "\"...");
}

TEST(Override, SetsOneValue) {
  const ExampleConfig config =
      parse("model: {dim: 3}",
            {"model.dim=5", "model.branches.1.router.top_k=4", "lr=1e-5", "model.tied=false",
             "model.branches.1.router.z_loss=0.5", "flags=[true]", "flags.0=false", "flags.1=true"});
  EXPECT_EQ(config.model.dim, 5);
  EXPECT_EQ(config.model.branches[1].router.top_k, 4);
  EXPECT_EQ(config.model.branches[1].router.kind, "segment") << "the rest of a default stays";
  EXPECT_EQ(config.model.branches[0].router.top_k, 2);
  EXPECT_EQ(config.lr, 1e-5);
  EXPECT_FALSE(config.model.tied);
  EXPECT_EQ(config.model.branches[1].router.z_loss, 0.5);
  EXPECT_EQ(config.flags, (std::vector<bool>{false, true}));
}

TEST(Override, TextNeedsNoQuotes) {
  EXPECT_EQ(parse("", {"name=7"}).name, "7");
  EXPECT_EQ(parse("", {"name=a: b #c, [d]=e"}).name, "a: b #c, [d]=e");
  EXPECT_EQ(parse("", {"name=\"a\\tb\""}).name, "a\tb");
  EXPECT_EQ(parse("", {"name='null'"}).name, "null");
  EXPECT_EQ(parse("", {"name="}).name, "");
  EXPECT_EQ(parse("", {"note=x y"}).note, "x y");
  EXPECT_FALSE(parse("note: a", {"note=null"}).note);
  EXPECT_FALSE(parse("note: a", {"note="}).note);
  EXPECT_EQ(parse("", {"languages.2=true"}).languages[2], "true");
}

TEST(Override, WholeListsMapsAndStructs) {
  const ExampleConfig config = parse(
      "", {"languages=[rust, go]", "mixture={rust: 0.5}", "model={dim: 9}", "model.branches.0={name: new}",
           "model.branches.2={name: third}", "model.extra={name: e}", "model.extra.router.top_k=1"});
  EXPECT_EQ(config.languages, (std::vector<std::string>{"rust", "go"}));
  EXPECT_EQ(config.mixture, (std::map<std::string, double>{{"rust", 0.5}}));
  EXPECT_EQ(config.model.dim, 9);
  EXPECT_EQ(config.model.branches[0].name, "new");
  EXPECT_EQ(config.model.branches[2].name, "third");
  EXPECT_EQ(config.model.extra->name, "e");
  EXPECT_EQ(config.model.extra->router.top_k, 1);
  EXPECT_FALSE(parse("model: {extra: {}}", {"model.extra=null"}).model.extra);
  EXPECT_EQ(parse("", {"model.extra.num_experts=4"}).model.extra->num_experts, 4);
}

TEST(Override, MapKeys) {
  const ExampleConfig config =
      parse("mixture: {rust: 1}", {"mixture.rust=2", "mixture.go=3", "settings.a.b=1", "settings.\"c.d\"=2",
                                   "pools.\"x.y\".num_experts=4", "settings.\"e=\\\"\"=3"});
  EXPECT_EQ(config.mixture, (std::map<std::string, double>{{"rust", 2}, {"go", 3}}));
  EXPECT_EQ(config.settings, (std::map<std::string, std::string>{{"a.b", "1"}, {"c.d", "2"}, {"e=\"", "3"}}));
  EXPECT_EQ(config.pools.at("x.y").num_experts, 4);
}

TEST(Override, ErrorsNameTheCommandLine) {
  EXPECT_EQ(override_error("model.dmi=3"), "command line: model.dmi: unknown key, did you mean dim?");
  EXPECT_EQ(override_error("model.dim=x"), "command line: model.dim: wanted an integer, got x");
  EXPECT_EQ(override_error("model.dim="), "command line: model.dim: wanted an integer, got nothing");
  EXPECT_EQ(override_error("model.dim=0"), "command line: model.dim: wanted at least 1, got 0");
  EXPECT_EQ(override_error("model.dim.x=0"),
            "command line: model.dim.x: unknown key, model.dim is an integer");
  EXPECT_EQ(override_error("model.branches.3.name=a"),
            "command line: model.branches.3: wanted an index from 0 to 2 (2 appends), got 3");
  EXPECT_EQ(override_error("model.branches.x.name=a"),
            "command line: model.branches.x: wanted an index from 0 to 2 (2 appends), got x");
  EXPECT_EQ(override_error("model={dmi: 3}"), "command line: model.dmi: unknown key, did you mean dim?");
  EXPECT_EQ(override_error("languages=rust"), "command line: languages: wanted a list, got rust");
  EXPECT_EQ(override_error("languages=[a"),
            "command line: languages: not valid YAML: end of sequence flow not found");
  EXPECT_EQ(override_error("mixture={a: 1, a: 2}"), "command line: mixture: key \"a\" given twice");
  EXPECT_EQ(override_error("mixture.a=-1"), "command line: mixture.a: wanted at least 0, got -1.0");
  EXPECT_EQ(override_error("model.branches.0.num_experts=4\xff"),
            "command line: wanted UTF-8 text, got other bytes");
  EXPECT_EQ(override_error("model.dim"), "command line: wanted key.path=value, got \"model.dim\"");
  EXPECT_EQ(override_error("=3"),
            "command line: wanted key.path=value, got \"=3\", where a part of the path is empty");
  EXPECT_EQ(override_error("a..b=3"),
            "command line: wanted key.path=value, got \"a..b=3\", where a part of the path is empty");
  EXPECT_EQ(override_error("mixture.\"a=3"),
            "command line: wanted key.path=value, got \"mixture.\\\"a=3\", where a quote is not closed");
}

TEST(Override, MayRepairTheFile) { EXPECT_EQ(parse("model: {dim: 0}", {"model.dim=4"}).model.dim, 4); }

TEST(Override, ForgetsPlacesOfWhatItReplaces) {
  EXPECT_EQ(
      parse_error("model:\n  branches:\n    - router: {top_k: 1}\n", {"model.branches=[{num_experts: 1}]"}),
      "command line: model.branches.0.router.top_k: wanted at most num_experts = 1, got 2");
}

}  // namespace
}  // namespace hymoe
