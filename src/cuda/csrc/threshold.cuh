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
constexpr int kPlacedTiles = 128;  // of a warp: places have 16 bits
// Octaves that keep_share tries above what is sure, and where the largest logit has so much of the
// mass.
constexpr float kFewNearFloor = 3.0f, kFewNearPeak = 6.0f, kPeaked = 1.0f / 16;
constexpr float kBinned = 5.0f;  // octaves above that floor which bins are made of

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

// About 1 / value.
__device__ __forceinline__ float reciprocal(float value) {
#ifndef FR_EMULATION
  return __fdividef(1.0f, value);
#else
  return 1.0f / value;
#endif
}

struct Team {
  int rank, blocks;
  int first;  // its first block in the cluster
  // [2] in every block: what all blocks tell it once is a phase, of these in turns, since one that
  // has all of a phase may tell the next to one that has not.
  uint64_t* pending;

  // Of what is told the next time. `times`: how often it was before.
  __device__ __forceinline__ uint64_t* word(int times) const { return pending + (times & 1); }

  // One thread: before its cluster_start.
  __device__ __forceinline__ void expect() const {
    expect_announcements(pending, blocks);
    expect_announcements(pending + 1, blocks);
  }

  // All warps: values[0] to values[count - 1] into the same shared variables of every block.
  template <typename V>
  __device__ __forceinline__ void tell(V* shared, const V* values, int count, int times) const {
    for (int block = block_warp(); block < blocks; block += block_warps()) {
      for (int i = block_lane(); i < count; i += kWarp) {
        if (blocks == 1) {
          shared[i] = values[i];
        } else {
          send_to_block(shared + i, word(times), first + block, values[i]);
        }
      }
    }
  }

  // The same of many, 16 bytes at once.
  template <int count, typename V>
  __device__ __forceinline__ void tell_all(V* shared, const V* values, int times) const {
    constexpr int words = static_cast<int>(count * sizeof(V) / sizeof(uint4));
    for (int block = block_warp(); block < blocks; block += block_warps()) {
      for (int i = block_lane(); i < words; i += kWarp) {
        uint4* to = reinterpret_cast<uint4*>(shared) + i;
        const uint4 own = reinterpret_cast<const uint4*>(values)[i];
        if (blocks == 1) {
          *to = own;
        } else {
          send_words_to_block(to, word(times), first + block, own);
        }
      }
    }
  }

  // All threads: how many bytes this block tells each.
  __device__ __forceinline__ void announce_all(int bytes, int times) const {
    const int block = static_cast<int>(threadIdx.x);
    if (block < blocks && blocks > 1) announce(word(times), first + block, bytes);
  }

  // All threads: what was told is there after it, and nobody reads what he told any more.
  __device__ __forceinline__ void wait(int times) const {
    if (blocks > 1) wait_for_bytes(word(times), times >> 1 & 1);
    __syncthreads();
  }
};

// What a block found in a range of logits. Least and most are keys.
struct Finding {
  uint32_t count, least, most, none;

  static constexpr int kWords = 4;
};

// What filters keep of a row: the logits from `threshold` on, -inf where there are no filters, or
// no mass. The logsumexp is known where the threshold is above -inf.
struct alignas(16) Kept {
  float threshold, largest;
  double logsumexp;
};

// Logits of a warp's tiles, tile by tile, and where they are: kTile times which of its tiles, and
// the place in it.
struct Pending {
  float logits[kPending];
  uint16_t places[kPending];
};

// What a warp went through last: its tiles' logits in a range, all of them among its pending ones;
// count is -1 where they were too many.
struct Seen {
  int count;
  float lo, hi;
  bool to_top;  // nothing in the row is above hi
};

// In dynamic shared memory, which the other blocks of the team store into.
struct Search {
  alignas(16) uint32_t low[kBins], high[kBins];  // 64-bit sums: shared memory adds 32 bits natively
  struct Told {
    union {
      uint64_t bins[kLargestTeam][kBins];
      float listed[kLargestTeam][kListed];
      uint32_t counts[kLargestTeam][kBins];
    };
    Finding findings[kLargestTeam];
    uint64_t masses[kLargestTeam];
  };
  union {
    // What the blocks tell one another: in turns here and there, since one that has read what was
    // told tells the next while others still read.
    Told told[2];
    alignas(16) float tiles[kMaxWarps][kTile];  // after the search
  };
  Finding mine;
  alignas(16) uint64_t merged[kBins];
  uint64_t weights[kListed];
  float ranked[kListed];
  Pending pending[kMaxWarps];
  Seen seen[kMaxWarps];
  uint64_t masses[kMaxWarps];
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

// One warp: f(raw, tile, slot) for each of its tiles from `tile` on that has a logit of at least
// lo, `slot` saying which of its tiles it is, until f is false: `tile` is that one then, else the
// end of the row.
template <typename T, typename F>
__device__ __forceinline__ void each_tile_from(const T* x, const TileStats* stats, OwnTiles own,
                                               int vocab_size, float lo, int* tile, const F& f) {
  const int lane = block_lane(), tiles = num_tiles(vocab_size);
  const int plain_tiles = by_vectors<T>(x, nullptr, vocab_size) ? vocab_size / kTile : 0;
  const T* own_x = x + lane * kVector<T>;
  const auto load = [&](int from, RawTile<T>& raw) {
    if (from < plain_tiles) {
      load_vectors(own_x + from * kTile, raw);
    } else if (from < tiles) {
      load_tile(x, from, vocab_size, kNegativeInfinityWord<T>, lane, raw);
    }
  };
  int slot = 0, at = *tile;
  for (int before = own.first; before < at; before += own.step) ++slot;
  const auto skip = [&](int& from, int& its_slot) {
    while (from < tiles && !(stats[from].largest >= lo)) {
      from += own.step;
      ++its_slot;
    }
  };
  skip(at, slot);
  RawTile<T> raw;
  load(at, raw);
#pragma unroll 1
  while (at < tiles) {
    int behind = at + own.step, next_slot = slot + 1;
    skip(behind, next_slot);
    RawTile<T> next;
    load(behind, next);
    if (!f(raw, at, slot)) break;
    raw = next;
    at = behind;
    slot = next_slot;
  }
  *tile = at;
}

// One warp: makes a list of the logits of its tiles from `tile` on that are at least lo, and at
// most hi unless that is the largest of all; ends before the tile for which it has no room, which
// is `tile` then, else that is the end of the row. How many there are. A call, as are the steps of
// the search: they are many, and a warp waits longer for new instructions than for most else.
template <typename T>
__device__ __noinline__ int warp_collect(const T* x, const TileStats* stats, OwnTiles own,
                                         int vocab_size, float lo, float hi, Pending* pending,
                                         int* tile) {
  assume_shared(pending);
  const int lane = block_lane();
  int held = 0;
  each_tile_from(x, stats, own, vocab_size, lo, tile, [&](const RawTile<T>& raw, int at, int slot) {
    uint32_t bits = bits_at_least(raw, lo);
    if (stats[at].largest > hi) bits &= ~bits_at_least(raw, next_above(hi));
    const int hits = static_cast<int>(__reduce_add_sync(kAllLanes, __popc(bits)));
    if (held + hits > kPending) return false;
#pragma unroll 1
    for (;;) {  // few lanes have any, hardly any two
      const unsigned some = __ballot_sync(kAllLanes, bits != 0);
      if (!some) break;
      if (bits) {
        const int bit = __ffs(bits) - 1, to = held + __popc(some & ((1u << lane) - 1));
        pending->logits[to] = raw.of_any_bit(bit);
        pending->places[to] = static_cast<uint16_t>(slot * kTile + RawTile<T>::place(bit, lane));
        bits &= bits - 1;
      }
      held += __popc(some);
    }
    return true;
  });
  __syncwarp();
  return held;
}

// One warp: counts the logits of its tiles that are at least lo, the 16-bit ones as many steps
// below the one whose key is `most` as there are counts.
template <typename T>
__device__ __noinline__ void warp_count_values(const T* x, const TileStats* stats, OwnTiles own,
                                               int vocab_size, float lo, uint32_t most,
                                               uint32_t* counts) {
  assume_shared(counts);
  int tile = own.first;
  each_tile_from(x, stats, own, vocab_size, lo, &tile, [&](const RawTile<T>& raw, int, int) {
    uint32_t bits = bits_at_least(raw, lo);
#pragma unroll 1
    while (bits) {
      atomicAdd(counts + ((most - key_of(raw.of_any_bit(__ffs(bits) - 1))) >> 16), 1u);
      bits &= bits - 1;
    }
    return true;
  });
}

// One warp: the largest logit of a row, and, unless that is null, about the sum of its weights
// beside it.
__device__ __forceinline__ float warp_glance(const TileStats* stats, float scale, int tiles,
                                             float* rough_sum) {
  constexpr int own = 8;
  const int lane = block_lane();
  TileStats known[own];
  float largest = kNegativeInfinity, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < own; ++i) {
    const int tile = i * kWarp + lane;
    known[i] = {kNegativeInfinity, 0.0f};
    if (tile < tiles) known[i] = stats[tile];
    largest = fmaxf(largest, known[i].largest);
  }
#pragma unroll 1
  for (int tile = own * kWarp + lane; tile < tiles; tile += kWarp) {
    largest = fmaxf(largest, stats[tile].largest);
  }
  largest = warp_max(largest);
  if (!rough_sum) return largest;
  const float product = largest * scale, anchor = whole(product);
  int first = lane;
  if (!is_wide(product)) {
#pragma unroll
    for (int i = 0; i < own; ++i) {  // tile_weight
      const float octaves = whole(known[i].largest * scale) - anchor;
      sum += known[i].sum * times_power(1.0f, at_least(octaves, -127.0f) + kRoundingShift);
    }
    first += own * kWarp;
  }
#pragma unroll 1
  for (int tile = first; tile < tiles; tile += kWarp) {
    sum += tile_weight(stats[tile], largest, scale);
  }
  *rough_sum = group_total<kWarp>(sum);
  return largest;
}

template <typename T>
struct ThresholdSearch {
  // The bins of a range of logits, bin 0 holding the largest: of equal width from `top` down, or of
  // equally many floats.
  struct Bins {
    float top, per_logit;  // of equal width where per_logit is above 0
    uint32_t most;
    int shift;

    __device__ __forceinline__ int operator()(float logit) const {
      if (!(per_logit > 0.0f)) return static_cast<int>((most - key_of(logit)) >> shift);
      const float bin = (top - logit) * per_logit;
      return bin < kBins - 1 ? bin > 0.0f ? static_cast<int>(bin) : 0 : kBins - 1;
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
    float top_p;  // 0: what is wanted is known
    bool of_row;  // the total is the row's, else of the masses in the bins
    uint64_t wanted, above;
  };

  Search& s;
  Team team;
  const T* x;
  const TileStats* stats;  // of the whole row
  int vocab_size;
  int exchange;  // how often the team has told
  float largest, scale, unit;
  float per_octave;  // logits
  float rough_sum;   // of the row's weights, where the tiles' sums are known
  float threshold = kNegativeInfinity;
  uint64_t mass = 0;  // of what is kept, 0 where it is not known yet

  // All warps: f(is_one, x) by whole warps for the finite_logit x of this block's tiles that are in
  // [lo, hi], lo above -inf: 32 at a time, as they are sparse. A range within the last one is
  // looked for in what that left.
  template <typename F>
  __device__ __forceinline__ void each(float lo, float hi, const F& f) const {
    const int lane = block_lane(), tiles = num_tiles(vocab_size);
    const OwnTiles own(team.rank, team.blocks);
    Pending* pending = here().pending + block_warp();
    Seen& seen = here().seen[block_warp()];
    const bool is_known = seen.count >= 0 && seen.lo <= lo && seen.hi >= hi;
    int tile = is_known ? tiles : own.first, held = is_known ? seen.count : 0;
    bool overflows = false;
#pragma unroll 1
    for (;;) {
      if (!is_known) held = warp_collect(x, stats, own, vocab_size, lo, hi, pending, &tile);
      for (int first = 0; first < held; first += kWarp) {
        const int i = first + lane;
        const float logit = i < held ? finite_logit(pending->logits[i]) : 0.0f;
        f(i < held && logit >= lo && logit <= hi, logit);
      }
      __syncwarp();
      if (tile >= tiles) break;
      overflows = true;
    }
    if (!is_known && lane == 0) {
      seen = {overflows ? -1 : held, lo, hi, hi >= largest};
    }
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
    if (threadIdx.x == 0) s.mine = {0, 0xFFFFFFFFu, 0, 0};
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
    if (__ballot_sync(kAllLanes, most > 0)) {
      least = __reduce_min_sync(kAllLanes, least);
      most = __reduce_max_sync(kAllLanes, most);
      if (lane == 0) {
        atomicMin(&s.mine.least, least);
        atomicMax(&s.mine.most, most);
      }
    }
    __syncthreads();
    const int listed = s.mine.count <= kListed ? static_cast<int>(s.mine.count) : 0;
    team.tell(&told.findings[team.rank].count, &s.mine.count, Finding::kWords, exchange - 1);
    team.tell(told.listed[team.rank], s.ranked, listed, exchange - 1);
    team.announce_all(static_cast<int>(sizeof(Finding) + listed * sizeof(float)), exchange - 1);
    team.wait(exchange - 1);
    Finding all{0, 0xFFFFFFFFu, 0, 0};
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

  // Of all logits that the blocks have listed number i; -inf behind the last.
  __device__ __forceinline__ float listed(int i) const {
    const Search::Told& told = here().told[exchange & 1];
    float logit = kNegativeInfinity;
#pragma unroll 1
    for (int block = 0; block < team.blocks; ++block) {
      const int of_block = static_cast<int>(told.findings[block].count);
      if (i >= 0 && i < of_block) logit = told.listed[block][i];
      i -= of_block;
    }
    return logit;
  }

  // The mass of those of the `count` listed logits that are at least `least`. Every warp.
  __device__ __noinline__ uint64_t listed_mass(int count, float least) const {
    uint64_t sum = 0;
#pragma unroll 1
    for (int i = block_lane(); i < count; i += kWarp) {
      const float logit = listed(i);
      if (logit >= least) sum += mass_of(logit, largest, scale, unit);
    }
    return group_total<kWarp>(sum);
  }

  // The largest of the listed logits, of which there are at most kWarp, at which the weights reach
  // what is wanted: by every warp, so that none waits for another.
  __device__ __forceinline__ bool rank_few(const Goal& goal, int count, float* logit,
                                           uint64_t* reached) const {
    const float own = listed(block_lane());
    const uint64_t weight = block_lane() < count ? weight_of(goal, own) : 0;
    uint64_t before = goal.above, with = goal.above;
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const float other = __shfl_sync(kAllLanes, own, j);
      const uint64_t its_weight = __shfl_sync(kAllLanes, weight, j);
      if (other > own) before += its_weight;
      if (other >= own) with += its_weight;
    }
    const bool is_it = block_lane() < count && before < goal.wanted && goal.wanted <= with;
    const unsigned hits = __ballot_sync(kAllLanes, is_it);  // one logit, or equal ones
    const int hit = hits ? __ffs(hits) - 1 : 0;
    *logit = __shfl_sync(kAllLanes, own, hit);
    *reached = __shfl_sync(kAllLanes, with, hit);
    return hits != 0;
  }

  // The same of up to kListed; `reached`: the weights down to it.
  __device__ __noinline__ bool rank(Goal goal, int count, float* logit, uint64_t* reached) const {
    if (count <= kWarp) return rank_few(goal, count, logit, reached);
    Search& s = here();
    static_assert(kListed <= kMaxWarps * kWarp);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += blockDim.x) {
      const float own = listed(i);
      s.ranked[i] = own;
      if (goal.by_mass) s.weights[i] = weight_of(goal, own);
    }
    if (threadIdx.x == 0) s.is_found = false;
    __syncthreads();
    const int lane = block_lane();
#pragma unroll 1
    for (int i = block_warp(); i < count; i += block_warps()) {
      const float own = s.ranked[i];
      uint64_t before = 0, with = 0;
#pragma unroll 1
      for (int first = 0; first < count; first += kWarp) {
        const int j = first + lane;
        const float other = j < count ? s.ranked[j] : kNegativeInfinity;
        if (goal.by_mass) {
          const uint64_t weight = j < count ? s.weights[j] : 0;
          if (other > own) before += weight;
          if (other >= own) with += weight;
        } else {
          before += __popc(__ballot_sync(kAllLanes, other > own));
          with += __popc(__ballot_sync(kAllLanes, other >= own));
        }
      }
      if (goal.by_mass) {
        before = group_total<kWarp>(before);
        with = group_total<kWarp>(with);
      }
      before += goal.above;
      with += goal.above;
      if (lane == 0 && before < goal.wanted && goal.wanted <= with) {  // one, or equal ones
        s.answer = own;
        s.above = with;
        s.is_found = true;
      }
    }
    __syncthreads();
    *logit = s.answer;
    *reached = s.above;
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
      s.merged[i] = (uint64_t{s.high[i]} << 32) + s.low[i];
    }
    __syncthreads();
    team.tell_all<kBins>(told.bins[team.rank], s.merged, exchange - 1);
    team.announce_all(static_cast<int>(sizeof s.merged), exchange - 1);
    if (goal->of_row && block_warp() == block_warps() - 1) {  // while others are on their way
      const double sum = warp_row_sum(stats, largest, scale, num_tiles(vocab_size), lane);
      if (lane == 0) s.sum = sum;
    }
    team.wait(exchange - 1);
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
        const double total = goal->of_row ? s.sum * unit : static_cast<double>(all);
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
  // in [found.least, found.most]. The mass down to it is known then, where the goal is one of
  // masses, or all are listed.
  __device__ __noinline__ bool select(Finding found, Goal goal, float* logit) {
    for (;;) {
      if (found.count == 0) return false;
      if (found.count <= kListed) {
        const int count = static_cast<int>(found.count);
        uint64_t reached;
        if (!rank(goal, count, logit, &reached)) return false;
        mass = goal.by_mass ? reached : goal.above == 0 ? listed_mass(count, *logit) : 0;
        return true;
      }
      *logit = logit_of(found.least);
      if (found.least == found.most) {
        const uint64_t reached = goal.above + found.count * weight_of(goal, *logit);
        mass = goal.by_mass ? reached : 0;
        return reached >= goal.wanted;
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
      unsigned count = 0;
#pragma unroll
      for (int i = 0; i < own; ++i) count += most[i] >= logit;
      return static_cast<int>(__reduce_add_sync(kAllLanes, count));
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

  __device__ __forceinline__ void keep_top(int k, float floor) {
    const Finding found = gather(floor, kLargestFloat, Choice{{}, -1, 0.0f});
    float logit;
    const Goal goal{false, 0.0f, false, static_cast<uint64_t>(k), 0};
    if (select(found, goal, &logit)) threshold = logit;
  }

  // At or below every logit whose exponent beside the largest is `octaves` or more.
  __device__ __forceinline__ float down_to(float octaves) const {
    const float slack = 0.01f + fabsf(octaves) * 0x1p-20f;
    const float logit = largest + (octaves - slack) * per_octave - fabsf(largest) * 0x1p-20f;
    return logit > kLeastFloat ? logit : kLeastFloat;
  }

  // At most log2 of a positive number that is normal, and hardly less.
  static __device__ __forceinline__ float log2_below(float value) {
    return static_cast<float>(static_cast<int>(bits_of(value)) - 0x3F800000) * 0x1p-23f;
  }

  // Where to look for the share of top-p: what is below `surest` is left out, and in most rows what
  // is below `guessed`; below `massless` a mass is 0.
  struct Floors {
    float guessed, surest, massless;
  };

  // The share is of the row, or of what top-k left of it.
  __device__ __forceinline__ Floors floors_of_share(float top_p, bool is_ranked) const {
    float floor = down_to(-log2_below(unit) - 1.0f);
    if (threshold > floor) floor = threshold;
    Floors floors{floor, floor, floor};
    if (is_ranked) return floors;
    // What is below the floor, V logits at most, has less mass than the share leaves out. By less
    // than an octave a rough sum is wrong, and where it is, the search begins anew.
    const float left = rough_sum * (1.0f - top_p);
    if (!(left > 0.0f)) return floors;
    const float octaves = log2_below(left * reciprocal(static_cast<float>(vocab_size))) - 1.1f;
    // A larger share reaches further down than the bound does.
    const bool is_far = rough_sum * kPeaked < 1.0f && top_p < 0.97f;
    const float above = is_far ? kFewNearPeak : kFewNearFloor;
    const float found = down_to(octaves), guess = down_to(octaves + above);
    if (found > floor) floors.surest = floors.guessed = found;
    // In most rows few logits are so near to the floor: a higher one leaves fewer to look at.
    if (guess > floors.surest && guess < largest) floors.guessed = guess;
    return floors;
  }

  __device__ __forceinline__ void keep_share(float top_p, bool is_ranked, const Floors& floors) {
    Goal goal{true, top_p, !is_ranked, 1, 0};
    float floor = floors.guessed;
    for (;;) {
      // The threshold is seldom far above the floor: what is goes into the first bin.
      const float wide = floor + kBinned * per_octave, top = wide < largest ? wide : largest;
      const float span = top - floor, per_logit = kBins / span;
      const bool is_linear = span > 0.0f && per_logit > 0.0f && per_logit < 1e30f;
      const Bins bins{top, is_linear ? per_logit : 0.0f, key_of(largest), 31};
      goal.above = 0;
      const int bin = find_bin(floor, largest, bins, &goal);
      if (bin >= 0) {
        const float width = is_linear ? 1.0f / per_logit : INFINITY;
        const float slack = fabsf(largest) * 0x1p-20f;
        const float lo = is_linear ? top - (bin + 2) * width - slack : floor;
        const float hi = is_linear && bin > 0 ? top - (bin - 1) * width + slack : largest;
        const Finding found =
            gather(lo > floor ? lo : floor, hi < largest ? hi : largest, Choice{bins, bin, 0.0f});
        float logit;
        const uint64_t ranked = mass;
        if (select(found, goal, &logit) && logit > threshold) {
          threshold = logit;
        } else {
          mass = ranked;
        }
        return;
      }
      if (floor == floors.massless) return;  // rounding leaves out what was wanted: all are kept
      floor = floor > floors.surest ? floors.surest : floors.massless;
    }
  }

  __device__ __forceinline__ void keep_near(float min_p, float near) {
    const Finding found =
        gather(near > threshold ? near : threshold, kLargestFloat, Choice{{}, -1, min_p});
    // A min_p above 1 would keep nothing: the largest always stays.
    const float least = found.count > 0 ? logit_of(found.least) : largest;
    if (!(least > threshold)) return;
    threshold = least;
    const bool are_listed = found.count > 0 && found.count <= kListed;
    mass = are_listed ? listed_mass(static_cast<int>(found.count), least) : 0;
  }

  // All filters at once where the logits have 16 bits and few values from `floor` on, which may be
  // a guess: how many there are of each value says all. False where it does not.
  __device__ __noinline__ bool keep_values(int top_k, float top_p, float min_p, float floor) {
    Search& s = here();
    const float largest = this->largest, scale = this->scale, unit = this->unit;
    const int lane = block_lane();
    const uint32_t exact = bits_of(floor), up = exact + (exact >> 31 ? 0u : 0xFFFFu);
    const uint32_t most = key_of(largest), least = key_of(float_from_bits(up & 0xFFFF0000u));
    if (bits_of(largest) & 0xFFFFu || (most - least) >> 16 >= kBins) return false;
    const auto value_of = [&](int bin) {
      const uint32_t key = most - (static_cast<uint32_t>(bin) << 16);
      // A negative one's key ends in ones.
      return logit_of(key < 0x80000000u && !(most & 0xFFFFu) ? key - 1 : key);
    };
    Search::Told& told = s.told[++exchange & 1];
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += blockDim.x) s.low[i] = 0;
    __syncthreads();
    warp_count_values(x, stats, OwnTiles(team.rank, team.blocks), vocab_size, floor, most, s.low);
    __syncthreads();
    team.tell_all<kBins>(told.counts[team.rank], s.low, exchange - 1);
    team.announce_all(static_cast<int>(sizeof s.low), exchange - 1);
    if (top_p < 1.0f && top_k <= 0 && block_warp() == block_warps() - 1) {
      const double sum = warp_row_sum(stats, largest, scale, num_tiles(vocab_size), lane);
      if (lane == 0) s.sum = sum;
    }
    team.wait(exchange - 1);
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += blockDim.x) {
      uint32_t count = 0;
#pragma unroll 8
      for (int block = 0; block < team.blocks; ++block) count += told.counts[block][i];
      s.low[i] = count;
      s.merged[i] = count ? count * mass_of(value_of(i), largest, scale, unit) : 0;
    }
    __syncthreads();
    if (block_warp() == 0) {
      constexpr int own = kBins / kWarp;
      uint32_t counts[own], count = 0;
      uint64_t masses[own], sum = 0;  // cumulated
#pragma unroll
      for (int i = 0; i < own; ++i) {
        counts[i] = count += s.low[lane * own + i];
        masses[i] = sum += s.merged[lane * own + i];
      }
      const uint32_t counts_before = warp_inclusive(count, lane) - count;
      const uint64_t masses_before = warp_inclusive(sum, lane) - sum;
#pragma unroll
      for (int i = 0; i < own; ++i) s.merged[lane * own + i] = masses_before + masses[i];
      __syncwarp();
      int last = kBins - 1;
      bool is_found = true;
      if (top_k > 0) {
        unsigned fewer = 0;  // bins that with those before do not reach it
#pragma unroll
        for (int i = 0; i < own; ++i) {
          fewer += counts_before + counts[i] < static_cast<uint32_t>(top_k);
        }
        last = static_cast<int>(__reduce_add_sync(kAllLanes, fewer));
        is_found = last < kBins;
      }
      if (is_found && top_p < 1.0f) {
        const double total = top_k > 0 ? static_cast<double>(s.merged[last]) : s.sum * unit;
        const uint64_t wanted = mass_wanted(top_p, total);
        unsigned less = 0;
#pragma unroll
        for (int i = 0; i < own; ++i) less += masses_before + masses[i] < wanted;
        const int first = static_cast<int>(__reduce_add_sync(kAllLanes, less));
        is_found = first < kBins;
        last = first < last ? first : last;
      }
      if (is_found && min_p > 0.0f) {
        int kept = 0;  // the largest always stays
#pragma unroll 1
        for (int bin = lane * own; bin < lane * own + own && bin <= last; ++bin) {
          if (s.low[bin] && keeps_min_p(value_of(bin), largest, scale, min_p)) kept = bin;
        }
        last = __reduce_max_sync(kAllLanes, kept);
      }
      if (lane == 0) {
        s.is_found = is_found;
        s.bin = last;
        if (is_found) s.above = s.merged[last];
      }
    }
    __syncthreads();
    if (!s.is_found) return false;
    threshold = value_of(s.bin);
    mass = s.above;
    return true;
  }

  __device__ __forceinline__ void keep(int top_k, float top_p, float min_p) {
    const bool has_top = top_k > 0, has_share = top_p < 1.0f;
    float floor = 0.0f;
    Floors floors = {};
    if (has_top) {
      floor = floor_of_top(top_k);
    } else if (has_share) {
      floors = floors_of_share(top_p, false);
      floor = floors.guessed;
    } else {
      floor = down_to(log2_below(min_p));
    }
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (keep_values(top_k, top_p, min_p, floor)) return;
    }
    if (has_top) keep_top(top_k, floor);
    if (has_share) keep_share(top_p, has_top, has_top ? floors_of_share(top_p, true) : floors);
    if (min_p > 0.0f) keep_near(min_p, down_to(log2_below(min_p)));
  }

  // The mass of what is kept, where the search did not come upon it.
  __device__ __noinline__ void find_mass() {
    Search& s = here();
    const float largest = this->largest, scale = this->scale, unit = this->unit;
    Search::Told& told = s.told[++exchange & 1];
    uint64_t sum = 0;
    each(threshold, largest, [&](bool is_there, float logit) {
      if (is_there) sum += mass_of(logit, largest, scale, unit);
    });
    sum = group_total<kWarp>(sum);
    if (block_lane() == 0) s.masses[block_warp()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < block_warps(); ++warp) s.masses[0] += s.masses[warp];
    }
    __syncthreads();
    team.tell(&told.masses[team.rank], s.masses, 1, exchange - 1);
    team.announce_all(static_cast<int>(sizeof(uint64_t)), exchange - 1);
    team.wait(exchange - 1);
    mass = 0;
    for (int block = 0; block < team.blocks; ++block) mass += told.masses[block];
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

// All threads of the team's blocks: what a row's filters keep. exchange: how often the team has
// told, 0 before its first search.
template <typename T>
__device__ __noinline__ Kept find_kept(Search& s, Team team, Filters filters, const T* x,
                                       const TileStats* stats, int vocab_size, int* exchange) {
  Kept kept = {kNegativeInfinity, kNegativeInfinity, -INFINITY};
  if (!filters.any()) return kept;
  if (block_lane() == 0) s.seen[block_warp()].count = -1;
  __syncwarp();
  float rough_sum = 0.0f;
  kept.largest = warp_glance(stats, filters.scale, num_tiles(vocab_size),
                             filters.want_sums() ? &rough_sum : nullptr);
  if (!(kept.largest > kNegativeInfinity)) return kept;
  ThresholdSearch<T> search{s,
                            team,
                            x,
                            stats,
                            vocab_size,
                            *exchange,
                            kept.largest,
                            filters.scale,
                            mass_unit(vocab_size),
                            reciprocal(filters.scale),
                            rough_sum};
  search.keep(filters.top_k, filters.top_p, filters.min_p);
  if (!(search.threshold > kNegativeInfinity)) search.threshold = kLeastFloat;  // all are kept
  if (search.mass == 0) search.find_mass();
  *exchange = search.exchange;
  kept.threshold = search.threshold;
  kept.logsumexp = kept_logsumexp(search.mass, kept.largest, filters.scale, search.unit);
  __syncthreads();  // nobody reads what was told any more
  return kept;
}

}  // namespace
}  // namespace fused_rejection
