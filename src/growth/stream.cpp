#include "growth/stream.h"

#include <algorithm>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include "hymoe/config/error.h"
#include "hymoe/io/file.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxShardBytes = 5'000'000'000;
constexpr int64_t kRun = int64_t{1} << 25;  // elements that are converted at a time

}  // namespace

SafetensorsLayout write_tensors(const fs::path& folder, const std::string& stem,
                                const std::vector<NewTensor>& tensors,
                                const std::vector<const SafetensorsFolder*>& sources,
                                const GrowthProgress& progress, const SeenRun& seen) {
  std::vector<TensorSpec> specs;
  specs.reserve(tensors.size());
  for (const NewTensor& tensor : tensors) specs.push_back(tensor.spec);
  SafetensorsLayout layout(stem, std::move(specs), kMaxShardBytes);
  layout.create(folder);  // all zero
  layout.write(folder, [&](const SafetensorsLayout::Put& put) {
    int64_t done = 0;
    for (const auto& [spec, make] : tensors) {
      progress("write", done++, static_cast<int64_t>(tensors.size()));
      int64_t begin = 0;
      if (make) {
        make([&](const Tensor& values) {
          for (const Tensor& run : values.contiguous().view(-1).split(kRun)) {
            const Tensor written = run.to(spec.dtype);
            put({.shard = {.name = spec.name, .shape = spec.shape}, .begin = begin, .values = written});
            if (seen) seen(spec.name, written);
            begin += written.numel();
          }
          for (const SafetensorsFolder* source : sources) {
            for (const SafetensorsFile& file : source->files()) file.drop_pages();
          }
        });
        TORCH_CHECK(begin == spec.numel(), "write_tensors: ", spec.name, " has ", spec.numel(),
                    " elements, got ", begin);
      }
    }
  });
  return layout;
}

at::Generator generator_for(int64_t seed, std::string_view name) {
  const std::string digits = sha256(std::to_string(seed) + " " + std::string(name)).substr(0, 16);
  return at::detail::createCPUGenerator(std::stoull(digits, nullptr, 16));
}

Tensor with_noise(const Tensor& values, double share, int64_t seed, const std::string& name) {
  constexpr int64_t kPart = int64_t{1} << 20;
  const Tensor exact = values.to(at::kFloat).contiguous();
  const double std = exact.numel() > 1 ? exact.std().item<double>() : 0.0;
  Tensor noise = at::empty_like(exact).view(-1);
  const int64_t parts = (noise.numel() + kPart - 1) / kPart;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      noise.narrow(0, part * kPart, std::min(kPart, noise.numel() - part * kPart))
          .normal_(0, share * std, generator_for(seed, name + " " + std::to_string(part)));
    }
  });
  return noise.view_as(exact).add_(exact);
}

nlohmann::ordered_json hash_files(const SafetensorsFolder& folder) {
  nlohmann::ordered_json hashes = nlohmann::ordered_json::object();
  for (const SafetensorsFile& file : folder.files())
    hashes[file.path().filename().string()] = sha256_file(file.path());
  return hashes;
}

nlohmann::ordered_json read_object(const fs::path& path) {
  auto object = nlohmann::ordered_json::parse(read_text(path), nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) throw DataError(path.string(), "expected a JSON object");
  return object;
}

nlohmann::ordered_json read_receipt(const fs::path& folder) {
  const fs::path path = folder / "receipt.json";
  return fs::exists(path) ? read_object(path) : nullptr;
}

}  // namespace hymoe
