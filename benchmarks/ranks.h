#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "hymoe/comm/group.h"
#include "measure.h"

/// Median seconds of rounds of several kinds of work, taken in turns after one that does not count, each
/// until the slowest rank has done it: what is left of the difference between kinds is then their own.
inline std::vector<double> medians(const hymoe::Group& ranks, int64_t rounds,
                                   const std::vector<std::function<void()>>& kinds) {
  std::vector<std::vector<double>> seconds(kinds.size());
  for (int64_t round = 0; round <= rounds; ++round) {
    for (size_t k = 0; k < kinds.size(); ++k) {
      ranks.barrier();
      const double time = measure::seconds_of([&] {
        kinds[k]();
        ranks.barrier();
      });
      if (round > 0) seconds[k].push_back(time);
    }
  }
  std::vector<double> result;
  for (const auto& times : seconds) result.push_back(measure::median(times));
  return result;
}

/// Starts this program again as each of `ranks` ranks, `kind` its first argument; -> exit code.
inline int start_ranks(std::string kind, int ranks, int port, const std::vector<char*>& arguments) {
  std::vector<pid_t> children;
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      setenv("RANK", std::to_string(rank).c_str(), 1);
      setenv("WORLD_SIZE", std::to_string(ranks).c_str(), 1);
      setenv("MASTER_ADDR", "127.0.0.1", 1);
      setenv("MASTER_PORT", std::to_string(port).c_str(), 1);
      std::vector<char*> argv = arguments;
      argv.insert(argv.begin() + 1, kind.data());
      argv.push_back(nullptr);
      execv("/proc/self/exe", argv.data());
      _exit(127);
    }
    children.push_back(child);
  }
  int failed = 0;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    failed |= status;
  }
  return failed == 0 ? 0 : 1;
}
