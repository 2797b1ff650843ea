#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hymoe {

/// A programming or markup language that the corpus tools know. The tag is CodeGeeX's (arXiv 2303.17568 and
/// its released data_utils), to the letter; prose ("text") has none.
struct Language {
  std::string_view name;                     // canonical: lower case, fit for file names and metric names
  std::string_view tag;                      // the document's first line, empty for none
  std::vector<std::string_view> extensions;  // lower case with the dot, or whole file names ("makefile")
  std::vector<std::string_view> aliases;     // other names, lower case
  bool prose = false;                        // lines and letters follow no rules of source code
};

/// All known languages, sorted by name.
const std::vector<Language>& languages();

/// The language of that name or alias, whatever its case ("C++", "cpp", "CPP"); nullptr when unknown.
const Language* find_language(std::string_view name);

/// The language of a file by its name or extension; an exact-case match is preferred (".R", ".C"). nullptr
/// when unknown.
const Language* language_of_file(const std::filesystem::path& path);

/// The name that token files and metrics use: the canonical name of a known language, else the name in lower
/// case. Throws DataError naming `where` when it is empty or holds other characters than a-z 0-9 + # - _ .
std::string normalize_language(std::string_view name, const std::string& where);

/// The one of `names` nearest to `name`, for error messages (" (nearest: rust)"); empty when none is near.
std::string nearest_hint(std::string_view name, const std::vector<std::string>& names);

}  // namespace hymoe
