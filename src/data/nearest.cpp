#include "data/nearest.h"

#include <algorithm>
#include <numeric>

namespace hymoe {
namespace {

// Levenshtein's distance.
size_t edits(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t change = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({change, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string choices(std::string_view name, const std::vector<std::string>& names) {
  if (names.empty()) return "; there are none";
  const auto closer = [&](const std::string& a, const std::string& b) {
    return edits(name, a) < edits(name, b);
  };
  std::string text = "; nearest: " + *std::min_element(names.begin(), names.end(), closer) + ", there are ";
  for (size_t i = 0; i < names.size(); ++i) text += (i ? ", " : "") + names[i];
  return text;
}

}  // namespace hymoe
