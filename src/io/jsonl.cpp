#include "hymoe/io/jsonl.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include <zlib.h>

#include "hymoe/config/error.h"
#include "hymoe/io/utf8.h"

namespace hymoe {
namespace {

constexpr size_t kBlock = 1 << 18;
constexpr size_t kLongestLine = size_t{1} << 30;

}  // namespace

/// Bytes in order. read() gives 0 at the end only, and throws a text without a place: LineReader knows the
/// line.
class LineReader::Source {
 public:
  virtual ~Source() = default;
  virtual size_t read(char* data, size_t size) = 0;
};

class LineReader::PlainSource final : public Source {
 public:
  explicit PlainSource(const std::filesystem::path& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (!fd_) throw DataError(path.string(), std::string("cannot open: ") + std::strerror(errno));
  }

  size_t read(char* data, size_t size) override {
    while (true) {
      const ssize_t got = ::read(fd_.get(), data, size);
      if (got >= 0) return static_cast<size_t>(got);
      if (errno != EINTR) throw std::runtime_error(std::string("cannot read: ") + std::strerror(errno));
    }
  }

 private:
  FileDescriptor fd_;
};

/// Gzip members one after another, the way gzip itself reads them: zeros may follow the last one, nothing
/// else.
class LineReader::GzipSource final : public Source {
 public:
  explicit GzipSource(const std::filesystem::path& path) : packed_(path), input_(kBlock, '\0') {
    constexpr int kGzipOnly = 16;
    if (::inflateInit2(&stream_, MAX_WBITS + kGzipOnly) != Z_OK) throw std::bad_alloc();
  }
  ~GzipSource() override { ::inflateEnd(&stream_); }

  size_t read(char* data, size_t size) override {
    stream_.next_out = reinterpret_cast<Bytef*>(data);
    stream_.avail_out = static_cast<uInt>(size);
    while (stream_.avail_out == size && more_input()) inflate_some();
    return size - stream_.avail_out;
  }

 private:
  /// False at a proper end of the file.
  bool more_input() {
    if (stream_.avail_in == 0) refill();
    if (between_members_ && !first_member_ && stream_.avail_in > 0 && *stream_.next_in == 0) skip_padding();
    if (stream_.avail_in > 0 || pending_output_) return true;
    if (first_member_ || !between_members_) throw std::runtime_error("gzip data ends too early");
    return false;
  }

  void refill() {
    stream_.next_in = reinterpret_cast<Bytef*>(input_.data());
    stream_.avail_in = static_cast<uInt>(packed_.read(input_.data(), input_.size()));
  }

  void skip_padding() {
    while (stream_.avail_in > 0) {
      const auto* begin = stream_.next_in;
      if (std::any_of(begin, begin + stream_.avail_in, [](Bytef byte) { return byte != 0; })) {
        throw std::runtime_error("there is other data after the gzip data");
      }
      refill();
    }
  }

  void inflate_some() {
    const uInt room = stream_.avail_out;
    const int status = ::inflate(&stream_, Z_NO_FLUSH);
    const bool ended = status == Z_STREAM_END, well = ended || status == Z_OK || status == Z_BUF_ERROR;
    // What came before the damage goes out first; zlib gives the same error again at the next call.
    pending_output_ = well ? !ended && stream_.avail_out == 0 : stream_.avail_out < room;
    if (!well && !pending_output_) {
      if (between_members_ && !first_member_)
        throw std::runtime_error("there is other data after the gzip data");
      throw std::runtime_error(std::string("gzip data is damaged") +
                               (stream_.msg ? std::string(": ") + stream_.msg : ""));
    }
    between_members_ = ended;
    if (ended) {
      first_member_ = false;
      ::inflateReset(&stream_);
    }
  }

  PlainSource packed_;
  std::string input_;
  z_stream stream_ = {};
  bool first_member_ = true;     // no member has ended yet
  bool between_members_ = true;  // nothing of the current member has been read
  bool pending_output_ = false;  // the last call filled the buffer: zlib may hold more
};

LineReader::LineReader(const std::filesystem::path& path) : path_(path) {
  if (path.extension() == ".gz") {
    source_ = std::make_unique<GzipSource>(path);
  } else {
    source_ = std::make_unique<PlainSource>(path);
  }
}

LineReader::~LineReader() = default;
LineReader::LineReader(LineReader&&) noexcept = default;
LineReader& LineReader::operator=(LineReader&&) noexcept = default;

std::string LineReader::where() const { return path_.string() + ":" + std::to_string(line_number_); }

bool LineReader::next(std::string& line) {
  line.clear();
  bool found = false, ended = false;
  ++line_number_;
  while (!found) {
    if (position_ == buffer_.size()) {
      buffer_.resize(kBlock);
      position_ = 0;
      try {
        buffer_.resize(source_->read(buffer_.data(), kBlock));
      } catch (const std::runtime_error& error) {
        throw DataError(where(), error.what());
      }
      if (buffer_.empty()) {
        ended = true;
        break;
      }
    }
    const size_t newline = buffer_.find('\n', position_);
    found = newline != std::string::npos;
    const size_t stop = found ? newline : buffer_.size();
    if (line.size() + (stop - position_) > kLongestLine)
      throw DataError(where(), "line is longer than 1 GiB");
    line.append(buffer_, position_, stop - position_);
    position_ = found ? newline + 1 : stop;
  }
  if (ended && line.empty()) {
    --line_number_;
    return false;
  }
  if (!line.empty() && line.back() == '\r') line.pop_back();
  return true;
}

bool JsonLines::next(nlohmann::json& record) {
  do {
    if (!lines_.next(line_)) return false;
  } while (line_.find_first_not_of(" \t\r") == std::string::npos);

  const size_t bad = find_invalid_utf8(line_);
  if (bad != std::string::npos)
    throw DataError(where(), "invalid UTF-8 at byte " + std::to_string(bad + 1) + " of the line");
  try {
    record = nlohmann::json::parse(line_);
  } catch (const nlohmann::json::exception& error) {
    throw DataError(where(), std::string("no valid JSON: ") + error.what());
  }
  if (!record.is_object())
    throw DataError(where(), std::string("wanted a JSON object, got ") + record.type_name());
  return true;
}

JsonLinesWriter::JsonLinesWriter(std::filesystem::path path)
    : path_(std::move(path)), fd_(::open(path_.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {
  const auto fail = [&](const char* what) {
    throw DataError(path_.string(), std::string(what) + ": " + std::strerror(errno));
  };
  if (!fd_) fail("cannot open");
  std::string block(kBlock, '\0');
  off_t end = ::lseek(fd_.get(), 0, SEEK_END);
  const off_t size = end;
  while (end > 0) {
    const off_t begin = std::max<off_t>(0, end - static_cast<off_t>(block.size()));
    const ssize_t got = ::pread(fd_.get(), block.data(), static_cast<size_t>(end - begin), begin);
    if (got != end - begin) fail("cannot read");
    const size_t newline = std::string_view(block).substr(0, static_cast<size_t>(got)).rfind('\n');
    end = newline == std::string_view::npos ? begin : begin + static_cast<off_t>(newline) + 1;
    if (newline != std::string_view::npos) break;
  }
  if (end >= 0 && end != size && ::ftruncate(fd_.get(), end) != 0)
    fail("cannot cut off an incomplete last line");
}

void JsonLinesWriter::write(const nlohmann::ordered_json& record) {
  const std::string line = record.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  const off_t begin = ::lseek(fd_.get(), 0, SEEK_END);
  for (size_t done = 0; done < line.size();) {
    const ssize_t written = ::write(fd_.get(), line.data() + done, line.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      const std::string reason = std::strerror(errno);
      const bool undone = done == 0 || ::ftruncate(fd_.get(), begin) == 0;
      throw DataError(path_.string(),
                      "cannot write: " + reason + (undone ? "" : " (part of a line was written)"));
    }
    done += static_cast<size_t>(written);
  }
}

}  // namespace hymoe
