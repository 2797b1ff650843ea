#include "hymoe/io/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include <openssl/evp.h>

#include "hymoe/config/error.h"

namespace hymoe {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kTemporaryMark = ".tmp-";
constexpr size_t kTemporarySuffix = 6;

[[noreturn]] void fail(const fs::path& path, const std::string& what, int error = errno) {
  throw DataError(path.string(), what + ": " + std::strerror(error));
}

FileDescriptor open_to_read(const fs::path& path) {
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) fail(path, "cannot open");
  return fd;
}

/// A file's or folder's data on the disk. File systems that have no sync for folders answer EINVAL.
void sync(int fd, const fs::path& path) {
  if (::fsync(fd) != 0 && errno != EINVAL) fail(path, "cannot sync to disk");
}

fs::path parent_of(const fs::path& path) {
  const fs::path parent = path.parent_path();
  return parent.empty() ? fs::path(".") : parent;
}

void sync_path(const fs::path& path) { sync(open_to_read(path).get(), path); }

void sync_tree(const fs::path& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_symlink() && (entry.is_regular_file() || entry.is_directory())) sync_path(entry.path());
  }
  sync_path(folder);
}

fs::path with_random_suffix(const fs::path& path, std::string_view mark) {
  static constexpr std::string_view kAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789";
  std::random_device random;
  std::string name = path.string().append(mark);
  for (size_t i = 0; i < kTemporarySuffix; ++i) name += kAlphabet[random() % kAlphabet.size()];
  return name;
}

bool is_temporary_name(const std::string& name) {
  return name.size() > kTemporaryMark.size() + kTemporarySuffix &&
         std::string_view(name).substr(name.size() - kTemporarySuffix - kTemporaryMark.size(),
                                       kTemporaryMark.size()) == kTemporaryMark;
}

/// A living writer holds a lock on its temporary; false when remove_abandoned() was faster and took it away.
bool lock_temporary(int fd) {
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) return false;
  struct stat status;
  return ::fstat(fd, &status) == 0 && status.st_nlink > 0;
}

/// `runs/x/` and `runs/x` are the same target.
fs::path without_trailing_slash(fs::path path) { return path.has_filename() ? path : path.parent_path(); }

void exchange_folders(const fs::path& fresh, const fs::path& target) {
  if (::renameat2(AT_FDCWD, fresh.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS) fail(target, "cannot replace");
  // No exchange on this file system. The old folder gets a name that remove_abandoned() does not touch, for
  // it is the only complete one if we die between the two renames.
  const fs::path old = with_random_suffix(target, ".old-");
  if (::rename(target.c_str(), old.c_str()) != 0) fail(target, "cannot replace");
  if (::rename(fresh.c_str(), target.c_str()) != 0) {
    const int error = errno;
    ::rename(old.c_str(), target.c_str());
    fail(target, "cannot replace", error);
  }
  if (::rename(old.c_str(), fresh.c_str()) != 0) fail(old, "cannot rename");
}

}  // namespace

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

FileDescriptor::~FileDescriptor() { close(); }

bool FileDescriptor::close() { return fd_ < 0 || ::close(std::exchange(fd_, -1)) == 0; }

MappedFile::MappedFile(fs::path path) : path_(std::move(path)) {
  const FileDescriptor fd = open_to_read(path_);
  struct stat status;
  if (::fstat(fd.get(), &status) != 0) fail(path_, "cannot read");
  if (S_ISDIR(status.st_mode)) throw DataError(path_.string(), "is a folder, wanted a file");
  if (!S_ISREG(status.st_mode)) throw DataError(path_.string(), "is no regular file and cannot be mapped");
  if (status.st_size == 0) return;
  void* data = ::mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) fail(path_, "cannot map");
  data_ = static_cast<const std::byte*>(data);
  size_ = static_cast<size_t>(status.st_size);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::drop_pages() const {
  if (data_ != nullptr) ::madvise(const_cast<std::byte*>(data_), size_, MADV_DONTNEED);
}

std::string read_text(const fs::path& path) {
  const FileDescriptor fd = open_to_read(path);
  struct stat status;
  if (::fstat(fd.get(), &status) != 0) fail(path, "cannot read");
  // One byte more than the size, so that a file of that size ends at the second read; pipes report 0 and
  // grow.
  std::string text(static_cast<size_t>(std::max<off_t>(status.st_size, 0)) + 1, '\0');
  size_t filled = 0;
  while (true) {
    if (filled == text.size()) text.resize(2 * text.size());
    const ssize_t got = ::read(fd.get(), text.data() + filled, text.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path, "cannot read");
    if (got == 0) break;
    filled += static_cast<size_t>(got);
  }
  text.resize(filled);
  return text;
}

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  std::error_code ignored;
  const fs::file_status status = fs::status(path_, ignored);
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    throw DataError(path_.string(), "cannot write: exists and is no regular file");
  }
  do {
    temporary_ = with_random_suffix(path_, kTemporaryMark);
    fd_ = FileDescriptor(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (!fd_ && errno != EEXIST) fail(path_, "cannot write");
  } while (!fd_ || !lock_temporary(fd_.get()));
}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd_.get(), bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path_, "cannot write");
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
}

void AtomicFile::commit() {
  sync(fd_.get(), path_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "cannot write");
  temporary_.clear();
  if (!fd_.close()) fail(path_, "cannot close");
  sync_path(parent_of(path_));
}

void check_vacant(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path, ignored) || (fs::is_directory(path, ignored) && fs::is_empty(path, ignored))) return;
  throw DataError(path.string(), "is there already; remove it, or name another folder");
}

AtomicDirectory::AtomicDirectory(fs::path path) : path_(without_trailing_slash(std::move(path))) {
  std::error_code error;
  fs::create_directories(parent_of(path_), error);
  if (error) fail(path_, "cannot create", error.value());
  const fs::file_status status = fs::status(path_, error);
  if (fs::exists(status) && !fs::is_directory(status)) {
    throw DataError(path_.string(), "cannot write: exists and is no folder");
  }
  do {
    temporary_ = with_random_suffix(path_, kTemporaryMark);
    if (::mkdir(temporary_.c_str(), 0777) != 0) {
      if (errno == EEXIST) continue;
      fail(path_, "cannot create");
    }
    lock_ = FileDescriptor(::open(temporary_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!lock_ && errno != ENOENT) {  // ENOENT: another process has tidied it away
      const int reason = errno;
      ::rmdir(temporary_.c_str());
      fail(path_, "cannot open what was created for it", reason);
    }
  } while (!lock_ || !lock_temporary(lock_.get()));
}

AtomicDirectory::~AtomicDirectory() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
}

void AtomicDirectory::commit() {
  try {
    sync_tree(temporary_);
  } catch (const fs::filesystem_error& error) {
    throw DataError(path_.string(), "cannot sync to disk: " + error.code().message());
  }
  if (::rename(temporary_.c_str(), path_.c_str()) == 0) {  // nothing there, or an empty folder
    temporary_.clear();
  } else if (errno == ENOTEMPTY || errno == EEXIST || errno == ENOTDIR) {
    exchange_folders(temporary_, path_);  // what the destructor removes is now the old folder
  } else {
    fail(path_, "cannot create");
  }
  lock_.close();
  sync_path(parent_of(path_));
}

void reserve_file(const fs::path& path, int64_t size) {
  FileDescriptor fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!fd) fail(path, "cannot write");
  const int error = ::posix_fallocate(fd.get(), 0, size);
  if (error != 0) fail(path, "cannot reserve " + std::to_string(size) + " bytes", error);
}

SharedFile::SharedFile(fs::path path) : path_(std::move(path)) {
  // Not to be read: a network file system would fetch the pages around, and write them back whole.
  fd_ = FileDescriptor(::open(path_.c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd_) fail(path_, "cannot write");
}

void SharedFile::write(int64_t at, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(fd_.get(), bytes.data(), bytes.size(), at);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path_, "cannot write");
    at += written;
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
}

void SharedFile::commit() {
  sync(fd_.get(), path_);
  if (!fd_.close()) fail(path_, "cannot close");
}

void write_file_atomic(const fs::path& path, std::span<const std::byte> bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_file_atomic(const fs::path& path, std::string_view text) {
  write_file_atomic(path, std::as_bytes(std::span(text)));
}

void remove_abandoned(const fs::path& folder) {
  std::error_code error;
  std::vector<fs::path> temporaries;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (is_temporary_name(entry.path().filename().string())) temporaries.push_back(entry.path());
  }
  if (error) throw DataError(folder.string(), "cannot read: " + error.message());
  for (const fs::path& path : temporaries) {
    const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
    if (!fd || ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) continue;
    fs::remove_all(path, error);
    if (error) throw DataError(path.string(), "cannot remove: " + error.message());
  }
}

Sha256::Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
  if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) {
    throw Error("libcrypto has no SHA-256");
  }
}

void Sha256::update(std::span<const std::byte> bytes) {
  if (EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) != 1)
    throw Error("libcrypto: SHA-256 failed");
}

std::string Sha256::hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (EVP_DigestFinal_ex(context_.get(), digest, &size) != 1) throw Error("libcrypto: SHA-256 failed");
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    text += kDigits[digest[i] >> 4];
    text += kDigits[digest[i] & 15];
  }
  return text;
}

std::string sha256(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.hex();
}

std::string sha256(std::string_view text) { return sha256(std::as_bytes(std::span(text))); }

std::string sha256_file(const fs::path& path) {
  // Read, not mapped: the file may be larger than the memory that a process shall have.
  const FileDescriptor fd = open_to_read(path);
  std::vector<std::byte> piece(1 << 20);
  Sha256 hash;
  while (true) {
    const ssize_t got = ::read(fd.get(), piece.data(), piece.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path, "cannot read");
    if (got == 0) return hash.hex();
    hash.update(std::span(piece).first(static_cast<size_t>(got)));
  }
}

int64_t free_bytes(const fs::path& path) {
  std::error_code ignored;
  fs::path existing = fs::absolute(path);
  while (!fs::exists(existing, ignored) && existing.has_relative_path()) existing = existing.parent_path();
  struct statvfs status;
  if (::statvfs(existing.c_str(), &status) != 0) fail(path, "cannot tell the free space");
  return static_cast<int64_t>(status.f_bavail) * static_cast<int64_t>(status.f_frsize);
}

}  // namespace hymoe
