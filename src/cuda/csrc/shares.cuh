// Verification from logits for many requests, in two launches. A block has a share of a row's
// tiles, and the block that completes the position decides, so that nothing waits for another
// block. Then a cluster a request draws.
#pragma once

#include "positions.cuh"

namespace fused_rejection {
namespace {

constexpr int kDecidingWarps = 4;  // of a block

// All warps of a block: counts what it has stored. Whether all of `wanted` is there now; if so the
// block sees it.
__device__ __forceinline__ bool block_completes(unsigned* counter, int count, int wanted, int lane,
                                                int warp) {
  __shared__ bool completes;
  __syncthreads();
  if (warp == 0 && lane == 0) {
    const unsigned done = add_released(counter, static_cast<unsigned>(count)) + count;
    completes = done == static_cast<unsigned>(wanted);
    if (completes) acquire();  // by the last one only: it empties the L1 cache
  }
  __syncthreads();
  return completes;
}

// All warps of a block, when all statistics of a position are there: its verdict, and what it would
// draw from. What it takes is told to three warps, since all that run beside them slow each down.
template <typename T>
__device__ __forceinline__ void block_decide_position(const LogitsParams& a, unsigned b, unsigned k,
                                                      bool is_last, int rows, float scale,
                                                      bool greedy, const Findings<T>& findings,
                                                      int lane, int warp) {
  using Request = LogitsRequest<T, PositionSummaries>;
  __shared__ RowSummary summaries[2], given;
  __shared__ DraftMass draft_mass;
  __shared__ DraftToken draft;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int64_t spec_length = a.base.spec_length, position = b * (spec_length + 1) + k;
  const T* x_p = static_cast<const T*>(a.base.target_probs) + b * a.base.target_row_stride +
                 k * a.base.target_position_stride;
  const T* x_q = nullptr;
  if (!is_last && a.base.draft_probs) {
    x_q = static_cast<const T*>(a.base.draft_probs) + b * a.base.draft_row_stride +
          k * a.base.draft_position_stride;
  }
  if (warp < rows) {
    const int64_t row = warp == 0 ? position : num_target_rows(a.base) + b * spec_length + k;
    const RowSummary summary = warp_summarize(warp == 0 ? x_p : x_q, findings.stats + row * tiles,
                                              scale, kNegativeInfinity, greedy, vocab_size, lane);
    if (lane == 0) {
      summaries[warp] = summary;
      if (warp > 0 && summary.sum > 0) draft_mass = draft_mass_of(summary.logsumexp(scale));
    }
  } else if (warp == 2 && is_last && lane == 0) {
    draft.id = kPlaceholderTokenId;
  } else if (warp == 2 && lane == 0) {
    ComingDraft<T> coming;
    coming.ask(a.base, b, k);
    const double sum = a.draft_logsumexp ? a.draft_logsumexp[b * spec_length + k] : 0.0;
    draft.u = uniform(a.base, b, k);
    coming.ask_values(x_p, x_q, vocab_size);
    given = {0.0, sum, nullptr, 0.0f, kNegativeInfinity, -1};
    if (a.draft_logsumexp) draft_mass = draft_mass_of(sum);
    draft.id = coming.id;
    draft.values = coming.values(x_q);
  }
  __syncthreads();
  if (lane != 0 || warp > 1) return;
  const PlainPosition<T> plain{a, x_p, x_q, summaries[0], draft_mass, draft, scale, greedy};
  LogitsRow<T>* const row = &findings.rows[position];
  const auto tell = [&](Verdict found) {
    if (found == kEnds) findings.verdicts[position] = kEnds;  // kGoesOn is there
  };
  if (!plain.decide(warp == 0, tell, row)) {
    const PositionSummaries known{summaries, a.draft_logsumexp ? &given : nullptr, &draft_mass};
    const OtherPosition<Request> other{Request(a, b, known, scale, greedy), k, draft};
    if (warp == 1) {
      other.make_row(row);
    } else {
      tell(is_last || !other.accepts_draft() ? kEnds : kGoesOn);
    }
  }
}

// A block has `share` tiles a warp, at most 32, of one row. The grid: `blocks` of a target's row
// and as many of a draft's where that is read, by requests, by positions.
template <typename T>
__global__ void __launch_bounds__(kDecidingWarps* kWarp, kResidentDecisions)
    decide_kernel(const __grid_constant__ LogitsParams a, int blocks, int share,
                  const __grid_constant__ Findings<T> findings) {
  __shared__ bool is_over;
  wait_for_launch_before();
  allow_next_launch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned b = blockIdx.y, k = blockIdx.z;
  const unsigned spec_length = static_cast<unsigned>(a.base.spec_length);
  const int64_t position = static_cast<int64_t>(b) * (spec_length + 1) + k;
  // Before anything else, since about half of all blocks leave here. One warp looks, so that all
  // leave together.
  if (k > 0) {
    if (warp == 0) {
      const bool over = warp_is_over(findings.verdicts + position - k, k, lane);
      if (lane == 0) is_over = over;
    }
    __syncthreads();
    if (is_over) return;
  }
  const int drafts = drafts_of(a.base, b, spec_length);
  if (k > 0 && static_cast<int>(k) > drafts) return;
  const bool is_last = static_cast<int>(k) >= drafts, greedy = a.is_greedy(b);
  const int rows = num_draft_rows(a) > 0 && !greedy && !is_last ? 2 : 1;
  const bool is_draft = static_cast<int>(blockIdx.x) >= blocks;
  if (is_draft && rows == 1) return;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int of_block = kDecidingWarps * share;
  const int block_begin = (static_cast<int>(blockIdx.x) - (is_draft ? blocks : 0)) * of_block;
  const int begin = block_begin + warp * share, end = begin + share < tiles ? begin + share : tiles;
  const T* x = static_cast<const T*>(is_draft ? a.base.draft_probs : a.base.target_probs);
  x += is_draft ? b * a.base.draft_row_stride + k * a.base.draft_position_stride
                : b * a.base.target_row_stride + k * a.base.target_position_stride;
  // Known once for all of a row's tiles; with float32 logits that takes registers which are wanted.
  const bool vectors = sizeof(T) < 4 && by_vectors<T>(x, nullptr, vocab_size);
  const int plain_tiles = vectors ? vocab_size / kTile : 0;
  const T* own_x = x + lane * kVector<T>;
  const auto load = [&](int tile, RawTile<T>& raw) {
    if (tile < plain_tiles) {
      load_vectors(own_x + tile * kTile, raw);
    } else {
      load_tile(x, tile, vocab_size, kNegativeInfinityWord<T>, lane, raw);
    }
  };
  RawTile<T> raw;
  if (begin < end) load(begin, raw);
  const float scale = a.scale(b);
  TileStats own = {};
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    RawTile<T> next;
    if (tile + 1 < end) load(tile + 1, next);
    const TileStats found = warp_tile_stats(raw, scale, kNegativeInfinity, !greedy, [] {});
    if (lane == tile - begin) own = found;
    raw = next;
  }
  if (begin + lane < end) {
    const int64_t draft_row = num_target_rows(a.base) + static_cast<int64_t>(b) * spec_length + k;
    findings.stats[(is_draft ? draft_row : position) * tiles + begin + lane] = own;
  }
  const int left = tiles - block_begin, count = left < of_block ? left : of_block;
  if (block_completes(findings.arrived + position, count, rows * tiles, lane, warp)) {
    block_decide_position(a, b, k, is_last, rows, scale, greedy, findings, lane, warp);
  }
}

// How many of a row's tiles are read 16 bytes at a time, and have no end: known once for all, as in
// decide_kernel.
template <typename T>
__device__ __forceinline__ int tiles_by_vectors(const LogitsRow<T>& row, int vocab_size) {
  const bool vectors = sizeof(T) < 4 && by_vectors<T>(row.p, row.q, vocab_size);
  return vectors ? vocab_size / kTile : 0;
}

// One warp: the sum of a tile's weights.
template <typename T>
__device__ __forceinline__ float warp_weigh_next(const LogitsRow<T>& row, int tile, int plain_tiles,
                                                 int vocab_size, int lane) {
  RawTile<T> p, q;
  if (tile < plain_tiles) {
    const int from = tile * kTile + lane * kVector<T>;
    load_vectors(row.p + from, p);
    if (row.q) load_vectors(row.q + from, q);
  } else {
    load_tiles(row, tile, vocab_size, lane, p, q);
  }
  return warp_weigh_raw(row, p, q, tile, lane, nullptr);
}

// RequestOutput of a request that is made anew where it is used: kept, it would take registers that
// the loop over tiles wants.
template <typename T>
struct DrawOutput {
  const Params& a;
  unsigned b;
  const int64_t& accepted;  // in shared memory

  __device__ __forceinline__ void store_decision(int lane) const {
    const Request<T> request(a, b);
    RequestOutput<Request<T>>{request, accepted}.store_decision(lane);
  }
  __device__ __forceinline__ void store_token(int id) const {
    Request<T>(a, b).store(accepted, id);
  }
};

// Draws at the first position that ends each request, by a cluster a request: its blocks tell one
// another what they sum, which takes a fraction of the time of a count in global memory.
template <typename T>
__global__ void __launch_bounds__(kMaxFusedWarps* kWarp, 1)
    draw_kernel(const __grid_constant__ LogitsParams a, int blocks,
                const __grid_constant__ Findings<T> findings) {
#if FR_HAS_CLUSTERS
  __shared__ LogitsRow<T> row;
  __shared__ int64_t accepted;
  __shared__ float recovery_uniform;
  __shared__ Pick picked;
  __shared__ float weights[kPaddedTile];
  FR_DYNAMIC_SHARED(uint64_t, shared);  // TileSums
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const unsigned b = cluster_index();
  const int rank = static_cast<int>(cluster_rank());
  const int64_t spec_length = a.base.spec_length;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const TileSums all{reinterpret_cast<float*>(shared + 2), shared};
  if (threadIdx.x == 0) expect_sums(all, tiles);
  __syncwarp();
  cluster_start();
  // Before the launch in front lets this one start it has waited for the arguments.
  const int drafts = drafts_of(a.base, b, static_cast<unsigned>(spec_length));
  if (warp == warps - 1) {
    const float u = uniform(a.base, b, spec_length);
    if (lane == 0) recovery_uniform = u;
  }
  wait_for_launch_before();
  allow_next_launch();
  if (warp == 0) {
    const int64_t position = b * (spec_length + 1);
    const int64_t end = warp_first_end(findings.verdicts + position, drafts, lane);
    if (lane == 0) {
      accepted = end;
      row = findings.rows[position + end];
    }
  }
  cluster_wait();
  __syncthreads();
  const DrawOutput<T> output{a.base, b, accepted};
  if (rank == 0 && warp == warps - 1) output.store_decision(lane);
  if (row.fixed_token >= 0) {
    if (rank == 0 && threadIdx.x == 0) output.store_token(row.fixed_token);
    return;
  }
  const OwnTiles own(rank, blocks);
#pragma unroll 1  // the second pass is rare, and its sums are known
  for (;;) {
    const bool known = row.from_stats();
    const int plain_tiles = tiles_by_vectors(row, vocab_size);
#pragma unroll 1
    for (int tile = known ? tiles : own.first; tile < tiles; tile += own.step) {
      const float sum = warp_weigh_next(row, tile, plain_tiles, vocab_size, lane);
      if (blocks == 1 && lane == 0) all.sums[tile] = sum;  // there is no cluster then
      if (blocks > 1 && lane < blocks) send_to_block(all.sums + tile, all.pending, lane, sum);
    }
    if (blocks == 1) __syncthreads();
    if (warp == 0) {
      if (known) {
        warp_store_masses(row, tiles, lane, all.sums);
      } else if (blocks > 1) {
        wait_for_bytes(all.pending);
      }
      const Pick found = warp_pick_tile(all.sums, tiles, recovery_uniform, lane);
      if (lane == 0) picked = found;
    }
    __syncthreads();
    const Pick tile = picked;
    if (tile.item >= 0 || known) {
      if (tile.item < 0) {  // p has no mass either
        if (rank == 0 && threadIdx.x == 0) output.store_token(0);
      } else if (tile.item / warps % blocks == rank) {
        block_store_weights(row, tile.item, vocab_size, weights);
        __syncthreads();
        if (warp != 0) return;
        const int token = warp_pick_token(weights, tile, lane);
        if (lane == 0) output.store_token(token);
      }
      return;
    }
    if (threadIdx.x == 0) row = row.target();  // the residual has no weight
    __syncthreads();
  }
#endif
}

}  // namespace
}  // namespace fused_rejection
