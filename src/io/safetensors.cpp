#include "hymoe/io/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <set>
#include <span>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <nlohmann/json.hpp>

#include "hymoe/config/error.h"
#include "io/safetensors_dtypes.h"

namespace hymoe {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;

/// A name as it may stand in a one-line message.
std::string quoted(const std::string& name) {
  constexpr size_t kLongest = 200;
  std::string text = json(name.substr(0, kLongest)).dump(-1, ' ', false, json::error_handler_t::replace);
  return name.size() > kLongest ? text + "..." : text;
}

bool is_there(const fs::path& path) {
  std::error_code error;
  const bool found = fs::exists(path, error);
  if (error) throw DataError(path.string(), "cannot read: " + error.message());
  return found;
}

/// JSON in which no object has a key twice and nothing lies deeper than `max_depth`. `what` names it in
/// errors.
json parse_strict(const fs::path& path, std::string_view text, const std::string& what, int max_depth) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
      if (depth >= max_depth) throw DataError(path.string(), what + " is nested too deeply");
      if (event == json::parse_event_t::object_start) keys.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == json::parse_event_t::key) {
      const std::string name = value.get<std::string>();
      if (!keys.back().insert(name).second)
        throw DataError(path.string(), what + " names " + quoted(name) + " twice");
    }
    return true;
  };
  try {
    json parsed = json::parse(text, check);
    if (!parsed.is_object()) throw DataError(path.string(), what + " must be a JSON object");
    return parsed;
  } catch (const json::exception& error) {
    throw DataError(path.string(), what + " is no valid JSON: " + error.what());
  }
}

std::string join(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

/// Reads one file's header; throws DataError naming the file and, once known, the tensor.
class HeaderReader {
 public:
  HeaderReader(const MappedFile& file, std::map<std::string, std::string>& metadata)
      : file_(file), metadata_(metadata) {}

  /// Tensors in the order of their bytes.
  std::vector<std::pair<std::string, TensorInfo>> read() {
    const std::string_view text = header_text();
    const json header = parse_strict(file_.path(), text, "header", 3);
    data_begin_ = kLengthBytes + text.size();
    std::vector<std::pair<std::string, TensorInfo>> tensors;
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        read_metadata(entry);
      } else {
        tensors.emplace_back(name, read_info(name, entry));
      }
    }
    std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
      return std::tie(a.second.begin, a.second.end, a.first) <
             std::tie(b.second.begin, b.second.end, b.first);
    });
    check_layout(tensors);
    return tensors;
  }

 private:
  [[noreturn]] void fail(const std::string& text) const { throw DataError(file_.path().string(), text); }
  [[noreturn]] void fail(const std::string& tensor, const std::string& text) const {
    fail("tensor " + quoted(tensor) + ": " + text);
  }

  std::string_view header_text() const {
    const std::span<const std::byte> bytes = file_.bytes();
    if (bytes.size() < kLengthBytes) {
      fail("is too short for a safetensors file: " + std::to_string(bytes.size()) +
           " bytes, wanted at least 8");
    }
    uint64_t length;
    std::memcpy(&length, bytes.data(), sizeof(length));
    if (length > kMaxHeader) {
      fail("header length " + std::to_string(length) + " is over the limit of " + std::to_string(kMaxHeader));
    }
    if (length > bytes.size() - kLengthBytes) {
      fail("header of " + std::to_string(length) + " bytes reaches past the end of the file (" +
           std::to_string(bytes.size()) + " bytes)");
    }
    const auto* text = reinterpret_cast<const char*>(bytes.data()) + kLengthBytes;
    if (length == 0 || text[0] != '{') fail("header does not begin with '{': not a safetensors file");
    return {text, length};
  }

  void read_metadata(const json& entry) {
    if (!entry.is_object()) fail("__metadata__ must be an object of strings");
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) fail("__metadata__: " + quoted(key) + " must be a string");
      metadata_[key] = value.get<std::string>();
    }
  }

  TensorInfo read_info(const std::string& name, const json& entry) const {
    if (!entry.is_object()) fail(name, "must be an object with dtype, shape and data_offsets");
    for (const auto& [key, value] : entry.items()) {
      if (key != "dtype" && key != "shape" && key != "data_offsets")
        fail(name, "has an unknown entry " + quoted(key));
    }
    if (entry.size() != 3) fail(name, "must have dtype, shape and data_offsets");
    if (!entry["dtype"].is_string()) fail(name, "dtype must be a string");
    const std::string dtype_name = entry["dtype"].get<std::string>();
    const auto dtype = dtype_from_safetensors(dtype_name);
    if (!dtype) fail(name, "unknown dtype " + quoted(dtype_name));

    TensorInfo info{
        .dtype = *dtype, .shape = read_numbers(name, "shape", entry["shape"]), .begin = 0, .end = 0};
    const std::vector<int64_t> offsets = read_numbers(name, "data_offsets", entry["data_offsets"]);
    if (offsets.size() != 2)
      fail(name, "data_offsets must be two numbers, got " + std::to_string(offsets.size()));
    const auto data_bytes = static_cast<int64_t>(file_.bytes().size() - data_begin_);
    if (offsets[0] > offsets[1]) fail(name, "data_offsets " + join(offsets) + " end before they begin");
    if (offsets[1] > data_bytes) {
      fail(name, "data_offsets " + join(offsets) + " reach past the end of the data (" +
                     std::to_string(data_bytes) + " bytes)");
    }
    const int64_t wanted = byte_count(name, info);
    if (offsets[1] - offsets[0] != wanted) {
      fail(name, "data_offsets " + join(offsets) + " hold " + std::to_string(offsets[1] - offsets[0]) +
                     " bytes, but " + dtype_name + " " + join(info.shape) + " takes " +
                     std::to_string(wanted));
    }
    info.begin = static_cast<int64_t>(data_begin_) + offsets[0];
    info.end = static_cast<int64_t>(data_begin_) + offsets[1];
    return info;
  }

  std::vector<int64_t> read_numbers(const std::string& name, const std::string& key,
                                    const json& value) const {
    if (!value.is_array()) fail(name, key + " must be a list of whole numbers");
    std::vector<int64_t> numbers;
    for (const json& number : value) {
      constexpr auto kLargest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
      if (!number.is_number_unsigned() || number.get<uint64_t>() > kLargest) {
        fail(name, key + " must hold whole numbers from 0 to 2^63 - 1, got " + quoted(number.dump()));
      }
      numbers.push_back(number.get<int64_t>());
    }
    return numbers;
  }

  int64_t byte_count(const std::string& name, const TensorInfo& info) const {
    // Without the zeros first: torch computes strides from the other sizes even when a tensor is empty.
    auto bytes = static_cast<int64_t>(c10::elementSize(info.dtype));
    bool empty = false;
    for (const int64_t size : info.shape) {
      empty |= size == 0;
      if (size != 0 && __builtin_mul_overflow(bytes, size, &bytes)) {
        fail(name, "shape " + join(info.shape) + " overflows");
      }
    }
    return empty ? 0 : bytes;
  }

  void check_layout(const std::vector<std::pair<std::string, TensorInfo>>& tensors) const {
    const auto data = static_cast<int64_t>(data_begin_);
    const auto unowned = [data](int64_t from, int64_t to) {
      return "bytes " + std::to_string(from - data) + " to " + std::to_string(to - data) +
             " of the data belong to no tensor";
    };
    int64_t end = data;
    const std::string* previous = nullptr;
    for (const auto& [name, info] : tensors) {
      if (info.begin < end) {
        fail(name, "data_offsets " + join({info.begin - data, info.end - data}) + " overlap tensor " +
                       quoted(*previous));
      }
      if (info.begin > end) fail(name, unowned(end, info.begin));
      end = info.end;
      previous = &name;
    }
    const auto size = static_cast<int64_t>(file_.bytes().size());
    if (end != size) fail(unowned(end, size));
  }

  const MappedFile& file_;
  std::map<std::string, std::string>& metadata_;
  uint64_t data_begin_ = 0;
};

}  // namespace

SafetensorsFile::SafetensorsFile(const fs::path& path) : file_(std::make_shared<MappedFile>(path)) {
  for (auto& [name, info] : HeaderReader(*file_, metadata_).read()) {
    names_.push_back(name);
    infos_.emplace(std::move(name), std::move(info));
  }
}

const TensorInfo& SafetensorsFile::info(const std::string& name) const {
  const auto found = infos_.find(name);
  if (found == infos_.end()) throw DataError(path().string(), "has no tensor " + quoted(name));
  return found->second;
}

Tensor SafetensorsFile::tensor(const std::string& name) const {
  const TensorInfo& info = this->info(name);
  const auto options = at::TensorOptions().dtype(info.dtype);
  if (info.begin == info.end) return at::empty(info.shape, options);
  const std::byte* bytes = file_->bytes().data() + info.begin;
  if (reinterpret_cast<uintptr_t>(bytes) % c10::elementSize(info.dtype) != 0) {
    Tensor copy = at::empty(info.shape, options);
    std::memcpy(copy.data_ptr(), bytes, static_cast<size_t>(info.end - info.begin));
    return copy;
  }
  return at::from_blob(
      const_cast<std::byte*>(bytes), info.shape, [keep = file_](void*) {}, options);
}

void SafetensorsFile::read(const TensorPart& part) const {
  const auto& [shard, begin, values] = part;
  TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "read: ", shard.name,
              ": values must be [n] and contiguous, got ", values.sizes());
  const TensorInfo& info = this->info(shard.name);
  const at::ScalarType wanted = values.scalar_type();
  if (info.shape != shard.shape || !reads_as(info.dtype, wanted)) {
    throw DataError(path().string(), "tensor " + quoted(shard.name) + ": expected " + c10::toString(wanted) +
                                         " " + join(shard.shape) + ", got " + c10::toString(info.dtype) +
                                         " " + join(info.shape));
  }
  const bool direct = values.is_cpu() && wanted == info.dtype;
  const Tensor stored = direct ? values : at::empty(values.sizes(), info.dtype);
  const auto size = static_cast<int64_t>(c10::elementSize(info.dtype));
  auto* to = static_cast<std::byte*>(stored.data_ptr());
  const std::byte* from = file_->bytes().data() + info.begin;
  shard.for_each_run(begin, begin + values.numel(), [&](int64_t local, int64_t whole, int64_t count) {
    std::memcpy(to + (local - begin) * size, from + whole * size, static_cast<size_t>(count * size));
  });
  if (!direct) values.detach().copy_(stored);
}

SafetensorsFolder::SafetensorsFolder(const fs::path& path, std::string_view stem) : path_(path) {
  std::error_code ignored;  // add_file() tells of a path that cannot be read
  if (!fs::is_directory(path, ignored)) {
    add_file(path);
    return;
  }
  const std::string base(stem);
  const fs::path single = path / (base + ".safetensors");
  const fs::path index = path / (base + ".safetensors.index.json");
  if (!is_there(index)) {
    if (!is_there(single)) {
      throw DataError(path.string(),
                      "has neither " + single.filename().string() + " nor " + index.filename().string());
    }
    add_file(single);
    return;
  }

  const json parsed = parse_strict(index, read_text(index), "index", 3);
  if (!parsed.contains("weight_map") || !parsed["weight_map"].is_object()) {
    throw DataError(index.string(), "must have an object weight_map of tensor names to file names");
  }
  std::map<std::string, std::string> weight_map;
  std::set<std::string> file_names;
  for (const auto& [name, value] : parsed["weight_map"].items()) {
    const std::string file = value.is_string() ? value.get<std::string>() : "";
    if (file.empty() || file == "." || file == ".." ||
        file.find_first_of(std::string_view("/\\\0", 3)) != file.npos) {
      throw DataError(index.string(), "tensor " + quoted(name) +
                                          ": wanted the name of a file in the same folder, got " +
                                          quoted(value.dump()));
    }
    weight_map[name] = file;
    file_names.insert(file);
  }
  if (weight_map.empty()) throw DataError(index.string(), "weight_map is empty");
  if (is_there(single) && !file_names.contains(single.filename().string())) {
    throw DataError(path.string(),
                    "holds both " + single.filename().string() + " and an index of other files");
  }
  for (const std::string& name : file_names) {
    if (!is_there(path / name))
      throw DataError(index.string(), "lists " + quoted(name) + ", which is missing");
    add_file(path / name);
  }
  check_index(index, weight_map);
}

void SafetensorsFolder::add_file(const fs::path& path) {
  const SafetensorsFile& file = files_.emplace_back(path);
  for (const std::string& name : file.names()) {
    const auto [entry, fresh] = file_of_.emplace(name, files_.size() - 1);
    if (!fresh) {
      throw DataError(path.string(), "tensor " + quoted(name) + " is also in " +
                                         files_[entry->second].path().filename().string());
    }
    names_.push_back(name);
  }
}

void SafetensorsFolder::check_index(const fs::path& index,
                                    const std::map<std::string, std::string>& weight_map) const {
  for (const auto& [name, file] : weight_map) {
    const auto found = file_of_.find(name);
    if (found == file_of_.end())
      throw DataError((path_ / file).string(), "lacks tensor " + quoted(name) + " of the index");
    const std::string actual = files_[found->second].path().filename().string();
    if (actual != file) {
      throw DataError(index.string(),
                      "tensor " + quoted(name) + " is said to be in " + file + " but is in " + actual);
    }
  }
  for (const auto& [name, file] : file_of_) {
    if (!weight_map.contains(name)) {
      throw DataError(files_[file].path().string(), "tensor " + quoted(name) + " is not in the index");
    }
  }
}

const SafetensorsFile& SafetensorsFolder::file_with(const std::string& name) const {
  const auto found = file_of_.find(name);
  if (found == file_of_.end()) throw DataError(path_.string(), "has no tensor " + quoted(name));
  return files_[found->second];
}

}  // namespace hymoe
