#include "growth/stream.h"

#include <algorithm>
#include <cmath>
#include <future>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "data/parallel.h"
#include "hymoe/config/error.h"
#include "hymoe/io/file.h"

namespace hymoe {
namespace {

namespace fs = std::filesystem;

// At most at::internal::GRAIN_SIZE elements, which LibTorch works on with the calling thread: OpenMP's
// threads spin while they wait, at the cost of what reads, hashes and writes beside.
constexpr int64_t kPart = int64_t{1} << 15;

int64_t parts_of(const Tensor& flat) { return (flat.numel() + kPart - 1) / kPart; }

Tensor part_of(const Tensor& flat, int64_t part) {
  return flat.narrow(0, part * kPart, std::min(kPart, flat.numel() - part * kPart));
}

Tensor converted(const Tensor& run, at::ScalarType dtype) {
  if (run.scalar_type() == dtype) return run;
  Tensor written = at::empty(run.sizes(), dtype);
  for (int64_t part = 0; part < parts_of(run); ++part) part_of(written, part).copy_(part_of(run, part));
  return written;
}

}  // namespace

Moments moments_of(const Tensor& values) {
  struct Part {
    double mean = 0, squares = 0;  // squared distances from the mean
  };
  const Tensor flat = values.contiguous().view(-1);
  std::vector<Part> parts(parts_of(flat));
  parallel_for(parts_of(flat), at::get_num_threads(), [&](int64_t part) {
    Tensor exact = at::empty({part_of(flat, part).numel()}, at::kFloat).copy_(part_of(flat, part));
    const Tensor mean = exact.mean();
    parts[part] = {mean.item<double>(), exact.sub_(mean).square_().sum().item<double>()};
  });
  const auto count = static_cast<double>(flat.numel());
  double mean = 0, squares = 0;
  const auto size = [&](size_t part) { return static_cast<double>(part_of(flat, part).numel()); };
  for (size_t i = 0; i < parts.size(); ++i) mean += parts[i].mean * size(i) / count;
  for (size_t i = 0; i < parts.size(); ++i)
    squares += parts[i].squares + size(i) * (parts[i].mean - mean) * (parts[i].mean - mean);
  return {mean, count > 1 ? std::sqrt(squares / (count - 1)) : 0};
}

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
    std::future<void> writing;  // the last run, while the next is made
    const auto wait = [&] {
      if (writing.valid()) writing.get();
    };
    int64_t done = 0;
    for (const auto& [spec, make] : tensors) {
      progress("write", done++, static_cast<int64_t>(tensors.size()));
      int64_t begin = 0;
      if (make) {
        make([&](const Tensor& values) {
          for (const Tensor& run : values.contiguous().view(-1).split(kRun)) {
            const Tensor written = converted(run, spec.dtype);
            wait();
            writing = std::async(std::launch::async, [&put, &spec, begin, written] {
              put({.shard = {.name = spec.name, .shape = spec.shape}, .begin = begin, .values = written});
            });
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
    wait();
  });
  return layout;
}

at::Generator generator_for(int64_t seed, std::string_view name) {
  const std::string digits = sha256(std::to_string(seed) + " " + std::string(name)).substr(0, 16);
  return at::detail::createCPUGenerator(std::stoull(digits, nullptr, 16));
}

void put_with_noise(const Tensor& values, double share, int64_t seed, const std::string& name,
                    at::ScalarType dtype, const NewTensor::Put& put) {
  if (share == 0) return put(values);
  const Tensor flat = values.contiguous().view(-1);
  const double std = share * moments_of(flat).std;
  int64_t before = 0;  // parts
  for (const Tensor& exact : flat.split(kRun)) {
    const Tensor run = at::empty(exact.sizes(), dtype);
    parallel_for(parts_of(run), at::get_num_threads(), [&](int64_t part) {
      const Tensor of_run = part_of(run, part), noise = at::empty(of_run.sizes(), at::kFloat);
      noise.normal_(0, std, generator_for(seed, name + " " + std::to_string(before + part)));
      of_run.copy_(noise.add_(part_of(exact, part).to(at::kFloat)));
    });
    before += parts_of(run);
    put(run);
  }
}

FileHashes::FileHashes(std::vector<const SafetensorsFolder*> folders) {
  hashes_ = std::async(std::launch::async, [this, folders = std::move(folders)] {
    std::vector<nlohmann::ordered_json> all;
    for (const SafetensorsFolder* folder : folders) {
      auto& hashes = all.emplace_back(nlohmann::ordered_json::object());
      for (const SafetensorsFile& file : folder->files()) {
        if (!stop_) hashes[file.path().filename().string()] = sha256_file(file.path());
      }
    }
    return all;
  });
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
