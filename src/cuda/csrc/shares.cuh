// Verification from logits for many requests: a block has a share of a row's tiles, and the block
// that completes the position, or the row to draw from, goes on with it. Nothing waits for another
// block.
#pragma once

#include "positions.cuh"

namespace fused_rejection {
namespace {

constexpr int kDecidingWarps = 8, kDrawingWarps = 4;  // of a block
constexpr int kResidentDecisions = kResidentShares * kDrawingWarps / kDecidingWarps;

// One warp: counts what its block has stored, before a __syncthreads(). Whether all of `wanted` is
// there now; if so this warp sees it.
__device__ __forceinline__ bool warp_completes(unsigned* counter, int count, int wanted, int lane) {
  unsigned done = 0;
  if (lane == 0) done = add_released(counter, static_cast<unsigned>(count)) + count;
  done = __shfl_sync(kAllLanes, done, 0);
  if (done != static_cast<unsigned>(wanted)) return false;
  acquire();  // by the last one only: it empties the L1 cache
  return true;
}

// One warp, when all statistics of a position are there: its verdict, and what it would draw from.
template <typename T>
__device__ __noinline__ void warp_decide_position(const LogitsParams& a, unsigned b, unsigned k,
                                                  bool is_last, int rows, float scale, bool greedy,
                                                  const Findings<T>& findings, int lane) {
  using Request = LogitsRequest<T, PositionSummaries>;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int64_t spec_length = a.base.spec_length, position = b * (spec_length + 1) + k;
  RowSummary summaries[2], given;
  Request request(a, b, {summaries}, scale, greedy);
  DraftToken draft = {kPlaceholderTokenId, 0.0f, {}};
  if (!is_last && lane == 0) {  // on its way while the sums are added up
    draft.id = request.id(k);
    draft.u = uniform(a.base, b, k);
    draft.values = request.values(k, draft.id);
    if (a.draft_logsumexp) {
      given = {a.draft_logsumexp[b * spec_length + k], nullptr, 0.0f, kNegativeInfinity, -1};
      request.summaries.given = &given;
    }
  }
  summaries[0] = warp_summarize(request.target_row(k), findings.stats + position * tiles, scale,
                                kNegativeInfinity, greedy, vocab_size, lane);
  if (rows > 1) {
    const int64_t row = num_target_rows(a.base) + b * spec_length + k;
    summaries[1] = warp_summarize(request.draft_row(k), findings.stats + row * tiles, scale,
                                  kNegativeInfinity, false, vocab_size, lane);
  }
  if (lane != 0) return;
  const bool ends =
      is_last || !request.accepts_values(k, draft.id, draft.values, [&] { return draft.u; });
  if (!ends) return;  // kGoesOn is there
  findings.verdicts[position] = kEnds;
  findings.rows[position] = request.row(k, draft.id);
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
  __syncthreads();
  if (warp != 0) return;
  const int left = tiles - block_begin, count = left < of_block ? left : of_block;
  if (warp_completes(findings.arrived + position, count, rows * tiles, lane)) {
    warp_decide_position(a, b, k, is_last, rows, scale, greedy, findings, lane);
  }
}

// One warp: draws from a row whose tiles' sums are there, or are known.
template <typename T, typename Output>
__device__ void warp_draw(const LogitsRow<T>& row, float* sums, float u, int vocab_size,
                          const Output& output, int lane) {
  const int tiles = num_tiles(vocab_size);
  int token = row.fixed_token;
  Pick pick{-1, 0.0};
  if (token < 0 && !row.from_stats()) {
    pick = warp_pick_tile(sums, tiles, u, lane);
    if (pick.item >= 0) token = warp_draw_from_tile(row, pick, vocab_size, lane);
  }
  if (token < 0) {  // from the target
    const LogitsRow<T> target = row.from_stats() ? row : row.target();
    warp_store_masses(target, tiles, lane, sums);
    pick = warp_pick_tile(sums, tiles, u, lane);
    token = pick.item < 0 ? 0 : warp_draw_from_tile(target, pick, vocab_size, lane);
  }
  if (lane == 0) output.store_token(token);
}

// Draws at the first position that ends each request.
template <typename T>
__global__ void __launch_bounds__(kDrawingWarps* kWarp, kResidentShares)
    draw_kernel(const __grid_constant__ LogitsParams a, int blocks, int share,
                const __grid_constant__ Findings<T> findings) {
  __shared__ LogitsRow<T> row;
  __shared__ int64_t accepted;
  __shared__ float recovery_uniform;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned b = blockIdx.x / blocks;
  const int rank = static_cast<int>(blockIdx.x % blocks);
  const int64_t spec_length = a.base.spec_length;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  // Before the launch in front lets this one start it has waited for the arguments.
  const Request<T> request(a.base, b);
  if (warp == kDrawingWarps - 1) {
    const float u = uniform(a.base, b, spec_length);
    if (lane == 0) recovery_uniform = u;
  }
  wait_for_launch_before();
  if (warp == 0) {
    const int64_t position = b * (spec_length + 1);
    const int64_t end = warp_first_end(findings.verdicts + position, request.drafts, lane);
    if (lane == 0) {
      accepted = end;
      row = findings.rows[position + end];
    }
  }
  __syncthreads();
  float* sums = findings.sums + static_cast<int64_t>(b) * tiles;
  const RequestOutput<Request<T>> output{request, accepted};
  if (rank == 0 && warp == kDrawingWarps - 1) output.store_decision(lane);
  bool completes = rank == 0;
  if (row.fixed_token < 0 && !row.from_stats()) {
    const int block_begin = rank * kDrawingWarps * share, begin = block_begin + warp * share;
    const int end = begin + share < tiles ? begin + share : tiles;
    float own = 0.0f;
    for (int tile = begin; tile < end; ++tile) {
      const float sum = warp_weigh_tile(row, tile, vocab_size, lane, nullptr);
      if (lane == tile - begin) own = sum;
    }
    if (begin + lane < end) sums[begin + lane] = own;
    __syncthreads();
    if (warp != 0) return;
    const int left = tiles - block_begin, of_block = kDrawingWarps * share;
    completes = warp_completes(findings.summed + b, left < of_block ? left : of_block, tiles, lane);
  }
  if (completes && warp == 0) {
    warp_draw(row, sums, recovery_uniform, vocab_size, output, lane);
  }
}

}  // namespace
}  // namespace fused_rejection
