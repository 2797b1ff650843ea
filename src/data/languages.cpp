#include "hymoe/data/languages.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

// ASCII only: names of languages and extensions hold nothing else.
std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
  }
  return out;
}

std::vector<Language> make_languages() {
  return {
      {"abap", "* language: Abap", {}, {".abap"}, {}},
      {"actionscript", "// language: ActionScript", {"as3"}, {".as"}, {}},
      {"assembly", "; language: Assembly", {"asm", "nasm"}, {".asm", ".s"}, {}},
      {"basic", "' language: Basic", {}, {".bas"}, {}},
      {"c", "// language: C", {}, {".c", ".h"}, {}},
      {"clojure", "; language: Clojure", {"clj"}, {".clj", ".cljs", ".cljc"}, {}},
      {"cobol", "// language: Cobol", {}, {".cob", ".cbl"}, {}},
      {"cpp",
       "// language: C++",
       {"c++", "cxx", "cplusplus"},
       {".cpp", ".cc", ".cxx", ".c++", ".hpp", ".hh", ".hxx", ".h++", ".ipp", ".tpp", ".inl"},
       {".h"}},
      {"csharp", "// language: C#", {"c#", "cs", "c-sharp"}, {".cs"}, {}},
      {"css", "/* language: CSS */", {}, {".css"}, {}},
      {"cuda", "// language: Cuda", {"cu"}, {".cu", ".cuh"}, {".h"}},
      {"dart", "// language: Dart", {}, {".dart"}, {}},
      {"delphi", "{language: Delphi}", {}, {".dpr", ".dpk"}, {".pas"}},
      {"elixir", "# language: Elixir", {"ex"}, {".ex", ".exs"}, {}},
      {"erlang", "% language: Erlang", {"erl"}, {".erl", ".hrl"}, {}},
      {"excel", "' language: Excel", {"vba"}, {".vba"}, {".bas"}},
      {"fortran", "!language: Fortran", {"f90"}, {".f", ".for", ".f77", ".f90", ".f95", ".f03", ".f08"}, {}},
      {"gdscript", "# language: GDScript", {"gd"}, {".gd"}, {}},
      {"go", "// language: Go", {"golang"}, {".go"}, {}},
      {"groovy", "// language: Groovy", {}, {".groovy", ".gradle", "jenkinsfile"}, {}},
      {"haskell", "-- language: Haskell", {"hs"}, {".hs"}, {}},
      {"html", "<!--language: HTML-->", {"htm"}, {".html", ".htm", ".xhtml"}, {}, true},
      {"java", "// language: Java", {}, {".java"}, {}},
      {"javascript",
       "// language: JavaScript",
       {"js", "node", "nodejs"},
       {".js", ".jsx", ".mjs", ".cjs"},
       {}},
      {"julia", "# language: Julia", {"jl"}, {".jl"}, {}},
      {"kotlin", "// language: Kotlin", {"kt"}, {".kt", ".kts"}, {}},
      {"lean", "-- language: Lean", {"lean4"}, {".lean"}, {}},
      {"lisp", "; language: Lisp", {"common-lisp", "common lisp", "elisp"}, {".lisp", ".lsp", ".el"}, {}},
      {"lua", "// language: Lua", {}, {".lua"}, {}},
      {"markdown", "<!--language: Markdown-->", {"md"}, {".md", ".markdown"}, {}, true},
      {"matlab", "% language: Matlab", {}, {}, {".m"}},
      {"objective-c", "// language: Objective-C", {"objectivec", "objective c", "objc"}, {".m"}, {".h"}},
      {"objective-c++",
       "// language: Objective-C++",
       {"objectivec++", "objective c++", "objc++", "objective-cpp"},
       {".mm"},
       {".h"}},
      {"pascal", "// language: Pascal", {}, {".pas", ".pp"}, {}},
      {"perl", "# language: Perl", {"pl"}, {".pl", ".pm"}, {".t"}},
      {"php", "// language: PHP", {}, {".php"}, {}},
      {"powershell", "# language: PowerShell", {"pwsh", "ps1"}, {".ps1", ".psm1"}, {}},
      {"prolog", "% language: Prolog", {}, {".prolog", ".pro"}, {".pl"}},
      {"python", "# language: Python", {"py", "python3"}, {".py", ".pyi", ".pyw"}, {}},
      {"r", "# language: R", {"rlang"}, {".r"}, {}},
      {"ruby", "# language: Ruby", {"rb"}, {".rb", ".rake", ".gemspec", "rakefile", "gemfile"}, {}},
      {"rust", "// language: Rust", {"rs"}, {".rs"}, {}},
      {"scala", "// language: Scala", {}, {".scala", ".sc"}, {}},
      {"scheme", "; language: Scheme", {"scm"}, {".scm", ".ss"}, {}},
      {"shell", "# language: Shell", {"sh", "bash", "zsh"}, {".sh", ".bash", ".zsh", ".ksh"}, {}},
      {"solidity", "// language: Solidity", {"sol"}, {".sol"}, {}},
      {"sql", "-- language: SQL", {}, {".sql"}, {}},
      {"swift", "// language: swift", {}, {".swift"}, {}},
      {"tex", "% language: TeX", {"latex"}, {".tex", ".sty"}, {".cls"}, true},
      {"text", "", {"txt", "plain", "plain text", "natural language"}, {".txt"}, {}, true},
      {"typescript", "// language: TypeScript", {"ts"}, {".ts", ".tsx", ".mts", ".cts"}, {}},
      {"vb",
       "' language: Visual Basic",
       {"visual basic", "visual-basic", "vb.net", "visualbasic"},
       {".vb"},
       {}},
      {"vue", "<!--language: Vue-->", {}, {".vue"}, {}},
  };
}

using Index = std::unordered_map<std::string_view, const Language*>;

Index index_names() {
  Index index;
  for (const Language& language : languages()) {
    index.emplace(language.name, &language);
    for (std::string_view alias : language.aliases) index.emplace(alias, &language);
  }
  return index;
}

Index index_files() {
  Index index;
  for (const Language& language : languages()) {
    for (std::string_view file : language.files) index.emplace(file, &language);
  }
  return index;
}

bool contains(const std::vector<std::string_view>& list, const std::string& item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

}  // namespace

const std::vector<Language>& languages() {
  static const std::vector<Language> all = make_languages();
  return all;
}

const Language* find_language(std::string_view name) {
  static const Index index = index_names();
  const auto found = index.find(lower(name));
  return found == index.end() ? nullptr : found->second;
}

const Language* language_of_file(const std::filesystem::path& path) {
  static const Index index = index_files();
  const std::string name = lower(path.filename().string());
  auto found = name.starts_with('.') ? index.end() : index.find(name);
  if (found == index.end()) found = index.find(lower(path.extension().string()));
  return found == index.end() ? nullptr : found->second;
}

bool may_hold(const Language& language, const std::filesystem::path& path) {
  const std::string name = lower(path.filename().string()), extension = lower(path.extension().string());
  return contains(language.files, name) || contains(language.files, extension) ||
         contains(language.shared, extension);
}

std::string normalize_language(std::string_view name, const std::string& where) {
  if (const Language* known = find_language(name)) return std::string(known->name);
  const std::string normal = lower(name);
  const bool fits =
      normal.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789+#-_.") == std::string::npos;
  if (normal.empty() || normal.front() == '.' || !fits) {
    throw DataError(
        where, "a language's name holds letters, digits and + # - _ . only, got '" + std::string(name) + "'");
  }
  return normal;
}

}  // namespace hymoe
