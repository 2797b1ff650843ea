#pragma once

#include <cstddef>
#include <string>

namespace hymoe {

/// Appends to an error's text "; 7 tensors missing: a, b, c, d, e and 2 more" (what: "tensors missing");
/// nothing for no names.
template <typename Names>
void append_names(std::string& text, const Names& names, const std::string& what) {
  constexpr size_t kNamesInAnError = 5;
  if (names.empty()) return;
  text += (text.empty() ? "" : "; ") + std::to_string(names.size()) + " " + what + ": ";
  size_t i = 0;
  for (auto name = names.begin(); name != names.end() && i < kNamesInAnError; ++name, ++i)
    text += (i == 0 ? "" : ", ") + *name;
  if (names.size() > i) text += " and " + std::to_string(names.size() - i) + " more";
}

}  // namespace hymoe
