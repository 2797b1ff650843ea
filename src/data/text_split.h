#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;

namespace hymoe {

/// One step of cutting text into words, as a pre_tokenizer of `tokenizers`.
struct SplitStep {
  enum class Kind { kRegex, kLiteral, kPrefixSpace };
  /// What becomes of the matches: pieces of their own, dropped, glued to a neighbour, or glued to one
  /// another.
  enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

  static SplitStep regex(std::string_view pattern, Behavior behavior = Behavior::kIsolated);

  Kind kind = Kind::kRegex;
  std::string pattern = {};
  Behavior behavior = Behavior::kIsolated;
  bool invert = false;
};

/// What in `pattern` the regular expressions of `tokenizers` (Oniguruma) and PCRE2 read differently, or that
/// depends on the version of Unicode; empty when nothing does.
std::string unsupported_in_pattern(std::string_view pattern);

/// Cuts text into words by steps, each applied to every piece that the one before left.
class TextSplitter {
 public:
  /// Throws std::invalid_argument on a pattern that is malformed or not supported.
  explicit TextSplitter(std::vector<SplitStep> steps);

  using Sink = std::function<void(std::string_view word)>;
  /// Calls `sink` with each word of `text` (valid UTF-8), none of them empty. A word may be a view of `text`
  /// or of memory that lives no longer than the call.
  void split(std::string_view text, const Sink& sink) const;

 private:
  struct CodeDeleter {
    void operator()(pcre2_real_code_8* code) const;
  };
  struct Step : SplitStep {
    explicit Step(SplitStep step);
    std::unique_ptr<pcre2_real_code_8, CodeDeleter> code;
    bool jit = false;
  };
  // A piece of text, and the same bytes with stable categories for the patterns to look at.
  struct Piece {
    std::string_view text;
    const char* subject;
    Piece slice(size_t begin, size_t end) const { return {text.substr(begin, end - begin), subject + begin}; }
  };
  struct Range {
    size_t begin, end;
    bool match;
  };

  bool find(const Step& step, Piece piece, size_t from, pcre2_real_match_data_8* data, Range& found) const;
  std::vector<Range> ranges(const Step& step, Piece piece, pcre2_real_match_data_8* data) const;
  void run(size_t index, Piece piece, pcre2_real_match_data_8* data, const Sink& sink) const;

  std::vector<Step> steps_;
};

}  // namespace hymoe
