// model.safetensors.index.json beside two shards.
#include <ATen/ops/ones.h>

#include "fuzz/target.h"
#include "hymoe/io/safetensors.h"

namespace hymoe::fuzz {
namespace {

struct Shards : Folder {
  Shards() {
    write_safetensors(path() / "a.safetensors", {{"x", at::ones({2})}, {"y", at::ones({1})}});
    write_safetensors(path() / "b.safetensors", {{"z", at::ones({3})}});
  }
};

bool read(std::string_view bytes) {
  static const Shards folder;
  folder.write("model.safetensors.index.json", bytes);
  return taken([] {
    const SafetensorsFolder files(folder.path());
    for (const std::string& name : files.names()) {
      if (files.tensor(name).numel() != files.info(name).shape.at(0)) broken("a tensor has another shape");
    }
  });
}

std::vector<std::string> seeds() {
  return {
      R"({"metadata":{"total_size":24},"weight_map":{"x":"a.safetensors","y":"a.safetensors","z":"b.safetensors"}})",
      R"({"weight_map":{"z":"b.safetensors","y":"a.safetensors","x":"a.safetensors"}})"};
}

const Registration registration({"shard_index", read, seeds});

}  // namespace
}  // namespace hymoe::fuzz
