#include "data/bpe.h"

#include <bit>
#include <cstring>
#include <limits>
#include <queue>
#include <tuple>

namespace hymoe {
namespace {

constexpr int32_t kNone = -1;
constexpr size_t kShort = 64;  // longer words are merged by a heap instead of scans

struct ByteMap {
  std::array<char16_t, 256> character;
  std::array<int16_t, 324> byte;  // of a character, or -1
};

constexpr ByteMap make_byte_map() {
  ByteMap map{};
  for (int16_t& byte : map.byte) byte = -1;
  char16_t next = 256;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    map.character[b] = printable ? static_cast<char16_t>(b) : next++;
    map.byte[map.character[b]] = static_cast<int16_t>(b);
  }
  return map;
}
constexpr ByteMap kByteMap = make_byte_map();

uint64_t mix(uint64_t x) {
  x *= 0x9E3779B97F4A7C15u;
  return x ^ (x >> 32);
}

uint32_t hash_word(std::string_view word) {
  uint64_t hash = word.size();
  const char* p = word.data();
  size_t left = word.size();
  for (; left >= 8; p += 8, left -= 8) {
    uint64_t chunk;
    std::memcpy(&chunk, p, 8);
    hash = mix(hash ^ chunk);
  }
  uint64_t tail = 0;
  for (size_t i = 0; i < left; ++i) tail |= uint64_t{static_cast<unsigned char>(p[i])} << (8 * i);
  return static_cast<uint32_t>(mix(hash ^ tail));
}

}  // namespace

std::optional<std::string> bytes_of_characters(std::string_view token) {
  std::string bytes;
  for (size_t i = 0; i < token.size(); ++i) {
    unsigned c = static_cast<unsigned char>(token[i]);
    if (c >= 0xC0 && i + 1 < token.size()) {
      if (c >= 0xE0) return std::nullopt;
      c = (c & 0x1F) << 6 | (static_cast<unsigned char>(token[++i]) & 0x3F);
    }
    if (c >= kByteMap.byte.size() || kByteMap.byte[c] < 0) return std::nullopt;
    bytes += static_cast<char>(kByteMap.byte[c]);
  }
  return bytes;
}

std::string characters_of_bytes(std::string_view bytes) {
  std::string token;
  for (const char byte : bytes) {
    const unsigned c = kByteMap.character[static_cast<unsigned char>(byte)];
    if (c < 0x80) {
      token += static_cast<char>(c);
    } else {
      token += static_cast<char>(0xC0 | c >> 6);
      token += static_cast<char>(0x80 | (c & 0x3F));
    }
  }
  return token;
}

Bpe::Bpe(const std::vector<std::string>& tokens, const std::vector<Merge>& merges, Options options)
    : options_(options) {
  byte_ids_.fill(kNone);
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (tokens[id].size() == 1) {
      byte_ids_[static_cast<unsigned char>(tokens[id][0])] = static_cast<int32_t>(id);
    }
  }
  pairs_.resize(std::bit_ceil(2 * merges.size() + 2));
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    auto* pair = const_cast<Pair*>(find_pair(merge.left, merge.right));
    if (!pair) {
      size_t i = mix(uint64_t(merge.left) << 32 | uint32_t(merge.right)) & (pairs_.size() - 1);
      while (pairs_[i].key != Pair().key) i = (i + 1) & (pairs_.size() - 1);
      pair = &pairs_[i];
    }
    *pair = {uint64_t(merge.left) << 32 | uint32_t(merge.right), static_cast<int32_t>(rank), merge.result};
  }
  // A token that its own bytes merge to needs no merging when it comes as a word.
  std::vector<std::pair<std::string_view, int32_t>> whole;
  std::vector<int32_t> ids;
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (tokens[id].empty()) continue;
    ids.clear();
    if (!options_.ignore_merges) append_symbols(tokens[id], ids);
    if (options_.ignore_merges || (ids.size() == 1 && ids[0] == static_cast<int32_t>(id))) {
      whole.emplace_back(tokens[id], static_cast<int32_t>(id));
    }
  }
  words_.resize(std::bit_ceil(2 * whole.size() + 2));
  for (const auto& [bytes, id] : whole) add_word(bytes, id);
}

void Bpe::add_word(std::string_view bytes, int32_t id) {
  const uint32_t hash = hash_word(bytes);
  size_t i = hash & (words_.size() - 1);
  while (words_[i].id >= 0) i = (i + 1) & (words_.size() - 1);
  words_[i] = {hash, id, static_cast<uint32_t>(word_bytes_.size()), static_cast<uint32_t>(bytes.size())};
  word_bytes_ += bytes;
}

const Bpe::Pair* Bpe::find_pair(int32_t left, int32_t right) const {
  const uint64_t key = uint64_t(left) << 32 | uint32_t(right);
  for (size_t i = mix(key) & (pairs_.size() - 1);; i = (i + 1) & (pairs_.size() - 1)) {
    if (pairs_[i].key == key) return &pairs_[i];
    if (pairs_[i].key == Pair().key) return nullptr;
  }
}

const Bpe::Word* Bpe::find_word(std::string_view word, uint32_t hash) const {
  for (size_t i = hash & (words_.size() - 1);; i = (i + 1) & (words_.size() - 1)) {
    const Word& entry = words_[i];
    if (entry.id < 0) return nullptr;
    if (entry.hash == hash && entry.size == word.size() &&
        std::memcmp(&word_bytes_[entry.offset], word.data(), word.size()) == 0) {
      return &entry;
    }
  }
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& out) const {
  if (word.empty()) return;
  if (const Word* whole = find_word(word, hash_word(word))) {
    out.push_back(whole->id);
  } else {
    append_symbols(word, out);
  }
}

void Bpe::append_symbols(std::string_view word, std::vector<int32_t>& out) const {
  const size_t begin = out.size();
  bool after_unknown = false;
  for (const char c : word) {
    const int32_t id = byte_ids_[static_cast<unsigned char>(c)];
    if (id >= 0) {
      out.push_back(id);
    } else if (options_.unknown && !(after_unknown && options_.fuse_unknown)) {
      out.push_back(*options_.unknown);
    }
    after_unknown = id < 0;
  }
  const size_t count = out.size() - begin;
  int32_t* symbols = out.data() + begin;
  out.resize(begin + (count <= kShort ? merge_short(symbols, count) : merge_long(symbols, count)));
}

// Scans for the lowest rank, the leftmost of equals, until no pair merges. Returns how many symbols are left.
size_t Bpe::merge_short(int32_t* symbols, size_t count) const {
  constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();
  if (count < 2) return count;
  std::array<int32_t, kShort> ranks;
  std::array<int32_t, kShort> results;
  const auto look_up = [&](size_t i) {
    const Pair* pair = find_pair(symbols[i], symbols[i + 1]);
    ranks[i] = pair ? pair->rank : kNoRank;
    if (pair) results[i] = pair->result;
  };
  for (size_t i = 0; i + 1 < count; ++i) look_up(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (ranks[i] < ranks[best]) best = i;
    }
    if (ranks[best] == kNoRank) break;
    symbols[best] = results[best];
    const size_t behind = count - best - 2;
    std::memmove(&symbols[best + 1], &symbols[best + 2], behind * sizeof(int32_t));
    std::memmove(&ranks[best], &ranks[best + 1], behind * sizeof(int32_t));
    std::memmove(&results[best], &results[best + 1], behind * sizeof(int32_t));
    --count;
    if (best > 0) look_up(best - 1);
    if (best + 1 < count) look_up(best);
  }
  return count;
}

// The same by a heap of candidate merges over a linked list: n log n for long runs.
size_t Bpe::merge_long(int32_t* symbols, size_t count) const {
  struct Candidate {
    int32_t rank;
    size_t left;
    int32_t left_id, right_id, result;
    bool operator>(const Candidate& other) const {
      return std::tie(rank, left) > std::tie(other.rank, other.left);
    }
  };
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
  std::vector<size_t> next(count);
  std::vector<size_t> last(count);
  const auto push = [&](size_t i) {
    if (const Pair* pair = find_pair(symbols[i], symbols[next[i]])) {
      heap.push({pair->rank, i, symbols[i], symbols[next[i]], pair->result});
    }
  };
  for (size_t i = 0; i < count; ++i) {
    next[i] = i + 1;
    last[i] = i - 1;
  }
  for (size_t i = 0; i + 1 < count; ++i) push(i);
  while (!heap.empty()) {
    const Candidate top = heap.top();
    heap.pop();
    const size_t i = top.left;
    // A symbol that was merged away is kNone; one that has grown has another id.
    if (symbols[i] != top.left_id || next[i] >= count || symbols[next[i]] != top.right_id) continue;
    const size_t eaten = next[i];
    symbols[i] = top.result;
    symbols[eaten] = kNone;
    next[i] = next[eaten];
    if (next[i] < count) {
      last[next[i]] = i;
      push(i);
    }
    if (i > 0) push(last[i]);
  }
  size_t left = 0;
  for (size_t i = 0; i < count; i = next[i]) symbols[left++] = symbols[i];
  return left;
}

}  // namespace hymoe
