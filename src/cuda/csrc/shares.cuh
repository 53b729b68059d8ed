// Verification from logits for many requests: a block has a share of a row's tiles, and the block
// that completes the position, or the row to draw from, goes on with it. Nothing waits for another
// block.
#pragma once

#include "positions.cuh"

namespace fused_rejection {
namespace {

constexpr int kDecidingWarps = 8, kDrawingWarps = 4;  // of a block
constexpr int kResidentDecisions = kResidentShares * kDrawingWarps / kDecidingWarps;

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
    const RowSummary summary =
        warp_summarize(warp == 0 ? x_p : x_q, findings.stats + row * tiles, scale,
                       kNegativeInfinity, greedy, vocab_size, lane);
    if (lane == 0) {
      summaries[warp] = summary;
      if (warp > 0 && summary.sum > 0) draft_mass = draft_mass_of(summary.logsumexp(scale));
    }
  } else if (warp == 2 && !is_last && lane == 0) {
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
  const RowSummary& target = summaries[0];
  RowRatio q_over_p = {};
  if (!is_last && x_q && a.draft_is_logits && !greedy) {
    q_over_p = RowRatio::of(target.sum, target.largest, draft_mass, scale);
  }
  LogitsRow<T>* const row = &findings.rows[position];
  if (q_over_p.is_plain && warp == 1) {  // for nothing where the draft is accepted
    *row = LogitsRow<T>::of_plain(x_p, x_q, target, q_over_p, scale);
  } else if (q_over_p.is_plain) {
    const bool is_known = draft.id >= 0 && draft.id < vocab_size;
    const auto u = [&] { return draft.u; };
    if (is_known && q_over_p.accepts_draft(draft.values, scale, u)) return;  // kGoesOn is there
    findings.verdicts[position] = kEnds;
  } else {
    const Request request(a, b, {summaries, a.draft_logsumexp ? &given : nullptr, &draft_mass},
                          scale, greedy);
    if (warp == 1) {
      make_row(request, k, is_last ? kPlaceholderTokenId : draft.id, row);
    } else if (is_last || !accepts_token(request, k, draft)) {
      findings.verdicts[position] = kEnds;
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

// All warps of a block: draws from a row, in shared memory, whose tiles' sums are there, or are
// known.
template <typename T, typename Output>
__device__ __forceinline__ void block_draw(LogitsRow<T>& row, float* sums, float u, int vocab_size,
                                           const Output& output, int lane, int warp) {
  __shared__ float weights[kPaddedTile];
  __shared__ Pick pick;
  const int tiles = num_tiles(vocab_size);
  if (warp == 0) {
#pragma unroll 1  // the second pass is rare
    for (;;) {
      const bool known = row.from_stats();
      if (known) warp_store_masses(row, tiles, lane, sums);
      const Pick found = warp_pick_tile(sums, tiles, u, lane);
      if (lane == 0) pick = found;
      if (known || found.item >= 0) break;
      if (lane == 0) row = row.target();  // the residual has no weight
      __syncwarp();
    }
  }
  __syncthreads();
  if (pick.item >= 0) {  // a few logits a thread: one warp alone would take as long as all before
    block_store_weights(row, pick.item, vocab_size, weights);
    __syncthreads();
  }
  if (warp != 0) return;
  const int token = pick.item < 0 ? 0 : warp_pick_token(weights, pick, lane);
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
  if (row.fixed_token >= 0) {
    if (rank == 0 && threadIdx.x == 0) output.store_token(row.fixed_token);
    return;
  }
  if (row.from_stats()) {
    if (rank != 0) return;
  } else {
    const int block_begin = rank * kDrawingWarps * share, begin = block_begin + warp * share;
    const int end = begin + share < tiles ? begin + share : tiles;
    // Known once for all tiles, as in decide_kernel.
    const bool vectors = sizeof(T) < 4 && by_vectors<T>(row.p, row.q, vocab_size);
    const int plain_tiles = vectors ? vocab_size / kTile : 0;
    float own = 0.0f;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      RawTile<T> p, q;
      if (tile < plain_tiles) {
        const int from = tile * kTile + lane * kVector<T>;
        load_vectors(row.p + from, p);
        if (row.q) load_vectors(row.q + from, q);
      } else {
        load_tiles(row, tile, vocab_size, lane, p, q);
      }
      const float sum = warp_weigh_raw(row, p, q, tile, lane, nullptr);
      if (lane == tile - begin) own = sum;
    }
    if (begin + lane < end) sums[begin + lane] = own;
    const int left = tiles - block_begin, of_block = kDrawingWarps * share;
    const int count = left < of_block ? left : of_block;
    if (!block_completes(findings.summed + b, count, tiles, lane, warp)) return;
  }
  block_draw(row, sums, recovery_uniform, vocab_size, output, lane, warp);
}

}  // namespace
}  // namespace fused_rejection
