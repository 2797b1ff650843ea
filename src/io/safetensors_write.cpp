#include <algorithm>
#include <limits>
#include <span>

#include "hymoe/io/safetensors.h"

namespace hymoe {
namespace fs = std::filesystem;
namespace {

std::vector<TensorSpec> specs_of(const NamedTensors& tensors) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(tensor.defined(), "write_safetensors: tensor ", name, " is undefined");
    TORCH_CHECK(tensor.layout() == at::kStrided, "write_safetensors: tensor ", name, " must be dense");
    specs.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  }
  return specs;
}

/// An output file that is counted and hashed on the way.
class HashedFile {
 public:
  explicit HashedFile(const fs::path& path) : name_(path.filename().string()), file_(path) {}

  void write(std::span<const std::byte> bytes) {
    // Piece by piece, so that what is hashed is still in the cache when it is written.
    constexpr size_t kPiece = 1 << 20;
    while (!bytes.empty()) {
      const auto piece = bytes.first(std::min(kPiece, bytes.size()));
      hash_.update(piece);
      file_.write(piece);
      size_ += static_cast<int64_t>(piece.size());
      bytes = bytes.subspan(piece.size());
    }
  }
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }

  WrittenFile commit() {
    file_.commit();
    return {.name = name_, .size = size_, .sha256 = hash_.hex()};
  }

 private:
  std::string name_;
  AtomicFile file_;
  Sha256 hash_;
  int64_t size_ = 0;
};

WrittenFile write_file(const fs::path& path, const SafetensorsLayout::File& layout,
                       const NamedTensors& tensors) {
  HashedFile file(path);
  file.write(layout.head);
  for (const size_t i : layout.tensors) {
    const Tensor tensor = tensors[i].second.detach().cpu().contiguous().resolve_neg();
    file.write({static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
  }
  return file.commit();
}

}  // namespace

WrittenFile write_safetensors(const fs::path& path, const NamedTensors& tensors,
                              const std::map<std::string, std::string>& metadata) {
  constexpr auto kOneFile = std::numeric_limits<int64_t>::max();
  return write_file(path, SafetensorsLayout("", specs_of(tensors), kOneFile, metadata).files()[0], tensors);
}

std::vector<WrittenFile> write_safetensors_sharded(const fs::path& folder, const std::string& stem,
                                                   const NamedTensors& tensors, int64_t max_shard_bytes,
                                                   const std::map<std::string, std::string>& metadata) {
  const SafetensorsLayout layout(stem, specs_of(tensors), max_shard_bytes, metadata);
  std::vector<WrittenFile> written;
  for (const auto& file : layout.files()) written.push_back(write_file(folder / file.name, file, tensors));
  if (!layout.index().empty()) {
    HashedFile index(folder / layout.index_name());
    index.write(layout.index());
    written.push_back(index.commit());
  }
  return written;
}

}  // namespace hymoe
