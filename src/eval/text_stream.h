#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hymoe {

/// The text of a completion while its bytes arrive: knows which part is certain, ends it at a stop text, and
/// turns bytes that are no UTF-8 into U+FFFD.
class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stop) : stop_(std::move(stop)) {}

  /// Adds bytes; whether a stop text is complete now. Then text() ends before the first one.
  bool push(std::string_view bytes);
  /// What became certain since the last call: no character cut in two, nothing that may begin a stop text.
  std::string_view take();
  /// The end has come: everything is certain.
  void finish();

  const std::string& text() const { return text_; }

 private:
  void decode(bool last);
  size_t certain_size() const;

  std::vector<std::string> stop_;
  std::string pending_;  // bytes that are no whole character yet
  std::string text_;
  size_t taken_ = 0;
  bool finished_ = false;
};

}  // namespace hymoe
