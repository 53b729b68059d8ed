// Verdicts on drafts from sums that are only roughly known, by the device's own exponential: a few
// instructions a logit where the portable one takes a dozen. A verdict is given where no error of
// that size could change it, so it is the exact one, and left open elsewhere.
#pragma once

#include "from_logits.h"
#include "tiles.cuh"
#include "warp.cuh"

namespace fused_rejection {
namespace {

// How far a rough log2 of a ratio may be off. The largest errors are those of exponents before
// they are raised, 2^-18 where they are beyond 64; of ex2.approx, of the sums' roundings and of the
// exact sums' own less.
constexpr double kDoubt = 0x1p-14;

#ifdef FR_EMULATION
// As wrong as the device's may be.
inline float exp2_approximate(float t) { return std::exp2(t) * (1.0f + 0x1p-22f); }
#else
__device__ __forceinline__ float exp2_approximate(float t) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  return power;
}
#endif

// A warp's part of what is known of a row: of its sum, 2^anchor * sum. NaN and infinite sums are of
// rows that want more care. Of a greedy request the sum counts what comes before the draft token.
struct RoughSum {
  float anchor = kNegativeInfinity;  // in octaves; -inf before the first logit that is above it
  float sum = 0.0f;
};

// The elements of a lane's share of a tile, with their places from the tile's first on.
template <typename T, typename F>
__device__ __forceinline__ void each_element(const RawTile<T>& raw, int lane, const F& f) {
  constexpr int per_word = 4 / sizeof(T);
#pragma unroll
  for (int i = 0; i < 4 * kVectors<T>; ++i) {
    const uint32_t word = raw.words[i / 4].word[i % 4];
#pragma unroll
    for (int e = 0; e < per_word; ++e) {
      const int in_vector = i % 4 * per_word + e;
      f(RawTile<T>::element(word, e), (i / 4 * kWarp + lane) * kVector<T> + in_vector);
    }
  }
}

// One warp: adds a tile to the lanes' parts, which share their anchor. Logits far below the anchor
// are lost beside it; those far above it overflow.
template <typename T>
__device__ __forceinline__ void warp_add_tile(const RawTile<T>& raw, float scale, int lane,
                                              RoughSum& rough) {
  if (rough.anchor == kNegativeInfinity) {
    const float product = warp_max(largest_of(raw)) * scale;
    if (product == kNegativeInfinity) return;
    rough.anchor = is_wide(product) ? 0.0f : whole(product);
    if (is_wide(product)) rough.sum = NAN;
  }
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  each_element(raw, lane, [&](float x, int i) {
    sums[i % 4] += exp2_approximate(fmaf(x, scale, -rough.anchor));
  });
  rough.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One lane: counts the logits of a tile that come before a token in the order of greedy choice.
template <typename T>
__device__ __forceinline__ void count_before(const RawTile<T>& raw, int lane, int first,
                                             float token_logit, int token, RoughSum& rough) {
  const int place = token - first;
  float count = 0.0f;
  each_element(raw, lane, [&](float x, int i) {
    if (x > token_logit || (x == token_logit && i < place)) count += 1.0f;
  });
  rough.sum += count;
}

// One warp: log2 of a row's sum, from the parts of its warps; NaN where it is not known.
__device__ __forceinline__ double warp_rough_log2(const RoughSum* parts, int count, int lane) {
  float anchor = kNegativeInfinity;
  for (int i = lane; i < count; i += kWarp) anchor = fmaxf(anchor, parts[i].anchor);
  anchor = warp_max(anchor);
  float sum = 0.0f;
  for (int i = lane; i < count; i += kWarp) {
    const RoughSum part = parts[i];
    if (part.anchor > kNegativeInfinity) sum += part.sum * exp2_approximate(part.anchor - anchor);
  }
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  const bool is_known = sum > 0x1p-100f && sum < 0x1p120f;
  return is_known ? anchor + log2_portable(sum) : static_cast<double>(NAN);
}

// One warp: whether any of the parts of a greedy request's row counted something.
__device__ __forceinline__ bool warp_any(const RoughSum* parts, int count, int lane) {
  bool any = false;
  for (int i = lane; i < count; i += kWarp) any |= parts[i].sum > 0.0f;
  return __ballot_sync(kAllLanes, any) != 0;
}

enum class Verdict { kAccepted, kRejected, kOpen };

// On a draft inside the vocabulary of a request that is not greedy. `log2_target` and `log2_draft`
// are of the rows' sums, in octaves of 2^(x * scale).
__device__ __forceinline__ Verdict rough_verdict(float u, float target, float draft,
                                                 bool draft_is_logits, float scale,
                                                 double log2_target, double log2_draft) {
  const float x_p = finite_logit(target);
  if (!(x_p > kNegativeInfinity)) return Verdict::kRejected;
  double odds;  // log2(u * q / p)
  if (draft_is_logits) {
    const float x_q = finite_logit(draft);
    if (!(u > 0.0f) || !(x_q > kNegativeInfinity)) return Verdict::kOpen;
    odds = log2_portable(u) + (static_cast<double>(x_q) - x_p) * scale + log2_target - log2_draft;
  } else {
    const double product = static_cast<double>(u) * static_cast<double>(draft);
    const double log2_p = static_cast<double>(x_p) * scale - log2_target;
    if (!(product > 0x1p-100 && product < 0x1p100 && log2_p > -100.0)) return Verdict::kOpen;
    odds = log2_portable(product) - log2_p;
  }
  if (odds < -kDoubt) return Verdict::kAccepted;
  return odds > kDoubt ? Verdict::kRejected : Verdict::kOpen;
}

}  // namespace
}  // namespace fused_rejection
