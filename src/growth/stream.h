#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "hymoe/growth/receipt.h"
#include "hymoe/io/safetensors.h"

namespace hymoe {

/// Elements that are made, converted and written together.
inline constexpr int64_t kRun = int64_t{1} << 22;

/// A tensor of a checkpoint that is being made. `make` hands on its values, one run of elements after
/// another, of any shape and dtype; without it they are zero. So that no more need be in memory than a run.
/// Values that were handed on must not change any more: they are written while the next are made.
struct NewTensor {
  using Put = std::function<void(const Tensor&)>;
  TensorSpec spec = {};
  std::function<void(const Put&)> make = {};
};

/// Given every run as it is written.
using SeenRun = std::function<void(const std::string& name, const Tensor& values)>;
/// Writes `<stem>*.safetensors` into `folder`, tensor by tensor, and gives back the memory of what was read
/// from `sources` on the way. Where tensors lie is returned.
SafetensorsLayout write_tensors(const std::filesystem::path& folder, const std::string& stem,
                                const std::vector<NewTensor>& tensors,
                                const std::vector<const SafetensorsFolder*>& sources,
                                const GrowthProgress& progress, const SeenRun& seen = {});

/// The random numbers of one tensor, whatever was drawn for others.
at::Generator generator_for(int64_t seed, std::string_view name);

/// Mean and standard deviation (unbiased; 0 of one element) in fp32 parts, merged in their order: the same
/// for any number of threads.
struct Moments {
  double mean = 0, std = 0;
};
Moments moments_of(const Tensor& values);

/// Hands on values + N(0, (share·std(values))²), added in fp32 and rounded to `dtype`, run by run. What is
/// drawn does not depend on the number of threads. With a share of 0, the values as they are.
void put_with_noise(const Tensor& values, double share, int64_t seed, const std::string& name,
                    at::ScalarType dtype, const NewTensor::Put& put);

/// SHA-256 of every file of weights of some folders, computed beside other work; left undone when it goes.
class FileHashes {
 public:
  explicit FileHashes(std::vector<const SafetensorsFolder*> folders);
  ~FileHashes() { stop_ = true; }

  /// A folder's, in the order given, by the names of the files.
  std::vector<nlohmann::ordered_json> get() { return hashes_.get(); }

 private:
  std::atomic<bool> stop_ = false;
  std::future<std::vector<nlohmann::ordered_json>> hashes_;
};

/// A file that holds a JSON object; throws DataError for one that does not.
nlohmann::ordered_json read_object(const std::filesystem::path& path);

/// A checkpoint's receipt.json, or null.
nlohmann::ordered_json read_receipt(const std::filesystem::path& folder);

}  // namespace hymoe
