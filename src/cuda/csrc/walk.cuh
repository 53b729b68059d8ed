// A request's walk along its drafts, by all blocks of its cluster: they share out the rows of the
// next positions, tell one another the sums that they roughly have, and each of them knows where
// the first of these positions is that rejects its draft.
#pragma once

#include "rough.cuh"

namespace fused_rejection {
namespace {

constexpr int kMostAtOnce = 8;  // positions of a step

__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

struct Walk {
  int rank, blocks;
  int at_once;        // positions of a step, at most kMostAtOnce and the warps of a block
  uint64_t* pending;  // [2]: of the parts of every other step
  RoughSum* parts;    // [2][at_once][2][blocks * warps]: of the target's row, of the draft's

  FR_HOST_DEVICE static constexpr int64_t parts_bytes(int at_once, int blocks) {
    return 2 * at_once * 2 * blocks * kMaxWarps * static_cast<int64_t>(sizeof(RoughSum));
  }
};

// All threads of the cluster's blocks: how many drafts are accepted, of `drafts`. Where rough sums
// leave a verdict open each block finds it by itself with the exact ones, for which `stats`
// [2][tiles] has room.
template <typename T, typename Summaries>
__device__ __forceinline__ int walk_drafts(const LogitsParams& a, unsigned b, int drafts,
                                           const Walk& walk, TileStats* stats) {
  using Request = LogitsRequest<T, Summaries>;
  __shared__ RowSummary summaries[2], given;
  __shared__ Verdict verdicts[2][kMostAtOnce];

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int parts = walk.blocks * warps, own_part = walk.rank * warps + warp;
  // Made anew where it is used: kept, it would take registers that the loop wants.
  const auto request = [&] { return Request(a, b, {summaries}); };
  const bool greedy = a.is_greedy(b);
  const int rows = num_draft_rows(a) > 0 && !greedy ? 2 : 1;  // of a position
  const float scale = a.scale(b);

#pragma unroll 1
  for (int begin = 0, turn = 0; begin < drafts; begin += walk.at_once, ++turn) {
    const auto row_of = [&](int i) {
      const int k = begin + (rows == 2 ? i >> 1 : i);
      return rows == 2 && i & 1 ? request().draft_row(k) : request().target_row(k);
    };
    // What is asked for next: two tiles ahead of what is added.
    int next_row = 0, next_tile = own_part, rows_here = min_of(walk.at_once, drafts - begin) * rows;
    const auto load = [&](RawTile<T>& raw) {
      for (; next_tile >= tiles; next_tile -= tiles) ++next_row;
      if (next_row >= rows_here) return;
      load_tile(row_of(next_row), next_tile, vocab_size, kNegativeInfinityWord<T>, lane, raw);
      next_tile += parts;
    };
    RawTile<T> raw, next;
    load(raw);
    load(next);

    // Rows behind a draft that is outside the vocabulary are not read.
    int count = min_of(walk.at_once, drafts - begin);
    const int64_t own_id = lane < count ? request().id(begin + lane) : 0;
    const unsigned outside = __ballot_sync(kAllLanes, !request().in_vocab(own_id));
    const int id = static_cast<int>(own_id);
    if (outside) count = __ffs(outside) - 1;
    rows_here = count * rows;
    uint64_t* const pending = walk.pending + (turn & 1);
    if (threadIdx.x == 0) {
      expect_more(pending, rows_here * parts * static_cast<int>(sizeof(RoughSum)));
    }
    __syncwarp();
    const int judged_id = __shfl_sync(kAllLanes, id, warp < count ? warp : 0);
    DraftValues values{};
    float u = 0.0f;
    if (warp < count) {
      values = request().values(begin + warp, judged_id);
      u = uniform(a.base, b, begin + warp);
    }

    RoughSum* const here = walk.parts + (turn & 1) * walk.at_once * 2 * parts;
    RoughSum rough;
    int row = 0, tile = own_part;
    int token = 0;
    float token_logit = 0.0f;
    const auto at_row = [&] {  // a greedy request's draft token there
      if (!greedy) return;
      token = __shfl_sync(kAllLanes, id, row < count ? row : 0);
      token_logit = static_cast<float>(read_argument(row_of(row < count ? row : 0) + token));
    };
    const auto send = [&] {
#pragma unroll
      for (int d = 1; d < kWarp; d *= 2) rough.sum += __shfl_xor_sync(kAllLanes, rough.sum, d);
      if (lane < walk.blocks) {
        RoughSum& part = here[row * parts + own_part];
        send_pair_to_block(&part.anchor, pending, lane, rough.anchor, rough.sum);
      }
      rough = RoughSum{};
      ++row;
    };
    if (count > 0) at_row();
    while (row < rows_here) {
      if (tile >= tiles) {
        tile -= tiles;
        send();
        at_row();
        continue;
      }
      const RawTile<T> added = raw;
      raw = next;
      load(next);
      if (greedy) {
        count_before(added, lane, tile * kTile, token_logit, token, rough);
      } else {
        warp_add_tile(added, scale, lane, rough);
      }
      tile += parts;
    }

    Verdict* const verdict = verdicts[turn & 1];
    if (warp < count) {
      wait_for_bytes(pending, turn >> 1 & 1);
      const RoughSum* own = here + warp * rows * parts;
      Verdict found = Verdict::kOpen;
      if (greedy) {
        if (fabsf(values.target) < kLargestFloat) {
          found = warp_any(own, parts, lane) ? Verdict::kRejected : Verdict::kAccepted;
        }
      } else {
        const double log2_target = warp_rough_log2(own, parts, lane);
        double log2_draft = 0.0;
        if (rows == 2) {
          log2_draft = warp_rough_log2(own + parts, parts, lane);
        } else if (a.draft_logsumexp) {
          log2_draft = a.draft_logsumexp[b * a.base.spec_length + begin + warp] * kLog2E;
        }
        found =
            rough_verdict(u, values.target, values.draft, a.draft_is_logits && a.base.draft_probs,
                          scale, log2_target, log2_draft);
      }
      if (lane == 0) verdict[warp] = found;
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      if (verdict[i] == Verdict::kRejected) return begin + i;
      if (verdict[i] == Verdict::kAccepted) continue;
      const int k = begin + i;
      for (int r = warp; r < rows * tiles; r += warps) {
        const T* x = r < tiles ? request().target_row(k) : request().draft_row(k);
        load_tile(x, r < tiles ? r : r - tiles, vocab_size, kNegativeInfinityWord<T>, lane, raw);
        const TileStats found = warp_tile_stats(raw, scale, kNegativeInfinity, !greedy);
        if (lane == 0) stats[r] = found;
      }
      __syncthreads();
      if (warp < rows) {
        const T* x = warp == 0 ? request().target_row(k) : request().draft_row(k);
        const RowSummary summary = warp_summarize(x, stats + warp * tiles, scale, kNegativeInfinity,
                                                  greedy, vocab_size, lane);
        if (lane == 0) summaries[warp] = summary;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        Request decided = request();
        if (a.draft_logsumexp) {
          given = {a.draft_logsumexp[b * a.base.spec_length + k], nullptr, 0.0f, kNegativeInfinity,
                   -1};
          decided.summaries.given = &given;
        }
        const float own = uniform(a.base, b, k);
        const bool accepted = decided.accepts_draft(k, request().id(k), [&] { return own; });
        verdict[i] = accepted ? Verdict::kAccepted : Verdict::kRejected;
      }
      // Not before all blocks are done with them are statistics of other rows sent.
      __syncthreads();
      cluster_arrive();
      cluster_wait();
      if (verdict[i] == Verdict::kRejected) return k;
    }
    if (outside) return begin + count;
  }
  return drafts > 0 ? drafts : 0;
}

}  // namespace
}  // namespace fused_rejection
