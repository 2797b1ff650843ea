#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "hymoe/comm/mesh.h"

namespace hymoe {

/// This process among those that were started together.
struct Process {
  int64_t rank = 0;
  int64_t world_size = 1;
  int64_t local_rank = 0;    // among those of this machine: the number of its GPU
  std::string address = {};  // where the processes meet
  int64_t port = 29500;
  bool store_is_there = false;  // torchrun keeps the meeting place; else rank 0 opens it
  std::string attempt = "0";    // which start of the same job this is
};

/// Reads the environment that torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), srun
/// (SLURM_PROCID, ...) or Open MPI's mpirun (OMPI_COMM_WORLD_RANK, ...) sets; without any, one process alone.
/// MASTER_ADDR and MASTER_PORT, where set, go over what is derived. Throws ConfigError naming a variable that
/// is missing or no number. `get` returns nullptr for what is not set.
Process read_process(const std::function<const char*(const char*)>& get);
Process read_process();

/// The ranks of a job, connected. Lives as long as its mesh is used.
class World {
 public:
  /// A world of this process alone.
  World() = default;
  /// Meets the other processes, which must ask for the same mesh, and forms the groups; Gloo for the CPU,
  /// NCCL for CUDA. A collective that takes longer than `timeout` fails. Throws ConfigError when dp·ep·tp is
  /// not the number of processes, and Error when the others do not come within `timeout`.
  World(const Process& process, const MeshConfig& config, bool cuda, std::chrono::milliseconds timeout);
  ~World();
  World(World&&) noexcept;
  World& operator=(World&&) noexcept;

  const Mesh& mesh() const { return mesh_; }

 private:
  class Heart;
  std::shared_ptr<Heart> heart_;
  Mesh mesh_;
};

}  // namespace hymoe
