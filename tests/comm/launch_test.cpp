#include "hymoe/comm/launch.h"

#include <unistd.h>

#include <chrono>
#include <latch>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <torch/types.h>

#include "hymoe/config/error.h"

namespace hymoe {
namespace {

Process process_of(const std::map<std::string, std::string>& environment) {
  return read_process([&](const char* name) -> const char* {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

TEST(ReadProcess, AloneWithoutALauncher) {
  const Process process = process_of({});
  EXPECT_EQ(process.rank, 0);
  EXPECT_EQ(process.world_size, 1);
}

TEST(ReadProcess, Torchrun) {
  const Process process = process_of({{"RANK", "5"},
                                      {"WORLD_SIZE", "8"},
                                      {"LOCAL_RANK", "1"},
                                      {"MASTER_ADDR", "node0"},
                                      {"MASTER_PORT", "1234"},
                                      {"TORCHELASTIC_RESTART_COUNT", "2"},
                                      {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                      {"SLURM_PROCID", "0"}});
  EXPECT_EQ(process.rank, 5);
  EXPECT_EQ(process.world_size, 8);
  EXPECT_EQ(process.local_rank, 1);
  EXPECT_EQ(process.address, "node0");
  EXPECT_EQ(process.port, 1234);
  EXPECT_EQ(process.attempt, "2");
  EXPECT_TRUE(process.store_is_there);
}

TEST(ReadProcess, Slurm) {
  std::map<std::string, std::string> environment{
      {"SLURM_PROCID", "3"},      {"SLURM_STEP_NUM_TASKS", "4"},
      {"SLURM_LOCALID", "1"},     {"SLURM_STEP_NODELIST", "gpu[07-09,12]"},
      {"SLURM_JOB_ID", "123456"}, {"SLURM_STEP_ID", "0"}};
  const Process process = process_of(environment);
  EXPECT_EQ(process.rank, 3);
  EXPECT_EQ(process.world_size, 4);
  EXPECT_EQ(process.local_rank, 1);
  EXPECT_EQ(process.address, "gpu07");
  EXPECT_EQ(process.port, 20000 + 123456 % 20000);
  EXPECT_FALSE(process.store_is_there);
  for (const auto& [list, first] : {std::pair("a1,a2", "a1"), {"solo", "solo"}, {"x[3,5]", "x3"}}) {
    environment["SLURM_STEP_NODELIST"] = list;
    EXPECT_EQ(process_of(environment).address, first);
  }
  environment["MASTER_ADDR"] = "other";
  environment["MASTER_PORT"] = "77";
  EXPECT_EQ(process_of(environment).address, "other");
  EXPECT_EQ(process_of(environment).port, 77);
}

TEST(ReadProcess, OpenMpi) {
  std::map<std::string, std::string> environment{{"OMPI_COMM_WORLD_RANK", "1"},
                                                 {"OMPI_COMM_WORLD_SIZE", "2"},
                                                 {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                                 {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
  EXPECT_EQ(process_of(environment).rank, 1);
  EXPECT_EQ(process_of(environment).address, "127.0.0.1");
  environment["OMPI_COMM_WORLD_LOCAL_SIZE"] = "1";  // on two machines, of which we know no address
  EXPECT_THROW(process_of(environment), ConfigError);
}

TEST(ReadProcess, SaysWhichVariableIsMissingOrWrong) {
  const std::map<std::string, std::string> good{
      {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "localhost"}, {"MASTER_PORT", "1"}};
  for (const auto& [name, value] :
       {std::pair("RANK", ""), {"RANK", "x"}, {"WORLD_SIZE", "2x"}, {"MASTER_ADDR", ""}}) {
    auto environment = good;
    environment[name] = value;
    if (environment[name].empty()) environment.erase(name);
    try {
      process_of(environment);
      FAIL() << name;
    } catch (const ConfigError& error) {
      EXPECT_EQ(error.key_path(), name);
    }
  }
  auto beyond = good;
  beyond["RANK"] = "2";
  EXPECT_THROW(process_of(beyond), ConfigError);
}

TEST(World, RankZeroOpensTheMeetingPlaceWhereNoLauncherDoes) {
  std::vector<std::thread> ranks;
  std::vector<int64_t> sums(2);
  for (int64_t rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      const Process process{
          .rank = rank, .world_size = 2, .address = "127.0.0.1", .port = 20000 + getpid() % 20000};
      const World world(process, {}, /*cuda=*/false, std::chrono::seconds(30));
      Tensor sum = at::full({1}, rank + 1, at::kLong);
      world.mesh().world.all_reduce_sum(sum);
      sums[rank] = sum.item<int64_t>();
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_EQ(sums, std::vector<int64_t>(2, 3));
}

// Rank 3 does not come; rank 2 waits for it among the slices, and so do ranks 0 and 1 among the replicas.
TEST(World, ErrorsNameTheRankThatHangsNotThoseThatWaitForIt) {
  std::vector<std::string> errors(4);
  std::vector<std::thread> ranks;
  std::latch all_failed(3);
  for (int64_t rank = 0; rank < 4; ++rank) {
    ranks.emplace_back([&, rank] {
      const Process process{
          .rank = rank, .world_size = 4, .address = "127.0.0.1", .port = 20000 + (getpid() + 1) % 20000};
      const World world(process, {.dp = 2, .tp = 2}, /*cuda=*/false, std::chrono::seconds(4));
      Tensor sum = at::ones({1});
      world.mesh().world.all_reduce_sum(sum);
      if (rank < 3) {
        try {
          world.mesh().tp.all_reduce_sum(sum);
          world.mesh().dp.all_reduce_sum(sum);
        } catch (const CommError& error) {
          errors[rank] = error.what();
        }
        all_failed.count_down();
      }
      all_failed.wait();  // its process lives on
    });
  }
  for (std::thread& rank : ranks) rank.join();
  for (int64_t rank = 0; rank < 3; ++rank)
    EXPECT_TRUE(errors[rank].ends_with("; rank 3 has not started what the others wait for")) << errors[rank];
}

}  // namespace
}  // namespace hymoe
