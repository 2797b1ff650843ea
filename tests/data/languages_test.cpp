#include "hymoe/data/languages.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include "hymoe/config/error.h"
#include "temporary_folder.h"

namespace hymoe {
namespace {

// Keys and strings as CodeGeeX's LANGUAGE_TAG has them.
const std::map<std::string, std::string> kCodeGeeX = {
    {"c", "// language: C"},
    {"c++", "// language: C++"},
    {"cpp", "// language: C++"},
    {"c#", "// language: C#"},
    {"csharp", "// language: C#"},
    {"css", "/* language: CSS */"},
    {"cuda", "// language: Cuda"},
    {"dart", "// language: Dart"},
    {"lua", "// language: Lua"},
    {"objectivec", "// language: Objective-C"},
    {"objective-c", "// language: Objective-C"},
    {"objective-c++", "// language: Objective-C++"},
    {"python", "# language: Python"},
    {"perl", "# language: Perl"},
    {"prolog", "% language: Prolog"},
    {"swift", "// language: swift"},
    {"lisp", "; language: Lisp"},
    {"java", "// language: Java"},
    {"scala", "// language: Scala"},
    {"tex", "% language: TeX"},
    {"vue", "<!--language: Vue-->"},
    {"markdown", "<!--language: Markdown-->"},
    {"html", "<!--language: HTML-->"},
    {"php", "// language: PHP"},
    {"js", "// language: JavaScript"},
    {"javascript", "// language: JavaScript"},
    {"typescript", "// language: TypeScript"},
    {"go", "// language: Go"},
    {"shell", "# language: Shell"},
    {"rust", "// language: Rust"},
    {"sql", "-- language: SQL"},
    {"kotlin", "// language: Kotlin"},
    {"vb", "' language: Visual Basic"},
    {"ruby", "# language: Ruby"},
    {"pascal", "// language: Pascal"},
    {"r", "# language: R"},
    {"fortran", "!language: Fortran"},
    {"lean", "-- language: Lean"},
    {"matlab", "% language: Matlab"},
    {"delphi", "{language: Delphi}"},
    {"scheme", "; language: Scheme"},
    {"basic", "' language: Basic"},
    {"assembly", "; language: Assembly"},
    {"groovy", "// language: Groovy"},
    {"abap", "* language: Abap"},
    {"gdscript", "# language: GDScript"},
    {"haskell", "-- language: Haskell"},
    {"julia", "# language: Julia"},
    {"elixir", "# language: Elixir"},
    {"excel", "' language: Excel"},
    {"clojure", "; language: Clojure"},
    {"actionscript", "// language: ActionScript"},
    {"solidity", "// language: Solidity"},
    {"powershell", "# language: PowerShell"},
    {"erlang", "% language: Erlang"},
    {"cobol", "// language: Cobol"},
};

TEST(Languages, TagsAreCodeGeeXs) {
  std::set<std::string> tags;
  for (const auto& [name, tag] : kCodeGeeX) {
    const Language* language = find_language(name);
    ASSERT_NE(language, nullptr) << name;
    EXPECT_EQ(language->tag, tag) << name;
    tags.insert(tag);
  }
  for (const Language& language : languages()) {
    if (language.name == "text") {
      EXPECT_EQ(language.tag, "");
    } else {
      EXPECT_TRUE(tags.contains(std::string(language.tag))) << language.name;
    }
  }
}

TEST(Languages, NamesAreSortedUniqueAndFindThemselves) {
  std::set<std::string_view> names, files;
  for (const Language& language : languages()) {
    EXPECT_TRUE(names.insert(language.name).second) << language.name;
    for (std::string_view alias : language.aliases) EXPECT_TRUE(names.insert(alias).second) << alias;
    for (std::string_view file : language.files) EXPECT_TRUE(files.insert(file).second) << file;
    EXPECT_EQ(normalize_language(language.name, "here"), language.name);
  }
  EXPECT_TRUE(std::is_sorted(languages().begin(), languages().end(),
                             [](const Language& a, const Language& b) { return a.name < b.name; }));
}

TEST(Languages, AliasesInAnyCase) {
  EXPECT_EQ(normalize_language("C++", "here"), "cpp");
  EXPECT_EQ(normalize_language("Golang", "here"), "go");
  EXPECT_EQ(normalize_language("PY", "here"), "python");
  EXPECT_EQ(normalize_language("Visual Basic", "here"), "vb");
  EXPECT_EQ(find_language("klingon"), nullptr);
  EXPECT_EQ(normalize_language("Klingon-2", "here"), "klingon-2");
}

TEST(Languages, OfFiles) {
  const std::map<std::string, std::string> names = {
      {"a.py", "python"},      {"a.hpp", "cpp"},     {"a.h", "c"},           {"A.JAVA", "java"},
      {"lib.rs", "rust"},      {"main.go", "go"},    {"x.rb", "ruby"},       {"d/Rakefile", "ruby"},
      {"a.tar.sh", "shell"},   {"a.R", "r"},         {"a.m", "objective-c"}, {"a.cs", "csharp"},
      {"a.tsx", "typescript"}, {"notes.txt", "text"}};
  for (const auto& [file, name] : names) {
    ASSERT_NE(language_of_file(file), nullptr) << file;
    EXPECT_EQ(language_of_file(file)->name, name) << file;
  }
  for (const char* file : {"README", "a.unknown", "py", ".py", "a.", ""})
    EXPECT_EQ(language_of_file(file), nullptr) << file;
  EXPECT_TRUE(may_hold(*find_language("cpp"), "a.h"));
  EXPECT_TRUE(may_hold(*find_language("matlab"), "a.m"));
  EXPECT_FALSE(may_hold(*find_language("cpp"), "a.c"));
  EXPECT_FALSE(may_hold(*find_language("cpp"), "README"));
}

TEST(Languages, NamesThatAreNoFileNamesAreRefused) {
  for (const char* name : {"", "a/b", "../x", ".hidden", "a b", "ärger"}) {
    const std::string what = message_of<DataError>([&] { normalize_language(name, "f.jsonl:3"); });
    EXPECT_TRUE(holds(what, "f.jsonl:3: a language's name holds letters, digits")) << name;
    EXPECT_TRUE(holds(what, std::string("got '") + name + "'"));
  }
}

}  // namespace
}  // namespace hymoe
