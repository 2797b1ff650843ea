#include "hymoe/comm/launch.h"

#include <cstdlib>
#include <optional>
#include <utility>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

using Get = std::function<const char*(const char*)>;

int64_t number(const Get& get, const char* name) {
  const char* text = get(name);
  if (text == nullptr) throw ConfigError(name, "expected a number in the environment, it is not set");
  char* end = nullptr;
  const int64_t value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0)
    throw ConfigError(name, "expected a number in the environment, got '" + std::string(text) + "'");
  return value;
}

// First machine of Slurm's list: "a[01-04,7],b" -> "a01".
std::string first_host(const std::string& list) {
  const size_t open = list.find_first_of("[,");
  if (open == std::string::npos || list[open] == ',') return list.substr(0, open);
  return list.substr(0, open) + list.substr(open + 1, list.find_first_of("-,]", open) - open - 1);
}

void find_torchrun(const Get& get, Process& process) {
  process.rank = number(get, "RANK");
  process.world_size = number(get, "WORLD_SIZE");
  process.local_rank = get("LOCAL_RANK") != nullptr ? number(get, "LOCAL_RANK") : process.rank;
  if (const char* attempt = get("TORCHELASTIC_RESTART_COUNT")) process.attempt = attempt;
  const char* agent = get("TORCHELASTIC_USE_AGENT_STORE");
  process.store_is_there = agent != nullptr && std::string(agent) == "True";
}

void find_slurm(const Get& get, Process& process) {
  process.rank = number(get, "SLURM_PROCID");
  process.world_size = number(get, "SLURM_STEP_NUM_TASKS");
  process.local_rank = number(get, "SLURM_LOCALID");
  if (const char* nodes = get("SLURM_STEP_NODELIST")) process.address = first_host(nodes);
  // Jobs on one machine need ports of their own.
  process.port = 20000 + number(get, "SLURM_JOB_ID") % 20000;
  process.attempt = std::to_string(number(get, "SLURM_STEP_ID"));
}

void find_mpirun(const Get& get, Process& process) {
  process.rank = number(get, "OMPI_COMM_WORLD_RANK");
  process.world_size = number(get, "OMPI_COMM_WORLD_SIZE");
  process.local_rank = number(get, "OMPI_COMM_WORLD_LOCAL_RANK");
  if (number(get, "OMPI_COMM_WORLD_LOCAL_SIZE") == process.world_size) process.address = "127.0.0.1";
}

}  // namespace

Process read_process(const Get& get) {
  Process process;
  if (get("RANK") != nullptr || get("WORLD_SIZE") != nullptr) {
    find_torchrun(get, process);
  } else if (get("OMPI_COMM_WORLD_SIZE") != nullptr) {
    find_mpirun(get,
                process);  // within Slurm its ranks inherit the variables of the daemon that started them
  } else if (get("SLURM_STEP_NUM_TASKS") != nullptr) {
    find_slurm(get, process);
  }
  if (const char* address = get("MASTER_ADDR")) process.address = address;
  if (get("MASTER_PORT") != nullptr) process.port = number(get, "MASTER_PORT");
  if (process.rank >= process.world_size) {
    throw ConfigError("", "the environment says rank " + std::to_string(process.rank) + " of " +
                              std::to_string(process.world_size) + " processes");
  }
  if (process.world_size > 1 && process.address.empty())
    throw ConfigError("MASTER_ADDR", "expected the address of rank 0 in the environment, it is not set");
  return process;
}

Process read_process() {
  return read_process([](const char* name) { return std::getenv(name); });
}

}  // namespace hymoe
