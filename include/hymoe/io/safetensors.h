#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/io/file.h"

namespace hymoe {

using at::Tensor;

/// What a safetensors header says of one tensor.
struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape = {};
  int64_t begin;  // offset of the first byte in the file
  int64_t end;    // one past the last
};

/// A safetensors file, memory-mapped. The constructor checks all of the header against the file (lengths,
/// names, dtypes, shapes, offsets without overlap or hole) and throws DataError naming file, tensor and
/// numbers.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_->path(); }
  /// In the order of their bytes in the file.
  const std::vector<std::string>& names() const { return names_; }
  bool contains(const std::string& name) const { return infos_.contains(name); }
  /// Throws DataError when the file has no such tensor.
  const TensorInfo& info(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// A CPU tensor over the mapped bytes, without a copy: never write to it (clone first). It keeps the
  /// mapping alive. Bytes that do not lie at a multiple of the element size are copied.
  Tensor tensor(const std::string& name) const;

 private:
  std::shared_ptr<const MappedFile> file_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, TensorInfo> infos_;
  std::map<std::string, std::string> metadata_;
};

/// The tensors of a folder: `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` lists;
/// or of one file, when the path is one. Throws DataError also when index and shards differ in any name.
class SafetensorsFolder {
 public:
  explicit SafetensorsFolder(const std::filesystem::path& path, std::string_view stem = "model");

  const std::filesystem::path& path() const { return path_; }
  /// File by file (in the order of file names), within a file in the order of bytes.
  const std::vector<std::string>& names() const { return names_; }
  bool contains(const std::string& name) const { return file_of_.contains(name); }
  const TensorInfo& info(const std::string& name) const { return file_with(name).info(name); }
  Tensor tensor(const std::string& name) const { return file_with(name).tensor(name); }
  /// The file that holds the tensor. Throws DataError when none does.
  const SafetensorsFile& file_with(const std::string& name) const;
  const std::vector<SafetensorsFile>& files() const { return files_; }
  /// That of the first file; write_safetensors_sharded gives every shard the same.
  const std::map<std::string, std::string>& metadata() const { return files_.front().metadata(); }

 private:
  void add_file(const std::filesystem::path& path);
  void check_index(const std::filesystem::path& index,
                   const std::map<std::string, std::string>& weight_map) const;

  std::filesystem::path path_;
  std::vector<SafetensorsFile> files_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, size_t> file_of_;
};

using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

/// A file just written: its name within the folder, bytes, and SHA-256 in hexadecimal digits.
struct WrittenFile {
  std::string name = {};
  int64_t size;
  std::string sha256 = {};
};

/// Writes a safetensors file atomically, one tensor at a time (tensors on a device or not contiguous are
/// copied one by one). Tensors lie in the given order, those of wider elements first, so that each is
/// aligned. The same input gives the same bytes. Other programs expect metadata to hold format = pt. Throws
/// DataError on failure to write.
WrittenFile write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                              const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

/// Writes `<stem>.safetensors` into `folder`, or, when the tensors take more than `max_shard_bytes`, shards
/// `<stem>-00001-of-0000N.safetensors` filled in the given order, and after them
/// `<stem>.safetensors.index.json`. Returns all files written.
std::vector<WrittenFile> write_safetensors_sharded(
    const std::filesystem::path& folder, const std::string& stem, const NamedTensors& tensors,
    int64_t max_shard_bytes, const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace hymoe
