#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/text_split.h"

#include <algorithm>
#include <cctype>
#include <stdexcept>
#include <utility>

#include <pcre2.h>

#include "data/json_node.h"
#include "data/unicode.h"

namespace hymoe {
namespace {

std::string pcre2_message(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

// Reads the part of the pattern language whose meaning is the same in both engines.
class PatternCheck {
 public:
  explicit PatternCheck(std::string_view pattern) : pattern_(pattern) {}

  std::string run() {
    while (at_ < pattern_.size() && trouble_.empty()) {
      if (pattern_[at_] == '\\') {
        escape();
      } else if (pattern_[at_] == '[') {
        char_class();
      } else if (pattern_[at_] == '(') {
        group();
      } else if (pattern_[at_] == ')') {
        if (!outer_caseless_.empty()) {
          caseless_ = outer_caseless_.back();
          outer_caseless_.pop_back();
        }
        at_ += 1;
      } else if (pattern_[at_] == '{') {
        repeat();
      } else if (pattern_[at_] == '^' || pattern_[at_] == '$') {
        refuse(at_, at_ + 1);
      } else {
        // Ignoring case, Oniguruma also takes one character for two: \u00DF for ss, a ligature for fi.
        for (const std::string_view pair : {"ss", "st", "ff", "fi", "fl"}) {
          if (caseless_ && pattern_.substr(at_, 2) == pair) refuse(at_, at_ + 2);
        }
        at_ += 1;
      }
    }
    return trouble_;
  }

 private:
  void refuse(size_t begin, size_t end) { trouble_ = std::string(pattern_.substr(begin, end - begin)); }

  void escape() {
    const size_t begin = at_;
    const char c = at_ + 1 < pattern_.size() ? pattern_[at_ + 1] : '\0';
    at_ += 2;
    if (c == 'p' || c == 'P') {
      const size_t end = pattern_.find('}', at_);
      if (at_ >= pattern_.size() || pattern_[at_] != '{' || end == std::string_view::npos) {
        return refuse(begin, at_);
      }
      std::string_view name = pattern_.substr(at_ + 1, end - at_ - 1);
      at_ = end + 1;
      if (name.starts_with('^')) name.remove_prefix(1);
      static constexpr std::string_view kCategories =
          " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp ";
      std::string padded(1, ' ');
      padded.append(name).append(1, ' ');
      const bool known = kCategories.find(padded) != std::string_view::npos;
      // Ignoring case, the engines disagree on what \p{Lu} holds.
      if (!known || (caseless_ && (name == "Lu" || name == "Ll" || name == "Lt"))) refuse(begin, at_);
    } else if (c == 'x') {
      const size_t end = pattern_.find('}', at_);
      const bool braced = at_ < pattern_.size() && pattern_[at_] == '{' && end != std::string_view::npos;
      if (!braced) return refuse(begin, at_);
      at_ = end + 1;
    } else if (std::string_view("sSdDrntf").find(c) == std::string_view::npos &&
               !(c > ' ' && c < 0x7F && !std::isalnum(static_cast<unsigned char>(c)))) {
      refuse(begin, std::min(at_, pattern_.size()));
    }
  }

  void char_class() {
    const size_t begin = at_++;
    if (at_ < pattern_.size() && pattern_[at_] == '^') ++at_;
    const size_t first = at_;
    while (at_ < pattern_.size() && trouble_.empty()) {
      const char c = pattern_[at_];
      if (c == ']' && at_ > first) {
        ++at_;
        return;
      }
      if (c == ']' || c == '[' || pattern_.substr(at_, 2) == "&&") return refuse(begin, at_ + 1);
      if (c == '\\') {
        escape();
      } else {
        ++at_;
      }
    }
  }

  void group() {
    outer_caseless_.push_back(caseless_);
    static constexpr std::string_view kOpenings[] = {"(?i:", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    for (const std::string_view opening : kOpenings) {
      if (!pattern_.substr(at_).starts_with(opening)) continue;
      caseless_ = caseless_ || opening == "(?i:";
      at_ += opening.size();
      return;
    }
    if (pattern_.substr(at_, 2) == "(?" || pattern_.substr(at_, 2) == "(*") return refuse(at_, at_ + 3);
    at_ += 1;
  }

  // {n}, {n,}, {n,m}; what may follow them means another thing in Ruby's syntax.
  void repeat() {
    const size_t begin = at_;
    const size_t end = pattern_.find('}', at_);
    const std::string_view inside = pattern_.substr(at_ + 1, end - at_ - 1);
    const bool plain = end != std::string_view::npos && !inside.empty() && inside[0] != ',' &&
                       inside.find_first_not_of("0123456789,") == std::string_view::npos;
    if (!plain) return refuse(begin, begin + 1);
    at_ = end + 1;
    if (at_ < pattern_.size() && (pattern_[at_] == '+' || pattern_[at_] == '?')) refuse(begin, at_ + 1);
  }

  std::string_view pattern_;
  size_t at_ = 0;
  bool caseless_ = false;
  std::vector<bool> outer_caseless_;  // of each open group
  std::string trouble_;
};

}  // namespace

SplitStep SplitStep::regex(std::string_view pattern, Behavior behavior) {
  SplitStep step;
  step.pattern = std::string(pattern);
  step.behavior = behavior;
  return step;
}

std::string unsupported_in_pattern(std::string_view pattern) { return PatternCheck(pattern).run(); }

void TextSplitter::CodeDeleter::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

TextSplitter::Step::Step(SplitStep step) : SplitStep(std::move(step)) {
  if (kind != Kind::kRegex) return;
  if (const std::string trouble = unsupported_in_pattern(pattern); !trouble.empty()) {
    throw std::invalid_argument("\"" + trouble + "\" in the pattern is not supported");
  }
  int error = 0;
  size_t offset = 0;
  code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                           PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr));
  if (!code) {
    throw std::invalid_argument(pcre2_message(error) + " at byte " + std::to_string(offset) +
                                " of the pattern");
  }
  jit = pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE) == 0;
}

TextSplitter::TextSplitter(std::vector<SplitStep> steps) {
  for (SplitStep& step : steps) steps_.emplace_back(std::move(step));
}

void TextSplitter::split(std::string_view text, const Sink& sink) const {
  std::string buffer;
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
      pcre2_match_data_create(1, nullptr), &pcre2_match_data_free);
  run(0, {text, with_stable_categories(text, buffer).data()}, data.get(), sink);
}

void TextSplitter::run(size_t index, Piece piece, pcre2_real_match_data_8* data, const Sink& sink) const {
  if (piece.text.empty()) return;
  if (index == steps_.size()) return sink(piece.text);
  const Step& step = steps_[index];
  if (step.kind == SplitStep::Kind::kPrefixSpace) {
    if (piece.text.front() == ' ') return run(index + 1, piece, data, sink);
    std::string text(1, ' ');
    text.append(piece.text);
    std::string subject(1, ' ');
    subject.append(piece.subject, piece.text.size());
    return run(index + 1, {text, subject.data()}, data, sink);
  }
  if (step.behavior == SplitStep::Behavior::kIsolated) {
    size_t done = 0;
    Range found{0, 0, false};
    while (find(step, piece, found.end, data, found)) {
      run(index + 1, piece.slice(done, found.begin), data, sink);
      run(index + 1, piece.slice(found.begin, found.end), data, sink);
      done = found.end;
    }
    return run(index + 1, piece.slice(done, piece.text.size()), data, sink);
  }
  for (const Range& range : ranges(step, piece, data)) {
    run(index + 1, piece.slice(range.begin, range.end), data, sink);
  }
}

// The next match that begins at `from` or later; an empty one right where the last match ended does not
// count.
bool TextSplitter::find(const Step& step, Piece piece, size_t from, pcre2_real_match_data_8* data,
                        Range& found) const {
  const std::string_view subject(piece.subject, piece.text.size());
  if (step.kind == SplitStep::Kind::kLiteral) {
    const size_t begin = step.pattern.empty() ? std::string_view::npos : piece.text.find(step.pattern, from);
    if (begin == std::string_view::npos) return false;
    found = {begin, begin + step.pattern.size(), true};
    return true;
  }
  const auto* bytes = reinterpret_cast<PCRE2_SPTR>(subject.data());
  const bool after_match = found.match;
  while (from <= subject.size()) {
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (step.jit) rc = pcre2_jit_match(step.code.get(), bytes, subject.size(), from, 0, data, nullptr);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(step.code.get(), bytes, subject.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                       nullptr);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return false;
    if (rc < 0) throw DataError("split pattern " + one_line(step.pattern), pcre2_message(rc));
    const size_t* ends = pcre2_get_ovector_pointer(data);
    if (ends[0] == ends[1] && after_match && ends[1] == found.end) {
      do ++from;
      while (from < subject.size() && (static_cast<unsigned char>(subject[from]) & 0xC0) == 0x80);
      continue;
    }
    found = {ends[0], ends[1], true};
    return true;
  }
  return false;
}

// Matches and what lies between them, cut and glued by the step's behavior; dropped ranges are not among
// them.
std::vector<TextSplitter::Range> TextSplitter::ranges(const Step& step, Piece piece,
                                                      pcre2_real_match_data_8* data) const {
  using Behavior = SplitStep::Behavior;
  std::vector<Range> all;
  Range found{0, 0, false};
  size_t done = 0;
  while (find(step, piece, found.end, data, found)) {
    if (done != found.begin) all.push_back({done, found.begin, step.invert});
    all.push_back({found.begin, found.end, !step.invert});
    done = found.end;
  }
  if (done != piece.text.size()) all.push_back({done, piece.text.size(), step.invert});

  if (step.behavior == Behavior::kIsolated) return all;
  if (step.behavior == Behavior::kRemoved) {
    std::erase_if(all, [](const Range& range) { return range.match; });
    return all;
  }
  const bool backwards = step.behavior == Behavior::kMergedWithNext;
  if (backwards) std::reverse(all.begin(), all.end());
  std::vector<Range> glued;
  bool last_match = false;
  for (const Range& range : all) {
    const bool glue =
        step.behavior == Behavior::kContiguous ? range.match == last_match : range.match && !last_match;
    if (glue && !glued.empty()) {
      (backwards ? glued.back().begin : glued.back().end) = backwards ? range.begin : range.end;
    } else {
      glued.push_back(range);
    }
    last_match = range.match;
  }
  if (backwards) std::reverse(glued.begin(), glued.end());
  return glued;
}

}  // namespace hymoe
