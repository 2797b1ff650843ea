#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "comm/communicator.h"
#include "comm/rendezvous.h"
#include "hymoe/comm/launch.h"
#include "hymoe/config/error.h"

namespace hymoe {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kBeat{500};

std::string key_of(const std::string& sign, int64_t rank) { return sign + "/" + std::to_string(rank); }

c10::intrusive_ptr<c10d::Store> open_store(const Process& process, milliseconds timeout) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(process.port);
  options.isServer = process.rank == 0 && !process.store_is_there;
  options.waitWorkers = false;
  options.multiTenant = true;  // rank 0 opens it twice
  options.timeout = timeout;
  const std::string where = process.address + ":" + std::to_string(process.port);
  try {
    auto store = c10::make_intrusive<c10d::TCPStore>(process.address, options);
    return c10::make_intrusive<c10d::PrefixStore>("hymoe/" + process.attempt, store);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    throw Error("rank " + std::to_string(process.rank) + " of " + std::to_string(process.world_size) +
                ": cannot meet the others at " + where + ": " + text.substr(0, text.find('\n')));
  }
}

}  // namespace

// Says on the store, over a connection of its own, that this process runs and how far it is, and asks the
// same of the others.
class World::Heart : public Watch {
 public:
  Heart(const Process& process, milliseconds timeout)
      : process_(process), store_(open_store(process, timeout)), thread_([this] { beat(); }) {}
  ~Heart() override {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  // Ranks are silent whose process does not beat. If none of these has started least, whoever has is behind:
  // who waits has started what another has not, so that chains of waiting, through whatever groups, end
  // there.
  std::string missing_ranks() override {
    try {
      const Signs before = signs();
      std::this_thread::sleep_for(4 * kBeat);
      const Signs after = signs();
      const auto [least, most] = std::minmax_element(after.started.begin(), after.started.end());
      const auto silent = [&](size_t rank) { return after.beats[rank] == before.beats[rank]; };
      const auto last = [&](size_t rank) { return after.started[rank] == *least; };
      bool look_behind = *least < *most;
      for (size_t rank = 0; rank < after.beats.size(); ++rank) look_behind &= !(silent(rank) && last(rank));
      std::string missing;
      for (size_t rank = 0; rank < after.beats.size(); ++rank) {
        const bool behind = look_behind && last(rank) && after.started[rank] == before.started[rank];
        if (static_cast<int64_t>(rank) == process_.rank || !(silent(rank) || behind)) continue;
        if (!missing.empty()) missing += ", ";
        missing += "rank " + std::to_string(rank);
        missing += silent(rank) ? " no longer answers" : " has not started what the others wait for";
      }
      return missing;
    } catch (const std::exception&) {
      return process_.store_is_there ? "the launcher no longer answers" : "rank 0 no longer answers";
    }
  }

 private:
  struct Signs {
    std::vector<int64_t> beats, started;  // of each rank
  };

  Signs signs() {
    Signs all;
    for (int64_t rank = 0; rank < process_.world_size; ++rank) {
      all.beats.push_back(store_->add(key_of("beats", rank), 0));
      all.started.push_back(store_->add(key_of("started", rank), 0));
    }
    return all;
  }

  void beat() {
    int64_t told = 0;
    std::unique_lock lock(mutex_);
    while (!stopped_) {
      try {
        const int64_t now = started;
        store_->add(key_of("started", process_.rank), now - std::exchange(told, now));
        store_->add(key_of("beats", process_.rank), 1);
      } catch (const std::exception&) {
        return;  // the store is gone; a collective will say what happened
      }
      wake_.wait_for(lock, kBeat, [this] { return stopped_; });
    }
  }

  Process process_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopped_ = false;
  std::thread thread_;  // last: it uses the others
};

Mesh make_mesh(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t world_size,
               MeshConfig config, const Engine& engine, const Engine& control,
               const std::shared_ptr<Watch>& watch) {
  const int64_t rest = config.ep * config.tp;
  if (config.dp == 0) config.dp = world_size / rest;
  if (config.dp * rest != world_size) {
    throw ConfigError("parallel", "dp·ep·tp must be the number of processes, " + std::to_string(world_size) +
                                      ", got " + std::to_string(config.dp) + "·" + std::to_string(config.ep) +
                                      "·" + std::to_string(config.tp));
  }
  const int64_t tp = rank % config.tp, ep = rank / config.tp % config.ep, dp = rank / rest;
  // Ranks whose number in the group's own coordinate is `mine`; `others` tells groups of a kind apart.
  const auto group = [&](const char* name, int64_t mine, int64_t size, int64_t others, const Engine& make) {
    if (size == 1) return Group();
    const std::string prefix = std::string(name) + "/" + std::to_string(others);
    auto backend = make(c10::make_intrusive<c10d::PrefixStore>(prefix, store), static_cast<int>(mine),
                        static_cast<int>(size));
    return Group(std::shared_ptr<Communicator>(new Communicator{std::move(backend), name, watch}));
  };
  Mesh mesh{.exchange = config.exchange_type()};
  mesh.world = group("world", rank, world_size, 0, engine);
  mesh.control = group("control", rank, world_size, 0, control);
  mesh.dp = group("dp", dp, config.dp, ep * config.tp + tp, engine);
  mesh.ep = group("ep", ep, config.ep, dp * config.tp + tp, engine);
  mesh.tp = group("tp", tp, config.tp, dp * config.ep + ep, engine);
  mesh.data = group("data", dp * config.ep + ep, config.dp * config.ep, tp, engine);
  return mesh;
}

World::World(const Process& process, const MeshConfig& config, bool cuda, milliseconds timeout) {
  if (process.world_size == 1) {
    mesh_ = make_mesh({}, 0, 1, config, {}, {}, {});
    return;
  }
  heart_ = std::make_shared<Heart>(process, timeout);
  const Engine gloo = [&](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size) {
    return make_gloo(store, rank, size, timeout);
  };
  const Engine nccl = [&](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size) {
    return make_nccl(store, rank, size, timeout);
  };
  try {
    mesh_ = make_mesh(open_store(process, timeout), process.rank, process.world_size, config,
                      cuda ? nccl : gloo, gloo, heart_);
  } catch (const ConfigError&) {
    throw;
  } catch (const std::exception& error) {
    const std::string text = error.what(), missing = heart_->missing_ranks();
    throw Error("rank " + std::to_string(process.rank) + " of " + std::to_string(process.world_size) +
                ": the processes did not come together: " + text.substr(0, text.find('\n')) +
                (missing.empty() ? "" : "; " + missing));
  }
}

World::~World() = default;
World::World(World&&) noexcept = default;
World& World::operator=(World&&) noexcept = default;

}  // namespace hymoe
