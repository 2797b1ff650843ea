#include "hymoe/data/prepare.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <zlib.h>

#include "data/corpus.h"
#include "hymoe/config/config.h"
#include "hymoe/config/error.h"
#include "hymoe/config/version.h"
#include "hymoe/data/tokenizer.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;
using Texts = std::vector<std::string>;

std::string failure(const PrepareConfig& config) {
  return message_of<Error>([&] { prepare(config); });
}

std::map<std::string, std::string> files_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    files[entry.path().filename().string()] = read_text(entry.path());
  }
  return files;
}

TEST(Prepare, AFolderBecomesTaggedDocumentsWithAnEnd) {
  Corpus corpus;
  corpus.add("b/two.py", "y = 2\r\n");
  corpus.add("a.py", "x = 1\n");
  corpus.add("b.rs", "fn main() {}\n");
  corpus.add("notes.unknown", "nothing");
  PrepareConfig config = corpus.config();
  config.language_tags = true;
  const PrepareReport report = prepare(config);
  EXPECT_EQ(corpus.documents("python"),
            (Texts{"# language: Python\nx = 1\n$", "# language: Python\ny = 2\n$"}));
  EXPECT_EQ(corpus.documents("rust"), (Texts{"// language: Rust\nfn main() {}\n$"}));

  const Manifest manifest = read_manifest(corpus / "out");
  EXPECT_EQ(manifest.to_json(), report.manifest.to_json());
  EXPECT_EQ(manifest.version, kVersion);
  EXPECT_EQ(manifest.tokenizer_path, config.tokenizer);
  EXPECT_EQ(manifest.tokenizer_fingerprint, Tokenizer::load(config.tokenizer).fingerprint());
  EXPECT_EQ(manifest.vocab_size, 257);
  EXPECT_EQ(manifest.skipped, (std::map<std::string, int64_t>{{"unknown_language", 1}}));
  const LanguageRecord& python = manifest.languages.at("python");
  EXPECT_EQ(python.tag, "# language: Python");
  const SplitRecord& train = python.splits.at("train");
  EXPECT_EQ(train.file, "python.train.tokens");
  EXPECT_EQ(train.documents, 2);
  EXPECT_EQ(train.bytes, 12);
  EXPECT_EQ(train.tokens, 2 * (19 + 6 + 1));
  EXPECT_EQ(train.sha256, sha256_file(corpus / "out/python.train.tokens"));
  EXPECT_EQ(from_json<PrepareConfig>(nlohmann::json(manifest.config), "config").sources.size(), 1u);
  EXPECT_EQ(report.bytes_read, 7 + 6 + 13);
  open_token_file(corpus / "out", manifest, "python", "train").verify();
}

TEST(Prepare, HiddenFilesVersionControlAndLinksArePassedOver) {
  Corpus corpus;
  corpus.add("a.py", "a\n");
  corpus.add(".hidden.py", "b\n");
  corpus.add(".git/c.py", "c\n");
  corpus.add("CVS/d.py", "d\n");
  fs::create_symlink(put(corpus / "elsewhere/e.py", "e\n"), corpus / "src/e.py");
  fs::create_directory_symlink(corpus / "elsewhere", corpus / "src/linked");
  prepare(corpus.config());
  EXPECT_EQ(corpus.documents("python"), Texts{"a\n$"});
}

TEST(Prepare, LanguagesAreChosenAndFixed) {
  Corpus corpus;
  corpus.add("a.py", "a\n");
  corpus.add("b.h", "b\n");
  corpus.add("c.cpp", "c\n");
  corpus.add("d.c", "d\n");
  PrepareConfig config = corpus.config();
  config.languages = {"C++", "py"};
  prepare(config);
  EXPECT_EQ(corpus.documents("python"), Texts{"a\n$"});
  EXPECT_EQ(corpus.documents("cpp"), Texts{"c\n$"});
  EXPECT_EQ(read_manifest(corpus / "out").skipped.at("other_language"), 2);

  config.output = corpus.path("fixed");
  config.sources[0].language = "CPP";
  prepare(config);
  EXPECT_EQ(corpus.documents("cpp", "train", "fixed"), (Texts{"b\n$", "c\n$"})) << "headers may be C++";

  config.output = corpus.path("own");
  config.sources[0].language = "Mine";
  config.languages = {};
  prepare(config);
  EXPECT_EQ(corpus.documents("mine", "train", "own").size(), 4u)
      << "any file may hold a language of the user's";
}

std::string gzipped(const fs::path& path, const std::string& text) {
  const gzFile file = gzopen(path.c_str(), "wb");
  gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
  gzclose(file);
  return path.string();
}

TEST(Prepare, JsonLinesPlainAndPackedFolderAndText) {
  Corpus corpus;
  const std::string lines =
      "{\"code\": \"a\\n\", \"lang\": \"Python\"}\n\n{\"lang\": \"golang\", \"code\": \"b\"}\n";
  put(corpus / "x/1.jsonl", lines);
  gzipped(corpus / "x/2.jsonl.gz", "{\"code\": \"c\", \"lang\": \"py\"}");
  put(corpus / "x/readme.md", "not read\n");
  put(corpus / "plain.txt", "some prose\n");
  PrepareConfig config = corpus.config();
  config.sources = {
      {.path = corpus.path("x"), .format = "jsonl", .text_field = "code", .language_field = "lang"},
      {.path = corpus.path("plain.txt")},
      {.path = corpus.path("x/2.jsonl.gz"), .language = "ruby", .text_field = "lang"},
      {.path = corpus.path("x/2.jsonl.gz"), .text_field = "lang"}};
  config.remove_duplicates = false;
  prepare(config);
  EXPECT_EQ(corpus.documents("python"), (Texts{"a\n$", "c$"}));
  EXPECT_EQ(corpus.documents("go"), Texts{"b$"});
  EXPECT_EQ(corpus.documents("ruby"), Texts{"py$"});
  EXPECT_EQ(corpus.documents("text"), (Texts{"some prose\n$", "py$"}));
  const nlohmann::ordered_json sources = read_manifest(corpus / "out").sources;
  EXPECT_EQ(sources[0]["sha256"]["1.jsonl"], sha256(lines));
  EXPECT_EQ(sources[0]["sha256"].size(), 2u);
  EXPECT_EQ(sources[1]["format"], "text");
  EXPECT_EQ(sources[1]["sha256"]["plain.txt"], sha256("some prose\n"));
  EXPECT_EQ(sources[2]["path"], corpus.path("x/2.jsonl.gz"));
}

TEST(Prepare, BadJsonLinesAreNamedByLine) {
  Corpus corpus;
  PrepareConfig config = corpus.config();
  config.sources = {{.path = corpus.path("x.jsonl"), .language_field = "lang"}};
  const auto read = [&](const std::string& line) {
    put(corpus / "x.jsonl", "{\"text\": \"a\", \"lang\": \"go\"}\n" + line + "\n");
    return failure(config);
  };
  const std::string where = corpus.path("x.jsonl") + ":2: ";
  EXPECT_TRUE(holds(read("{\"text\": "), where + "this is no JSON"));
  EXPECT_TRUE(holds(read("[1]"), where + "a JSON object was wanted, got array"));
  EXPECT_TRUE(holds(read("{\"lang\": \"go\"}"), where + "the key 'text' is missing"));
  EXPECT_TRUE(
      holds(read("{\"text\": 3, \"lang\": \"go\"}"), where + "the key 'text' must hold text, got number"));
  EXPECT_TRUE(holds(read("{\"text\": \"a\"}"), where + "the key 'lang' is missing"));
  EXPECT_TRUE(
      holds(read("{\"text\": \"a\", \"lang\": \"../x\"}"), where + "a language's name holds letters"));
  EXPECT_FALSE(fs::exists(corpus / "out"));
}

TEST(Prepare, BinaryAndInvalidTextIsSkippedOrRefused) {
  Corpus corpus;
  corpus.add("a.py", "good\n");
  corpus.add("b.py", std::string_view("\x7f"
                                      "ELF\0\1",
                                      6));
  corpus.add("c.py", "caf\xe9\n");
  put(corpus / "x.jsonl", "{\"text\": \"\\u0000\"}\n{\"text\": \"\xff\"}\n");
  PrepareConfig config = corpus.config();
  config.sources.push_back({.path = corpus.path("x.jsonl"), .language = "go"});
  prepare(config);
  const Manifest manifest = read_manifest(corpus / "out");
  const std::map<std::string, int64_t> expected = {{"binary", 1}, {"invalid_utf8", 1}};
  EXPECT_EQ(manifest.languages.at("python").skipped, expected);
  EXPECT_EQ(manifest.languages.at("go").skipped, expected);
  EXPECT_EQ(corpus.documents("python"), Texts{"good\n$"});

  config.on_bad_text = "error";
  config.output = corpus.path("other");
  EXPECT_TRUE(holds(failure(config), corpus.path("src/b.py") + ": holds NUL bytes"));
  fs::remove(corpus / "src/b.py");
  EXPECT_TRUE(holds(failure(config), corpus.path("src/c.py") + ": the text is not valid UTF-8"));
  fs::remove(corpus / "src/c.py");
  EXPECT_TRUE(holds(failure(config), corpus.path("x.jsonl") + ":1: holds NUL bytes"));
}

TEST(Prepare, DuplicatesAreRemovedAcrossSourcesAndLineEnds) {
  Corpus corpus;
  corpus.add("a.py", "same\n");
  corpus.add("b.py", "same\r\n");
  corpus.add("c.py", "same");
  put(corpus / "more/d.go", "same\n");
  PrepareConfig config = corpus.config();
  config.sources.push_back({.path = corpus.path("more")});
  prepare(config);
  EXPECT_EQ(corpus.documents("python"), (Texts{"same\n$", "same$"}));
  const Manifest manifest = read_manifest(corpus / "out");
  EXPECT_EQ(manifest.languages.at("python").skipped.at("duplicate"), 1);
  EXPECT_EQ(manifest.languages.at("go").skipped.at("duplicate"), 1);
  EXPECT_TRUE(manifest.languages.at("go").splits.empty());
}

TEST(Prepare, FiltersAreCountedByReason) {
  Corpus corpus;
  corpus.add("a.py", "ok\n");
  corpus.add("b.py", "# Generated by a tool, do not edit\n");
  corpus.add("c.py", std::string(2000, 'x'));
  corpus.add("d.py", std::string(300000, 'x'));
  corpus.add("e.py", "");
  corpus.add("f.py", "1234567890\n");
  corpus.add("g.py", std::string(150, 'x') + "\n");
  PrepareConfig config = corpus.config();
  config.filters = {};
  prepare(config);
  const std::map<std::string, int64_t> expected = {{"few_letters", 1}, {"generated", 1}, {"long_line", 1},
                                                   {"long_lines", 1},  {"too_long", 1},  {"too_short", 1}};
  EXPECT_EQ(read_manifest(corpus / "out").languages.at("python").skipped, expected);
}

TEST(Prepare, TheSplitDependsOnContentAlone) {
  Corpus corpus;
  for (int i = 0; i < 400; ++i) corpus.add(numbered("f", i, ".py"), numbered("document ", i));
  PrepareConfig config = corpus.config();
  config.valid_share = 0.25;
  prepare(config);
  const Texts train = corpus.documents("python"), valid = corpus.documents("python", "valid");
  EXPECT_EQ(train.size() + valid.size(), 400u);
  EXPECT_NEAR(static_cast<double>(valid.size()), 100, 30);
  for (int i = 0; i < 100; ++i) corpus.add(numbered("a", i, ".py"), numbered("more ", i));
  config.output = corpus.path("more");
  prepare(config);
  const Texts later = corpus.documents("python", "valid", "more");
  for (const std::string& text : valid)
    EXPECT_TRUE(std::find(later.begin(), later.end(), text) != later.end());
  for (const std::string& text : later)
    EXPECT_TRUE(std::find(train.begin(), train.end(), text) == train.end());
}

TEST(Prepare, TheOutputDependsOnNeitherThreadsNorTheOrderOfTheDisk) {
  Corpus corpus;
  for (int i = 299; i >= 0; --i) {
    std::string text;
    for (int j = 0; j < i % 17; ++j) text += numbered("line ", i * j % 50, "\n");
    corpus.add(numbered("d", i % 7, "/f") + numbered("", i, i % 3 ? ".py" : ".rs"), text);
  }
  PrepareConfig config = corpus.config();
  config.valid_share = 0.1;
  std::map<std::string, std::string> first;
  for (int64_t threads : {1, 2, 7}) {
    config.threads = threads;
    config.output = corpus.path(numbered("out", threads));
    prepare(config);
    std::map<std::string, std::string> files = files_of(config.output);
    EXPECT_EQ(files.size(), 5u);
    files.erase(Manifest::kFileName);  // holds the config
    if (first.empty()) first = files;
    EXPECT_EQ(files, first);
  }
}

TEST(Prepare, ALimitOfBytesTakesNestedSubsets) {
  Corpus corpus;
  for (int i = 0; i < 100; ++i) corpus.add(numbered("f", i, ".py"), numbered("document number ", 100 + i));
  corpus.add("one.rs", "fn main() {}\n");
  PrepareConfig config = corpus.config();
  std::set<std::string> smaller;
  for (int64_t limit : {200, 700, 10000}) {
    config.max_language_bytes = limit;
    config.output = corpus.path(numbered("out", limit));
    prepare(config);
    const Texts texts = corpus.documents("python", "train", numbered("out", limit));
    const std::set<std::string> now(texts.begin(), texts.end());
    EXPECT_EQ(static_cast<int64_t>(now.size()), std::min<int64_t>(limit / 19, 100));
    EXPECT_TRUE(std::includes(now.begin(), now.end(), smaller.begin(), smaller.end()));
    EXPECT_EQ(corpus.documents("rust", "train", numbered("out", limit)).size(), 1u);
    smaller = now;
  }
  EXPECT_EQ(read_manifest(corpus / "out700").languages.at("python").skipped.at("over_limit"), 100 - 700 / 19);
}

TEST(Prepare, ALimitOfBytesDoesNotFavourShortDocuments) {
  Corpus corpus;
  for (int i = 1; i <= 100; ++i) corpus.add(numbered("f", i, ".py"), std::string(i, 'x'));
  PrepareConfig config = corpus.config();
  config.max_language_bytes = 5050 / 2;
  prepare(config);
  const Texts texts = corpus.documents("python");
  EXPECT_NEAR(static_cast<double>(texts.size()), 50, 15);
  const auto longer = [](const std::string& a, const std::string& b) { return a.size() < b.size(); };
  EXPECT_GT(std::max_element(texts.begin(), texts.end(), longer)->size(), 90u);
}

TEST(Prepare, LongDocumentsAreCutIntoTaggedPieces) {
  Corpus corpus;
  corpus.add("a.r", "abcdefghijklmnopqrstuvwxyz");  // tag "# language: R\n" of 14 tokens
  PrepareConfig config = corpus.config();
  config.language_tags = true;
  config.piece_tokens = 24;
  prepare(config);
  EXPECT_EQ(corpus.documents("r"),
            (Texts{"# language: R\nabcdefghij", "# language: R\nklmnopqrst", "# language: R\nuvwxyz$"}));
  config.output = corpus.path("exact");
  config.piece_tokens = 14 + 26 + 1;
  prepare(config);
  EXPECT_EQ(corpus.documents("r", "train", "exact").size(), 1u);
  config.output = corpus.path("short");
  config.piece_tokens = 14;
  EXPECT_TRUE(
      holds(failure(config), "piece_tokens: must be above the 14 tokens of the tag '# language: R', got 14"));
}

TEST(Prepare, TagsOfOtherLanguages) {
  Corpus corpus;
  put(corpus / "x.jsonl", "{\"text\": \"a\", \"lang\": \"Klingon\"}\n");
  PrepareConfig config = corpus.config();
  config.sources = {{.path = corpus.path("x.jsonl"), .language_field = "lang"}};
  config.language_tags = true;
  EXPECT_TRUE(holds(failure(config),
                    "tags: no language tag is known for 'klingon' (" + corpus.path("x.jsonl") + ":1)"));
  config.tags = {{"KLINGON", "## tlhIngan"}};
  prepare(config);
  EXPECT_EQ(corpus.documents("klingon"), Texts{"## tlhIngan\na$"});
  config.tags = {{"klingon", "two\nlines"}};
  EXPECT_TRUE(holds(failure(config), "tags.klingon: a tag is one line"));
}

TEST(Prepare, TextThatLooksLikeAnEndOfTextStaysText) {
  Corpus corpus;
  corpus.add("a.txt", "<|endoftext|>");
  prepare(corpus.config());
  EXPECT_EQ(corpus.documents("text"), Texts{"<|endoftext|>$"});
}

TEST(Prepare, TheTokenAtTheEndCanBeChosen) {
  Corpus corpus;
  corpus.add("a.txt", "a");
  put(corpus / "no_end.json", byte_tokenizer_json("<|other|>"));
  PrepareConfig config = corpus.config();
  config.tokenizer = corpus.path("no_end.json");
  config.end_token = "<|other|>";
  prepare(config);
  EXPECT_EQ(corpus.documents("text"), Texts{"a$"});
  config = corpus.config();
  config.end_token = "z";
  config.overwrite = true;
  prepare(config);
  EXPECT_EQ(corpus.documents("text"), Texts{"az"});
}

TEST(Prepare, PackageRecordsArePassedThrough) {
  Corpus corpus;
  corpus.add("one/a.py", "a\n");
  corpus.add("two/b.py", "b\n");
  const nlohmann::ordered_json records = {{"packages", {{{"name", "python3-x"}, {"licence", "MIT"}}}}};
  corpus.add("sources.json", records.dump());
  PrepareConfig config = corpus.config();
  config.sources = {{.path = corpus.path("src/one")}, {.path = corpus.path("src/two")}};
  for (int i = 0; i < 2; ++i) {
    prepare(config);
    const nlohmann::ordered_json sources = read_manifest(corpus / "out").sources;
    ASSERT_EQ(sources.size(), config.sources.size() + 1) << "the records of a folder above stand once";
    EXPECT_EQ(sources[0]["files"], config.sources.size() == 2 ? 1 : 2);
    EXPECT_EQ(sources.back()["path"], corpus.path("src/sources.json"));
    EXPECT_EQ(sources.back()["records"], records);
    config.sources = {{.path = corpus.path("src")}};
    config.overwrite = true;
  }
  corpus.add("sources.json", "{");
  EXPECT_TRUE(holds(failure(config), "src/sources.json: this is no JSON"));
}

TEST(Prepare, FilesThatChangeMeanwhileAreNoticed) {
  Corpus corpus;
  for (const std::string text : {"{\"text\": \"a\"}\n{\"text\": \"x\"}\n", "{\"text\": \"a\"}\n",
                                 "{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": \"c\"}\n"}) {
    put(corpus / "x.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
    PrepareConfig config = corpus.config();
    config.sources = {{.path = corpus.path("x.jsonl")}};
    const std::string what = message_of<DataError>([&] {
      prepare(config, [&](const std::string& phase, int64_t, int64_t) {
        if (phase == "scan") put(corpus / "x.jsonl", text);
      });
    });
    EXPECT_TRUE(holds(what, "changed while it was read")) << text;
    EXPECT_FALSE(fs::exists(corpus / "out"));
  }
}

TEST(Prepare, AFullDiskLeavesNothingBehind) {
  const SmallDisk disk("size=64k");
  if (!disk.mounted()) GTEST_SKIP() << "this user may not mount a small disk";
  Corpus corpus;
  corpus.add("a.txt", std::string(80000, 'x'));
  PrepareConfig config = corpus.config();
  config.output = (disk / "out").string();
  EXPECT_TRUE(holds(failure(config), "No space left"));
  EXPECT_TRUE(fs::is_empty(disk.path()));
}

TEST(Prepare, AnEmptyCorpusSaysWhatWasLeftOut) {
  Corpus corpus;
  fs::create_directories(corpus / "src");
  PrepareConfig config = corpus.config();
  EXPECT_TRUE(holds(failure(config),
                    corpus.path("src") + ": no document is left for the corpus; the sources are empty"));
  corpus.add("a.py", " \n");
  corpus.add("b.py", "caf\xe9");
  corpus.add("c.unknown", "x");
  EXPECT_TRUE(
      holds(failure(config), "left out: python invalid_utf8 1, python too_short 1, unknown_language 1"));
  EXPECT_FALSE(fs::exists(corpus / "out"));
  EXPECT_EQ(files_of(corpus / "src").size(), 3u);
}

TEST(Prepare, WhatIsMissingIsNamed) {
  Corpus corpus;
  corpus.add("a.py", "a\n");
  const auto with = [&](auto change) {
    PrepareConfig config = corpus.config();
    change(config);
    return failure(config);
  };
  EXPECT_TRUE(holds(with([&](auto& c) { c.sources[0].path = corpus.path("none"); }),
                    corpus.path("none") + ": there is no such file or folder"));
  EXPECT_TRUE(holds(with([](auto& c) { c.sources.clear(); }), "sources: at least one source was wanted"));
  EXPECT_TRUE(
      holds(with([](auto& c) { c.sources[0].path = ""; }), "sources.0.path: a folder or file was wanted"));
  EXPECT_TRUE(holds(with([](auto& c) { c.output = ""; }), "output: a folder to write was wanted"));
  EXPECT_TRUE(holds(with([](auto& c) { c.tokenizer = ""; }), "tokenizer: a tokenizer.json or its folder"));
  EXPECT_TRUE(holds(with([&](auto& c) { c.tokenizer = corpus.path("none"); }), corpus.path("none")));
  EXPECT_TRUE(
      holds(with([](auto& c) { c.sources[0].format = "text"; }), "a text file was wanted, this is a folder"));
  EXPECT_TRUE(
      holds(with([&](auto& c) { c.sources[0] = {.path = corpus.path("src/a.py"), .format = "folder"}; }),
            "this is no folder"));
  EXPECT_TRUE(holds(with([](auto& c) { c.sources[0].language = c.sources[0].language_field = "go"; }),
                    "exclude each other"));
  EXPECT_TRUE(holds(with([](auto& c) { c.valid_share = 1; }), "valid_share"));
  EXPECT_TRUE(holds(with([](auto& c) { c.filters.min_bytes = 1 << 20; }),
                    "filters.max_bytes: must be at least min_bytes"));
  put(corpus / "no_end.json", byte_tokenizer_json("<|other|>"));
  EXPECT_TRUE(
      holds(with([&](auto& c) { c.tokenizer = corpus.path("no_end.json"); }), "names no end-of-text token"));
  EXPECT_TRUE(holds(with([&](auto& c) { c.end_token = "<|other|>"; }), "has no token '<|other|>'"));
  EXPECT_FALSE(fs::exists(corpus / "out"));
}

TEST(Prepare, AFolderThatIsThereIsReplacedOnlyWhenAsked) {
  Corpus corpus;
  corpus.add("a.py", "a\n");
  put(corpus / "out/mine.txt", "mine");
  PrepareConfig config = corpus.config();
  config.overwrite = true;
  EXPECT_TRUE(holds(failure(config), "out: is there already and no folder that `hymoe prepare` wrote"));
  EXPECT_EQ(read_text(corpus / "out/mine.txt"), "mine");
  fs::remove(corpus / "out/mine.txt");
  config.overwrite = false;
  prepare(config);
  corpus.add("b.py", "b\n");
  EXPECT_TRUE(holds(failure(config), "out: is there already; overwrite: true replaces it"));
  EXPECT_EQ(corpus.documents("python").size(), 1u);
  config.overwrite = true;
  prepare(config);
  EXPECT_EQ(corpus.documents("python").size(), 2u);
}

TEST(Prepare, ProgressRisesToItsEnd) {
  Corpus corpus;
  for (int i = 0; i < 10; ++i) corpus.add(numbered("f", i, ".py"), numbered("document ", i));
  std::map<std::string, int64_t> done;
  prepare(corpus.config(), [&](const char* phase, int64_t now, int64_t total) {
    EXPECT_GE(now, done[phase]);
    EXPECT_LE(now, total);
    done[phase] = now;
  });
  EXPECT_EQ(done, (std::map<std::string, int64_t>{{"encode", 100}, {"scan", 100}}));
}

}  // namespace
}  // namespace hymoe
