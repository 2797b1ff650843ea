#include <algorithm>
#include <cstring>
#include <set>
#include <span>

#include <nlohmann/json.hpp>

#include "hymoe/config/error.h"
#include "hymoe/io/safetensors.h"
#include "hymoe/io/utf8.h"
#include "io/safetensors_dtypes.h"

namespace hymoe {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

constexpr size_t kHeaderAlignment = 8;

void check_tensors(const NamedTensors& tensors) {
  std::set<std::string_view> names;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(name != "__metadata__", "write_safetensors: __metadata__ cannot be a tensor's name");
    TORCH_CHECK(is_valid_utf8(name), "write_safetensors: a tensor's name is no valid UTF-8: ", name);
    TORCH_CHECK(names.insert(name).second, "write_safetensors: two tensors are named ", name);
    TORCH_CHECK(tensor.defined(), "write_safetensors: tensor ", name, " is undefined");
    TORCH_CHECK(tensor.layout() == at::kStrided, "write_safetensors: tensor ", name, " must be dense");
    TORCH_CHECK(dtype_to_safetensors(tensor.scalar_type()), "write_safetensors: tensor ", name, " has dtype ",
                tensor.scalar_type(), ", which safetensors lacks");
  }
}

std::string numbered_shard(const std::string& stem, size_t number, size_t count) {
  const auto digits = [](size_t n) {
    const std::string text = std::to_string(n);
    return std::string(5 - std::min<size_t>(5, text.size()), '0') + text;
  };
  return stem + "-" + digits(number) + "-of-" + digits(count) + ".safetensors";
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

std::string header_of(const std::vector<const NamedTensors::value_type*>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  // By hand: an ordered_json looks every new key up among all earlier ones.
  std::string text = "{";
  if (!metadata.empty()) text += "\"__metadata__\":" + json(metadata).dump();
  int64_t begin = 0;
  for (const auto* entry : tensors) {
    const Tensor& tensor = entry->second;
    const int64_t end = begin + static_cast<int64_t>(tensor.nbytes());
    if (text.size() > 1) text += ',';
    text += json(entry->first).dump() + ":{\"dtype\":\"" +
            std::string(*dtype_to_safetensors(tensor.scalar_type())) +
            "\",\"shape\":" + json(tensor.sizes().vec()).dump() + ",\"data_offsets\":[" +
            std::to_string(begin) + ',' + std::to_string(end) + "]}";
    begin = end;
  }
  text += '}';
  text.resize((text.size() + kHeaderAlignment - 1) / kHeaderAlignment * kHeaderAlignment, ' ');
  return text;
}

}  // namespace

WrittenFile write_safetensors(const fs::path& path, const NamedTensors& tensors,
                              const std::map<std::string, std::string>& metadata) {
  check_tensors(tensors);
  std::vector<const NamedTensors::value_type*> layout;
  for (const auto& entry : tensors) layout.push_back(&entry);
  std::stable_sort(layout.begin(), layout.end(), [](const auto* a, const auto* b) {
    return a->second.element_size() > b->second.element_size();
  });

  HashedFile file(path);
  const std::string header = header_of(layout, metadata);
  const uint64_t length = header.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(header);
  for (const auto* entry : layout) {
    const Tensor tensor = entry->second.detach().cpu().contiguous().resolve_neg();
    file.write({static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
  }
  return file.commit();
}

std::vector<WrittenFile> write_safetensors_sharded(const fs::path& folder, const std::string& stem,
                                                   const NamedTensors& tensors, int64_t max_shard_bytes,
                                                   const std::map<std::string, std::string>& metadata) {
  TORCH_CHECK(max_shard_bytes > 0, "write_safetensors_sharded: max_shard_bytes must be positive, got ",
              max_shard_bytes);
  check_tensors(tensors);
  std::vector<NamedTensors> shards(1);
  int64_t total = 0, filled = 0;
  for (const auto& entry : tensors) {
    const auto bytes = static_cast<int64_t>(entry.second.nbytes());
    if (!shards.back().empty() && bytes > max_shard_bytes - filled) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(entry);
    filled += bytes;
    total += bytes;
  }
  if (shards.size() == 1) return {write_safetensors(folder / (stem + ".safetensors"), tensors, metadata)};

  std::vector<WrittenFile> written;
  std::map<std::string, std::string> weight_map;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = numbered_shard(stem, i + 1, shards.size());
    written.push_back(write_safetensors(folder / name, shards[i], metadata));
    for (const auto& entry : shards[i]) weight_map[entry.first] = name;
  }
  HashedFile index(folder / (stem + ".safetensors.index.json"));
  index.write(json{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}.dump(2) + "\n");
  written.push_back(index.commit());
  return written;
}

}  // namespace hymoe
