#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "hymoe/growth/receipt.h"
#include "hymoe/io/safetensors.h"

namespace hymoe {

/// A tensor of a checkpoint that is being made. `make` hands on its values, one run of elements after
/// another, of any shape and dtype; without it they are zero. So that no more need be in memory than a run.
struct NewTensor {
  using Put = std::function<void(const Tensor&)>;
  TensorSpec spec = {};
  std::function<void(const Put&)> make = {};
};

/// Writes `<stem>*.safetensors` into `folder`, tensor by tensor, and gives back the memory of what was read
/// from `sources` on the way. `seen` is given every run as it was written. Where tensors lie is returned.
using SeenRun = std::function<void(const std::string& name, const Tensor& values)>;
SafetensorsLayout write_tensors(const std::filesystem::path& folder, const std::string& stem,
                                const std::vector<NewTensor>& tensors,
                                const std::vector<const SafetensorsFolder*>& sources,
                                const GrowthProgress& progress, const SeenRun& seen = {});

/// The random numbers of one tensor, whatever was drawn for others.
at::Generator generator_for(int64_t seed, std::string_view name);

/// Hands on values + N(0, (share·std(values))²), added in fp32 and rounded to `dtype`, run by run. What is
/// drawn does not depend on the number of threads. With a share of 0, the values as they are.
void put_with_noise(const Tensor& values, double share, int64_t seed, const std::string& name,
                    at::ScalarType dtype, const NewTensor::Put& put);

/// SHA-256 of every file of weights, by name.
nlohmann::ordered_json hash_files(const SafetensorsFolder& folder);

/// A file that holds a JSON object; throws DataError for one that does not.
nlohmann::ordered_json read_object(const std::filesystem::path& path);

/// A checkpoint's receipt.json, or null.
nlohmann::ordered_json read_receipt(const std::filesystem::path& folder);

}  // namespace hymoe
