#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace hymoe {

/// A programming or markup language that the corpus tools know. The tag is CodeGeeX's (arXiv 2303.17568 and
/// its released data_utils), to the letter; "text" has none.
struct Language {
  std::string_view name = {};                  // canonical: lower case, fit for file names and metric names
  std::string_view tag = {};                   // a document's first line, empty for none
  std::vector<std::string_view> aliases = {};  // other names, lower case
  std::vector<std::string_view> files = {};    // ".extension" or whole file name, lower case
  std::vector<std::string_view>
      shared;          // the same, where another language is meant unless this one is asked for
  bool prose = false;  // lines and letters follow no rules of source code
};

/// All known languages, sorted by name.
const std::vector<Language>& languages();

/// The language of that name or alias, whatever its case ("C++", "cpp", "CPP"); nullptr when unknown.
const Language* find_language(std::string_view name);

/// The language of a file by its name or extension, whatever its case; nullptr when unknown.
const Language* language_of_file(const std::filesystem::path& path);

/// Whether a file of that name can hold that language (a header is C's, and may be C++'s).
bool may_hold(const Language& language, const std::filesystem::path& path);

/// The name that token files and metrics use: the canonical name of a known language, else the name in lower
/// case. Throws DataError naming `where` when that is empty or holds other characters than a-z 0-9 + # - _
/// and dots inside.
std::string normalize_language(std::string_view name, const std::string& where);

}  // namespace hymoe
