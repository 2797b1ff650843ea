#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/io/file.h"
#include "hymoe/io/shard.h"

namespace hymoe {

using at::Tensor;

/// What a safetensors header says of one tensor.
struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape = {};
  int64_t begin;  // offset of the first byte in the file
  int64_t end;    // one past the last
};

/// Whether a tensor of a file may fill one of `wanted`: floating-point numbers are converted, others are not.
inline bool reads_as(at::ScalarType stored, at::ScalarType wanted) {
  return stored == wanted || (c10::isFloatingType(stored) && c10::isFloatingType(wanted));
}

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
  /// Fills part.values, in their dtype and on their device, from the runs of the part alone. Throws DataError
  /// when the tensor is absent, or has another shape or a dtype that is not converted (see reads_as).
  void read(const TensorPart& part) const;
  /// See MappedFile::drop_pages.
  void drop_pages() const { file_->drop_pages(); }

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
  void read(const TensorPart& part) const { file_with(part.shard.name).read(part); }
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

/// A tensor that is to be written.
struct TensorSpec {
  std::string name = {};
  at::ScalarType dtype;
  std::vector<int64_t> shape = {};

  bool operator==(const TensorSpec&) const = default;
  int64_t numel() const;
  int64_t bytes() const { return numel() * static_cast<int64_t>(c10::elementSize(dtype)); }
};

/// What shards of a checkpoint are filled up to.
inline constexpr int64_t kMaxShardBytes = 5'000'000'000;

/// Where tensors will lie: in `<stem>.safetensors`, or, when they take more than `max_shard_bytes`, in shards
/// `<stem>-00001-of-0000N.safetensors` filled in the given order, beside `<stem>.safetensors.index.json`.
/// Within a file those of wider elements come first, so that each is aligned. Known before there is a value,
/// it lets several processes fill the files together: one calls create(), then each write().
class SafetensorsLayout {
 public:
  struct File {
    std::string name = {};
    std::string head = {};             // the bytes before those of the tensors
    std::vector<size_t> tensors = {};  // by their number, in the order of their bytes
    int64_t size = 0;
  };

  SafetensorsLayout(const std::string& stem, std::vector<TensorSpec> tensors, int64_t max_shard_bytes,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

  const std::vector<File>& files() const { return files_; }
  /// Name and text of the index; empty where there is a single file.
  const std::string& index_name() const { return index_name_; }
  const std::string& index() const { return index_; }

  /// Makes all files in `folder`, each of its full size; a full disk is found here, and nowhere later.
  void create(const std::filesystem::path& folder) const;
  /// Writes parts of the tensors into the files that create() made, to the disk.
  void write(const std::filesystem::path& folder, const std::vector<TensorPart>& parts) const;
  /// The same for parts that `produce` hands on one by one, none of which need stay.
  using Put = std::function<void(const TensorPart&)>;
  void write(const std::filesystem::path& folder, const std::function<void(const Put&)>& produce) const;

 private:
  struct Place {
    size_t file = 0;
    int64_t begin = 0;  // of the first byte
  };
  void add_file(const std::string& name, std::vector<size_t> tensors,
                const std::map<std::string, std::string>& metadata);
  void write_part(SharedFile& file, const Place& place, const TensorPart& part) const;

  std::vector<TensorSpec> tensors_;
  std::vector<File> files_;
  std::unordered_map<std::string, size_t> numbers_;  // of tensors, by name
  std::vector<Place> places_;
  std::string index_name_, index_;
};

using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

/// A file just written: its name within the folder, bytes, and SHA-256 in hexadecimal digits.
struct WrittenFile {
  std::string name = {};
  int64_t size;
  std::string sha256 = {};
};

/// Writes a safetensors file atomically, one tensor at a time (tensors on a device or not contiguous are
/// copied one by one). The same input gives the same bytes. Other programs expect metadata to hold format =
/// pt. Throws DataError on failure to write.
WrittenFile write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                              const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

/// Writes the files of a SafetensorsLayout into `folder`, the index last. Returns all files written.
std::vector<WrittenFile> write_safetensors_sharded(
    const std::filesystem::path& folder, const std::string& stem, const NamedTensors& tensors,
    int64_t max_shard_bytes, const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace hymoe
