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

// A draft, and the draft's logsumexp at its position where that was given, also about in octaves.
struct DraftOfWalk {
  DraftToken token;
  double logsumexp;
  float octaves;
};

// What tells whether a draft is accepted whatever the filters leave out: about what the tiles'
// statistics say of the target's whole row and the draft's. Each is found by another warp.
struct Evidence {
  float largest, sum;  // of the target's row
  // All that could be above the draft's token in it, and what is at least, as `sum` counts.
  float above, least_above;
  float draft_largest, draft_sum;  // of the draft's; the sum at most that of what filters keep

  enum Kind { kAbove, kTarget, kDraft, kKinds };

  // One warp. top-p and min_p are all the filters; `stats` are of the target's row, then, where its
  // logsumexp was not given, of the draft's.
  __device__ __noinline__ void warp_find(int kind, const TileStats* stats, const Filters& filters,
                                         const DraftOfWalk& draft, int tiles) {
    if (kind == kDraft) stats += tiles;
    const int lane = block_lane();
    float total = 0.0f;
    const float most = warp_glance(stats, filters.scale, tiles, kind == kAbove ? nullptr : &total);
    if (kind == kAbove) {
      const float x = finite_logit(draft.token.values.target);
      const float product = most * filters.scale, anchor = whole(product);
      float found = 0.0f, least = 0.0f;
      int begin = 0;
#pragma unroll 1
      for (; begin < tiles && !is_wide(product); begin += kGroup * kWarp) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {  // without a branch, so that none waits for another
          const int tile = begin + i * kWarp + lane;
          TileStats known = {kNegativeInfinity, 0.0f};
          if (tile < tiles) known = stats[tile];
          const float all = near_tile_weight(known, anchor, filters.scale);
          const float one = exp2_portable(fmaf(known.largest, filters.scale, -anchor));
          found += known.largest > x ? all : 0.0f;
          least += known.largest > x ? one : 0.0f;
        }
      }
#pragma unroll 1
      for (int tile = begin + lane; tile < tiles; tile += kWarp) {
        if (!(stats[tile].largest > x)) continue;
        found += tile_weight(stats[tile], most, filters.scale);
        least += exp2_portable(octaves_beside(stats[tile].largest, most, filters.scale));
      }
      __syncwarp();
      found = group_total<kWarp>(found);
      least = group_total<kWarp>(least);
      if (lane == 0) {
        above = found;
        least_above = least;
      }
    } else if (lane == 0 && kind == kTarget) {
      largest = most;
      sum = total;
    } else if (lane == 0) {
      // The largest logit is always kept. Beside itself it weighs 0.7 at least.
      const bool only_largest = filters.min_p > 0.0f || !(filters.top_p > 0.0f);
      draft_largest = most;
      draft_sum = only_largest ? 0.5f : filters.top_p < 1.0f ? total * filters.top_p : total;
    }
    __syncwarp();
  }

  enum Judgement { kUnknown, kExpected, kSure };

  // Whether the draft is accepted by more than roundings could change, or is expected to be, since
  // what is kept of the target's row has hardly more than the share of it.
  __device__ __forceinline__ Judgement judge(const DraftOfWalk& draft, const Filters& filters,
                                             bool is_given, int vocab_size) const {
    const float x_p = finite_logit(draft.token.values.target);
    const float x_q = finite_logit(draft.token.values.draft);
    const bool is_known = draft.token.id >= 0 && draft.token.id < vocab_size;
    if (!is_known || !(fminf(x_p, x_q) > kNegativeInfinity)) return kUnknown;
    const float share = filters.top_p < 1.0f ? filters.top_p : 1.0f, near = filters.min_p;
    const auto is_near = [&](float margin) {
      return !(near > 0.0f) || keeps_min_p(x_p, largest, filters.scale, near * (1.0f + margin));
    };
    if (!(share >= 1.0f || least_above < share * sum) || !is_near(0.0f)) return kUnknown;
    // With less of the target's row kept its probability is larger.
    const float anchor = largest * filters.scale;
    const float ratio = sum * ratio_of(draft, filters.scale, is_given, whole(anchor));
    const bool is_kept = share >= 1.0f || above < (1.0f - kMargin) * share * sum;
    if (is_kept && is_near(kMargin) && accepts(draft.token.u, ratio * (1.0f + kMargin), 1.0f)) {
      return kSure;
    }
    return accepts(draft.token.u, ratio * share, 1.0f) ? kExpected : kUnknown;
  }

  // The same where it is known what is kept of the target's row.
  __device__ __forceinline__ bool surely_accepts(const DraftOfWalk& draft, float scale,
                                                 bool is_given, const Kept& kept) const {
    if (!(finite_logit(draft.token.values.target) >= kept.threshold)) return false;
    const float octaves = static_cast<float>(kept.logsumexp * kLog2E);
    const float ratio = ratio_of(draft, scale, is_given, octaves);
    return accepts(draft.token.u, ratio * (1.0f + kMargin), 1.0f);
  }

 private:
  static constexpr float kMargin = 0x1p-10f;

  // At least the draft's probability over the target's, if log2 of the target's sum is this; NaN
  // where float32 would not tell it by less than the margin.
  __device__ __forceinline__ float ratio_of(const DraftOfWalk& draft, float scale, bool is_given,
                                            float octaves) const {
    constexpr float kMost = 0x1p10f;
    const float x_p = finite_logit(draft.token.values.target) * scale;
    const float x_q = finite_logit(draft.token.values.draft) * scale;
    const float draft_octaves = is_given ? draft.octaves : whole(draft_largest * scale);
    const float most =
        fmaxf(fmaxf(fabsf(x_p), fabsf(x_q)), fmaxf(fabsf(octaves), fabsf(draft_octaves)));
    if (!(most < kMost)) return NAN;
    const float log2_ratio = (x_q - x_p) + (octaves - draft_octaves);
    const float ratio = exp2_portable(log2_ratio < 126.0f ? log2_ratio : 126.0f);
    return is_given ? ratio : ratio * reciprocal(draft_sum);
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
  __shared__ Evidence both_evidence[2];  // of this position, and the one before
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
  PositionShared at(shared, tiles, true);
  const int drafts = drafts_of(a.base, b, spec_length);
  const float scale = a.scale(b);
  const bool greedy = a.is_greedy(b);
  if (threadIdx.x == 0) filters = Filters(a, b);
  __syncthreads();
  const bool sums_first = !greedy && (!filters.any() || filters.want_sums());
  const auto request = [&] { return Request(a, b, {summaries}, scale, greedy); };
  const int row_bytes = tiles * static_cast<int>(sizeof(TileStats));
  const bool is_given = a.draft_logsumexp != nullptr;
  const int kept_bytes = 2 * static_cast<int>(sizeof(Kept));
  if (threadIdx.x == 0) {
    expect_sums(at.sums, tiles);
    expect_bytes(at.pending + At::kDraftStats, row_bytes);
    expect_bytes(at.pending + At::kKept, kept_bytes);
    for (int turn = 0; turn < 2; ++turn) {  // of every block, and how many bytes, below
      expect_announcements(at.pending + At::kStats + turn, blocks + 1);
    }
    if (blocks % 2 == 0) team_of(at, true, rank, blocks).expect();
    team_of(at, false, rank, blocks).expect();
  }
  unsigned k = 0;
  Team drawing = {};
  TileStats* const all_stats = at.stats;
  int drafts_read = 0, searches = 0, told_by_halves = 0, told_by_all = 0;
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
    const int summed_rows = is_given ? 1 : rows;  // whose sums are not known before
    const auto load = [&](int i, RawTile<T>& raw) {
      load_tile(i < tiles ? x_p : x_q, i < tiles ? i : i - tiles, vocab_size,
                kNegativeInfinityWord<T>, lane, raw);
    };
    RawTile<T> raw;
    if (first < summed_rows * tiles) load(first, raw);
    // In turns here and there. A block that has all of this position's knows that nobody reads
    // those of the position before: every block has announced that, whether it has tiles or not.
    at.stats = all_stats + k % 2 * 2 * tiles;
    Evidence& evidence = both_evidence[k % 2];
    uint64_t* const pending = at.pending + At::kStats + k % 2;
    if (threadIdx.x == 0) expect_more(pending, summed_rows * row_bytes);
    if (k > 0 && k % kWarp == 0) __syncthreads();  // nobody reads the drafts before
    // The drafts' ids are on their way while a tile is worked on: all wait for the last tile.
    const int64_t at_k = k + lane;
    const bool looks = warp == warps - 1 && k % kWarp == 0 && at_k < drafts;
    const int64_t id = looks ? request().id(at_k) : kPlaceholderTokenId;
    const DraftOfWalk& draft = drafts_ahead[k % kWarp];
    __syncwarp();
    if (k == 0) {
      cluster_start();
      cluster_wait();
    }
    if (static_cast<int>(threadIdx.x) < blocks) announce(pending, static_cast<int>(threadIdx.x), 0);
    Team team = team_of(at, is_halved(rows, blocks), rank, blocks);
    bool is_accepted = false, alone = false;
    // Where its logsumexp was given the draft's row is read only where there is a search in it.
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      const int begin = turn * summed_rows * tiles + first;
      const int end = (turn ? rows : summed_rows) * tiles;
      if (turn > 0 && begin < end) load(begin, raw);
      for (int i = begin; i < end; i += step) {
        const TileStats found = warp_tile_stats(raw, scale, kNegativeInfinity, sums_first, [&] {
          if (i + step < end) load(i + step, raw);
        });
        TellStats{at.stats, turn ? at.pending + At::kDraftStats : pending, blocks}(i, found);
      }
      if (turn > 0) {
        if (rows > summed_rows) {
          wait_for_bytes(at.pending + At::kDraftStats, drafts_read++ & 1);
          if (threadIdx.x == 0) expect_more(at.pending + At::kDraftStats, row_bytes);
        }
        break;
      }
      // The next position will as a rule be wanted. Of float32 logits only the first tiles: more
      // would be in the way of other requests' loads.
      const bool both = summed_rows > 1 && static_cast<int>(k) + 1 < drafts;
      const int last = sizeof(T) < 4 || first >= tiles ? tiles : first + 1;
      for (int tile = first; tile < last && !is_last; tile += step) {
        prefetch_tile(x_p + a.base.target_position_stride,
                      both ? x_q + a.base.draft_position_stride : nullptr, tile, vocab_size, lane);
      }
      if (looks) {
        DraftOfWalk& ahead = drafts_ahead[lane];
        ahead.token = {id, 0.0f, request().values(at_k, id)};
        ahead.token.u = uniform(a.base, b, at_k);
        if (a.draft_logsumexp) {
          ahead.logsumexp = a.draft_logsumexp[static_cast<int64_t>(b) * spec_length + at_k];
          ahead.octaves = static_cast<float>(ahead.logsumexp * kLog2E);
        }
      }
      if (k == 0 && warp == 0) {
        const float u = uniform(a.base, b, spec_length);
        if (lane == 0) recovery_uniform = u;
      }
      wait_for_bytes(pending, k >> 1 & 1);
      if (k % kWarp == 0) __syncthreads();  // the drafts are there
      if (rows == 1 || !sums_first) continue;
#pragma unroll 1
      for (int kind = 0; kind < (is_given ? Evidence::kDraft : Evidence::kKinds); ++kind) {
        if (kind % warps == warp) evidence.warp_find(kind, at.stats, filters, draft, tiles);
      }
      __syncthreads();
      const Evidence::Judgement found = evidence.judge(draft, filters, is_given, vocab_size);
      is_accepted = found == Evidence::kSure;
      if (is_accepted) break;
      if (found == Evidence::kUnknown || !filters.any()) continue;
      // All of the cluster searches in the target's row, which will do.
      alone = true;
      team = team_of(at, false, rank, blocks);
      find_kept_of(at, 0, filters, team, x_p, vocab_size, &told_by_all);
      is_accepted = evidence.surely_accepts(draft, scale, is_given, at.kept_of[0]);
      if (is_accepted) break;
    }
    if (is_accepted) continue;
    if (!alone && is_halved(rows, blocks)) {
      find_kept_by_halves(at, filters, team, x_p, x_q, vocab_size, &told_by_halves, searches++);
      if (threadIdx.x == 0) expect_more(at.pending + At::kKept, kept_bytes);
    } else {
#pragma unroll 1
      for (int i = rows - 1; i >= (alone ? 1 : 0); --i) {
        find_kept_of(at, i, filters, team, i == 0 ? x_p : x_q, vocab_size, &told_by_all);
      }
      if (alone && lane == 0) at.search->seen[warp].count = -1;  // of the draft's row
    }
    if (warp < summed_rows) {
      const RowSummary summary =
          warp_summarize_kept(at, warp, warp == 0 ? x_p : x_q, scale, greedy, vocab_size, lane);
      if (lane == 0) summaries[warp] = summary;
    }
    __syncthreads();
    // Two threads decide, one whether the request ends here, one what it would draw from.
    if (threadIdx.x == 0 || threadIdx.x == kWarp) {
      const DraftToken& token = draft.token;
      Request decided = request();
      const RowSummary given = {0.0, draft.logsumexp, nullptr, 0.0f, kNegativeInfinity, -1};
      decided.summaries.given = a.draft_logsumexp ? &given : nullptr;
      if (rows > 1) decided.summaries.threshold = at.kept_of[1].threshold;
      if (threadIdx.x == kWarp) {
        make_filtered_row(decided, k, is_last, token, &row);
      } else {
        ends = ends_filtered(decided, k, is_last, token);
      }
    }
    __syncthreads();
    drawing = team;
    if (ends) break;
  }
  using Outputs = fused_rejection::Request<T>;
  const Outputs outputs(a.base, b);
  draw_kept(row, *at.search, drawing, vocab_size, recovery_uniform, rank, blocks, at.sums,
            RequestOutput<Outputs>{outputs, k});
#endif
}

}  // namespace
}  // namespace fused_rejection
