#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "hymoe/io/safetensors.h"
#include "hymoe/io/shard.h"

namespace hymoe {

/// What a rank tells the others of the parts that it gives: a list of tensors with their dtype, shape, how
/// many elements there are, and the sum of these elements' positions modulo 2^64.
nlohmann::json describe(const std::vector<TensorPart>& parts);

/// The tensors that the parts of all ranks make together, by name. Throws Error naming one of which the ranks
/// do not give every element once.
std::vector<TensorSpec> whole_tensors(const std::vector<nlohmann::json>& descriptions);

/// What a rank tells the others of the parts that it wants: which of the files' tensors, and what is wrong.
std::string wants_of(const SafetensorsFolder& files, const std::vector<TensorPart>& parts);

/// What is wrong between the files and what all ranks want, in words; empty if nothing is.
std::string difference(const SafetensorsFolder& files, const std::vector<std::string>& wants);

}  // namespace hymoe
