// The search for a row's threshold, a block a row. All filters keep the logits from some threshold
// on, and all sums are of integers, so that neither the order nor the way they are taken matters.
// A row is read once: what can still matter goes to shared memory, where the rest of the search
// takes place. Rows with too many such logits are read again for each step.
#pragma once

#include "from_logits.h"
#include "warp.cuh"

namespace fused_rejection {
namespace {

constexpr int kThresholdWarps = 32;
constexpr int kBins = kWarp * kWarp;  // a warp finds a bin in two steps
constexpr int kBinsPerOctave = 16;
constexpr int kNoTile = -1;
constexpr int kListBytes = 32 * 1024;
constexpr float kLeastFloat = -kLargestFloat;

// A block's shared memory.
struct Search {
  uint32_t low[kBins], high[kBins];  // 64-bit sums: shared memory adds 32 bits natively
  unsigned long long group[kWarp];
  unsigned long long above[2];
  int bin[2];
  unsigned long long sum;
  double approximate;
  uint32_t count, least, most;
  float largest;
  alignas(16) unsigned char list[kListBytes];
};

// A weight to reach, as far as it is known.
struct Wanted {
  uint64_t least, most;
};

// The logits a search is down to, and the weight of those beyond.
struct Range {
  float lo, hi;
  uint64_t above;
  bool crosses;  // whether it is known to reach what is wanted
};

// The largest logit whose key is at most this one: -0 has no key of its own.
__device__ __forceinline__ float logit_up_to(uint32_t key) {
  return logit_of(key == 0x7FFFFFFFu ? key - 1 : key);
}

enum class Found { kOne, kNone, kUnclear };  // kUnclear: the bounds of Wanted lead apart

__device__ __forceinline__ int block_warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int block_warps() { return static_cast<int>(blockDim.x) / kWarp; }
__device__ __forceinline__ int block_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

template <typename V>
__device__ __forceinline__ V warp_total(V value) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) value += __shfl_xor_sync(kAllLanes, value, d);
  return value;
}

template <typename V>
__device__ __forceinline__ V warp_inclusive(V value, int lane) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const V other = __shfl_up_sync(kAllLanes, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

// ---- Where logits come from. each(floor, f) calls f(x) for the finite_logit x >= floor; floor is
// above -inf.

template <typename T>
struct RowSource {
  const T* x;
  const TileStats* stats;
  int vocab_size;

  // All warps: visit(share, left) for the tiles that reach `floor`, left as in load_share; `ahead`:
  // two tiles' loads are on their way at a time.
  template <bool ahead, typename Visit>
  __device__ __forceinline__ void tiles(float floor, const Visit& visit) const {
    const int lane = block_lane(), warps = block_warps(), count = num_tiles(vocab_size);
    const bool vectors = by_vectors<T>(x, nullptr, vocab_size);
    for (int first = block_warp(); first < count; first += warps * kWarp) {
      const int mine = first + lane * warps;
      unsigned todo = __ballot_sync(kAllLanes, mine < count && stats[mine].largest >= floor);
      while (todo) {
        const int begin = take(&todo, first, warps, lane);
        Share<T, T> share, other;
        load(begin, vectors, share);
        if constexpr (ahead) {
          const int next = take(&todo, first, warps, lane);
          load(next, vectors, other);
          visit(share, vocab_size - begin);
          if (next != kNoTile) visit(other, vocab_size - next);
        } else {
          visit(share, vocab_size - begin);
        }
      }
    }
  }

  template <typename F>
  __device__ __forceinline__ void each(float floor, const F& f) const {
    tiles<false>(floor, [&](Share<T, T>& share, int left) {
      share.each([&](T& value, int i) {
        const float x_i = static_cast<float>(value);  // NaN is not >= floor
        if (x_i >= floor && i < left) f(finite_logit(x_i));
      });
    });
  }

  // The lane's first index in the next tile to do; kNoTile where there is none.
  __device__ __forceinline__ int take(unsigned* todo, int first, int warps, int lane) const {
    if (!*todo) return kNoTile;
    const int tile = first + (__ffs(*todo) - 1) * warps;
    *todo &= *todo - 1;
    return tile * kTile + lane * kVector<T>;
  }

  __device__ __forceinline__ void load(int begin, bool vectors, Share<T, T>& share) const {
    const int left = begin == kNoTile ? 0 : vocab_size - begin;
    const int from = left > 0 ? begin : 0;
    if (vectors && left >= kTile) {
      load_share(x + from, kTile, true, share);
    } else {
      load_share(x + from, left, vectors, share);
    }
  }
};

template <typename T>
struct ListSource {
  const T* x;
  int count;

  template <typename F>
  __device__ __forceinline__ void each(float floor, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const float x_i = static_cast<float>(x[i]);
      if (x_i >= floor) f(finite_logit(x_i));
    }
  }
};

// The tiles' largest logits.
struct TileSource {
  const TileStats* stats;
  int count;

  template <typename F>
  __device__ __forceinline__ void each(float floor, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const float x_i = stats[i].largest;
      if (x_i >= floor) f(x_i);
    }
  }
};

template <typename T>
constexpr int kListed = kListBytes / sizeof(T);

template <typename T>
__device__ __forceinline__ T* list_of(Search& s) {
  return reinterpret_cast<T*>(s.list);
}

// ---- Steps of a search, for all threads of a block. `weight_of(x)` is an integer.

// Copies the row's logits in [lo, hi] to the list; how many there are, of which kListed fit.
template <typename T>
__device__ __forceinline__ int collect(Search& s, const RowSource<T>& row, float lo, float hi) {
  T* list = list_of<T>(s);
  const int lane = block_lane();
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  row.template tiles<true>(lo, [&](Share<T, T>& share, int left) {
    const auto wanted = [&](T value, int i) {
      const float x = static_cast<float>(value);
      return x >= lo && (x <= hi || hi == kLargestFloat) && i < left;
    };
    int hits = 0;
    share.each([&](T& value, int i) { hits += wanted(value, i); });
    if (!__ballot_sync(kAllLanes, hits > 0)) return;
    const int scan = warp_inclusive(hits, lane);
    int begin = 0;
    if (lane == kWarp - 1) begin = static_cast<int>(atomicAdd(&s.count, uint32_t(scan)));
    int at = __shfl_sync(kAllLanes, begin, kWarp - 1) + scan - hits;
    if (at + hits > kListed<T>) return;  // the list is of no use then
    share.each([&](T& value, int i) {
      if (wanted(value, i)) list[at++] = value;
    });
  });
  __syncthreads();
  return static_cast<int>(s.count);
}

// The least and the largest logit in [lo, hi]; false where there is none.
template <typename Source>
__device__ __forceinline__ bool tighten(Search& s, const Source& source, Range* range) {
  __syncthreads();
  if (threadIdx.x == 0) {
    s.least = 0xFFFFFFFFu;
    s.most = 0;
  }
  __syncthreads();
  uint32_t least = 0xFFFFFFFFu, most = 0;
  source.each(range->lo, [&](float x) {
    if (x > range->hi) return;
    const uint32_t key = key_of(x);
    least = key < least ? key : least;
    most = key > most ? key : most;
  });
  if (__ballot_sync(kAllLanes, most > 0)) {
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const uint32_t low = __shfl_xor_sync(kAllLanes, least, d);
      const uint32_t high = __shfl_xor_sync(kAllLanes, most, d);
      least = low < least ? low : least;
      most = high > most ? high : most;
    }
    if (block_lane() == 0) {
      atomicMin(&s.least, least);
      atomicMax(&s.most, most);
    }
  }
  __syncthreads();
  range->lo = logit_of(s.least);
  range->hi = logit_of(s.most);
  return s.most > 0;
}

// Sums the weights of the logits in [lo, hi] by bin, bin 0 holding the largest logits.
template <typename Source, typename BinOf, typename WeightOf>
__device__ __forceinline__ void fill_bins(Search& s, const Source& source, float lo, float hi,
                                          const BinOf& bin_of, const WeightOf& weight_of) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
    s.low[i] = s.high[i] = 0;
  }
  __syncthreads();
  source.each(lo, [&](float x) {
    if (x > hi) return;
    const uint64_t weight = weight_of(x);
    if (!weight) return;
    const int bin = bin_of(x);
    const uint32_t low = static_cast<uint32_t>(weight);
    uint32_t high = static_cast<uint32_t>(weight >> 32);
    high += atomicAdd(&s.low[bin], low) + low < low;  // the carry
    if (high) atomicAdd(&s.high[bin], high);
  });
  __syncthreads();
  for (int group = block_warp(); group < kWarp; group += block_warps()) {
    const int bin = group * kWarp + block_lane();
    const auto sum = warp_total((uint64_t{s.high[bin]} << 32) + s.low[bin]);
    if (block_lane() == 0) s.group[group] = sum;
  }
  __syncthreads();
}

// The sum over all bins, after fill_bins.
__device__ __forceinline__ uint64_t bins_total(Search& s) {
  return warp_total(static_cast<uint64_t>(s.group[block_lane()]));
}

// One warp: the first bin at which the weights, with `above`, reach `wanted`; -1 where none does.
__device__ __forceinline__ void pick_bin(Search& s, uint64_t above, uint64_t wanted, int which) {
  const int lane = block_lane();
  const uint64_t group = s.group[lane], groups = warp_inclusive(group, lane) + above;
  const unsigned crossing = __ballot_sync(kAllLanes, groups >= wanted);
  int bin = -1;
  if (crossing) {
    const int chosen = __ffs(crossing) - 1;
    above = __shfl_sync(kAllLanes, groups - group, chosen);
    const int mine = chosen * kWarp + lane;
    const uint64_t weight = (uint64_t{s.high[mine]} << 32) + s.low[mine];
    const uint64_t weights = warp_inclusive(weight, lane) + above;
    const int in_group = __ffs(__ballot_sync(kAllLanes, weights >= wanted)) - 1;
    above = __shfl_sync(kAllLanes, weights - weight, in_group);
    bin = chosen * kWarp + in_group;
  }
  if (lane == 0) {
    s.bin[which] = bin;
    s.above[which] = above;
  }
}

// The bin that reaches what is wanted, after fill_bins, and the weight above it.
__device__ __forceinline__ Found find_bin(Search& s, const Wanted& wanted, int* bin,
                                          uint64_t* above) {
  if (block_warp() == 0) pick_bin(s, *above, wanted.least, 0);
  if (block_warp() == 1) pick_bin(s, *above, wanted.most, 1);
  __syncthreads();
  *bin = s.bin[0];
  *above = s.above[0];
  if (s.bin[1] != *bin) return Found::kUnclear;
  return *bin < 0 ? Found::kNone : Found::kOne;
}

// Narrows a tight range to about a kBins-th of its floats.
template <typename Source, typename WeightOf>
__device__ __forceinline__ Found narrow(Search& s, const Source& source, const WeightOf& weight_of,
                                        const Wanted& wanted, Range* range) {
  const uint32_t most = key_of(range->hi), least = key_of(range->lo),
                 bits = 32 - __clz(most - least);
  const int shift = bits > 10 ? static_cast<int>(bits) - 10 : 0;
  static_assert(kBins == 1 << 10);
  const auto bin_of = [&](float x) { return static_cast<int>((most - key_of(x)) >> shift); };
  fill_bins(s, source, range->lo, range->hi, bin_of, weight_of);
  int bin;
  const Found found = find_bin(s, wanted, &bin, &range->above);
  if (found != Found::kOne) return found;
  const uint32_t top = most - (static_cast<uint32_t>(bin) << shift);
  const uint32_t width = (1u << shift) - 1;
  range->hi = logit_up_to(top);
  range->crosses = true;
  range->lo = logit_of(top - least > width ? top - width : least);
  return Found::kOne;
}

// The largest logit in the range at which the weights reach what is wanted.
template <typename T, typename WeightOf>
__device__ __noinline__ Found select(Search& s, const ListSource<T>& list,
                                     const WeightOf& weight_of, const Wanted& wanted, Range range,
                                     float* logit) {
  for (;;) {
    if (!tighten(s, list, &range)) return Found::kNone;
    *logit = range.lo;
    const bool one = range.lo == range.hi;
    if (one && range.crosses) return Found::kOne;
    const Found found = narrow(s, list, weight_of, wanted, &range);
    if (one || found != Found::kOne) return found;
  }
}

template <typename T, typename WeightOf>
__device__ __forceinline__ Found select(Search& s, const RowSource<T>& row,
                                        const WeightOf& weight_of, const Wanted& wanted,
                                        Range range, float* logit) {
  for (;;) {
    const int count = collect(s, row, range.lo, range.hi);
    if (count <= kListed<T>) {
      return select(s, ListSource<T>{list_of<T>(s), count}, weight_of, wanted, range, logit);
    }
    if (!tighten(s, row, &range)) return Found::kNone;
    *logit = range.lo;
    const bool one = range.lo == range.hi;
    if (one && range.crosses) return Found::kOne;
    const Found found = narrow(s, row, weight_of, wanted, &range);
    if (one || found != Found::kOne) return found;
  }
}

// ---- Distances from the largest logit, in octaves of its weight

struct Distance {
  float largest, scale;

  __device__ __forceinline__ float operator()(float x) const { return (x - largest) * scale; }

  // Adding 1.5 * 2^23 rounds to an integer, and keeps the order.
  __device__ __forceinline__ int bin(float x) const {
    constexpr float shift = 12582912.0f, least = -static_cast<float>(kBins - 1) / kBinsPerOctave;
    const float t = (*this)(x), octaves = t > least ? t : least;
    return static_cast<int>(bits_of(shift) - bits_of(octaves * kBinsPerOctave + shift));
  }

  // One warp, the same in all of a block: the least x for which `holds`, true for the largest and
  // for what is above any for which it is.
  template <typename Holds>
  __device__ __forceinline__ float least(const Holds& holds) const {
    uint32_t lo = key_of(kLeastFloat), hi = key_of(largest);
    while (lo < hi) {
      const uint32_t step = (hi - lo) / kWarp + 1, lane = static_cast<uint32_t>(block_lane());
      const uint32_t probe = hi - lo > lane * step ? lo + lane * step : hi;
      const unsigned hits = __ballot_sync(kAllLanes, holds(logit_of(probe)));
      const uint32_t first = hits ? static_cast<uint32_t>(__ffs(hits)) - 1 : kWarp;
      if (hits) hi = hi - lo > first * step ? lo + first * step : hi;
      if (first > 0) lo = lo + (first - 1) * step + 1;
    }
    return logit_of(hi);
  }

  __device__ __forceinline__ float least_within(float octaves) const {
    const float t = octaves < 0.0f ? octaves : 0.0f;
    return least([&](float x) { return (*this)(x) >= t; });
  }
};

// ---- The filters

template <typename T>
struct ThresholdSearch {
  Search& s;
  RowSource<T> row;
  Distance distance;
  float threshold = kNegativeInfinity;
  int listed = -1;  // how many logits are on the list, all from listed_from on; -1: no list
  float listed_from = 0.0f;

  __device__ __forceinline__ ListSource<T> list() const { return {list_of<T>(s), listed}; }

  // Collects the row's logits from `floor` on.
  __device__ __forceinline__ void collect_from(float floor) {
    const int count = collect(s, row, floor, kLargestFloat);
    listed = count <= kListed<T> ? count : -1;
    listed_from = floor;
  }

  // A logit that at least k logits reach: the k-th largest of the tiles' largest, or less.
  __device__ __forceinline__ float floor_of_top(int k) {
    const TileSource tiles{row.stats, num_tiles(row.vocab_size)};
    if (k > tiles.count) return kLeastFloat;
    Range range{kLeastFloat, distance.largest, 0, false};
    tighten(s, tiles, &range);
    const auto one = [](float) { return uint64_t{1}; };
    const uint64_t wanted = static_cast<uint64_t>(k);
    const Found found = narrow(s, tiles, one, {wanted, wanted}, &range);
    return found == Found::kOne ? range.lo : kLeastFloat;
  }

  __device__ __forceinline__ void keep_top(int k) {
    const uint64_t wanted = static_cast<uint64_t>(k);
    const auto one = [](float) { return uint64_t{1}; };
    const float floor = floor_of_top(k);
    if (floor > kLeastFloat || row.vocab_size <= kListed<T>) collect_from(floor);
    const Range range{floor, distance.largest, 0, false};
    float logit;
    const Found found =
        listed >= 0
            ? select(s, list(), one, {wanted, wanted}, range, &logit)
            : select_in_row(one, [&](uint64_t) { return Wanted{wanted, wanted}; }, floor, &logit);
    if (found == Found::kOne) threshold = logit;
  }

  // As select, the first step by distance, so that the bins are about equally full.
  template <typename Source, typename WeightOf, typename WantedOf>
  __device__ __forceinline__ Found select_by_distance(const Source& source,
                                                      const WeightOf& weight_of,
                                                      const WantedOf& wanted_of, float floor,
                                                      float* logit) {
    const auto bin_of = [&](float x) { return distance.bin(x); };
    fill_bins(s, source, floor, distance.largest, bin_of, weight_of);
    const Wanted wanted = wanted_of(bins_total(s));
    Range range{floor, distance.largest, 0, false};
    int bin;
    const Found found = find_bin(s, wanted, &bin, &range.above);
    if (found != Found::kOne) return found;
    const float lo = distance.least([&](float x) { return distance.bin(x) <= bin; });
    range.lo = lo > floor ? lo : floor;
    range.crosses = true;
    if (bin > 0) {
      const float above = distance.least([&](float x) { return distance.bin(x) < bin; });
      range.hi = logit_up_to(key_of(above) - 1);
    }
    return select(s, source, weight_of, wanted, range, logit);
  }

  template <typename WeightOf, typename WantedOf>
  __device__ __forceinline__ Found select_in_row(const WeightOf& weight_of,
                                                 const WantedOf& wanted_of, float floor,
                                                 float* logit) {
    listed = -1;  // the list is overwritten
    return select_by_distance(row, weight_of, wanted_of, floor, logit);
  }

  template <typename Source, typename WeightOf>
  __device__ __forceinline__ uint64_t total(const Source& source, float floor,
                                            const WeightOf& weight_of) {
    __syncthreads();
    if (threadIdx.x == 0) s.sum = 0;
    __syncthreads();
    uint64_t sum = 0;
    source.each(floor, [&](float x) { sum += weight_of(x); });
    sum = warp_total(sum);
    if (block_lane() == 0) atomicAdd(&s.sum, static_cast<unsigned long long>(sum));
    __syncthreads();
    return s.sum;
  }

  // Bounds of the row's mass, from its tiles' sums. Those are off by 2^-16 at most: by the rounding
  // of exponents of up to 46 octaves (8e-6), of exponentials (6e-7) and of sums (6e-7), and by less
  // than one unit a logit, which its integer mass leaves out.
  __device__ __forceinline__ Wanted mass_bounds(float unit) {
    __syncthreads();
    if (block_warp() == 0) {
      double sum = 0;
      for (int tile = block_lane(); tile < num_tiles(row.vocab_size); tile += kWarp) {
        sum += tile_weight(row.stats[tile], distance.largest, distance.scale);
      }
      sum = warp_total(sum);
      if (block_lane() == 0) s.approximate = sum;
    }
    __syncthreads();
    const double mass = s.approximate * unit, error = mass * 0x1p-16 + row.vocab_size;
    const double least = mass > error ? mass - error : 0.0;
    return {static_cast<uint64_t>(least), static_cast<uint64_t>(mass + error) + 1};
  }

  __device__ __forceinline__ void keep_share(float top_p) {
    const float unit = mass_unit(row.vocab_size);
    const auto mass = [unit, d = distance](float x) {
      return mass_of(x, d.largest, d.scale, unit);
    };
    // Below this a mass is 0.
    const float massless = distance.least_within(-log2f(unit) - 1.0f);
    const float all = threshold > massless ? threshold : massless;
    float floor = all, logit;
    Wanted known{0, 0};
    if (threshold == kNegativeInfinity && top_p > 0) {
      const Wanted bounds = mass_bounds(unit);
      known = {mass_wanted(top_p, bounds.least), mass_wanted(top_p, bounds.most)};
      // What is below `floor`, V logits at most, has less mass than the share leaves out.
      if (known.most < bounds.least) {
        const double each = static_cast<double>(bounds.least - known.most) / row.vocab_size;
        const float octaves = log2f(static_cast<float>(each / unit)) - 0.01f;
        const float found = distance.least_within(octaves);
        floor = found > all ? found : all;
      }
    }
    if (listed < 0) collect_from(floor);
    if (listed < 0) floor = all;
    const bool complete = floor == all;
    const auto wanted_of = [&](uint64_t sum) {
      if (!complete) return known;
      const uint64_t wanted = mass_wanted(top_p, sum);
      return Wanted{wanted, wanted};
    };
    Found found = listed < 0 ? select_in_row(mass, wanted_of, floor, &logit)
                             : select_by_distance(list(), mass, wanted_of, floor, &logit);
    if (found == Found::kUnclear) {  // the mass has to be known exactly
      const uint64_t rest = total(row, all, [&](float x) { return x < floor ? mass(x) : 0; });
      const auto exactly = [&](uint64_t sum) {
        const uint64_t wanted = mass_wanted(top_p, sum + rest);
        return Wanted{wanted, wanted};
      };
      found = select_by_distance(list(), mass, exactly, floor, &logit);
    }
    if (found == Found::kOne && logit > threshold) threshold = logit;
  }

  __device__ __forceinline__ void keep_near(float min_p) {
    // Rounding takes nothing from below this. Exponentials are not monotone to the last bit, so
    // that it is the least logit kept that counts.
    const float near = distance.least_within(log2f(min_p) - 1e-4f);
    Range range{near > threshold ? near : threshold, distance.largest, 0, false};
    const auto least = [&](const auto& source) {
      __syncthreads();
      if (threadIdx.x == 0) s.least = key_of(distance.largest);
      __syncthreads();
      uint32_t key = 0xFFFFFFFFu;
      source.each(range.lo, [&](float x) {
        if (!keeps_min_p(x, distance.largest, distance.scale, min_p)) return;
        const uint32_t other = key_of(x);
        key = other < key ? other : key;
      });
      if (key != 0xFFFFFFFFu) atomicMin(&s.least, key);
      __syncthreads();
    };
    listed >= 0 && listed_from <= range.lo ? least(list()) : least(row);
    const float found = logit_of(s.least);
    threshold = found > threshold ? found : threshold;
  }
};

}  // namespace
}  // namespace fused_rejection
