#pragma once

#include <functional>
#include <string>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "comm/communicator.h"
#include "hymoe/comm/mesh.h"

namespace hymoe {

/// Makes the backend of one group.
using Engine = std::function<c10::intrusive_ptr<c10d::Backend>(const c10::intrusive_ptr<c10d::Store>& store,
                                                               int rank, int size)>;

/// The groups of a rank, which the ranks of a store form together. Throws ConfigError when the mesh does not
/// have world_size ranks.
/// `control` makes the engine of Mesh::control.
Mesh make_mesh(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t world_size,
               MeshConfig config, const Engine& engine, const Engine& control,
               const std::shared_ptr<Watch>& watch);

}  // namespace hymoe
