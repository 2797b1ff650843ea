#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "hymoe/io/shard.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

/// A parameter of this rank, and which part of the whole model's it is.
struct ParameterShard {
  Shard shard = {};       // its name is the one in files
  Tensor parameter = {};  // the part
  bool expert =
      false;  // lives under Experts: the same part is on the ranks of mesh.dp; else on those of mesh.data
  bool tp_copy = false;  // every rank of mesh.tp has the same part
};

/// All parameters of a model in the order of named_parameters(), a shared one once. What is divided follows
/// from the tree: what lives under Experts belongs to its expert-parallel rank, matrices of attention, FFNs,
/// experts, embedding and output to their tensor-parallel rank; norms, routers and biases of the residual
/// stream are on all.
std::vector<ParameterShard> parameter_shards(const Transformer& model);
std::vector<ParameterShard> parameter_shards(const TransformerImpl& model);

/// A parameter of the whole model.
struct WholeParameter {
  std::string name = {};
  std::vector<int64_t> shape = {};
  int64_t index = -1;  // in parameter_shards(); -1: all of it is on other ranks of mesh.ep
};

/// All parameters of the whole model, in the order that they have in one process.
std::vector<WholeParameter> whole_parameters(const Transformer& model);
std::vector<WholeParameter> whole_parameters(const TransformerImpl& model);

}  // namespace hymoe
