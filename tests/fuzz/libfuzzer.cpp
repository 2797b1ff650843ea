// What libFuzzer asks of a program. `--seeds=FOLDER` writes the target's seeds there and ends.
#include <cstdint>
#include <fstream>
#include <string>

#include "fuzz/target.h"

using hymoe::fuzz::targets;

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  constexpr std::string_view kSeeds = "--seeds=";
  for (int i = 1; i < *argc; ++i) {
    const std::string_view argument = (*argv)[i];
    if (!argument.starts_with(kSeeds)) continue;
    const std::filesystem::path folder = argument.substr(kSeeds.size());
    std::filesystem::create_directories(folder);
    int number = 0;
    for (const std::string& seed : targets().front().seeds())
      std::ofstream(folder / ("seed" + std::to_string(number++)), std::ios::binary) << seed;
    std::exit(0);
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  targets().front().read({reinterpret_cast<const char*>(data), size});
  return 0;
}
