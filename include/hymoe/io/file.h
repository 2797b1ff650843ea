#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

struct evp_md_ctx_st;

namespace hymoe {

/// An open file descriptor, closed by its owner; -1 is none.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  /// Closes now; false, with errno set, when the system reports a failure.
  bool close();

 private:
  int fd_ = -1;
};

/// A file as read-only memory. Pages are read when touched; the file must not shrink meanwhile.
/// Throws DataError naming the path and the system's reason.
class MappedFile {
 public:
  explicit MappedFile(std::filesystem::path path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }
  /// Gives back the memory of pages read so far; touched again they are read again.
  void drop_pages() const;

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// The whole file. Throws DataError.
std::string read_text(const std::filesystem::path& path);

/// A file that appears under its name only when complete: written beside it under `<path>.tmp-XXXXXX`, then
/// synced and renamed by commit(). Without commit() the destructor removes it. Throws DataError with the
/// system's reason.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  FileDescriptor fd_;
};

/// Throws DataError where a new folder at `path` would replace something: there may be nothing, or an empty
/// folder.
void check_vacant(const std::filesystem::path& path);

/// A folder that appears under its name only when complete. Write files into folder(); commit() syncs all of
/// them and renames the folder to `path`, in the place of a folder of that name if there is one (exchanged in
/// one step where the file system can). Without commit() the destructor removes it. Folders above it are
/// made. Throws DataError.
class AtomicDirectory {
 public:
  explicit AtomicDirectory(std::filesystem::path path);
  ~AtomicDirectory();
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;

  const std::filesystem::path& folder() const { return temporary_; }
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  FileDescriptor lock_;
};

/// Makes a file of `size` bytes, all zero, whose room on the disk is its own: writing there cannot find the
/// disk full. Throws DataError naming the bytes wanted.
void reserve_file(const std::filesystem::path& path, int64_t size);

/// An existing file that several processes fill, each at its own places. Nothing but the bytes given is
/// touched: on network file systems too, where a page mapped by two machines would be written whole by both.
class SharedFile {
 public:
  explicit SharedFile(std::filesystem::path path);
  void write(int64_t at, std::span<const std::byte> bytes);
  /// Brings to the disk what this process wrote, and closes.
  void commit();

 private:
  std::filesystem::path path_;
  FileDescriptor fd_;
};

/// Writes a file through AtomicFile: afterwards `path` holds either its old content or all of the new one.
void write_file_atomic(const std::filesystem::path& path, std::span<const std::byte> bytes);
void write_file_atomic(const std::filesystem::path& path, std::string_view text);

/// Removes from `folder` the temporary files and folders that killed writers left; those of living writers
/// stay.
void remove_abandoned(const std::filesystem::path& folder);

/// SHA-256 of what update() was given, piece by piece.
class Sha256 {
 public:
  Sha256();
  void update(std::span<const std::byte> bytes);
  void update(std::string_view text) { update(std::as_bytes(std::span(text))); }
  /// 64 lower-case hexadecimal digits. Ends the computation: call once.
  std::string hex();

 private:
  std::unique_ptr<evp_md_ctx_st, void (*)(evp_md_ctx_st*)> context_;
};

/// SHA-256 in hexadecimal digits.
std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);
std::string sha256_file(const std::filesystem::path& path);

/// Bytes that this user can still write on the file system of `path` (or of its nearest existing parent).
int64_t free_bytes(const std::filesystem::path& path);

}  // namespace hymoe
