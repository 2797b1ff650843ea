#include <optional>
#include <string>

#include <gtest/gtest.h>

#include "emulation/emulation.h"
#include "emulation/ops_device.h"

// --emulate=forward|reverse|shuffled: operations run on the emulated kernels, whose threads take turns in
// that order.
int main(int argc, char** argv) {
  using namespace hymoe::emulation;
  ::testing::InitGoogleTest(&argc, argv);
  std::optional<Emulate> emulate;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (!argument.starts_with("--emulate=")) continue;
    emulate.emplace();
    set_order(argument.ends_with("reverse")    ? Order::kReverse
              : argument.ends_with("shuffled") ? Order::kShuffled
                                               : Order::kForward);
  }
  return RUN_ALL_TESTS();
}
