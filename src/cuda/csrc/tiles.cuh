// Tiles of logits: how a warp reads one, what it makes of it, and what the tiles' statistics say
// about their row.
#pragma once

#include "from_logits.h"
#include "warp.cuh"

namespace fused_rejection {
namespace {

// Whether the hardware compares two bfloat16 at once.
#if defined(FR_EMULATION) || __CUDA_ARCH__ >= 900
constexpr bool kComparesPairs = true;
#else
constexpr bool kComparesPairs = false;
#endif

// All bits of each half of a word whose bfloat16 is at least that of `least`.
__device__ __forceinline__ uint32_t pairs_at_least(uint32_t word, uint32_t least) {
  uint32_t mask = 0;
#ifdef FR_EMULATION
  for (int half = 0; half < 32; half += 16) {
    const BFloat16 x{static_cast<uint16_t>(word >> half)};
    const BFloat16 y{static_cast<uint16_t>(least >> half)};
    if (static_cast<float>(x) >= static_cast<float>(y)) mask |= 0xFFFFu << half;
  }
#elif __CUDA_ARCH__ >= 900
  asm("set.ge.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(word), "r"(least));
#endif
  return mask;
}

// One lane: the bits of those of its share of a tile that are at least `least`.
template <typename T>
__device__ __forceinline__ uint32_t bits_at_least(const RawTile<T>& raw, float least) {
  uint32_t bits = 0;
  if constexpr (kComparesPairs && std::is_same_v<T, BFloat16>) {
    // The least bfloat16 that is.
    const uint32_t exact = bits_of(least), up = exact + (exact >> 31 ? 0u : 0xFFFFu);
    const uint32_t pair = up >> 16 | (up & 0xFFFF0000u);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      bits |= pairs_at_least(raw.words[w / 4].word[w % 4], pair) & 0x10001u << w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < RawTile<T>::kBits; ++i) {
      const int bit = RawTile<T>::bit(i);
      if (raw.of_bit(bit) >= least) bits |= 1u << bit;
    }
  }
  return bits;
}

// One lane: the largest logit of its share of a tile; a NaN is left out, so that it is -inf where
// there is nothing else.
template <typename T>
__device__ __forceinline__ float largest_of(const RawTile<T>& raw) {
  uint32_t most = raw.words[0].word[0];
#pragma unroll
  for (int i = 1; i < 4 * kVectors<T>; ++i) most = max_of<T>(most, raw.words[i / 4].word[i % 4]);
  float found = fmaxf(kNegativeInfinity, RawTile<T>::element(most, 0));
  if (sizeof(T) < 4) found = fmaxf(found, RawTile<T>::element(most, 1));
  return found;
}

// One warp: the largest of the lanes' values, none of them NaN, in every lane.
__device__ __forceinline__ float warp_max(float value) {
  // Floats as integers of the same order, which a warp compares in one instruction.
  const int bits = static_cast<int>(bits_of(value));
  const int most = __reduce_max_sync(kAllLanes, bits ^ (bits >> 31 & 0x7FFFFFFF));
  return float_from_bits(static_cast<uint32_t>(most ^ (most >> 31 & 0x7FFFFFFF)));
}

// One warp: the sum of power(x) over a tile, of those of each lane that have a bit, in every lane.
// `all_bits`: those that any lane has; where a threshold leaves little, the warp has nothing in
// most places.
template <typename T, typename Power>
__device__ __forceinline__ float warp_sum_of(RawTile<T> raw, uint32_t own_bits, uint32_t all_bits,
                                             const Power& power) {
  constexpr int kPairs = RawTile<T>::kPairs, kElements = RawTile<T>::kElements;
  float first = 0.0f, second = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float w[kElements] = {};
#pragma unroll
    for (int begin = 0; begin < kElements; begin += kPairs) {
      uint32_t places = 0;
#pragma unroll
      for (int i = begin; i < begin + kPairs; ++i) {
        places |= 1u << RawTile<T>::bit(half * kElements + i);
      }
      if (!(all_bits & places)) continue;
#pragma unroll
      for (int i = begin; i < begin + kPairs; ++i) w[i] = power(raw.at(i));
#pragma unroll
      for (int i = begin; i < begin + kPairs; ++i) {
        if (!(own_bits >> RawTile<T>::bit(half * kElements + i) & 1)) w[i] = 0.0f;
      }
    }
    first = second;
    second = half_sum(w);
    raw.next_half();
  }
  return warp_sum<T>(first, second);
}

// The same sum where the largest logit is too far from 0 for PowersBeside, or infinite: rare.
template <typename T>
__device__ __noinline__ float warp_sum_of_far(RawTile<T> raw, uint32_t own_bits, uint32_t all_bits,
                                              float largest, float scale) {
  return warp_sum_of(raw, own_bits, all_bits, [&](float x) {
    return exp2_portable(octaves_beside(finite_logit(x), largest, scale));
  });
}

// One warp: the statistics of a tile's logits that are kept, in every lane. The sum, unless
// `is_summed`, is left at 0. `load_next` may load into `raw`: it is called once that is not needed
// any more.
template <typename T, typename LoadNext>
__device__ __forceinline__ TileStats warp_tile_stats(RawTile<T>& raw, float scale, float threshold,
                                                     bool is_summed, const LoadNext& load_next) {
  float largest = warp_max(largest_of(raw));
  // What is below the threshold matters only where nothing reaches it.
  const bool is_kept = largest >= threshold && largest > kNegativeInfinity;
  if (largest > kLargestFloat) largest = kLargestFloat;
  uint32_t own_bits = 0xFFFFFFFFu, all_bits = 0xFFFFFFFFu;
  if (threshold > kNegativeInfinity) {
    own_bits = bits_at_least(raw, threshold);
    all_bits = __reduce_or_sync(kAllLanes, own_bits);
  }
  bool sums = is_kept && is_summed;
  float sum = 0.0f;
  if (sums && !PowersBeside::serve(largest, scale)) {
    sum = warp_sum_of_far(raw, own_bits, all_bits, largest, scale);
    sums = false;
  }
  const PowersBeside power(largest, scale);
  constexpr bool has_floor = !std::is_same_v<T, Float16>;  // float16 has no numbers so low
  RawTile<T> own = raw;
  if (has_floor) raise_to(own, power.floor);
  load_next();
  if (sums) {
    sum = warp_sum_of(own, own_bits, all_bits,
                      [&](float x) { return power(has_floor ? x : at_least(x, power.floor)); });
  }
  return {is_kept ? largest : kNegativeInfinity, sum};
}

template <typename T>
__device__ __forceinline__ TileStats warp_tile_stats(const T* x, int tile, int vocab_size,
                                                     float scale, float threshold, int lane) {
  RawTile<T> raw;
  load_tile(x, tile, vocab_size, kNegativeInfinityWord<T>, lane, raw);
  return warp_tile_stats(raw, scale, threshold, true, [] {});
}

// One warp: the largest logit of a row.
__device__ __forceinline__ float warp_largest(const TileStats* stats, int tiles, int lane) {
  float largest = kNegativeInfinity;
#pragma unroll 8
  for (int first = 0; first < tiles; first += kWarp) {
    const int tile = first + lane;
    largest = fmaxf(largest, tile < tiles ? stats[tile].largest : kNegativeInfinity);
  }
  return warp_max(largest);
}

// One warp: the total of inclusive_scan with a value a lane, in every lane.
__device__ __forceinline__ double warp_scanned_total(double sum) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  return sum;
}

// One warp: the sum of a row's weights by `weight_of` a tile.
template <typename WeightOf>
__device__ __forceinline__ double warp_sum_weights(const TileStats* stats, int tiles, int lane,
                                                   const WeightOf& weight_of) {
  const int length = (tiles + kSpans - 1) / kSpans, left = tiles - lane * length;
  const int count = left < length ? left : length;
  const TileStats* own = stats + lane * length;
  double sum = 0;
#pragma unroll 1
  for (int first = 0; first < length; first += kGroup) {
    float w[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      TileStats tile = {kNegativeInfinity, 0.0f};
      if (first + i < count) tile = own[first + i];
      w[i] = weight_of(tile);
    }
    sum += group_sum<double>(w);
  }
  return warp_scanned_total(sum);
}

__device__ __noinline__ double warp_wide_row_sum(const TileStats* stats, float largest, float scale,
                                                 int tiles, int lane) {
  return warp_sum_weights(stats, tiles, lane,
                          [&](const TileStats& tile) { return tile_weight(tile, largest, scale); });
}

// One warp: the sum of a row's weights beside its largest logit. Branches once, not a tile.
__device__ __forceinline__ double warp_row_sum(const TileStats* stats, float largest, float scale,
                                               int tiles, int lane) {
  const float product = largest * scale, anchor = whole(product);
  if (is_wide(product)) return warp_wide_row_sum(stats, largest, scale, tiles, lane);
  return warp_sum_weights(stats, tiles, lane, [&](const TileStats& tile) {
    return near_tile_weight(tile, anchor, scale);
  });
}

// One warp: the first index whose logit is `largest`.
template <typename T>
__device__ int warp_argmax(const T* x, const TileStats* stats, float largest, int vocab_size,
                           int lane) {
  if (!(largest > kNegativeInfinity)) return -1;
  const int tiles = num_tiles(vocab_size);
  int tile = 0;
  for (;; tile += kWarp) {
    const int t = tile + lane;
    const unsigned hits = __ballot_sync(kAllLanes, t < tiles && stats[t].largest == largest);
    if (!hits) continue;
    tile += __ffs(hits) - 1;
    break;
  }
  for (int first = tile * kTile;; first += kWarp) {
    const int i = first + lane;
    const bool hit =
        i < vocab_size && finite_logit(static_cast<float>(read_argument(x + i))) == largest;
    const unsigned hits = __ballot_sync(kAllLanes, hit);
    if (hits) return first + __ffs(hits) - 1;
  }
}

// One warp: the sum of a row's weights beside its largest logit, and that, of a row of few tiles:
// each is read once, for both.
__device__ __forceinline__ double warp_short_row_sum(const TileStats* stats, float scale, int tiles,
                                                     int lane, float* largest) {
  const int length = (tiles + kSpans - 1) / kSpans, left = tiles - lane * length;
  const int count = left < length ? left : length;
  TileStats own[kGroup];
  float most = kNegativeInfinity;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    own[i] = {kNegativeInfinity, 0.0f};
    if (i < count) own[i] = stats[lane * length + i];
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) most = fmaxf(most, own[i].largest);
  *largest = warp_max(most);
  const float product = *largest * scale, anchor = whole(product);
  if (is_wide(product)) return warp_wide_row_sum(stats, *largest, scale, tiles, lane);
  float w[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) w[i] = near_tile_weight(own[i], anchor, scale);
  return warp_scanned_total(group_sum<double>(w));
}

// One warp: a row's summary, in every lane.
template <typename T>
__device__ RowSummary warp_summarize(const T* x, const TileStats* stats, float scale,
                                     float threshold, bool greedy, int vocab_size, int lane) {
  const int tiles = num_tiles(vocab_size);
  if (!greedy && tiles <= kSpans * kGroup) {
    float largest;
    const double sum = warp_short_row_sum(stats, scale, tiles, lane, &largest);
    return {sum, -INFINITY, stats, largest, threshold, -1};
  }
  const float largest = warp_largest(stats, tiles, lane);
  if (greedy) {
    const int argmax = warp_argmax(x, stats, largest, vocab_size, lane);
    return {0.0, largest, stats, largest, kNegativeInfinity, argmax};
  }
  const double sum = warp_row_sum(stats, largest, scale, tiles, lane);
  return {sum, -INFINITY, stats, largest, threshold, -1};
}

}  // namespace
}  // namespace fused_rejection
