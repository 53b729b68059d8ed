// Verification from logits with top-p for more requests than have all their positions worked on at
// once: a request has a cluster of blocks, which walk through its positions until one ends it, and
// draw there. Nothing is read for nothing, and a draft that would be accepted whatever the filters
// leave out needs no search. One launch, no workspace.
#pragma once

#include "positions.cuh"

namespace fused_rejection {
namespace {

// Whether a walk may pay: most drafts have to be accepted without a search, as the tiles' sums of
// both rows tell with top-p.
inline bool may_walk(const LogitsParams& a) { return a.top_p && !a.top_k && num_draft_rows(a) > 0; }

// A draft, and the draft's logsumexp at its position where that was given.
struct DraftOfWalk {
  DraftToken token;
  double logsumexp;
};

// What tells whether a draft is accepted whatever the filters leave out: of the target's whole row
// and the draft's. Each is found by another warp.
struct Evidence {
  float above;  // all that could be above the draft's token in the target's row, as `sum` counts
  float largest, sum;
  double target_logsumexp, draft_logsumexp;  // the draft's at most that of what filters keep

  enum Kind { kAbove, kTarget, kDraft, kKinds };

  // One warp. top-p and min_p are all the filters; `stats` are of the target's row, then, unless
  // its logsumexp was given, of the draft's.
  __device__ __noinline__ void warp_find(int kind, const TileStats* stats, const Filters& filters,
                                         const DraftOfWalk& draft, bool is_given, int tiles,
                                         int lane) {
    if (kind == kDraft && is_given) {
      if (lane == 0) draft_logsumexp = draft.logsumexp;
      return;
    }
    if (kind == kDraft) stats += tiles;
    const float scale = filters.scale, most = warp_largest(stats, tiles, lane);
    if (kind == kAbove) {
      const float x = finite_logit(draft.token.values.target);
      float found = 0.0f;
      for (int tile = lane; tile < tiles; tile += kWarp) {
        if (stats[tile].largest > x) found += tile_weight(stats[tile], most, scale);
      }
#pragma unroll
      for (int d = 1; d < kWarp; d *= 2) found += __shfl_xor_sync(kAllLanes, found, d);
      if (lane == 0) above = found;
      return;
    }
    double total = warp_row_sum(stats, most, scale, tiles, lane);
    if (lane != 0) return;
    if (kind == kTarget) {
      largest = most;
      sum = static_cast<float>(total);
      target_logsumexp = logsumexp_of(total, most, scale);
      return;
    }
    // The largest logit is always kept. Beside itself it weighs 0.7 at least.
    const bool only_largest = filters.min_p > 0.0f || !(filters.top_p > 0.0f);
    if (only_largest) {
      total = 0.5;
    } else if (filters.top_p < 1.0f) {
      total *= filters.top_p;
    }
    draft_logsumexp = logsumexp_of(total, most, scale);
  }

  // By more than roundings could change.
  __device__ __forceinline__ bool surely_accepts(const DraftToken& draft, const Filters& filters,
                                                 int vocab_size) const {
    constexpr float kMargin = 0x1p-10f;
    const float x_p = finite_logit(draft.values.target), x_q = finite_logit(draft.values.draft);
    if (draft.id < 0 || draft.id >= vocab_size || !(fminf(x_p, x_q) > kNegativeInfinity)) {
      return false;
    }
    const float scale = filters.scale, near = filters.min_p * (1.0f + kMargin);
    const bool in_share = filters.top_p >= 1.0f || above < (1.0f - kMargin) * filters.top_p * sum;
    const bool is_near = !(filters.min_p > 0.0f) || keeps_min_p(x_p, largest, scale, near);
    // With less of the target's row kept its probability is larger.
    const double difference = static_cast<double>(x_q) - x_p;
    const double log2_ratio = difference * scale + (target_logsumexp - draft_logsumexp) * kLog2E;
    const float ratio = exp2_portable(static_cast<float>(log2_ratio < 126 ? log2_ratio : 126));
    return in_share && is_near && accepts(draft.u, ratio * (1.0f + kMargin), 1.0f);
  }
};

// Every block of a cluster has a multiprocessor to itself: the search wants the registers.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    walk_kernel(const __grid_constant__ LogitsParams a, int blocks) {
#if FR_HAS_CLUSTERS
  using Request = LogitsRequest<T, PositionSummaries>;
  using At = PositionShared;
  __shared__ RowSummary summaries[2];
  __shared__ DraftOfWalk drafts_ahead[kWarp];
  __shared__ Evidence evidence;
  __shared__ LogitsRow<T> row;
  __shared__ float recovery_uniform;
  __shared__ bool ends;
  __shared__ Filters filters;  // in a register each they would take four that the loops want
  FR_DYNAMIC_SHARED(uint64_t, shared);

  wait_for_launch_before();
  allow_next_launch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int rank = static_cast<int>(cluster_rank());
  const unsigned b = cluster_index();
  const unsigned spec_length = static_cast<unsigned>(a.base.spec_length);
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int first = rank * warps + warp, step = warps * blocks;
  const PositionShared at(shared, tiles, true);
  const int drafts = drafts_of(a.base, b, spec_length);
  const float scale = a.scale(b);
  const bool greedy = a.is_greedy(b);
  if (threadIdx.x == 0) filters = Filters(a, b);
  __syncthreads();
  const bool sums_first = !greedy && (!filters.any() || filters.want_sums());
  const auto request = [&] { return Request(a, b, {summaries}, scale, greedy); };
  if (warp == warps - 1) {
    const float u = uniform(a.base, b, spec_length);
    if (lane == 0) recovery_uniform = u;
  }
  unsigned k = 0;
  int last_rows = 1;
  for (;; ++k) {
    const bool is_last = static_cast<int>(k) >= drafts;
    const T* x_p = static_cast<const T*>(a.base.target_probs) + b * a.base.target_row_stride +
                   k * a.base.target_position_stride;
    const T* x_q = nullptr;
    if (!is_last && a.base.draft_probs) {
      x_q = static_cast<const T*>(a.base.draft_probs) + b * a.base.draft_row_stride +
            k * a.base.draft_position_stride;
    }
    const int rows = num_draft_rows(a) > 0 && !greedy && !is_last ? 2 : 1;
    const int summed_rows = a.draft_logsumexp ? 1 : rows;  // whose sums are not known before
    const auto load = [&](int i, RawTile<T>& raw) {
      load_tile(i < tiles ? x_p : x_q, i < tiles ? i : i - tiles, vocab_size,
                kNegativeInfinityWord<T>, lane, raw);
    };
    RawTile<T> raw;
    if (first < summed_rows * tiles) load(first, raw);
    if (warp == 0 && lane <= At::kCounts) {  // a lane a word
      if (k > 0) forget(at.pending + lane);
      const int row_bytes = tiles * static_cast<int>(sizeof(TileStats));
      int bytes = tiles * static_cast<int>(sizeof(float));  // TileSums
      if (lane == At::kStats) bytes = summed_rows * row_bytes;
      if (lane == At::kDraftStats) bytes = row_bytes;
      if (lane == At::kKept) bytes = rows * static_cast<int>(sizeof(Kept));
      if (lane < At::kCounts) {
        expect_bytes(at.pending + lane, bytes);
      } else {
        expect_announcements(at.barrier, Sharing::team_size(rows, blocks));
      }
    }
    if (k > 0 && k % kWarp == 0) __syncthreads();  // nobody reads the drafts before
    if (warp == warps - 1 && k % kWarp == 0 && static_cast<int>(k) + lane < drafts) {
      const int64_t at_k = k + lane, id = request().id(at_k);
      DraftOfWalk& ahead = drafts_ahead[lane];
      ahead.token = {id, uniform(a.base, b, at_k), request().values(at_k, id)};
      if (a.draft_logsumexp) {
        ahead.logsumexp = a.draft_logsumexp[static_cast<int64_t>(b) * spec_length + at_k];
      }
    }
    const DraftOfWalk& draft = drafts_ahead[k % kWarp];
    __syncwarp();
    // After it the words are set, the drafts are there, and nobody reads any more what was sent
    // before.
    cluster_arrive();
    cluster_wait();
    bool is_sure = false;
    // Where its logsumexp was given the draft's row is read only where there is a search.
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      const int begin = turn * summed_rows * tiles + first;
      const int end = (turn ? rows : summed_rows) * tiles;
      if (turn > 0 && begin < end) load(begin, raw);
      for (int i = begin; i < end; i += step) {
        const TileStats found = warp_tile_stats(raw, scale, kNegativeInfinity, sums_first, [&] {
          if (i + step < end) load(i + step, raw);
        });
        const int count = turn ? At::kDraftStats : At::kStats;
        TellStats{at.stats, at.pending + count, blocks}(i, found);
      }
      if (turn > 0) {
        if (rows > summed_rows) wait_for_bytes(at.pending + At::kDraftStats);
        break;
      }
      wait_for_bytes(at.pending + At::kStats);
      if (rows == 1 || !sums_first) continue;
      for (int kind = warp; kind < Evidence::kKinds; kind += warps) {
        evidence.warp_find(kind, at.stats, filters, draft, a.draft_logsumexp != nullptr, tiles,
                           lane);
      }
      __syncthreads();
      is_sure = evidence.surely_accepts(draft.token, filters, vocab_size);
      if (is_sure) break;
    }
    if (is_sure) continue;
    find_kept_of_rows(at, filters, Sharing(at, rows, rank, blocks), x_p, x_q, vocab_size);
    if (warp < summed_rows) {
      const RowSummary summary = warp_summarize_kept(at, warp, warp == 0 ? x_p : x_q, scale, greedy,
                                                     vocab_size, lane);
      if (lane == 0) summaries[warp] = summary;
    }
    __syncthreads();
    // Two threads decide, one whether the request ends here, one what it would draw from.
    if (threadIdx.x == 0 || threadIdx.x == kWarp) {
      const DraftToken& token = draft.token;
      Request decided = request();
      const RowSummary given = {draft.logsumexp, nullptr, 0.0f, kNegativeInfinity, -1};
      decided.summaries.given = a.draft_logsumexp ? &given : nullptr;
      if (rows > 1) decided.summaries.threshold = at.kept_of[1].threshold;
      if (threadIdx.x == kWarp) {
        row = decided.row(k, is_last ? kPlaceholderTokenId : token.id);
      } else {
        ends =
            is_last || !decided.accepts_values(k, token.id, token.values, [&] { return token.u; });
      }
    }
    __syncthreads();
    last_rows = rows;
    if (ends) break;
  }
  using Outputs = fused_rejection::Request<T>;
  const Outputs outputs(a.base, b);
  const Sharing sharing(at, last_rows, rank, blocks);
  draw_kept(row, *at.search, sharing.last_row() == 0, sharing.team, vocab_size, recovery_uniform,
            rank, blocks, at.sums, RequestOutput<Outputs>{outputs, k});
#endif
}

}  // namespace
}  // namespace fused_rejection
