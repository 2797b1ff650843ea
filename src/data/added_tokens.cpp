#include "data/added_tokens.h"

#include <algorithm>
#include <utility>

#include "data/unicode.h"

namespace hymoe {

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::ranges::sort(tokens_, {}, &AddedToken::content);
  all_special_ = std::ranges::all_of(tokens_, &AddedToken::special);
  for (const AddedToken& token : tokens_) {
    if (!first_bytes_.ends_with(token.content.front())) first_bytes_ += token.content.front();
  }
}

// Narrows the sorted contents byte by byte to those that `text` begins with.
const AddedToken* AddedTokenFinder::longest_at(std::string_view text) const {
  const AddedToken* longest = nullptr;
  auto first = tokens_.begin();
  auto last = tokens_.end();
  for (size_t depth = 0; depth < text.size() && first != last; ++depth) {
    const auto byte_at = [depth](const AddedToken& token) {
      return depth < token.content.size() ? static_cast<int>(static_cast<unsigned char>(token.content[depth]))
                                          : -1;
    };
    const int byte = static_cast<unsigned char>(text[depth]);
    const auto same = std::ranges::equal_range(first, last, byte, {}, byte_at);
    first = same.begin();
    last = same.end();
    if (first != last && first->content.size() == depth + 1) longest = &*first;
  }
  return longest;
}

void AddedTokenFinder::split(std::string_view text, bool allow_special, const Sink& sink) const {
  size_t done = 0;
  size_t at = tokens_.empty() || (all_special_ && !allow_special) ? std::string_view::npos
                                                                  : text.find_first_of(first_bytes_);
  while (at != std::string_view::npos) {
    const AddedToken* token = longest_at(text.substr(at));
    if (!token) {
      at = text.find_first_of(first_bytes_, at + 1);
      continue;
    }
    size_t begin = at;
    size_t end = at + token->content.size();
    at = text.find_first_of(first_bytes_, end);
    if (token->special && !allow_special) continue;
    if (token->single_word && (word_ends_at(text, begin) || word_begins_at(text, end))) continue;
    if (token->lstrip) begin = std::max(skip_space_back(text, begin), done);
    if (token->rstrip) end = skip_space(text, end);
    if (done < begin) sink(text.substr(done, begin - done), std::nullopt);
    sink(text.substr(begin, end - begin), token->id);
    done = end;
  }
  if (done < text.size()) sink(text.substr(done), std::nullopt);
}

}  // namespace hymoe
