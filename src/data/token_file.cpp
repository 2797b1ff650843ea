#include "hymoe/data/token_file.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include <c10/util/Exception.h>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are mapped as they are");

constexpr char kMagic[8] = {'H', 'Y', 'M', 'O', 'E', 'T', 'O', 'K'};
constexpr uint32_t kFormatVersion = 1;
constexpr int64_t kBufferBytes = 1 << 20;
constexpr int64_t kSmallVocabulary = 65536;

// The last bytes of a file.
struct Trailer {
  uint32_t version;
  uint32_t token_bytes;
  uint64_t documents;
  uint64_t tokens;
  uint64_t vocab_size;
  uint8_t fingerprint[32];
  uint8_t checksum[32];
  char magic[8];
};
static_assert(sizeof(Trailer) == 104);

int64_t padded(int64_t bytes) { return (bytes + 7) / 8 * 8; }

std::string to_hex(std::span<const uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t b : bytes) {
    text += kDigits[b >> 4];
    text += kDigits[b & 15];
  }
  return text;
}

void from_hex(const std::string& text, std::span<uint8_t> bytes) {
  const bool fits =
      text.size() == 2 * bytes.size() && text.find_first_not_of("0123456789abcdef") == std::string::npos;
  TORCH_CHECK(fits, "token file: a SHA-256 of 64 hexadecimal digits was wanted, got '", text, "'");
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
}

template <typename T>
int64_t copy_tokens(const std::byte* from, int64_t count, int64_t* out) {
  const T* tokens = reinterpret_cast<const T*>(from);
  int64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = tokens[i];
    largest = std::max(largest, out[i]);
  }
  return largest;
}

}  // namespace

void TokenFile::fail(const std::string& text) const { throw DataError(file_->path().string(), text); }

TokenFile::TokenFile(const std::filesystem::path& path) : file_(std::make_shared<MappedFile>(path)) {
  const std::span<const std::byte> bytes = file_->bytes();
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size < static_cast<int64_t>(sizeof kMagic) || std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) {
    fail("this is no token file (it does not begin with HYMOETOK)");
  }
  const int64_t smallest = sizeof kMagic + sizeof(uint64_t) + sizeof(Trailer);
  Trailer trailer;
  if (size >= smallest) std::memcpy(&trailer, bytes.data() + size - sizeof trailer, sizeof trailer);
  if (size < smallest || std::memcmp(trailer.magic, kMagic, sizeof kMagic) != 0) {
    fail("the token file is cut off after " + std::to_string(size) + " bytes (its end mark is missing)");
  }
  if (trailer.version != kFormatVersion) {
    fail("token file of version " + std::to_string(trailer.version) + ", this program reads version " +
         std::to_string(kFormatVersion));
  }
  token_bytes_ = trailer.token_bytes;
  if (token_bytes_ != 2 && token_bytes_ != 4) {
    fail("tokens of 2 or 4 bytes were wanted, the trailer says " + std::to_string(token_bytes_));
  }
  const uint64_t most = static_cast<uint64_t>(size);
  if (trailer.documents > most || trailer.tokens > most || trailer.vocab_size > INT32_MAX ||
      size != smallest + padded(static_cast<int64_t>(trailer.tokens) * token_bytes_) +
                  8 * static_cast<int64_t>(trailer.documents)) {
    fail("the file has " + std::to_string(size) + " bytes, which " + std::to_string(trailer.documents) +
         " documents of " + std::to_string(trailer.tokens) + " tokens of " + std::to_string(token_bytes_) +
         " bytes do not take");
  }
  num_documents_ = static_cast<int64_t>(trailer.documents);
  num_tokens_ = static_cast<int64_t>(trailer.tokens);
  vocab_size_ = static_cast<int64_t>(trailer.vocab_size);
  fingerprint_ = to_hex(trailer.fingerprint);

  const std::byte* offsets = bytes.data() + sizeof kMagic + padded(num_tokens_ * token_bytes_);
  offsets_ = {reinterpret_cast<const uint64_t*>(offsets), trailer.documents + 1};
  const auto flat = std::adjacent_find(offsets_.begin(), offsets_.end(), std::greater_equal<>());
  if (offsets_.front() != 0 || offsets_.back() != trailer.tokens || flat != offsets_.end()) {
    const size_t bad = flat != offsets_.end() ? flat - offsets_.begin() : 0;
    fail("document offsets must rise from 0 to " + std::to_string(num_tokens_) + "; document " +
         std::to_string(bad) + " begins at " + std::to_string(offsets_[bad]) + ", the last ends at " +
         std::to_string(offsets_.back()));
  }
}

int64_t TokenFile::document_of(int64_t token) const {
  TORCH_CHECK(token >= 0 && token < num_tokens_, "document_of: token must be in [0, ", num_tokens_, "), got ",
              token);
  const auto after = std::upper_bound(offsets_.begin(), offsets_.end(), static_cast<uint64_t>(token));
  return after - offsets_.begin() - 1;
}

void TokenFile::read(int64_t begin, int64_t count, int64_t* out) const {
  TORCH_CHECK(begin >= 0 && count >= 0 && begin <= num_tokens_ - count, "TokenFile::read: [", begin, ", ",
              begin + count, ") is outside of ", num_tokens_, " tokens");
  const std::byte* from = file_->bytes().data() + sizeof kMagic + begin * token_bytes_;
  const int64_t largest =
      token_bytes_ == 2 ? copy_tokens<uint16_t>(from, count, out) : copy_tokens<uint32_t>(from, count, out);
  if (count > 0 && largest >= vocab_size_) {
    fail("id " + std::to_string(largest) + " among tokens " + std::to_string(begin) + " to " +
         std::to_string(begin + count) + " is outside the vocabulary of " + std::to_string(vocab_size_));
  }
}

void TokenFile::check_tokenizer(const std::string& fingerprint) const {
  if (fingerprint != fingerprint_) {
    fail("made with the tokenizer " + fingerprint_ + ", but the tokenizer here is " + fingerprint +
         " (SHA-256 of vocabulary and merges)");
  }
}

void TokenFile::verify() const {
  const std::span<const std::byte> bytes = file_->bytes();
  Trailer trailer;
  std::memcpy(&trailer, bytes.data() + bytes.size() - sizeof trailer, sizeof trailer);
  const size_t covered = bytes.size() - sizeof trailer + offsetof(Trailer, checksum);
  if (sha256(bytes.first(covered)) != to_hex(trailer.checksum)) {
    fail("its content does not have the checksum that it was written with");
  }
  std::vector<int64_t> ids(1 << 16);
  for (int64_t begin = 0; begin < num_tokens_; begin += static_cast<int64_t>(ids.size())) {
    read(begin, std::min<int64_t>(ids.size(), num_tokens_ - begin), ids.data());
  }
}

TokenFileWriter::TokenFileWriter(std::filesystem::path path, int64_t vocab_size,
                                 const std::string& fingerprint)
    : path_(std::move(path)), file_(path_), vocab_size_(vocab_size), fingerprint_(fingerprint) {
  TORCH_CHECK(vocab_size > 0 && vocab_size <= INT32_MAX,
              "TokenFileWriter: vocab_size must be in [1, 2^31), got ", vocab_size);
  put(std::as_bytes(std::span(kMagic)));
}

void TokenFileWriter::put(std::span<const std::byte> bytes) {
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  if (static_cast<int64_t>(buffer_.size()) < kBufferBytes) return;
  checksum_.update(buffer_);
  file_hash_.update(buffer_);
  file_.write(buffer_);
  buffer_.clear();
}

void TokenFileWriter::add(std::span<const int32_t> ids) {
  TORCH_CHECK(!ids.empty(), "TokenFileWriter::add: a document has at least one token");
  std::vector<uint16_t> narrow;
  for (int32_t id : ids) {
    TORCH_CHECK(id >= 0 && id < vocab_size_, "TokenFileWriter::add: id ", id,
                " is outside the vocabulary of ", vocab_size_);
  }
  if (vocab_size_ <= kSmallVocabulary) {
    narrow.assign(ids.begin(), ids.end());
    put(std::as_bytes(std::span(narrow)));
  } else {
    put(std::as_bytes(ids));
  }
  offsets_.push_back(offsets_.back() + ids.size());
}

std::string TokenFileWriter::finish() {
  const int64_t token_bytes = vocab_size_ <= kSmallVocabulary ? 2 : 4;
  const std::vector<std::byte> zeros(padded(num_tokens() * token_bytes) - num_tokens() * token_bytes);
  put(zeros);
  put(std::as_bytes(std::span(offsets_)));
  Trailer trailer{.version = kFormatVersion,
                  .token_bytes = static_cast<uint32_t>(token_bytes),
                  .documents = static_cast<uint64_t>(num_documents()),
                  .tokens = offsets_.back(),
                  .vocab_size = static_cast<uint64_t>(vocab_size_),
                  .fingerprint = {},
                  .checksum = {},
                  .magic = {}};
  from_hex(fingerprint_, trailer.fingerprint);
  std::memcpy(trailer.magic, kMagic, sizeof kMagic);
  const std::span<const std::byte> bytes = std::as_bytes(std::span(&trailer, 1));
  put(bytes.first(offsetof(Trailer, checksum)));
  checksum_.update(buffer_);
  file_hash_.update(buffer_);
  file_.write(buffer_);
  from_hex(checksum_.hex(), trailer.checksum);
  const std::span<const std::byte> rest = bytes.subspan(offsetof(Trailer, checksum));
  file_hash_.update(rest);
  file_.write(rest);
  file_.commit();
  return file_hash_.hex();
}

}  // namespace hymoe
