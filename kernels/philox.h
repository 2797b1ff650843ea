#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/types.h"

/// Random numbers that are functions of a key and a counter, the same bits on CPUs and GPUs.
namespace hymoe::kernels {

struct Words {
  uint32_t at[4];
};

/// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
HYMOE_EVERYWHERE Words philox(uint64_t key, Words counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = counter.at[0], c1 = counter.at[1], c2 = counter.at[2], c3 = counter.at[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// log(x + low) of a normal x > 0, |low| far below x, to 1 ulp. Fused multiply-adds in a fixed order and no
/// branch: no compiler may put it otherwise, and all machines agree to the bit.
HYMOE_EVERYWHERE float log_of_sum(float x, float low) {
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const int32_t bits = __builtin_bit_cast(int32_t, x), exponent = (bits - kRootHalf) >> 23;
  const float m = __builtin_bit_cast(float, bits - exponent * (1 << 23));  // in [√½, √2)
  const float r = std::fma(low, __builtin_bit_cast(float, (127 - exponent) * (1 << 23)), m - 1.0f);
  float p = 7.0376836292e-2f;  // Cephes' logf
  p = std::fma(p, r, -1.1514610310e-1f);
  p = std::fma(p, r, 1.1676998740e-1f);
  p = std::fma(p, r, -1.2420140846e-1f);
  p = std::fma(p, r, 1.4249322787e-1f);
  p = std::fma(p, r, -1.6668057665e-1f);
  p = std::fma(p, r, 2.0000714765e-1f);
  p = std::fma(p, r, -2.4999993993e-1f);
  p = std::fma(p, r, 3.3333331174e-1f);
  p = std::fma(std::fma(p, r, -0.5f), r * r, r);
  const float e = static_cast<float>(exponent);
  return std::fma(e, 0.693359375f, std::fma(e, -2.12194440e-4f, p));
}
HYMOE_EVERYWHERE float exact_log(float x) { return log_of_sum(x, 0.0f); }

/// [0, 1), in steps of 2^-24.
HYMOE_EVERYWHERE float uniform(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

/// Exp(1): -log(1 - v), v in [2^-33, 1 - 2^-24]; small ones, which win races, are as precise as large ones.
HYMOE_EVERYWHERE float exponential(uint32_t bits) {
  const uint32_t below = bits < 0xffffff00u ? bits : 0xffffff00u;
  const float v = std::fma(static_cast<float>(below), 0x1p-32f, 0x1p-33f);
  const float rest = 1.0f - v;
  return -log_of_sum(rest, (1.0f - rest) - v);
}

}  // namespace hymoe::kernels
