// The search for a row's threshold by the blocks of a team: a cluster or half of it, or one block.
// All filters keep the logits from some threshold on. Every block goes through its own tiles of the
// row, those that the tiles' largest logits do not rule out, and tells the others what it finds;
// then all of them know the threshold. All sums are of integers, so that neither the order nor the
// number of blocks matters.
#pragma once

#include "from_logits.h"
#include "tiles.cuh"
#include "warp.cuh"

namespace fused_rejection {
namespace {

constexpr int kLargestTeam = 8;
constexpr int kBins = 256;
constexpr int kListed = 256;             // logits that are ranked by comparing each with each
constexpr int kPending = kTile + kWarp;  // logits of a warp's tiles, in the range last looked for
constexpr float kLeastFloat = -kLargestFloat;
constexpr float kFewNearFloor = 3.0f;  // octaves that keep_share tries above what is sure

__device__ __forceinline__ int block_warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int block_warps() { return static_cast<int>(blockDim.x) / kWarp; }
__device__ __forceinline__ int block_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// Says that a pointer is one to shared memory, which through a call nothing else tells: by a
// generic one it takes more instructions, the slower ones of any memory.
template <typename V>
__device__ __forceinline__ void assume_shared(const V* pointer) {
#ifndef FR_EMULATION
  __builtin_assume(__isShared(pointer));
#else
  static_cast<void>(pointer);
#endif
}

struct Team {
  int rank, blocks;
  int first;          // its first block in the cluster
  uint64_t* barrier;  // of every block, with as many arrivals as the team has blocks

  // One thread: stores into the same shared variable of every block.
  template <typename V>
  __device__ __forceinline__ void tell(V* shared, V value) const {
    if (blocks == 1) {
      *shared = value;
    } else {
      for (int block = 0; block < blocks; ++block) store_to_block(shared, first + block, value);
    }
  }

  // All threads: what was told before is there after it. `times`: how often the team has met.
  __device__ __forceinline__ void meet(int times) const {
    __syncthreads();
    if (blocks == 1) return;
    if (static_cast<int>(threadIdx.x) < blocks) {
      arrive_at_block(barrier, first + static_cast<int>(threadIdx.x));
    }
    wait_for_arrivals(barrier, times & 1);
  }
};

// What a block found in a range of logits. Least and most are keys.
struct Finding {
  uint32_t count, least, most;
};

// What a warp went through last: its tiles' logits in a range, all of them among its pending ones;
// count is -1 where they were too many.
struct Seen {
  int count;
  float lo, hi;
};

// In dynamic shared memory, which the other blocks of the team store into.
struct Search {
  uint32_t low[kBins], high[kBins];  // 64-bit sums: shared memory adds 32 bits natively
  // What the blocks tell one another: in turns here and there, since one that has read what was
  // told tells the next while others still read.
  struct Told {
    uint64_t bins[kLargestTeam][kBins];
    float listed[kLargestTeam][kListed];
    Finding findings[kLargestTeam];
  } told[2];
  Finding mine;
  uint64_t merged[kBins];
  uint64_t weights[kListed];
  float ranked[kListed];
  float pending[kMaxWarps][kPending];
  Seen seen[kMaxWarps];
  uint64_t above, wanted;
  double sum;
  int bin;
  float largest, answer;
  bool is_found;
};

// The sum over `together` adjacent lanes, in each of them.
template <int together, typename V>
__device__ __forceinline__ V group_total(V value) {
#pragma unroll
  for (int d = 1; d < together; d *= 2) value += __shfl_xor_sync(kAllLanes, value, d);
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

// The largest logit whose key is at most this one: -0 has no key of its own.
__device__ __forceinline__ float logit_up_to(uint32_t key) {
  return logit_of(key == 0x7FFFFFFFu ? key - 1 : key);
}

// The least float above a logit.
__device__ __forceinline__ float next_above(float logit) { return logit_of(key_of(logit) + 1); }

// One warp: appends the logits of a tile that are at least lo, and below `above` unless that is
// NaN, to `pending`, which holds `held`; how many it holds then, or would if there were room:
// nothing is appended where there is not. A call, as are the steps of the
// search: they are many, and a warp waits longer for new instructions than for most else.
template <typename T>
__device__ __noinline__ int warp_collect(const T* x, int tile, int vocab_size, float lo,
                                         float above, float* pending, int held) {
  assume_shared(pending);
  const int lane = block_lane();
  RawTile<T> raw;
  load_tile(x, tile, vocab_size, kNegativeInfinityWord<T>, lane, raw);
  uint32_t bits = bits_at_least(raw, lo);
  if (above == above) bits &= ~bits_at_least(raw, above);
  if (!__ballot_sync(kAllLanes, bits != 0)) return held;
  const int hits = __popc(bits), scan = warp_inclusive(hits, lane);
  const int total = held + __shfl_sync(kAllLanes, scan, kWarp - 1);
  if (total > kPending) return total;
  float* at = pending + held + scan - hits;
#pragma unroll
  for (int i = 0; i < RawTile<T>::kBits; ++i) {
    if (bits >> RawTile<T>::bit(i) & 1) *at++ = raw.of_bit(RawTile<T>::bit(i));
  }
  __syncwarp();
  return total;
}

template <typename T>
struct ThresholdSearch {
  // The bins of a range of logits, bin 0 holding the largest: of equal width, or of equally many
  // floats.
  struct Bins {
    float largest, per_logit;  // of equal width where per_logit is above 0
    uint32_t most;
    int shift;

    __device__ __forceinline__ int operator()(float logit) const {
      if (!(per_logit > 0.0f)) return static_cast<int>((most - key_of(logit)) >> shift);
      const int bin = static_cast<int>((largest - logit) * per_logit);
      return bin < kBins ? bin : kBins - 1;
    }
  };

  // What counts in a range: all, or one bin's, or what min_p keeps.
  struct Choice {
    Bins bins;
    int bin;  // -1: of any
    float min_p;
  };

  // What is summed: a logit's mass, or 1; up to a share of the total, or up to `wanted`.
  struct Goal {
    bool by_mass;
    float top_p;   // 0: what is wanted is known
    double total;  // of masses; 0: of those in the bins
    uint64_t wanted, above;
  };

  Search& s;
  Team team;
  const T* x;
  const TileStats* stats;  // of the whole row
  int vocab_size;
  int exchange;  // how often the team has told
  float largest, scale, unit;
  float threshold = kNegativeInfinity;

  // All warps: f(is_one, x) by whole warps for the finite_logit x of this block's tiles that are in
  // [lo, hi], lo above -inf: 32 at a time, as they are sparse. A range within the last one is
  // looked for in what that left.
  template <typename F>
  __device__ __forceinline__ void each(float lo, float hi, const F& f) const {
    const int lane = block_lane(), vocab_size = this->vocab_size, tiles = num_tiles(vocab_size);
    const OwnTiles own(team.rank, team.blocks);
    const T* x = this->x;
    const TileStats* stats = this->stats;
    float* pending = here().pending[block_warp()];
    Seen& seen = here().seen[block_warp()];
    const bool is_known = seen.count >= 0 && seen.lo <= lo && seen.hi >= hi;
    int tile = is_known ? tiles : own.first, held = is_known ? seen.count : 0, done = 0;
    bool overflows = false;
    for (;;) {
      const bool is_last = tile >= tiles;
      int total = held;
      if (!is_last) {
        const float most = stats[tile].largest;
        if (most >= lo) {
          const float above = most > hi ? next_above(hi) : NAN;
          total = warp_collect(x, tile, vocab_size, lo, above, pending, held);
        }
      }
      if (is_last || total > kPending) {
        for (; done < held; done += kWarp) {
          const int i = done + lane;
          const float logit = i < held ? finite_logit(pending[i]) : 0.0f;
          f(i < held && logit >= lo && logit <= hi, logit);
        }
        __syncwarp();
        if (is_last) break;
        overflows = true;
        held = done = 0;  // and the same tile again
      } else {
        held = total;
        tile += own.step;
      }
    }
    if (!is_known && lane == 0) seen = {overflows ? -1 : held, lo, hi};
    __syncwarp();
  }

  // The Search, known to be in shared memory. What is reached through `this` is read again after
  // every store: loops have copies.
  __device__ __forceinline__ Search& here() const {
    assume_shared(&s);
    return s;
  }

  // What the team has in [lo, hi] of the chosen; their logits are listed where there are at most
  // kListed.
  __device__ __noinline__ Finding gather(float lo, float hi, Choice choice) {
    Search& s = here();
    const float largest = this->largest, scale = this->scale;
    const int lane = block_lane();
    Search::Told& told = s.told[++exchange & 1];
    if (threadIdx.x == 0) s.mine = {0, 0xFFFFFFFFu, 0};
    __syncthreads();
    uint32_t least = 0xFFFFFFFFu, most = 0;
    each(lo, hi, [&](bool counts, float logit) {
      if (choice.bin >= 0) counts = counts && choice.bins(logit) == choice.bin;
      if (choice.min_p > 0.0f) {
        counts = counts && keeps_min_p(logit, largest, scale, choice.min_p);
      }
      const unsigned all = __ballot_sync(kAllLanes, counts);
      if (!all) return;
      uint32_t first = 0;
      if (lane == 0) first = atomicAdd(&s.mine.count, static_cast<uint32_t>(__popc(all)));
      first = __shfl_sync(kAllLanes, first, 0);
      if (!counts) return;
      const uint32_t at = first + static_cast<uint32_t>(__popc(all & ((1u << lane) - 1)));
      if (at < kListed) s.ranked[at] = logit;
      const uint32_t key = key_of(logit);
      least = key < least ? key : least;
      most = key > most ? key : most;
    });
    if (most > 0) {
      atomicMin(&s.mine.least, least);
      atomicMax(&s.mine.most, most);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Finding& there = told.findings[team.rank];
      team.tell(&there.count, s.mine.count);
      team.tell(&there.least, s.mine.least);
      team.tell(&there.most, s.mine.most);
    }
    if (s.mine.count <= kListed) {
      for (uint32_t i = threadIdx.x; i < s.mine.count; i += blockDim.x) {
        team.tell(&told.listed[team.rank][i], s.ranked[i]);
      }
    }
    team.meet(exchange - 1);
    Finding all{0, 0xFFFFFFFFu, 0};
#pragma unroll 1
    for (int block = 0; block < team.blocks; ++block) {
      const Finding& one = told.findings[block];
      all.count += one.count;
      all.least = one.least < all.least ? one.least : all.least;
      all.most = one.most > all.most ? one.most : all.most;
    }
    return all;
  }

  __device__ __forceinline__ uint64_t weight_of(const Goal& goal, float logit) const {
    return goal.by_mass ? mass_of(logit, largest, scale, unit) : 1;
  }

  // The largest of the listed logits at which the weights reach what is wanted.
  __device__ __noinline__ bool rank(Goal goal, float* logit) const {
    Search& s = here();
    constexpr int together = 4;  // threads that compare one logit with all
    const Search::Told& told = s.told[exchange & 1];
    int count = 0;
#pragma unroll 1
    for (int block = 0; block < team.blocks; ++block) {
      const int of_block = static_cast<int>(told.findings[block].count);
      for (int i = static_cast<int>(threadIdx.x); i < of_block; i += blockDim.x) {
        const float x_i = told.listed[block][i];
        s.ranked[count + i] = x_i;
        s.weights[count + i] = weight_of(goal, x_i);
      }
      count += of_block;
    }
    if (threadIdx.x == 0) s.is_found = false;
    __syncthreads();
    const int part = static_cast<int>(threadIdx.x) % together;
    for (int first = block_warp() * (kWarp / together); first < count;
         first += static_cast<int>(blockDim.x) / together) {  // by whole warps
      const int i = first + block_lane() / together;
      const float x_i = s.ranked[i < count ? i : 0];
      uint64_t before = 0, with = 0;
#pragma unroll 4
      for (int j = part; j < count; j += together) {
        const float x_j = s.ranked[j];
        const uint64_t weight = s.weights[j];
        if (x_j > x_i) before += weight;
        if (x_j >= x_i) with += weight;
      }
      before = goal.above + group_total<together>(before);
      with = goal.above + group_total<together>(with);
      if (i < count && before < goal.wanted && goal.wanted <= with) {  // one logit, or equal ones
        s.answer = x_i;
        s.is_found = true;
      }
    }
    __syncthreads();
    *logit = s.answer;
    return s.is_found;
  }

  // Sums the team's weights of the logits in [lo, hi] by bin and finds the first bin at which they
  // reach the goal, whose `above` then holds the weight above it; -1 where none does.
  __device__ __noinline__ int find_bin(float lo, float hi, Bins bins, Goal* goal) {
    Search& s = here();
    const float largest = this->largest, scale = this->scale, unit = this->unit;
    const bool by_mass = goal->by_mass;
    const int lane = block_lane();
    Search::Told& told = s.told[++exchange & 1];
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += blockDim.x) {
      s.low[i] = s.high[i] = 0;
    }
    __syncthreads();
    each(lo, hi, [&](bool is_there, float logit) {
      if (!is_there) return;
      const uint64_t weight = by_mass ? mass_of(logit, largest, scale, unit) : 1;
      if (!weight) return;
      const int bin = bins(logit);
      const uint32_t low = static_cast<uint32_t>(weight);
      uint32_t high = static_cast<uint32_t>(weight >> 32);
      high += atomicAdd(&s.low[bin], low) + low < low;  // the carry
      if (high) atomicAdd(&s.high[bin], high);
    });
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += blockDim.x) {
      team.tell(&told.bins[team.rank][i], (uint64_t{s.high[i]} << 32) + s.low[i]);
    }
    team.meet(exchange - 1);
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += blockDim.x) {
      uint64_t sum = 0;
#pragma unroll 8
      for (int block = 0; block < team.blocks; ++block) sum += told.bins[block][i];
      s.merged[i] = sum;
    }
    __syncthreads();
    if (block_warp() == 0) {
      constexpr int own = kBins / kWarp;
      uint64_t weights[own], sum = 0;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        weights[i] = s.merged[lane * own + i];
        sum += weights[i];
      }
      const uint64_t scan = warp_inclusive(sum, lane);
      const uint64_t all = __shfl_sync(kAllLanes, scan, kWarp - 1);
      if (goal->top_p > 0.0f) {
        const double total = goal->total > 0.0 ? goal->total : static_cast<double>(all);
        goal->wanted = mass_wanted(goal->top_p, total);
      }
      const unsigned reaching = __ballot_sync(kAllLanes, goal->above + scan >= goal->wanted);
      if (lane == 0) {
        s.bin = -1;
        s.wanted = goal->wanted;
      }
      __syncwarp();
      if (reaching && lane == __ffs(reaching) - 1) {
        uint64_t before = goal->above + scan - sum;
        int bin = 0;
#pragma unroll
        for (int i = 0; i < own - 1; ++i) {
          if (bin == i && before + weights[i] < goal->wanted) {
            before += weights[i];
            ++bin;
          }
        }
        s.bin = lane * own + bin;
        s.above = before;
      }
    }
    __syncthreads();
    goal->wanted = s.wanted;
    if (s.bin >= 0) goal->above = s.above;
    return s.bin;
  }

  // The largest logit of those that `found` is of at which the weights reach the goal. They are all
  // in [found.least, found.most].
  __device__ __noinline__ bool select(Finding found, Goal goal, float* logit) {
    for (;;) {
      if (found.count == 0) return false;
      if (found.count <= kListed) return rank(goal, logit);
      *logit = logit_of(found.least);
      if (found.least == found.most) {
        return goal.above + found.count * weight_of(goal, *logit) >= goal.wanted;
      }
      const int bits = 32 - __clz(static_cast<int>(found.most - found.least));
      static_assert(kBins == 1 << 8);
      const Bins bins{0.0f, 0.0f, found.most, bits > 8 ? bits - 8 : 0};
      goal.top_p = 0.0f;
      const int bin = find_bin(*logit, logit_of(found.most), bins, &goal);
      if (bin < 0) return false;
      const uint32_t top = found.most - (static_cast<uint32_t>(bin) << bins.shift);
      const uint32_t width = (1u << bins.shift) - 1;
      const uint32_t bottom = top - found.least > width ? top - width : found.least;
      found = gather(logit_of(bottom), logit_up_to(top), Choice{bins, -1, 0.0f});
    }
  }

  // Every warp: a logit that at least k logits reach, and not many more, from the tiles' largest
  // ones; the least of all where these are too few.
  __device__ __forceinline__ float floor_of_top(int k) const {
    constexpr int own = 8, steps = 12;
    const int tiles = num_tiles(vocab_size);
    float most[own];  // of every lane's tiles, in groups
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int tile = i * kWarp + block_lane();
      most[i] = tile < tiles ? stats[tile].largest : kNegativeInfinity;
    }
    for (int first = own * kWarp; first < tiles; first += kWarp) {
      const int tile = first + block_lane();
      if (tile < tiles) most[0] = fmaxf(most[0], stats[tile].largest);
    }
    const auto reach = [&](float logit) {
      int count = 0;
#pragma unroll
      for (int i = 0; i < own; ++i) count += __popc(__ballot_sync(kAllLanes, most[i] >= logit));
      return count;
    };
    float least = most[0];
#pragma unroll
    for (int i = 1; i < own; ++i)
      least = most[i] > kNegativeInfinity ? fminf(least, most[i]) : least;
    float lo = -warp_max(-least), hi = largest;
    if (!(lo > kLeastFloat) || reach(lo) < k) return kLeastFloat;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const float middle = 0.5f * lo + 0.5f * hi;
      const int count = reach(middle);
      (count >= k ? lo : hi) = middle;
      if (count >= k && count <= k + k / 4) break;
    }
    return lo;
  }

  __device__ __forceinline__ void keep_top(int k) {
    const Finding found = gather(floor_of_top(k), kLargestFloat, Choice{{}, -1, 0.0f});
    float logit;
    const Goal goal{false, 0.0f, 0.0, static_cast<uint64_t>(k), 0};
    if (select(found, goal, &logit)) threshold = logit;
  }

  // At or below every logit whose exponent beside the largest is `octaves` or more.
  __device__ __forceinline__ float down_to(float octaves) const {
    const float slack = 0.01f + fabsf(octaves) * 0x1p-20f;
    const float logit = largest + (octaves - slack) / scale - fabsf(largest) * 0x1p-20f;
    return logit > kLeastFloat ? logit : kLeastFloat;
  }

  // The share is of the row, or of what top-k left of it.
  __device__ __forceinline__ void keep_share(float top_p, bool is_ranked) {
    Goal goal{true, top_p, 0.0, 1, 0};
    // Below this a mass is 0.
    float floor = down_to(-log2f(unit) - 1.0f);
    if (threshold > floor) floor = threshold;
    const float massless = floor;
    float surest = floor;
    if (!is_ranked) {
      if (block_warp() == 0) {
        const double sum = warp_row_sum(stats, largest, scale, num_tiles(vocab_size), block_lane());
        if (threadIdx.x == 0) s.sum = sum;
      }
      __syncthreads();
      goal.total = s.sum * unit;
      // What is below the floor, V logits at most, has less mass than the share leaves out.
      const double left = goal.total - static_cast<double>(mass_wanted(top_p, goal.total));
      if (left > 0.0) {
        const float octaves = log2f(static_cast<float>(left / vocab_size / unit)) - 1.0f;
        const float found = down_to(octaves), guess = down_to(octaves + kFewNearFloor);
        floor = found > floor ? found : floor;
        surest = floor;
        // In most rows few logits are so near to the floor: a higher one leaves fewer to look at.
        if (guess > floor && guess < largest) floor = guess;
      }
    }
    for (;;) {
      const float span = largest - floor, per_logit = kBins / span;
      const bool is_linear = span > 0.0f && per_logit > 0.0f && per_logit < 1e30f;
      const Bins bins{largest, is_linear ? per_logit : 0.0f, key_of(largest), 31};
      goal.above = 0;
      const int bin = find_bin(floor, largest, bins, &goal);
      if (bin >= 0) {
        const float width = is_linear ? 1.0f / per_logit : INFINITY;
        const float slack = fabsf(largest) * 0x1p-20f;
        const float lo = is_linear ? largest - (bin + 2) * width - slack : floor;
        const float hi = is_linear ? largest - (bin - 1) * width + slack : largest;
        const Finding found =
            gather(lo > floor ? lo : floor, hi < largest ? hi : largest, Choice{bins, bin, 0.0f});
        float logit;
        if (select(found, goal, &logit) && logit > threshold) threshold = logit;
        return;
      }
      if (floor == massless) return;  // rounding leaves out what was wanted: all are kept
      floor = floor > surest ? surest : massless;
    }
  }

  __device__ __forceinline__ void keep_near(float min_p) {
    const float near = down_to(log2f(min_p));
    const Finding found =
        gather(near > threshold ? near : threshold, kLargestFloat, Choice{{}, -1, min_p});
    // A min_p above 1 would keep nothing: the largest always stays.
    const float least = found.count > 0 ? logit_of(found.least) : largest;
    threshold = least > threshold ? least : threshold;
  }
};

// A request's filters.
struct Filters {
  int top_k;
  float top_p, min_p, scale;

  Filters() = default;

  __device__ Filters(const LogitsParams& a, int64_t b)
      : top_k(a.top_k ? a.top_k[b] : 0),
        top_p(a.top_p ? a.top_p[b] : 1.0f),
        min_p(a.min_p ? a.min_p[b] : 0.0f),
        scale(a.scale(b)) {
    // They leave a greedy request as it is.
    if (a.is_greedy(b)) *this = none();
    if (top_k >= a.base.vocab_size) top_k = 0;
  }

  __device__ bool any() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f; }

  // Whether the search wants the tiles' sums, not only their largest logits.
  __device__ bool want_sums() const { return top_p < 1.0f && top_k <= 0; }

  static __device__ Filters none() {
    Filters filters;
    filters.top_k = 0;
    filters.top_p = filters.scale = 1.0f;
    filters.min_p = 0.0f;
    return filters;
  }
};

// All threads of the team's blocks: the least logit that a row's filters keep, -inf where they keep
// all. exchange: how often the team has told, 0 before its first search.
template <typename T>
__device__ __noinline__ float find_threshold(Search& s, Team team, Filters filters, const T* x,
                                             const TileStats* stats, int vocab_size,
                                             int* exchange) {
  if (!filters.any()) return kNegativeInfinity;
  if (block_lane() == 0) s.seen[block_warp()].count = -1;
  __syncwarp();
  const float largest = warp_largest(stats, num_tiles(vocab_size), block_lane());
  if (!(largest > kNegativeInfinity)) return kNegativeInfinity;
  ThresholdSearch<T> search{
      s, team, x, stats, vocab_size, *exchange, largest, filters.scale, mass_unit(vocab_size)};
  if (filters.top_k > 0) search.keep_top(filters.top_k);
  if (filters.top_p < 1.0f) search.keep_share(filters.top_p, filters.top_k > 0);
  if (filters.min_p > 0.0f) search.keep_near(filters.min_p);
  *exchange = search.exchange;
  return search.threshold;
}

}  // namespace
}  // namespace fused_rejection
