#include "kernels/philox.h"

#include <array>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

namespace hymoe::kernels {
namespace {

TEST(Philox, GivesThePublishedNumbers) {  // Random123, tests/kat_vectors
  struct Known {
    std::array<uint32_t, 4> counter;
    uint64_t key;
    std::array<uint32_t, 4> words;
  };
  for (const Known& k : std::vector<Known>{
           {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
           {{~0u, ~0u, ~0u, ~0u}, ~uint64_t{0}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
           {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
            0x299f31d0a4093822,
            {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}) {
    const Words words = philox(k.key, {{k.counter[0], k.counter[1], k.counter[2], k.counter[3]}});
    for (int i = 0; i < 4; ++i) EXPECT_EQ(words.at[i], k.words[i]);
  }
}

double ulps(float got, double want) {
  int exponent;
  std::frexp(want, &exponent);
  return std::abs(got - want) / std::ldexp(1.0, exponent - 24);
}

TEST(Philox, NumbersAreWhatTheySay) {
  EXPECT_EQ(uniform(0), 0);
  EXPECT_EQ(uniform(~0u), 1 - std::ldexp(1.0f, -24));
  double worst = 0, worst_log = 0, sum = 0;
  const auto look = [&](uint32_t bits) {
    const float x = exponential(bits), v = std::fma(static_cast<float>(bits), 0x1p-32f, 0x1p-33f);
    worst = std::max(worst, ulps(x, -std::log1p(-std::min<double>(v, 1 - 0x1p-24))));
    worst_log = std::max(worst_log, ulps(exact_log(x), std::log(static_cast<double>(x))));
    sum += x;
  };
  constexpr int kSteps = 1 << 18;
  for (uint64_t i = 0; i < kSteps; ++i) look(static_cast<uint32_t>(i << 14 | (i & 0x3fff)));
  EXPECT_NEAR(sum / kSteps, 1, 1e-4);
  for (uint32_t bits = 0; bits < 2000; ++bits) {
    look(bits);
    look(~bits);
  }
  EXPECT_LT(worst, 1);
  EXPECT_LT(worst_log, 1);
}

}  // namespace
}  // namespace hymoe::kernels
