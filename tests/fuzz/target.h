#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "hymoe/config/error.h"

namespace hymoe::fuzz {

/// A reader of other people's files, to be given any bytes. Several files, where it reads several, stand one
/// after another with a zero byte between.
struct Target {
  const char* name;
  bool (*read)(std::string_view bytes);  // whether it took them; see taken()
  std::vector<std::string> (*seeds)();   // what it takes, to begin from
};

/// Those linked into this program: one when it fuzzes, all of a room when it is a test.
inline std::vector<Target>& targets() {
  static std::vector<Target> all;
  return all;
}

struct Registration {
  explicit Registration(const Target& target) { targets().push_back(target); }
};

[[noreturn]] inline void broken(const std::string& law) { throw std::logic_error(law); }

/// Whether `read` ended without refusing the file by an Error of one line. What else it throws passes.
template <typename Read>
bool taken(const Read& read) {
  try {
    read();
    return true;
  } catch (const Error& error) {
    const std::string text = error.what();
    if (text.find('\n') != std::string::npos) broken("an error of several lines: " + text);
    return false;
  }
}

inline std::vector<std::string_view> split_files(std::string_view bytes) {
  std::vector<std::string_view> files;
  for (size_t end = 0; end != std::string_view::npos; bytes.remove_prefix(end + 1)) {
    end = bytes.find('\0');
    files.push_back(bytes.substr(0, end));
    if (end == std::string_view::npos) break;
  }
  return files;
}

/// A folder in memory where there is one, removed at the end.
class Folder {
 public:
  Folder() {
    const std::filesystem::path memory = "/dev/shm";
    const bool there = ::access(memory.c_str(), W_OK) == 0;
    std::string name =
        ((there ? memory : std::filesystem::temp_directory_path()) / "hymoe-fuzz-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }

  std::filesystem::path write(const char* name, std::string_view bytes) const {
    const std::filesystem::path path = path_ / name;
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    const bool written = ::write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size());
    if (::close(fd) != 0 || !written) throw std::runtime_error("cannot write " + path.string());
    return path;
  }
  void remove(const char* name) const { ::unlink((path_ / name).c_str()); }

 private:
  std::filesystem::path path_;
};

}  // namespace hymoe::fuzz
