// Verification from logits in clusters. Every position of every request has a cluster of blocks:
// they share out the tiles of its target row, and of its draft row where that is needed, tell one
// another the tiles' statistics, and then each knows whether the request would end here. First
// positions come first, so that where not all blocks run at once, those behind a known end find it
// when they start, and leave. Where all do, they draw at once, from rows that they have just read;
// if a position before it ends the request too, for nothing.
#pragma once

#include "from_logits.h"
#include "kept.cuh"
#include "threshold.cuh"
#include "tiles.cuh"
#include "warp.cuh"

namespace fused_rejection {
namespace {

// What positions leave to the next launch, in global memory; null where K is 0.
template <typename T>
struct Findings {
  // [B][K + 1], drawn where the position would end its request, else -1; or null.
  int32_t* tokens;
  // [B][K + 1], kGoesOn or kEnds; kGoesOn at first. Null where nobody looks.
  uint8_t* verdicts;
  // Null where there are tokens:
  LogitsRow<T>* rows;  // [B][K + 1], what to draw from where it ends
  TileStats* stats;    // [B][K + 1][tiles] of the target's rows, [B][K][tiles] of the draft's
  unsigned* arrived;   // [B][K + 1], tiles of a position whose statistics are there; 0 at first
};

enum Verdict : uint8_t { kGoesOn, kEnds };

struct DraftToken {
  int64_t id;
  float u;
  DraftValues values;
};

// A draft's id and then what it reads of its rows, while nothing waits for it yet. Of the padded
// layout, which logits always have.
template <typename T>
struct ComingDraft {
  int64_t id = kPlaceholderTokenId;
  T target = {}, draft = {};

  __device__ __forceinline__ void ask(const Params& a, unsigned b, unsigned k) {
    const int64_t at = static_cast<int64_t>(b) * a.spec_length + k;
    id = a.ids_are_int64 ? static_cast<const int64_t*>(a.draft_token_ids)[at]
                         : static_cast<const int32_t*>(a.draft_token_ids)[at];
  }
  __device__ __forceinline__ void ask_values(const T* x_p, const T* x_q, int vocab_size) {
    if (id < 0 || id >= vocab_size) return;
    target = read_argument(x_p + id);
    if (x_q) draft = read_argument(x_q + id);
  }
  __device__ __forceinline__ DraftValues values(const T* x_q) const {
    return {static_cast<float>(target), x_q ? static_cast<float>(draft) : 1.0f};
  }
};

// The summaries of one position, of the target's row and the draft's.
struct PositionSummaries {
  const RowSummary* rows;
  const RowSummary* given = nullptr;  // the draft's, where its logsumexp was
  const DraftMass* mass = nullptr;    // the draft's, where it was taken before
  float threshold = kNegativeInfinity;

  __device__ RowSummary target(int64_t) const { return rows[0]; }
  __device__ RowSummary draft(int64_t) const {
    if (!given) return rows[1];
    RowSummary summary = *given;
    summary.threshold = threshold;
    return summary;
  }
  __device__ DraftMass draft_mass(int64_t k, float scale) const {
    return mass ? *mass : draft_mass_of(draft(k).logsumexp(scale));
  }
};

// A block's dynamic shared memory, which the cluster's others send into.
struct PositionShared {
  Search* search;     // where there are filters; these two first, for their alignment
  Kept* kept_of;      // [2], likewise: of the target's row, the draft's
  uint64_t* pending;  // as Count numbers them
  uint64_t* teams;    // [2][2], of half of the cluster, and of all who search in a row together
  float* is_over;     // whether the request has ended before this position
  TileSums sums;
  TileStats* stats;  // [2][tiles]: the target's row, the draft's; twice where there are filters
  float* kept;       // the weights of `slots` tiles

  // What is still to arrive: statistics of what is read first, of two positions in turns, TileSums'
  // two, is_over, what filters keep, statistics of a draft's row that is read later.
  enum Count { kStats, kTileSums = kStats + 2, kIsOver = kTileSums + 2, kKept, kDraftStats };
  static constexpr int kCounts = kDraftStats + 1, kWords = kCounts + 5;
  static_assert(kWords % 2 == 0);  // 16 bytes at once go to the sums

  FR_HOST_DEVICE static constexpr int64_t bytes(int64_t tiles, bool filtered, int slots) {
    const int64_t stats = (filtered ? 4 : 2) * static_cast<int64_t>(sizeof(TileStats));
    const int64_t exchanged = tiles * (2 * static_cast<int64_t>(sizeof(float)) + stats);
    return kWords * static_cast<int64_t>(sizeof(uint64_t)) + exchanged +
           (filtered ? static_cast<int64_t>(sizeof(Search) + 2 * sizeof(Kept)) : 0) +
           kept_bytes(slots);
  }

  __device__ PositionShared(uint64_t* shared, int tiles, bool filtered)
      : search(reinterpret_cast<Search*>(shared)),
        kept_of(reinterpret_cast<Kept*>(search + (filtered ? 1 : 0))),
        pending(reinterpret_cast<uint64_t*>(kept_of + (filtered ? 2 : 0))),
        teams(pending + kCounts),
        is_over(reinterpret_cast<float*>(teams + 4)),
        sums{reinterpret_cast<float*>(pending + kWords), pending + kTileSums},
        stats(reinterpret_cast<TileStats*>(sums.sums + 2 * tiles)),
        kept(reinterpret_cast<float*>(stats + (filtered ? 4 : 2) * tiles)) {}
};

// A position's token goes to the findings, or to the outputs of a request without drafts.
struct PositionOutput {
  const Params& a;
  int32_t* tokens;
  unsigned b, k;

  __device__ __forceinline__ void store_decision(int) const {}
  __device__ __forceinline__ void store_token(int id) const {
    if (tokens) {
      tokens[static_cast<int64_t>(b) * (a.spec_length + 1) + k] = id;
    } else if (a.ids_are_int64) {
      static_cast<int64_t*>(a.token_ids)[b] = id;
    } else {
      static_cast<int32_t*>(a.token_ids)[b] = id;
    }
  }
};

// A request's drafts, in fewer registers than Request has them; below 0 as the caller may say.
__device__ __forceinline__ int drafts_of(const Params& a, unsigned b, unsigned spec_length) {
  int drafts = static_cast<int>(spec_length);
  if (a.num_draft_tokens) {
    drafts = a.num_draft_tokens[b] < drafts ? a.num_draft_tokens[b] : drafts;
  }
  return drafts;
}

// One warp: whether a position before k is known to end the request. Only a hint: what other
// clusters find is seen late or not at all.
__device__ __forceinline__ bool warp_is_over(const volatile uint8_t* verdicts, unsigned k,
                                             unsigned lane) {
#pragma unroll 1
  for (unsigned first = 0; first < k; first += kWarp) {
    const bool ends = first + lane < k && verdicts[first + lane] == kEnds;
    if (__ballot_sync(kAllLanes, ends)) return true;
  }
  return false;
}

// Whether half of a cluster searches in each of the rows.
__device__ __forceinline__ bool is_halved(int rows, int blocks) {
  return rows == 2 && blocks % 2 == 0;
}

// Of a block those who search in a row together: half of its cluster, or all of it.
__device__ __forceinline__ Team team_of(const PositionShared& at, bool halved, int rank,
                                        int blocks) {
  const int size = halved ? blocks / 2 : blocks;
  const bool is_first = rank < size;
  return {is_first ? rank : rank - size, size, is_first ? 0 : size, at.teams + (halved ? 0 : 2)};
}

// All threads of a cluster, each block of which has the statistics of a row: what filters keep of
// it, in at.kept_of. `exchange` as for find_kept.
template <typename T>
__device__ __forceinline__ void find_kept_of(const PositionShared& at, int row,
                                             const Filters& filters, const Team& team, const T* x,
                                             int vocab_size, int* exchange) {
  const TileStats* stats = at.stats + row * num_tiles(vocab_size);
  const Kept kept = find_kept(*at.search, team, filters, x, stats, vocab_size, exchange);
  if (threadIdx.x == 0) at.kept_of[row] = kept;
  __syncthreads();
}

// The same of both rows, a half of the cluster in each; only the target's half has its lists then.
// `phase`: of at.pending's kKept, 0 the first time.
template <typename T>
__device__ __forceinline__ void find_kept_by_halves(const PositionShared& at,
                                                    const Filters& filters, const Team& team,
                                                    const T* x_p, const T* x_q, int vocab_size,
                                                    int* exchange, int phase) {
  const int row = team.first > 0 ? 1 : 0;
  const Kept kept = find_kept(*at.search, team, filters, row == 0 ? x_p : x_q,
                              at.stats + row * num_tiles(vocab_size), vocab_size, exchange);
  uint64_t* pending = at.pending + PositionShared::kKept;
  if (team.rank == 0 && block_warp() == 0 && block_lane() < 2 * team.blocks) {
    float* to = &at.kept_of[row].threshold;
    send_pair_to_block(to, pending, block_lane(), kept.threshold, kept.largest);
    send_to_block(&at.kept_of[row].logsumexp, pending, block_lane(), kept.logsumexp);
  }
  wait_for_bytes(pending, phase & 1);
}

// One warp: the summary of the target's row, or the draft's, after the search where there was one.
template <typename T>
__device__ __forceinline__ RowSummary warp_summarize_kept(const PositionShared& at, int row,
                                                          const T* x, float scale, bool greedy,
                                                          int vocab_size, int lane) {
  const TileStats* stats = at.stats + row * num_tiles(vocab_size);
  const Kept& kept = at.kept_of[row];
  if (kept.threshold > kNegativeInfinity) {
    return {0.0, kept.logsumexp, stats, kept.largest, kept.threshold, -1};
  }
  return warp_summarize(x, stats, scale, kNegativeInfinity, greedy, vocab_size, lane);
}

// A position without filters. Its rows are plain as a rule, and then little is to be done.
template <typename T>
struct PlainPosition {
  const LogitsParams& a;
  const T *x_p, *x_q;  // x_q null where the drafts have ended, or where they are one-hot
  const RowSummary& target;
  const DraftMass& draft_mass;  // of x_q, where that is logits
  const DraftToken& draft;      // the placeholder where the drafts have ended
  float scale;
  bool greedy;

  // One thread: tells the verdict, or stores what to draw from if the request ends here, for
  // nothing where it does not. False where the rows are not plain.
  template <typename Tell>
  __device__ __forceinline__ bool decide(bool tells, const Tell& tell, LogitsRow<T>* row) const {
    RowRatio q_over_p = {};
    if (x_q && a.draft_is_logits && !greedy) {
      q_over_p = RowRatio::of(target.sum, target.largest, draft_mass, scale);
    }
    if (draft.id == kPlaceholderTokenId && !greedy) {
      if (!tells) *row = LogitsRow<T>::of_target(x_p, target, scale);
      if (tells) tell(kEnds);
      return true;
    }
    if (q_over_p.is_plain && !tells) {
      *row = LogitsRow<T>::of_plain(x_p, x_q, target, q_over_p, scale);
    } else if (q_over_p.is_plain) {
      const bool is_known = draft.id >= 0 && draft.id < static_cast<int>(a.base.vocab_size);
      const auto u = [&] { return draft.u; };
      const bool accepted = is_known && q_over_p.accepts_draft<T>(draft.values, scale, u);
      tell(accepted ? kGoesOn : kEnds);
    }
    return q_over_p.is_plain;
  }
};

// A position whose rows are not plain. Calls, since they would take registers; of one argument or
// two, for the same reason.
template <typename Request>
struct OtherPosition {
  Request request;
  unsigned k;
  const DraftToken& draft;  // the placeholder where the drafts have ended

  __device__ __noinline__ bool accepts_draft() const {
    const auto u = [&] { return draft.u; };
    return request.accepts_values(k, draft.id, draft.values, request.ratio(k), u);
  }
  __device__ __noinline__ void make_row(typename Request::Row* row) const {
    *row = request.row(k, draft.id);
  }
};

// The same where there are filters, so that rows are plain only if the request has none: inline for
// all others. `is_last`: the drafts have ended.
template <typename Request>
__device__ __forceinline__ bool ends_filtered(const Request& request, unsigned k, bool is_last,
                                              const DraftToken& draft) {
  if (is_last) return true;
  if (request.summaries.target(k).sum > 0) {
    return !OtherPosition<Request>{request, k, draft}.accepts_draft();
  }
  const auto u = [&] { return draft.u; };
  return !request.accepts_values(k, draft.id, draft.values, RowRatio{}, u);
}
template <typename Request>
__device__ __forceinline__ void make_filtered_row(const Request& request, unsigned k, bool is_last,
                                                  const DraftToken& draft,
                                                  typename Request::Row* row) {
  if (request.summaries.target(k).sum > 0) {
    const DraftToken none{kPlaceholderTokenId, 0.0f, {}};
    OtherPosition<Request>{request, k, is_last ? none : draft}.make_row(row);
  } else {
    *row = request.row(k, is_last ? kPlaceholderTokenId : draft.id, RowRatio{});
  }
}

// All threads of a cluster: draws from a residual of which each warp has at most one tile, in its
// registers. False where it has no weight; `row` is then that of the target.
template <typename T, typename Output>
__device__ __forceinline__ bool draw_kept_raw(LogitsRow<T>& row, RawTile<T>& p, RawTile<T>& q,
                                              int vocab_size, const float& u, int rank, int blocks,
                                              const PositionShared& at, const Output& output) {
  __shared__ bool picked;
  __shared__ uint4 own_sums[kMaxWarps / 4];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int tiles = num_tiles(vocab_size), begin = rank * warps, tile = begin + warp;
  float sum = 0.0f;
  if (tile < tiles) {
    sum = warp_weigh_raw(row, p, q, tile, lane, at.kept + warp * kPaddedTile);
    if (lane == 0) reinterpret_cast<float*>(own_sums)[warp] = sum;
  }
  __syncthreads();  // the weights of this block's tiles are there
  // Four sums a message, but for the row's last: messages to a block come one after the other.
  const int own = tiles - begin < warps ? tiles - begin : warps, fours = own / 4;
  if (lane < blocks && warp < fours) {
    uint4* const to = reinterpret_cast<uint4*>(at.sums.sums + begin);
    send_words_to_block(to + warp, at.sums.pending, lane, own_sums[warp]);
  } else if (lane < blocks && warp >= 4 * fours && warp < own) {
    send_to_block(at.sums.sums + tile, at.sums.pending, lane, sum);
  }
  if (warp == 0) {
    wait_for_bytes(at.sums.pending);
    const Pick pick = warp_pick_tile(at.sums.sums, tiles, u, lane);
    const int mine = pick.item - begin;
    if (pick.item >= 0 && mine >= 0 && mine < warps) {
      const int token = warp_pick_token(at.kept + mine * kPaddedTile, pick, lane);
      if (lane == 0) output.store_token(token);
    }
    if (lane == 0) {
      picked = pick.item >= 0;
      if (!picked) row = row.target();
    }
  }
  __syncthreads();
  return picked;
}

// How many blocks a multiprocessor has registers for. The search for thresholds wants many, and so
// do float32 logits.
template <typename T, bool filtered>
constexpr int kResidentPositions = filtered || sizeof(T) == 4 ? 1 : kResidentBlocks;

template <typename T, bool filtered>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentPositions<T, filtered>)
    positions_kernel(const __grid_constant__ LogitsParams a, int blocks, bool early_exit,
                     bool keeps, const __grid_constant__ Findings<T> findings) {
#if FR_HAS_CLUSTERS
  using Request = LogitsRequest<T, PositionSummaries>;
  using At = PositionShared;
  __shared__ RowSummary summaries[2], given;
  __shared__ DraftMass draft_mass;
  __shared__ DraftToken draft;
  __shared__ LogitsRow<T> row;
  __shared__ float recovery_uniform;
  __shared__ Verdict verdict;
  __shared__ bool is_decided;
  FR_DYNAMIC_SHARED(uint64_t, shared);

  wait_for_launch_before();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int rank = static_cast<int>(cluster_rank());
  // 32 bits hold them, as the grid does, and take half the registers.
  const unsigned b = cluster_index(), k = grid_row();
  const unsigned spec_length = static_cast<unsigned>(a.base.spec_length);
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int first = rank * warps + warp, step = warps * blocks;
  const T* x_p = static_cast<const T*>(a.base.target_probs) + b * a.base.target_row_stride +
                 k * a.base.target_position_stride;
  const T* x_q = nullptr;
  const auto load = [&](int i, RawTile<T>& raw) {
    load_tile(i < tiles ? x_p : x_q, i < tiles ? i : i - tiles, vocab_size,
              kNegativeInfinityWord<T>, lane, raw);
  };
  RawTile<T> raw;
  if (first < tiles) load(first, raw);
  // One warp looks at the draft. What it reads is on its way while it works on its tiles, since all
  // wait for the last tile.
  const bool looks = warp == warps - 1 && k < spec_length;
  ComingDraft<T> coming;
  if (looks) coming.ask(a.base, b, k);

  allow_next_launch();
  const int drafts = drafts_of(a.base, b, spec_length);
  const bool is_last = static_cast<int>(k) >= drafts, greedy = a.is_greedy(b);
  if (k > 0 && static_cast<int>(k) > drafts) return;
  if (!is_last && a.base.draft_probs) {
    x_q = static_cast<const T*>(a.base.draft_probs) + b * a.base.draft_row_stride +
          k * a.base.draft_position_stride;
  }
  const float scale = a.scale(b);
  const int rows = num_draft_rows(a) > 0 && !greedy && !is_last ? 2 : 1;
  // Where all blocks run at once a warp that has one tile of a row keeps it, and has the draft's
  // when it is wanted.
  const bool stays = !filtered && !early_exit && x_q && a.draft_is_logits && !greedy;
  const bool keeps_raw = stays && step >= tiles;
  RawTile<T> raw_q;
  if (keeps_raw) {
    if (rows > 1 && first < tiles) load(tiles + first, raw_q);
  } else if (first >= tiles && first < rows * tiles) {
    load(first, raw);
  }
  const PositionShared at(shared, tiles, filtered);
  const int summed_rows = a.draft_logsumexp ? 1 : rows;  // whose sums are not known before
  if (threadIdx.x == 0) {
    const int row_bytes = tiles * static_cast<int>(sizeof(TileStats));
    expect_bytes(at.pending + At::kStats, rows * row_bytes);
    expect_sums(at.sums, tiles);
    expect_bytes(at.pending + At::kIsOver, static_cast<int>(sizeof(float)));
    if (filtered) {
      expect_bytes(at.pending + At::kKept, rows * static_cast<int>(sizeof(Kept)));
      team_of(at, is_halved(rows, blocks), rank, blocks).expect();
    }
  }
  __syncwarp();
  cluster_start();
  float is_over = 0.0f;
  if (early_exit && rank == 0 && warp == 0) {
    const int64_t begin = static_cast<int64_t>(b) * (spec_length + 1);
    is_over = warp_is_over(findings.verdicts + begin, k, lane) ? 1.0f : 0.0f;
  }
  // Made anew where it is used, from the argument: kept, it would be stored.
  const auto position = [&] { return b * a.base.spec_length + b + k; };
  if (early_exit) {  // one block looks, so that all leave together
    cluster_wait();
    if (rank == 0 && warp == 0 && lane < blocks) {
      send_to_block(at.is_over, at.pending + At::kIsOver, lane, is_over);
    }
    wait_for_bytes(at.pending + At::kIsOver);
    if (*at.is_over > 0.0f) {
      if (findings.tokens && rank == 0 && threadIdx.x == 0) {
        findings.tokens[position()] = kPlaceholderTokenId;
      }
      return;
    }
  }
  double given_sum = 0.0;
  float given_uniform = 0.0f;  // of the draft for one lane, of what is drawn for another
  if (warp == warps - 1) {
    if (a.base.uniforms && lane < 2) {
      given_uniform = uniform(a.base, b, lane == 0 ? k : spec_length);
    }
    if (a.draft_logsumexp && !is_last) {
      given_sum = a.draft_logsumexp[static_cast<int64_t>(b) * spec_length + k];
    }
  }
  if (looks && !is_last) {
    coming.ask_values(x_p, x_q, vocab_size);
    if (lane == 0) draft.id = coming.id;
  } else if (warp == warps - 1 && lane == 0) {
    draft.id = kPlaceholderTokenId;
  }
  const auto show_draft = [&] {
    if (warp != warps - 1) return;
    if (lane < 2) {
      const int64_t which = lane == 0 ? k : spec_length;
      const float u = a.base.uniforms ? given_uniform : uniform(a.base, b, which);
      (lane == 0 ? draft.u : recovery_uniform) = u;
    }
    if (lane == 0) {
      draft.values = coming.values(x_q);
      given = {0.0, given_sum, nullptr, 0.0f, kNegativeInfinity, -1};
      if (a.draft_logsumexp) draft_mass = draft_mass_of(given_sum);
    }
    __syncwarp();
  };
  // With filters float32 has no registers to keep it in while the tiles are worked on.
  constexpr bool kShowsLate = !filtered || sizeof(T) < 4;
  if (!kShowsLate) show_draft();
  // The card has time for rows that only a rejection reads.
  const bool ahead = !filtered && !early_exit && rows == 1 && x_q && !keeps_raw;
  const Filters filters = filtered ? Filters(a, b) : Filters::none();
  const bool sums_first = !greedy && (!filters.any() || filters.want_sums());
  bool waits = !early_exit;  // no block writes into another's shared memory before that has started
  const int stride = keeps_raw ? tiles : step;
  for (int i = keeps_raw && first >= tiles ? rows * tiles : first; i < rows * tiles; i += stride) {
    if (ahead) prefetch_tile(static_cast<const T*>(nullptr), x_q, i, vocab_size, lane);
    RawTile<T> now = keeps_raw && i >= tiles ? raw_q : raw;
    // The next tile's load comes when this tile wants fewer registers.
    const TileStats found = warp_tile_stats(now, scale, kNegativeInfinity, sums_first, [&] {
      if (!keeps_raw && i + step < rows * tiles) load(i + step, raw);
    });
    if (waits) cluster_wait();
    waits = false;
    TellStats{at.stats, at.pending + At::kStats, blocks}(i, found);
  }
  if (waits) cluster_wait();
  if (keeps_raw && rows == 1 && first < tiles) load(tiles + first, raw_q);
  if (kShowsLate) show_draft();
  if (filtered || warp < rows) wait_for_bytes(at.pending + At::kStats);
  if constexpr (filtered) {
    const Team team = team_of(at, is_halved(rows, blocks), rank, blocks);
    int exchange = 0;
    if (is_halved(rows, blocks)) {
      find_kept_by_halves(at, filters, team, x_p, x_q, vocab_size, &exchange, 0);
    } else {
#pragma unroll 1
      for (int i = rows - 1; i >= 0; --i) {  // the target's last, of which there are lists then
        find_kept_of(at, i, filters, team, i == 0 ? x_p : x_q, vocab_size, &exchange);
      }
    }
  }
  if (warp < summed_rows) {
    const T* x = warp == 0 ? x_p : x_q;
    RowSummary summary;
    if constexpr (filtered) {
      summary = warp_summarize_kept(at, warp, x, scale, greedy, vocab_size, lane);
    } else {
      summary = warp_summarize(x, at.stats + warp * tiles, scale, kNegativeInfinity, greedy,
                               vocab_size, lane);
    }
    if (lane == 0) {
      summaries[warp] = summary;
      if (warp > 0 && summary.sum > 0) draft_mass = draft_mass_of(summary.logsumexp(scale));
    }
  }
  __syncthreads();
  const auto tell = [&](Verdict found) {  // one thread
    verdict = found;
    if (rank != 0) return;
    // kGoesOn is there.
    if (findings.verdicts && found == kEnds) findings.verdicts[position()] = kEnds;
    if (findings.tokens && found == kGoesOn) findings.tokens[position()] = kPlaceholderTokenId;
    if (spec_length == 0) a.base.num_accepted[b] = 0;
  };
  // Two threads decide, one whether the request ends here, one what it would draw from.
  const bool decides = threadIdx.x == 0 || threadIdx.x == kWarp;
  if (!filtered && decides) {
    const PlainPosition<T> plain{a, x_p, x_q, summaries[0], draft_mass, draft, scale, greedy};
    const bool known = plain.decide(threadIdx.x == 0, tell, &row);
    if (threadIdx.x == 0) is_decided = known;
  }
  if (!filtered) __syncthreads();
  if (filtered || !is_decided) {
    if (decides) {
      PositionSummaries known{summaries, a.draft_logsumexp ? &given : nullptr, &draft_mass};
      if (filtered && rows > 1) known.threshold = at.kept_of[1].threshold;
      const Request decided(a, b, known, scale, greedy);
      if constexpr (filtered) {
        if (threadIdx.x == kWarp) {
          make_filtered_row(decided, k, is_last, draft, &row);
        } else {
          tell(ends_filtered(decided, k, is_last, draft) ? kEnds : kGoesOn);
        }
      } else {
        const OtherPosition<Request> other{decided, k, draft};
        if (threadIdx.x == kWarp) {
          other.make_row(&row);
        } else {
          tell(is_last || !other.accepts_draft() ? kEnds : kGoesOn);
        }
      }
    }
    __syncthreads();
  }
  if (verdict == kGoesOn) return;
  const PositionOutput output{a.base, findings.tokens, b, k};
  if (!filtered && keeps_raw && keeps && row.is_plain()) {
    if (draw_kept_raw(row, raw, raw_q, vocab_size, recovery_uniform, rank, blocks, at, output)) {
      return;
    }
    keeps = false;  // the residual has no weight
  }
  if (a.logsumexp && rank == 0 && threadIdx.x == blockDim.x - 1) {  // no other waits for it
    a.logsumexp[b] = summaries[0].logsumexp(scale);
  }
  if constexpr (filtered) {
    const Team team = team_of(at, is_halved(rows, blocks), rank, blocks);
    draw_kept(row, *at.search, team, vocab_size, recovery_uniform, rank, blocks, at.sums, output);
    return;
  }
  if (findings.rows) {
    if (rank != 0) return;
    for (int i = threadIdx.x; i < tiles; i += blockDim.x) {
      findings.stats[position() * tiles + i] = at.stats[i];
    }
    if (threadIdx.x == 0) {
      LogitsRow<T> found = row;
      found.stats = findings.stats + position() * tiles;
      findings.rows[position()] = found;
    }
    return;
  }
  draw_token<Step::kInCluster>(row, vocab_size, recovery_uniform, rank, blocks, at.sums, output,
                               keeps ? at.kept : nullptr);
#endif
}

// One warp: the first position that ends a request, the end of its drafts at the latest.
__device__ __forceinline__ int64_t warp_first_end(const uint8_t* verdicts, int64_t drafts,
                                                  int lane) {
  for (int64_t first = 0;; first += kWarp) {
    const int64_t k = first + lane;
    const unsigned ends = __ballot_sync(kAllLanes, k >= drafts || verdicts[k] == kEnds);
    if (ends) return first + __ffs(ends) - 1;
  }
}

// A warp a request: what it ends with at the first position that does.
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    finish_kernel(const LogitsParams a, const int32_t* tokens) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp;
  allow_next_launch();
  if (b >= a.base.batch_size) return;
  // Before positions_kernel lets this one start it has waited for all that is read here.
  const Request<float> request(a.base, b);
  const int64_t spec_length = a.base.spec_length, begin = b * (spec_length + 1);
  const int64_t early = lane < request.drafts ? request.id(lane) : kPlaceholderTokenId;
  wait_for_launch_before();
  bool has_ended = false;
  for (int64_t first = 0; first <= spec_length; first += kWarp) {
    const int64_t k = first + lane;
    const bool is_drawn = k == 0 || k <= request.drafts;
    const int64_t drawn = is_drawn ? tokens[begin + k] : kPlaceholderTokenId;
    const unsigned ends = __ballot_sync(kAllLanes, drawn >= 0);
    const int64_t end = has_ended ? -1 : ends ? first + __ffs(ends) - 1 : first + kWarp;
    int64_t id = k == end ? drawn : kPlaceholderTokenId;
    if (k < end) id = first == 0 ? early : request.id(k);
    if (k <= spec_length) request.store(k, id);
    if (lane == 0 && ends && !has_ended) a.base.num_accepted[b] = static_cast<int32_t>(end);
    has_ended = has_ended || ends;
  }
}

}  // namespace
}  // namespace fused_rejection
