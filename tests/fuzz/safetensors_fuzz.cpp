// A safetensors file; or, from `{` on, its header alone and, behind a zero byte, its data.
#include <cstring>
#include <numeric>

#include <ATen/ops/zeros.h>

#include "fuzz/target.h"
#include "hymoe/io/safetensors.h"

namespace hymoe::fuzz {
namespace {

std::string file_of(std::string_view header, std::string_view data) {
  const uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file.append(header).append(data);
}

void read_all(const SafetensorsFile& file, size_t size) {
  for (const std::string& name : file.names()) {
    const TensorInfo& info = file.info(name);
    const Tensor tensor = file.tensor(name);
    if (info.begin < 8 || info.end < info.begin || info.end > static_cast<int64_t>(size))
      broken("a tensor lies outside of its file");
    if (static_cast<int64_t>(tensor.nbytes()) != info.end - info.begin) broken("a tensor has other bytes");
    const auto* bytes = static_cast<const uint8_t*>(tensor.data_ptr());
    volatile uint64_t sum = std::accumulate(bytes, bytes + tensor.nbytes(), uint64_t{0});
    (void)sum;
    if (info.dtype == at::kFloat) {
      const Tensor values = at::zeros({tensor.numel()}, at::kDouble);
      file.read({.shard = {.name = name, .shape = info.shape}, .begin = 0, .values = values});
    }
  }
}

bool read(std::string_view bytes) {
  static const Folder folder;
  std::string made;
  if (bytes.starts_with('{')) {
    const std::string_view header = bytes.substr(0, bytes.find('\0'));
    made = file_of(header, bytes.substr(std::min(header.size() + 1, bytes.size())));
    bytes = made;
  }
  const auto path = folder.write("model.safetensors", bytes);
  return taken([&] { read_all(SafetensorsFile(path), bytes.size()); });
}

std::vector<std::string> seeds() {
  const std::string two =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}})";
  const std::string kinds =
      R"({"e":{"dtype":"I64","shape":[0,7],"data_offsets":[0,0]},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
      R"("t":{"dtype":"U8","shape":[1,1,1],"data_offsets":[4,5]},"u":{"dtype":"F16","shape":[1],"data_offsets":[5,7]}})";
  const std::string zero(1, '\0'), data(14, '\x3f');
  return {two + zero + data, kinds + zero + data.substr(0, 7), file_of(two, data), file_of("{}", ""), "{}"};
}

const Registration registration({"safetensors", read, seeds});

}  // namespace
}  // namespace hymoe::fuzz
