#include <algorithm>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <utility>

#include <nlohmann/json.hpp>

#include "hymoe/io/safetensors.h"
#include "hymoe/io/utf8.h"
#include "io/safetensors_dtypes.h"

namespace hymoe {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

constexpr size_t kHeaderAlignment = 8;

void check_specs(const std::vector<TensorSpec>& tensors) {
  std::set<std::string_view> names;
  for (const auto& [name, dtype, shape] : tensors) {
    TORCH_CHECK(name != "__metadata__", "write_safetensors: __metadata__ cannot be a tensor's name");
    TORCH_CHECK(is_valid_utf8(name), "write_safetensors: a tensor's name is no valid UTF-8: ", name);
    TORCH_CHECK(names.insert(name).second, "write_safetensors: two tensors are named ", name);
    TORCH_CHECK(dtype_to_safetensors(dtype), "write_safetensors: tensor ", name, " has dtype ", dtype,
                ", which safetensors lacks");
  }
}

std::string numbered_shard(const std::string& stem, size_t number, size_t count) {
  const auto digits = [](size_t n) {
    const std::string text = std::to_string(n);
    return std::string(5 - std::min<size_t>(5, text.size()), '0') + text;
  };
  return stem + "-" + digits(number) + "-of-" + digits(count) + ".safetensors";
}

}  // namespace

int64_t TensorSpec::numel() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

SafetensorsLayout::SafetensorsLayout(const std::string& stem, std::vector<TensorSpec> tensors,
                                     int64_t max_shard_bytes,
                                     const std::map<std::string, std::string>& metadata)
    : tensors_(std::move(tensors)), places_(tensors_.size()) {
  TORCH_CHECK(max_shard_bytes > 0, "write_safetensors: max_shard_bytes must be positive, got ",
              max_shard_bytes);
  check_specs(tensors_);
  std::vector<std::vector<size_t>> shards(1);
  int64_t total = 0, filled = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const int64_t bytes = tensors_[i].bytes();
    if (!shards.back().empty() && bytes > max_shard_bytes - filled) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(i);
    filled += bytes;
    total += bytes;
    numbers_[tensors_[i].name] = i;
  }
  if (shards.size() == 1) {
    add_file(stem + ".safetensors", std::move(shards[0]), metadata);
    return;
  }
  json weight_map;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = numbered_shard(stem, i + 1, shards.size());
    for (const size_t tensor : shards[i]) weight_map[tensors_[tensor].name] = name;
    add_file(name, std::move(shards[i]), metadata);
  }
  index_name_ = stem + ".safetensors.index.json";
  index_ = json{{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}}.dump(2) + "\n";
}

void SafetensorsLayout::add_file(const std::string& name, std::vector<size_t> tensors,
                                 const std::map<std::string, std::string>& metadata) {
  std::stable_sort(tensors.begin(), tensors.end(), [&](size_t a, size_t b) {
    return c10::elementSize(tensors_[a].dtype) > c10::elementSize(tensors_[b].dtype);
  });
  // By hand: an ordered_json looks every new key up among all earlier ones.
  std::string text = "{";
  if (!metadata.empty()) text += "\"__metadata__\":" + json(metadata).dump();
  int64_t end = 0;
  for (const size_t i : tensors) {
    const TensorSpec& tensor = tensors_[i];
    const int64_t begin = std::exchange(end, end + tensor.bytes());
    places_[i] = {files_.size(), begin};
    if (text.size() > 1) text += ',';
    text += json(tensor.name).dump() + ":{\"dtype\":\"" + std::string(*dtype_to_safetensors(tensor.dtype)) +
            "\",\"shape\":" + json(tensor.shape).dump() + ",\"data_offsets\":[" + std::to_string(begin) +
            ',' + std::to_string(end) + "]}";
  }
  text += '}';
  text.resize((text.size() + kHeaderAlignment - 1) / kHeaderAlignment * kHeaderAlignment, ' ');
  const uint64_t length = text.size();
  text.insert(0, reinterpret_cast<const char*>(&length), sizeof(length));
  for (const size_t i : tensors) places_[i].begin += static_cast<int64_t>(text.size());
  const int64_t size = static_cast<int64_t>(text.size()) + end;
  files_.push_back({.name = name, .head = std::move(text), .tensors = std::move(tensors), .size = size});
}

void SafetensorsLayout::create(const fs::path& folder) const {
  for (const File& file : files_) reserve_file(folder / file.name, file.size);
  for (const File& file : files_) {
    SharedFile out(folder / file.name);
    out.write(0, std::as_bytes(std::span(file.head)));
    out.commit();
  }
  if (!index_.empty()) write_file_atomic(folder / index_name_, index_);
}

void SafetensorsLayout::write(const fs::path& folder, const std::vector<TensorPart>& parts) const {
  write(folder, [&](const Put& put) {
    for (const TensorPart& part : parts) put(part);
  });
}

void SafetensorsLayout::write(const fs::path& folder, const std::function<void(const Put&)>& produce) const {
  std::vector<std::optional<SharedFile>> open(files_.size());
  produce([&](const TensorPart& part) {
    const auto found = numbers_.find(part.shard.name);
    TORCH_CHECK(found != numbers_.end(), "write_safetensors: no tensor is named ", part.shard.name);
    const TensorSpec& tensor = tensors_[found->second];
    TORCH_CHECK((tensor == TensorSpec{tensor.name, part.values.scalar_type(), part.shard.shape}),
                "write_safetensors: tensor ", tensor.name, " must be ", tensor.dtype, " ",
                at::IntArrayRef(tensor.shape), ", got ", part.values.scalar_type(), " ",
                at::IntArrayRef(part.shard.shape));
    const Place& place = places_[found->second];
    if (!open[place.file]) open[place.file].emplace(folder / files_[place.file].name);
    write_part(*open[place.file], place, part);
  });
  for (auto& file : open) {
    if (file) file->commit();
  }
}

void SafetensorsLayout::write_part(SharedFile& file, const Place& place, const TensorPart& part) const {
  const Tensor values = part.values.detach().cpu().contiguous();
  const auto size = static_cast<int64_t>(values.element_size());
  const auto* from = static_cast<const std::byte*>(values.const_data_ptr());
  part.shard.for_each_run(
      part.begin, part.begin + values.numel(), [&](int64_t local, int64_t whole, int64_t count) {
        file.write(place.begin + whole * size,
                   {from + (local - part.begin) * size, static_cast<size_t>(count * size)});
      });
}

}  // namespace hymoe
