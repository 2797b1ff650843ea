#pragma once

#include "hymoe/comm/mesh.h"
#include "hymoe/model/config.h"
#include "hymoe/model/transformer.h"

namespace hymoe {

/// A model that takes no memory, of any size: its parameters and buffers have shapes and types alone (torch's
/// meta device). What counts parameters works on it, and parameter_shards; nothing can be computed. Routers
/// and experts of your own are outlined too, where their constructors make tensors without reading them.
Transformer outline(const ModelConfig& config, const Mesh& mesh = {});

}  // namespace hymoe
