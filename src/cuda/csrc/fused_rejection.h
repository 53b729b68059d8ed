// The arithmetic of rejection sampling, shared by host and device. No torch headers.
// docs/kernel.md states the order of summation. The tests compare tokens with the float64 oracle,
// so they allow another order within its CDF_EPSILON; no test pins the sums themselves yet.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FR_HOST_DEVICE inline
#endif

namespace fused_rejection {

constexpr int64_t kPlaceholderTokenId = -1;
constexpr int kTile = 512;  // indices a float32 sum runs over
constexpr int kRun = 32;    // tiles a float64 sum runs over before the next level
constexpr float kMaxWeight = 0x1p100f;

// Philox4x32-10 (Salmon et al. 2011), keyed and counted as cuRAND's curand_init does.
FR_HOST_DEVICE uint32_t philox_word(uint64_t seed, uint64_t subsequence, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position >> 2), static_cast<uint32_t>(position >> 34),
                   static_cast<uint32_t>(subsequence), static_cast<uint32_t>(subsequence >> 32)};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * c[0], second = 0xCD9E8D57ull * c[2];
    c[0] = static_cast<uint32_t>(second >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(second);
    c[2] = static_cast<uint32_t>(first >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const int lane = static_cast<int>(position & 3);
  return lane == 0 ? c[0] : lane == 1 ? c[1] : lane == 2 ? c[2] : c[3];
}

// [0, 1) on the 24-bit grid: curand_uniform's (0, 1] would reject where p == q.
FR_HOST_DEVICE float to_uniform(uint32_t word) { return (word >> 8) * 0x1p-24f; }

// Exact: the product of two float32 fits float64. NaN on either side rejects.
FR_HOST_DEVICE bool accepts(float u, float q, float p) {
  return static_cast<double>(u) * static_cast<double>(q) < static_cast<double>(p);
}

FR_HOST_DEVICE float weight(float p, float q) {
  const float difference = p - q;
  if (!(difference > 0.0f)) return 0.0f;
  return difference < kMaxWeight ? difference : kMaxWeight;
}

}  // namespace fused_rejection
