// Draws from what filters keep of a row, from the lists that the search for the threshold made: a
// warp has a list of the logits of its tiles, so that nothing of the row is read again. Sums are
// tile_sum's to the bit. Where a warp's list had no room the tiles themselves are read.
#pragma once

#include "threshold.cuh"
#include "tiles.cuh"
#include "warp.cuh"

namespace fused_rejection {
namespace {

// A warp's list of a row's logits from its threshold on; count is -1 where there is none.
struct Listed {
  const Pending* pending;
  int count;
  float* tile;  // this warp's room for one

  // The list of this block's `warp`, of a team with `step` warps, after a search in the row.
  __device__ __forceinline__ Listed(Search& s, int warp, int step, int tiles, float threshold)
      : pending(s.pending + warp), count(-1), tile(s.tiles[block_warp()]) {
    const Seen& seen = s.seen[warp];
    const bool is_whole = threshold > kNegativeInfinity && seen.to_top && seen.lo <= threshold;
    if (is_whole && tiles <= kPlacedTiles * step) count = seen.count;
  }
};

// One warp: sets a tile's weights to 0.
__device__ __forceinline__ void warp_clear(float* tile) {
  for (int i = block_lane(); i < kTile; i += kWarp) tile[i] = 0.0f;
  __syncwarp();
}

// One warp: tile_sum of a tile of which a lane may have the weight at a place; the others are 0,
// and stay so.
__device__ __forceinline__ float warp_sum_of_leaves(float* tile, bool has_one, int place,
                                                    float weight) {
  constexpr int own = kTile / kWarp;
  // tile_sum adds those kTile / 2 apart, then adjacent ones: in this order all are adjacent.
  const int leaf = place % (kTile / 2) * 2 + place / (kTile / 2);
  if (has_one) tile[leaf] = weight;
  __syncwarp();
  const float* leaves = tile + block_lane() * own;
  float w[own];
#pragma unroll
  for (int i = 0; i < own; ++i) w[i] = leaves[i];
  __syncwarp();
  if (has_one) tile[leaf] = 0.0f;
#pragma unroll
  for (int d = 1; d < own; d *= 2) {
#pragma unroll
    for (int i = 0; i < own; i += 2 * d) w[i] += w[i + d];
  }
  return group_total<kWarp>(w[0]);
}

// One warp: f(slot, sum) for each of its tiles of which something is listed and kept, `slot` saying
// which: the sums of weight(logit, slot, place), or sum_of(slot) where a tile has more than there
// are lanes. The order of addition is tile_sum's: pairs that are not there would have added 0.
template <typename Weight, typename SumOf, typename F>
__device__ __forceinline__ void each_listed_tile(const Listed& list, float threshold,
                                                 const Weight& weight, const SumOf& sum_of,
                                                 const F& f) {
  const int lane = block_lane();
  float* tile = list.tile;
  bool is_clear = false;
  int first = 0;
#pragma unroll 1
  while (first < list.count) {
    const int i = first + lane;
    const bool is_there = i < list.count;
    const int at = list.pending->places[is_there ? i : list.count - 1], slot = at / kTile;
    // A tile that goes on behind these is left for the next ones.
    const int behind =
        first + kWarp < list.count ? list.pending->places[first + kWarp] / kTile : -1;
    const unsigned cut = __ballot_sync(kAllLanes, slot == behind);
    const int count = cut ? __ffs(cut) - 1 : kWarp;
    if (count == 0) {
      unsigned kept = 0, same = 0;
      do {
        const int j = first + lane < list.count ? first + lane : list.count - 1;
        const bool is_same = first + lane < list.count && list.pending->places[j] / kTile == behind;
        same = __ballot_sync(kAllLanes, is_same);
        kept |= __ballot_sync(kAllLanes, is_same && list.pending->logits[j] >= threshold);
        first += __popc(same);
      } while (same == kAllLanes);
      if (kept) f(behind, sum_of(behind));
      continue;
    }
    first += count;
    const float logit = finite_logit(list.pending->logits[is_there ? i : 0]);
    bool is_live = is_there && lane < count && logit >= threshold;
    float sum = 0.0f;
    if (is_live) sum = weight(logit, slot, at % kTile);
    unsigned left = __ballot_sync(kAllLanes, is_live);
#pragma unroll 1
    while (left) {
      const int leader = __ffs(left) - 1, own_slot = __shfl_sync(kAllLanes, slot, leader);
      const bool is_mine = is_live && slot == own_slot;
      const unsigned mine = __ballot_sync(kAllLanes, is_mine);
      left &= ~mine;
      const unsigned others = mine & (mine - 1);
      float total = __shfl_sync(kAllLanes, sum, leader);
      if (others & (others - 1)) {
        if (!is_clear) warp_clear(tile);
        is_clear = true;
        total = warp_sum_of_leaves(tile, is_mine, at % kTile, sum);
      } else if (others) {  // two are added whatever lies between them
        total += __shfl_sync(kAllLanes, sum, __ffs(others) - 1);
      }
      f(own_slot, total);
    }
  }
}

// Tells all blocks of a cluster the statistics of tile i of the rows it works on; counted.
struct TellStats {
  TileStats* stats;
  uint64_t* pending;
  int blocks;

  // One warp.
  __device__ __forceinline__ void operator()(int i, const TileStats& found) const {
    if (block_lane() < blocks) {
      send_pair_to_block(&stats[i].largest, pending, block_lane(), found.largest, found.sum);
    }
  }
};

// The weight of a logit that is listed, index i of the row.
template <typename T>
__device__ __forceinline__ float weight_of_listed(const LogitsRow<T>& row, float logit, int i) {
  if (!row.q) return row.without_draft(logit, i);
  return row.with_draft(logit, static_cast<float>(read_argument(row.q + i)));
}

// The same of a row that is drawn from as it is, beside its tile's largest logit: as
// warp_tile_stats has it.
__device__ __forceinline__ float weight_in_tile(float logit, float largest, float scale) {
  if (!PowersBeside::serve(largest, scale)) {
    return exp2_portable(octaves_beside(logit, largest, scale));
  }
  const PowersBeside power(largest, scale);
  return power(at_least(logit, power.floor));
}

// One warp: lists what is kept of its tiles of a row, where the search has not.
template <typename T>
__device__ __forceinline__ void warp_list(Search& search, OwnTiles own, const LogitsRow<T>& row,
                                          int vocab_size) {
  const float threshold = row.softmax.threshold;
  if (!(threshold > kNegativeInfinity)) return;
  int tile = own.first;
  const int held = warp_collect(row.p, row.stats, own, vocab_size, threshold, kLargestFloat,
                                search.pending + block_warp(), &tile);
  const bool is_whole = tile >= num_tiles(vocab_size);
  if (block_lane() == 0) {
    search.seen[block_warp()] = {is_whole ? held : -1, threshold, kLargestFloat, true};
  }
  __syncwarp();
}

// One warp: the weights of a row's tiles that are its own, each to all blocks. row.stats: of all
// logits, kept or not.
template <typename T>
__device__ __noinline__ void warp_weigh_kept(Search& search, OwnTiles own, const LogitsRow<T>& row,
                                             int vocab_size, float* sums, uint64_t* pending,
                                             int blocks) {
  const int lane = block_lane(), tiles = num_tiles(vocab_size);
  Listed list(search, block_warp(), own.step, tiles, row.softmax.threshold);
  if (list.count < 0) {
    warp_list(search, own, row, vocab_size);
    list = Listed(search, block_warp(), own.step, tiles, row.softmax.threshold);
  }
  const auto tell = [&](int tile, float sum) {
    if (lane < blocks) send_to_block(sums + tile, pending, lane, sum);
  };
  const bool known = row.from_stats();
  const float scale = row.softmax.scale, threshold = row.softmax.threshold;
  const auto in_row = [&](int tile, float sum) {
    return known ? tile_weight({row.stats[tile].largest, sum}, row.largest, scale) : sum;
  };
  const auto read = [&](int tile) {
    if (!known) return warp_weigh_tile<true>(row, tile, vocab_size, lane, nullptr);
    return warp_tile_stats(row.p, tile, vocab_size, scale, threshold, lane).sum;
  };
#pragma unroll 1
  for (int tile = own.first; tile < tiles; tile += own.step) {
    const bool is_empty = !(row.stats[tile].largest >= threshold);
    if (!is_empty && list.count >= 0) continue;
    tell(tile, is_empty ? 0.0f : in_row(tile, read(tile)));
  }
  const auto tile_of = [&](int slot) { return own.first + slot * own.step; };
  each_listed_tile(
      list, threshold,
      [&](float logit, int slot, int place) {
        const int tile = tile_of(slot);
        if (known) return weight_in_tile(logit, row.stats[tile].largest, scale);
        return weight_of_listed(row, logit, tile * kTile + place);
      },
      [&](int slot) { return read(tile_of(slot)); },
      [&](int slot, float sum) { tell(tile_of(slot), in_row(tile_of(slot), sum)); });
}

// One warp: the token to draw from a tile of a row, which is number `slot` of those that this
// block's warps, of `step`, have.
template <typename T>
__device__ __noinline__ int warp_draw_listed(Search& search, int slot, int step,
                                             const LogitsRow<T>& row, Pick tile, int vocab_size) {
  const int lane = block_lane(), warps = block_warps();
  const Listed list(search, slot % warps, step, num_tiles(vocab_size), row.softmax.threshold);
  if (list.count < 0) return warp_draw_from_tile(row, tile, vocab_size, lane);
  __shared__ float weights[kPaddedTile];
  for (int i = lane; i < kPaddedTile; i += kWarp) weights[i] = 0.0f;
  __syncwarp();
  for (int i = lane; i < list.count; i += kWarp) {
    const int at = list.pending->places[i], place = at % kTile;
    if (at / kTile != slot / warps) continue;
    const float logit = list.pending->logits[i];
    weights[place + place / kKeptSpan] = weight_of_listed(row, logit, tile.item * kTile + place);
  }
  return warp_pick_token(weights, tile, lane);
}

// draw_token in a cluster, from a row in which its first team, or the only one, searched. `row` is
// in shared memory.
template <typename T, typename Output>
__device__ __forceinline__ void draw_kept(LogitsRow<T>& row, Search& search, const Team& team,
                                          int vocab_size, const float& u, int rank, int blocks,
                                          const TileSums& all, const Output& output) {
  __shared__ bool picked;
  const bool is_in_team = team.first == 0;
  const int lane = block_lane(), warp = block_warp(), tiles = num_tiles(vocab_size);
  const OwnTiles own(team.rank, team.blocks);
  const bool stores = rank == 0 && warp == block_warps() - 1;
  if (row.fixed_token >= 0) {
    if (stores) output.store_decision(lane);
    if (rank == 0 && threadIdx.x == 0) output.store_token(row.fixed_token);
    return;
  }
#pragma unroll 1  // the second pass is rare
  for (int pass = 0; pass < 2; ++pass) {
    float* sums = all.sums + pass * tiles;
    if (is_in_team) {
      warp_weigh_kept(search, own, row, vocab_size, sums, all.pending + pass, blocks);
    }
    __syncthreads();  // every warp's list is there
    if (pass == 0 && stores) output.store_decision(lane);
    if (warp == 0) {
      wait_for_bytes(all.pending + pass);
      const Pick pick = warp_pick_tile(sums, tiles, u, lane);
      const bool from_target = row.from_stats();
      if (lane == 0) picked = from_target || pick.item >= 0;
      if (pick.item < 0 && from_target && rank == 0 && lane == 0) {
        output.store_token(0);  // p has no mass either
      }
      const int mine = pick.item < 0 || !is_in_team ? -1 : own.slot(pick.item);
      if (mine >= 0) {
        const int token = warp_draw_listed(search, mine, own.step, row, pick, vocab_size);
        if (lane == 0) output.store_token(token);
      }
    }
    __syncthreads();
    if (picked) return;
    if (threadIdx.x == 0) row = row.target();  // the residual has no weight: draw from p
    __syncthreads();
  }
}

}  // namespace
}  // namespace fused_rejection
