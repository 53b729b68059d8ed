// The CUDA kernels on logits. Where all positions of all requests can run at once (small batches),
// and with filters, positions_kernel: a cluster a position reads its rows and decides whether the
// request would end there. Else decide_kernel: a few warps a position, whichever is done last
// decides. In both, positions behind a known end leave. Where all ran at once they have also drawn,
// and finish_kernel takes the first position that ends each request; else draw_kernel draws there.
// For block verification, and on cards without clusters: a pass over all rows (a warp a tile), with
// filters a search for each row's threshold and a second pass over what it keeps, and the fused
// kernel of warp.cuh, which finishes the rows' sums, decides, and draws.

#include "from_logits.h"
#include "threshold.cuh"
#include "tiles.cuh"
#include "warp.cuh"

#ifndef FR_EMULATION
#include "launch.cuh"
#endif

namespace fused_rejection {
namespace {

// Where a row of logits is, and whose.
template <typename T>
struct LogitsRowAt {
  const T* x;  // null where the row is not needed
  int64_t b;
};

template <typename T>
__device__ LogitsRowAt<T> locate_row(const LogitsParams& a, int64_t row) {
  const int64_t targets = num_target_rows(a.base);
  const bool is_draft = row >= targets;
  const int64_t positions = a.base.spec_length + (is_draft ? 0 : 1);
  const int64_t at = is_draft ? row - targets : row;
  const int64_t b = at / positions, k = at % positions;
  const Request<T> request(a.base, b);
  if (is_draft) {
    const bool needed = k < request.drafts && !a.is_greedy(b);
    return {needed ? request.draft_row(k) : nullptr, b};
  }
  return {k <= request.drafts || k == 0 ? request.target_row(k) : nullptr, b};
}

// A warp a tile, over all rows. `thresholds` [rows] or null.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentBlocks)
    tile_stats_kernel(const LogitsParams a, int64_t rows, const float* thresholds,
                      TileStats* stats) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  // A block takes consecutive tiles of one row.
  const int blocks_per_row = (tiles + warps - 1) / warps;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int tile = static_cast<int>(blockIdx.x % blocks_per_row) * warps + warp;
  const LogitsRowAt<T> at = locate_row<T>(a, row);
  if (!at.x || tile >= tiles) return;
  const float threshold = thresholds ? thresholds[row] : kNegativeInfinity;
  TileStats& tile_stats = stats[row * tiles + tile];
  TileStats found = {kNegativeInfinity, 0.0f};
  // Where a tile was seen to have nothing to keep, it is not read again.
  const bool is_empty = thresholds && tile_stats.largest < threshold;
  __syncwarp();
  if (!is_empty) {
    found = warp_tile_stats(at.x, tile, vocab_size, a.scale(at.b), threshold, lane);
  }
  if (lane == 0) tile_stats = found;
}

// One warp: the statistics of what a threshold leaves of a tile. A call, for its registers.
template <typename T>
__device__ __noinline__ TileStats warp_kept_stats(const T* x, int tile, int vocab_size, float scale,
                                                  float threshold, int lane) {
  return warp_tile_stats(x, tile, vocab_size, scale, threshold, lane);
}

// Filters: a block a row looks for the threshold. `thresholds` [rows].
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    threshold_kernel(const LogitsParams a, const TileStats* stats, float* thresholds) {
  FR_DYNAMIC_SHARED(uint64_t, shared);  // a Search
  const int64_t row = blockIdx.x;
  const LogitsRowAt<T> at = locate_row<T>(a, row);
  if (!at.x) return;
  const int vocab_size = static_cast<int>(a.base.vocab_size);
  int exchange = 0;
  const float threshold =
      find_threshold(*reinterpret_cast<Search*>(shared), Team{0, 1, 0, nullptr}, Filters(a, at.b),
                     at.x, stats + row * num_tiles(vocab_size), vocab_size, &exchange);
  if (threadIdx.x == 0) thresholds[row] = threshold;
}

// ---- Verification

// The summaries of a request's rows: K + 1 of the target, then K of the draft.
struct TableSummaries {
  const RowSummary* table;
  int64_t spec_length;

  __device__ RowSummary target(int64_t k) const { return table[k]; }
  __device__ RowSummary draft(int64_t k) const { return table[spec_length + 1 + k]; }
};

// All warps of a block: the table of request b.
template <typename T>
__device__ void summarize_request(const LogitsParams& a, int64_t b, const TileStats* stats,
                                  const float* thresholds, RowSummary* table) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const Request<T> request(a.base, b);
  const int64_t drafts = request.drafts > 0 ? request.drafts : 0, spec_length = a.base.spec_length;
  const bool greedy = a.is_greedy(b), draft_rows = a.draft_is_logits && !greedy;
  const float scale = a.scale(b);
  const int64_t wanted = drafts + 1 + (draft_rows ? drafts : 0);
  for (int64_t i = warp; i < wanted; i += warps) {
    const bool is_draft = i > drafts;
    const int64_t k = is_draft ? i - drafts - 1 : i;
    const int64_t row =
        is_draft ? num_target_rows(a.base) + b * spec_length + k : b * (spec_length + 1) + k;
    const float threshold = thresholds && !greedy ? thresholds[row] : kNegativeInfinity;
    RowSummary summary;
    if (is_draft && a.draft_logsumexp) {
      summary = {a.draft_logsumexp[b * spec_length + k], nullptr, 0.0f, threshold, -1};
    } else {
      const T* x = is_draft ? request.draft_row(k) : request.target_row(k);
      summary = warp_summarize(x, stats + row * tiles, scale, threshold, greedy, vocab_size, lane);
    }
    if (lane == 0) table[is_draft ? spec_length + 1 + k : k] = summary;
  }
  __syncthreads();
}

template <typename T, Step step, bool block>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    logits_kernel(const LogitsParams a, int blocks_per_row, const TileStats* stats,
                  const float* thresholds, float* workspace) {
  FR_DYNAMIC_SHARED(double, shared);  // the table, reach [K + 1], in a cluster TileSums
  const Place place = place_of<step>(blocks_per_row);
  const int64_t b = place.b;
  const int tiles = num_tiles(a.base.vocab_size);
  RowSummary* table = reinterpret_cast<RowSummary*>(shared);
  double* reach = reinterpret_cast<double*>(table + 2 * a.base.spec_length + 1);
  TileSums sums{workspace + b * tiles, nullptr};
  if (step == Step::kInCluster) {
    static_assert(step != Step::kInCluster || block);  // else positions_kernel does it
    sums.pending = reinterpret_cast<uint64_t*>(reach + a.base.spec_length + 1);
    sums.sums = reinterpret_cast<float*>(sums.pending + 2);
    cluster_start();
  }
  wait_for_launch_before();
  summarize_request<T>(a, b, stats, thresholds, table);
  const LogitsRequest<T, TableSummaries> request(a, b, {table, a.base.spec_length});
  if (step != Step::kSum && a.logsumexp && place.rank == 0 && threadIdx.x == 0) {
    a.logsumexp[b] = table[request.drafts > 0 ? request.drafts : 0].logsumexp;
  }
  if (block) {
    sample_block<step>(request, place.rank, blocks_per_row, sums.sums, reach);
  } else {
    sample_request<step>(request, place.rank, blocks_per_row, sums);
  }
}

// ---- In clusters. Every position of every request has a cluster of blocks: they share out the
// tiles of its target row, and of its draft row where that is needed, tell one another the tiles'
// statistics, and then each knows whether the request would end here. First positions come first,
// so that where not all blocks run at once, those behind a known end find it when they start, and
// leave. Where all do, they draw at once, from rows that they have just read; if a position before
// it ends the request too, for nothing.

// What positions leave to the next launch, in global memory; null where K is 0.
template <typename T>
struct Findings {
  uint8_t* verdicts;  // [B][K + 1], kGoesOn or kEnds
  int32_t* tokens;    // [B][K + 1], drawn where the position would end its request, or, where null:
  LogitsRow<T>* rows;  // [B][K + 1], what to draw from there
  TileStats* stats;    // [B][K + 1][tiles] of the target's rows, [B][K][tiles] of the draft's
  // What warps leave to the last of them.
  float* sums;        // [B][tiles], of the row drawn from
  unsigned* arrived;  // [B][K + 1], tiles of a position whose statistics are there; 0 at first
  unsigned* summed;   // [B], tiles of `sums` that are there; 0 at first
};

constexpr uint8_t kGoesOn = 0, kEnds = 1;

struct DraftToken {
  int64_t id;
  float u;
  DraftValues values;
};

// The summaries of one position, of the target's row and the draft's.
struct PositionSummaries {
  const RowSummary* rows;
  const RowSummary* given = nullptr;  // the draft's, where its logsumexp was
  float threshold = kNegativeInfinity;

  __device__ RowSummary target(int64_t) const { return rows[0]; }
  __device__ RowSummary draft(int64_t) const {
    if (!given) return rows[1];
    RowSummary summary = *given;
    summary.threshold = threshold;
    return summary;
  }
};

// A block's dynamic shared memory, which the cluster's others send into.
struct PositionShared {
  uint64_t* pending;  // as Count numbers them
  uint64_t* barrier;  // of those who search for a threshold together
  float* is_over;     // whether the request has ended before this position
  float* thresholds;  // of the target's row, the draft's
  TileSums sums;
  TileStats* stats;  // [2][tiles]: the target's row, the draft's
  Search* search;    // where there are filters
  float* kept;       // the weights of `slots` tiles

  // What is still to arrive: statistics of what is read first and of a draft's row that has its
  // turn after it, those of what filters keep, is_over, thresholds, TileSums' two.
  enum Count { kStats, kDraftStats, kKeptStats, kIsOver, kThresholds, kTileSums };
  static constexpr int kCounts = kTileSums + 2, kWords = kCounts + 3;

  FR_HOST_DEVICE static constexpr int64_t bytes(int64_t tiles, bool filtered, int slots) {
    const int64_t exchanged = 2 * tiles * static_cast<int64_t>(sizeof(float) + sizeof(TileStats));
    return kWords * static_cast<int64_t>(sizeof(uint64_t)) + exchanged +
           (filtered ? static_cast<int64_t>(sizeof(Search)) : 0) + kept_bytes(slots);
  }

  __device__ PositionShared(uint64_t* shared, int tiles, bool filtered)
      : pending(shared),
        barrier(shared + kCounts),
        is_over(reinterpret_cast<float*>(shared + kCounts + 1)),
        thresholds(reinterpret_cast<float*>(shared + kCounts + 2)),
        sums{reinterpret_cast<float*>(shared + kWords), shared + kTileSums},
        stats(reinterpret_cast<TileStats*>(sums.sums + 2 * tiles)),
        search(reinterpret_cast<Search*>(stats + 2 * tiles)),
        kept(reinterpret_cast<float*>(search + (filtered ? 1 : 0))) {}
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

// One warp, which has `draft`: whether a draft is accepted whatever the filters leave out, by more
// than roundings could change, so that nobody needs to look for what they keep. `stats` are of the
// target's whole row; top-p and min_p are all the filters.
__device__ __noinline__ bool warp_surely_accepts(const TileStats* stats, const Filters& filters,
                                                 const DraftToken& draft, double draft_logsumexp,
                                                 int vocab_size, int lane) {
  constexpr float kMargin = 0x1p-10f;
  const float x_p = finite_logit(draft.values.target), x_q = finite_logit(draft.values.draft);
  if (draft.id < 0 || draft.id >= vocab_size || !(fminf(x_p, x_q) > kNegativeInfinity)) {
    return false;
  }
  const int tiles = num_tiles(vocab_size);
  const float scale = filters.scale, largest = warp_largest(stats, tiles, lane);
  // All of the row that could be above the draft.
  float above = 0.0f;
  for (int tile = lane; tile < tiles; tile += kWarp) {
    if (stats[tile].largest > x_p) above += tile_weight(stats[tile], largest, scale);
  }
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) above += __shfl_xor_sync(kAllLanes, above, d);
  const double sum = warp_row_sum(stats, largest, scale, tiles, lane);
  const bool in_share =
      filters.top_p >= 1.0f || above < (1.0f - kMargin) * filters.top_p * static_cast<float>(sum);
  const bool is_near =
      !(filters.min_p > 0.0f) || keeps_min_p(x_p, largest, scale, filters.min_p * (1.0f + kMargin));
  // With less of the row kept its probability is larger.
  const double difference = static_cast<double>(x_q) - x_p;
  const double least = logsumexp_of(sum, largest, scale) - draft_logsumexp;
  const double log2_ratio = difference * scale + least * kLog2E;
  const float ratio = exp2_portable(static_cast<float>(log2_ratio < 126 ? log2_ratio : 126));
  return in_share && is_near && accepts(draft.u, ratio * (1.0f + kMargin), 1.0f);
}

// How many blocks a multiprocessor has registers for. The search for thresholds wants many, and so
// do float32 logits.
template <typename T, bool filtered>
constexpr int kResidentPositions = filtered || sizeof(T) == 4 ? 1 : kResidentBlocks;

template <typename T, bool filtered>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentPositions<T, filtered>)
    positions_kernel(const LogitsParams a, int blocks, bool early_exit, bool keeps,
                     Findings<T> findings) {
  using Request = LogitsRequest<T, PositionSummaries>;
  using At = PositionShared;
  __shared__ RowSummary summaries[2], given;
  __shared__ DraftToken draft;
  __shared__ LogitsRow<T> row;
  __shared__ float recovery_uniform;
  __shared__ bool ends;
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

  allow_next_launch();
  int drafts = static_cast<int>(spec_length);
  if (a.base.num_draft_tokens)
    drafts = a.base.num_draft_tokens[b] < drafts ? a.base.num_draft_tokens[b] : drafts;
  const bool is_last = static_cast<int>(k) >= drafts, greedy = a.is_greedy(b);
  if (k > 0 && static_cast<int>(k) > drafts) return;
  if (!is_last && a.base.draft_probs) {
    x_q = static_cast<const T*>(a.base.draft_probs) + b * a.base.draft_row_stride +
          k * a.base.draft_position_stride;
  }
  const float scale = a.scale(b);
  const int rows = num_draft_rows(a) > 0 && !greedy && !is_last ? 2 : 1;
  if (first >= tiles && first < rows * tiles) load(first, raw);
  const PositionShared at(shared, tiles, filtered);
  // Where the draft's sum is known and not all blocks run at once the draft's row has its turn
  // after the target's: most drafts are accepted without it. With top-k, for which a search does
  // little, two rows at once are no slower; with float32 logits there are no registers for it.
  const bool in_turns = filtered && sizeof(T) < 4 && early_exit && rows == 2 && a.draft_logsumexp &&
                        !(a.top_k && a.top_k[b] > 0);
  const int summed_rows = a.draft_logsumexp ? 1 : rows;  // whose sums are not known before
  // Half of the cluster searches in each of two rows, where it can be halved.
  const bool halved = filtered && rows == 2 && !in_turns && blocks % 2 == 0;
  const int team_size = halved ? blocks / 2 : blocks;
  if (threadIdx.x == 0) {
    const int row_bytes = tiles * static_cast<int>(sizeof(TileStats));
    expect_bytes(at.pending + At::kStats, (in_turns ? 1 : rows) * row_bytes);
    expect_sums(at.sums, tiles);
    expect_bytes(at.pending + At::kIsOver, static_cast<int>(sizeof(float)));
    if (filtered) {
      expect_bytes(at.pending + At::kKeptStats, summed_rows * row_bytes);
      expect_bytes(at.pending + At::kDraftStats, row_bytes);
      expect_bytes(at.pending + At::kThresholds, rows * static_cast<int>(sizeof(float)));
      expect_arrivals(at.barrier, team_size);
    }
  }
  __syncwarp();
  cluster_start();
  float is_over = 0.0f;
  if (early_exit && rank == 0 && warp == 0) {
    const int64_t begin = static_cast<int64_t>(b) * (spec_length + 1);
    is_over = warp_is_over(findings.verdicts + begin, k, lane) ? 1.0f : 0.0f;
  }

  // Made anew where it is used: kept, it would take registers that the loops want.
  const auto request = [&] { return Request(a, b, {summaries}); };
  const auto tell = [&](int i, const TileStats& found, int count) {
    if (lane < blocks) {
      send_pair_to_block(&at.stats[i].largest, at.pending + count, lane, found.largest, found.sum);
    }
  };
  if (warp == warps - 1) {
    const float u = uniform(a.base, b, spec_length);
    if (lane == 0) {
      recovery_uniform = u;
      if (!is_last) {
        const int64_t id = request().id(k);
        const float own = uniform(a.base, b, k);  // while the id is on its way
        draft = {id, own, request().values(k, id)};
        if (a.draft_logsumexp) {
          const double sum = a.draft_logsumexp[static_cast<int64_t>(b) * spec_length + k];
          given = {sum, nullptr, 0.0f, kNegativeInfinity, -1};
        }
      }
    }
  }
  __syncwarp();
  cluster_wait();
  if (early_exit) {  // one block looks, so that all leave together
    if (rank == 0 && warp == 0 && lane < blocks) {
      send_to_block(at.is_over, at.pending + At::kIsOver, lane, is_over);
    }
    wait_for_bytes(at.pending + At::kIsOver);
    if (*at.is_over > 0.0f) return;
  }
  // Where all blocks run at once the card has time for rows that only a rejection reads.
  const bool ahead = !early_exit && rows == 1 && x_q;
  const Filters filters = filtered ? Filters(a, b) : Filters();
  const bool sums_first = !greedy && (!filters.any() || filters.want_sums());
  float threshold_p = kNegativeInfinity, threshold_q = kNegativeInfinity;
  int exchange = 0;
  const auto leave_a_verdict = [&] {
    if (rank == 0 && findings.verdicts) {
      findings.verdicts[static_cast<int64_t>(b) * (spec_length + 1) + k] = ends ? kEnds : kGoesOn;
    }
  };
#pragma unroll 1
  for (int turn = 0; turn < (in_turns ? 2 : 1); ++turn) {
    const int begin = turn * tiles + first, end = (in_turns ? turn + 1 : rows) * tiles;
    if (filtered && turn > 0 && begin < end) load(begin, raw);
    for (int i = begin; i < end; i += step) {
      RawTile<T> next;
      if (i + step < end) load(i + step, next);
      if (ahead) prefetch_tile(static_cast<const T*>(nullptr), x_q, i, vocab_size, lane);
      tell(i, warp_tile_stats(raw, scale, kNegativeInfinity, sums_first), At::kStats + turn);
      raw = next;
    }
    if (filtered || warp < rows) wait_for_bytes(at.pending + At::kStats + turn);
    if constexpr (filtered) {
      if (in_turns && turn == 0 && sums_first) {
        if (warp == warps - 1) {
          const bool sure =
              warp_surely_accepts(at.stats, filters, draft, given.logsumexp, vocab_size, lane);
          if (lane == 0) ends = !sure;
        }
        __syncthreads();
        if (!ends) {
          if (threadIdx.x == 0) leave_a_verdict();
          return;
        }
      }
      const Team team{rank % team_size, team_size, rank - rank % team_size, at.barrier};
      for (int row = halved ? rank / team_size : turn; row * tiles < end;
           row += halved ? rows : 1) {
        const float found = find_threshold(*at.search, team, filters, row == 0 ? x_p : x_q,
                                           at.stats + row * tiles, vocab_size, &exchange);
        if (halved) {
          if (team.rank == 0 && warp == 0 && lane < blocks) {
            send_to_block(at.thresholds + row, at.pending + At::kThresholds, lane, found);
          }
        } else if (row == 0) {
          threshold_p = found;
        } else {
          threshold_q = found;
        }
      }
      if (halved) {
        wait_for_bytes(at.pending + At::kThresholds);
        threshold_p = at.thresholds[0];
        threshold_q = at.thresholds[1];
      }
      const bool sums_later = !greedy && !sums_first;
      const auto threshold_of = [&](int i) { return i < tiles ? threshold_p : threshold_q; };
      const auto changes = [&](float threshold) {
        return sums_later || threshold > kNegativeInfinity;
      };
      if (turn == 0 && (changes(threshold_p) || changes(threshold_q))) {
        for (int i = first; i < summed_rows * tiles; i += step) {
          const float threshold = threshold_of(i);
          TileStats found = at.stats[i];
          __syncwarp();  // what is sent below overwrites it
          if (changes(threshold)) {
            // Where a tile was seen to have nothing to keep, it is not read again.
            const bool is_kept = found.largest >= threshold;
            found = {kNegativeInfinity, 0.0f};
            if (is_kept) {
              found = warp_kept_stats(i < tiles ? x_p : x_q, i < tiles ? i : i - tiles, vocab_size,
                                      scale, threshold, lane);
            }
          }
          tell(i, found, At::kKeptStats);
        }
        if (warp < summed_rows) wait_for_bytes(at.pending + At::kKeptStats);
      }
    }
    if (turn == 0 && warp < summed_rows) {
      const RowSummary summary =
          warp_summarize(warp == 0 ? x_p : x_q, at.stats + warp * tiles, scale,
                         warp == 0 ? threshold_p : threshold_q, greedy, vocab_size, lane);
      if (lane == 0) summaries[warp] = summary;
    }
    __syncthreads();
    // Two threads decide, one whether the request ends here, one what it would draw from. In the
    // first of two turns nothing of the draft is left out: a draft that is accepted then, is.
    if (threadIdx.x == 0 || threadIdx.x == kWarp) {
      Request decided = request();
      decided.summaries.given = a.draft_logsumexp ? &given : nullptr;
      if (filtered) decided.summaries.threshold = threshold_q;
      if (threadIdx.x == kWarp) {
        row = decided.row(k, is_last ? kPlaceholderTokenId : draft.id);
      } else {
        ends =
            is_last || !decided.accepts_values(k, draft.id, draft.values, [&] { return draft.u; });
        if (!in_turns || turn > 0 || !ends) leave_a_verdict();
        if (rank == 0 && a.logsumexp) a.logsumexp[b] = summaries[0].logsumexp;
        if (rank == 0 && spec_length == 0) a.base.num_accepted[b] = 0;
      }
    }
    __syncthreads();
    if (!ends) return;
  }
  if (findings.rows) {
    if (rank != 0) return;
    const int64_t position = static_cast<int64_t>(b) * (spec_length + 1) + k;
    for (int i = threadIdx.x; i < tiles; i += blockDim.x) {
      findings.stats[position * tiles + i] = at.stats[i];
    }
    if (threadIdx.x == 0) {
      LogitsRow<T> found = row;
      found.stats = findings.stats + position * tiles;
      findings.rows[position] = found;
    }
    return;
  }
  draw_token<Step::kInCluster>(row, vocab_size, recovery_uniform, rank, blocks, at.sums,
                               PositionOutput{a.base, findings.tokens, b, k},
                               keeps ? at.kept : nullptr);
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
    finish_kernel(const LogitsParams a, const uint8_t* verdicts, const int32_t* tokens) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp;
  if (b >= a.base.batch_size) return;
  // Before positions_kernel lets this one start it has waited for all that is read here.
  const Request<float> request(a.base, b);
  const int64_t spec_length = a.base.spec_length, begin = b * (spec_length + 1);
  const int64_t early = lane < request.drafts ? request.id(lane) : kPlaceholderTokenId;
  wait_for_launch_before();
  const int64_t accepted = warp_first_end(verdicts + begin, request.drafts, lane);
  for (int64_t k = lane; k <= spec_length; k += kWarp) {
    int64_t id = kPlaceholderTokenId;
    if (k == accepted) id = tokens[begin + k];
    if (k < accepted) id = k < kWarp ? early : request.id(k);
    request.store(k, id);
  }
  if (lane == 0) a.base.num_accepted[b] = static_cast<int32_t>(accepted);
}

// ---- Many requests: a block has a share of a row's tiles, and the block that completes the row
// goes on with it. Nothing waits for another block.

constexpr int kDecidingWarps = 8, kDrawingWarps = 4;  // of a block

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
                                                  bool is_last, int rows,
                                                  const Findings<T>& findings, int lane) {
  using Request = LogitsRequest<T, PositionSummaries>;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int64_t spec_length = a.base.spec_length, position = b * (spec_length + 1) + k;
  RowSummary summaries[2], given;
  Request request(a, b, {summaries});
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
  const float scale = request.scale;
  summaries[0] = warp_summarize(request.target_row(k), findings.stats + position * tiles, scale,
                                kNegativeInfinity, request.greedy, vocab_size, lane);
  if (rows > 1) {
    const int64_t row = num_target_rows(a.base) + b * spec_length + k;
    summaries[1] = warp_summarize(request.draft_row(k), findings.stats + row * tiles, scale,
                                  kNegativeInfinity, false, vocab_size, lane);
  }
  if (lane != 0) return;
  const bool ends =
      is_last || !request.accepts_values(k, draft.id, draft.values, [&] { return draft.u; });
  findings.verdicts[position] = ends ? kEnds : kGoesOn;
  if (ends) findings.rows[position] = request.row(k, draft.id);
}

// `share`: tiles of a warp, at most 32.
template <typename T>
__global__ void __launch_bounds__(kDecidingWarps* kWarp, 4)
    decide_kernel(const __grid_constant__ LogitsParams a, int blocks, int share,
                  const __grid_constant__ Findings<T> findings) {
  __shared__ bool is_over;
  wait_for_launch_before();
  allow_next_launch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned b = blockIdx.x / blocks, k = grid_row();
  const unsigned spec_length = static_cast<unsigned>(a.base.spec_length);
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  int drafts = static_cast<int>(spec_length);
  if (a.base.num_draft_tokens)
    drafts = a.base.num_draft_tokens[b] < drafts ? a.base.num_draft_tokens[b] : drafts;
  if (k > 0 && static_cast<int>(k) > drafts) return;
  const bool is_last = static_cast<int>(k) >= drafts, greedy = a.is_greedy(b);
  const int rows = num_draft_rows(a) > 0 && !greedy && !is_last ? 2 : 1, all = rows * tiles;
  const int of_block = kDecidingWarps * share;
  const int block_begin = static_cast<int>(blockIdx.x % blocks) * of_block;
  if (block_begin >= all) return;
  const int begin = block_begin + warp * share, end = begin + share < all ? begin + share : all;
  const int64_t position = static_cast<int64_t>(b) * (spec_length + 1) + k;
  const T* x_p = static_cast<const T*>(a.base.target_probs) + b * a.base.target_row_stride +
                 k * a.base.target_position_stride;
  const T* x_q = static_cast<const T*>(a.base.draft_probs) + b * a.base.draft_row_stride +
                 k * a.base.draft_position_stride;
  const auto load = [&](int i, RawTile<T>& raw) {
    load_tile(i < tiles ? x_p : x_q, i < tiles ? i : i - tiles, vocab_size,
              kNegativeInfinityWord<T>, lane, raw);
  };
  RawTile<T> raw;
  if (begin < end) load(begin, raw);
  if (k > 0) {  // one warp looks, so that all leave together
    if (warp == 0) {
      const bool over = warp_is_over(findings.verdicts + position - k, k, lane);
      if (lane == 0) is_over = over;
    }
    __syncthreads();
    if (is_over) return;
  }
  const float scale = a.scale(b);
  TileStats own = {};
  for (int i = begin; i < end; ++i) {
    RawTile<T> next;
    if (i + 1 < end) load(i + 1, next);
    const TileStats found = warp_tile_stats(raw, scale, kNegativeInfinity, !greedy);
    if (lane == i - begin) own = found;
    raw = next;
  }
  const int i = begin + lane;
  if (i < end) {
    const int64_t row =
        i < tiles ? position : num_target_rows(a.base) + static_cast<int64_t>(b) * spec_length + k;
    findings.stats[row * tiles + (i < tiles ? i : i - tiles)] = own;
  }
  __syncthreads();
  if (warp != 0) return;
  const int count = all - block_begin < of_block ? all - block_begin : of_block;
  if (warp_completes(findings.arrived + position, count, all, lane)) {
    warp_decide_position(a, b, k, is_last, rows, findings, lane);
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

#ifndef FR_EMULATION
namespace fused_rejection {
namespace {

const void* const kLogitsKernels[] = {
    reinterpret_cast<const void*>(&positions_kernel<BFloat16, false>),
    reinterpret_cast<const void*>(&positions_kernel<float, false>),
    reinterpret_cast<const void*>(&positions_kernel<Float16, false>),
    reinterpret_cast<const void*>(&positions_kernel<float, true>),
    reinterpret_cast<const void*>(&positions_kernel<BFloat16, true>),
    reinterpret_cast<const void*>(&positions_kernel<Float16, true>),
    reinterpret_cast<const void*>(&logits_kernel<float, Step::kInCluster, true>),
    reinterpret_cast<const void*>(&logits_kernel<BFloat16, Step::kInCluster, true>),
    reinterpret_cast<const void*>(&logits_kernel<Float16, Step::kInCluster, true>),
};

bool has_one_block_a_multiprocessor(const LogitsParams& a) {  // as kResidentPositions has it
  return a.filters() || a.base.dtype == Dtype::kFloat32;
}

// Blocks of positions_kernel that run at once.
int64_t blocks_at_once(const LogitsParams& a, const Device& device) {
  return (has_one_block_a_multiprocessor(a) ? 1 : kResidentBlocks) * device.multiprocessors;
}

// Blocks that share a position's rows: many where about all of them run at once, few where there
// would be too many for the card to start; no more than have a tile for each warp.
int blocks_per_position(const LogitsParams& a, const Device& device) {
  const bool one = has_one_block_a_multiprocessor(a);
  const int64_t positions = num_target_rows(a.base), at_once = blocks_at_once(a, device);
  const int64_t tiles = num_tiles(a.base.vocab_size) * (num_draft_rows(a) > 0 ? 2 : 1);
  // A search for top-k alone is short: a larger cluster of it waits more than it saves.
  const bool only_ranked = a.top_k && !a.top_p && !a.min_p;
  int blocks = 2;
  if (4 * positions <= (only_ranked ? 4 : one ? 5 : 18) * device.multiprocessors) blocks = 4;
  if (8 * positions <= at_once * 5 / 4) blocks = kPortableCluster;
  static_assert(kPortableCluster <= kLargestTeam);
  if (!one && positions <= device.large_clusters[kLargestCluster]) blocks = kLargestCluster;
  while (blocks > 2 && blocks / 2 * kMaxWarps >= tiles) blocks /= 2;
  return blocks;
}

// Tiles that a warp takes of `tiles`, where there are `rows` such rows: as many as still give every
// place for a warp on the card some.
int share_of_tiles(int64_t rows, int tiles, const Device& device) {
  constexpr int kLeast = 1, kMost = 8;
  const int64_t places = device.multiprocessors * kResidentShares * kDrawingWarps;
  const int64_t share = rows * tiles / places;
  return static_cast<int>(std::clamp<int64_t>(share, kLeast, kMost));
}

int blocks_of_shares(int tiles, int of_block) { return (tiles + of_block - 1) / of_block; }

// The workspace: tile statistics, then thresholds and tile sums; or Findings.
struct Workspace {
  int64_t stats_bytes = 0, thresholds_bytes = 0, sums_bytes = 0;
  int64_t rows_bytes = 0, tokens_bytes = 0;
  int64_t counters_bytes = 0, verdicts_bytes = 0;  // these two begin as zeros, in early exit

  Workspace(const LogitsParams& a, const LogitsPlan& plan) {
    const int64_t targets = num_target_rows(a.base), rows = targets + num_draft_rows(a);
    const int64_t tiles = num_tiles(a.base.vocab_size), row_bytes = tiles * sizeof(TileStats);
    const int64_t sums = a.base.batch_size * tiles * static_cast<int64_t>(sizeof(float));
    if (plan.blocks_per_position > 0) {
      if (a.base.spec_length == 0) return;  // the token goes to the outputs
      verdicts_bytes = targets;
      if (!plan.early_exit) {
        tokens_bytes = targets * static_cast<int64_t>(sizeof(int32_t));
        return;
      }
      stats_bytes = (plan.deciding_share ? rows : targets) * row_bytes;
      rows_bytes = targets * static_cast<int64_t>(sizeof(LogitsRow<float>));
      sums_bytes = sums;
      counters_bytes = (targets + a.base.batch_size) * static_cast<int64_t>(sizeof(unsigned));
      return;
    }
    stats_bytes = rows * row_bytes;
    thresholds_bytes = a.filters() ? (rows + 1) / 2 * 8 : 0;
    sums_bytes = plan.fused.exchange == Exchange::kWorkspace ? sums : 0;
  }

  int64_t bytes() const {
    return stats_bytes + thresholds_bytes + sums_bytes + rows_bytes + tokens_bytes +
           counters_bytes + verdicts_bytes;
  }
};

// Summaries and, for block verification, reach.
int64_t table_bytes(const LogitsParams& a) {
  const int64_t table = (2 * a.base.spec_length + 1) * static_cast<int64_t>(sizeof(RowSummary));
  const int64_t reach = (a.base.spec_length + 1) * static_cast<int64_t>(sizeof(double));
  return table + (a.base.block_verification ? reach : 0);
}

int64_t cluster_bytes(const LogitsParams& a) {
  return a.base.block_verification
             ? exchange_bytes(a.base.vocab_size) + table_bytes(a)
             : PositionShared::bytes(num_tiles(a.base.vocab_size), a.filters(), 0);
}

template <typename T>
struct LaunchLogits {
  static cudaError_t run(const LogitsParams& a, const LogitsPlan& plan, char* workspace,
                         cudaStream_t stream) {
    return plan.blocks_per_position > 0 ? by_positions(a, plan, workspace, stream)
                                        : by_rows(a, plan, workspace, stream);
  }

 private:
  static cudaError_t by_positions(const LogitsParams& a, const LogitsPlan& plan, char* workspace,
                                  cudaStream_t stream) {
    const Workspace sizes(a, plan);
    const int64_t targets = num_target_rows(a.base);
    const int tiles = num_tiles(a.base.vocab_size);
    Findings<T> findings = {};
    if (a.base.spec_length > 0) {
      char* at = workspace;
      if (plan.early_exit) {
        findings.stats = reinterpret_cast<TileStats*>(at);
        findings.rows = reinterpret_cast<LogitsRow<T>*>(at += sizes.stats_bytes);
        findings.sums = reinterpret_cast<float*>(at += sizes.rows_bytes);
        findings.arrived = reinterpret_cast<unsigned*>(at += sizes.sums_bytes);
        findings.summed = findings.arrived + targets;
        const cudaError_t error = cudaMemsetAsync(
            at, kGoesOn, static_cast<size_t>(sizes.counters_bytes + sizes.verdicts_bytes), stream);
        if (error != cudaSuccess) return error;
      } else {
        findings.tokens = reinterpret_cast<int32_t*>(at);
      }
      findings.verdicts =
          reinterpret_cast<uint8_t*>(workspace + sizes.bytes() - sizes.verdicts_bytes);
    }
    const cudaError_t error =
        plan.deciding_share ? decide(a, plan, findings, stream) : find(a, plan, findings, stream);
    if (error != cudaSuccess || a.base.spec_length == 0) return error;
    if (plan.early_exit) {
      const int blocks = blocks_of_shares(tiles, kDrawingWarps * plan.drawing_share);
      const cudaLaunchConfig_t draw =
          configure(a.base.batch_size * blocks, kDrawingWarps * kWarp, stream);
      return launch_overlapping(draw_kernel<T>, draw, true, a, blocks, plan.drawing_share,
                                findings);
    }
    constexpr int requests = 4;  // a block
    const cudaLaunchConfig_t finish =
        configure((a.base.batch_size + requests - 1) / requests, requests * kWarp, stream);
    return launch_overlapping(finish_kernel, finish, true, a, findings.verdicts, findings.tokens);
  }

  static cudaError_t find(const LogitsParams& a, const LogitsPlan& plan,
                          const Findings<T>& findings, cudaStream_t stream) {
    const int blocks = plan.blocks_per_position, kept = plan.kept_tiles;
    cudaLaunchConfig_t config =
        configure(a.base.batch_size * blocks, warps_per_block(a.base.vocab_size) * kWarp, stream);
    config.gridDim.y = static_cast<unsigned>(a.base.spec_length + 1);
    const auto kernel = a.filters() ? positions_kernel<T, true> : positions_kernel<T, false>;
    const int64_t shared_bytes =
        PositionShared::bytes(num_tiles(a.base.vocab_size), a.filters(), kept);
    return launch_in_clusters(kernel, config, blocks, shared_bytes, a, blocks, plan.early_exit,
                              kept > 0, findings);
  }

  static cudaError_t decide(const LogitsParams& a, const LogitsPlan& plan,
                            const Findings<T>& findings, cudaStream_t stream) {
    const int tiles = num_tiles(a.base.vocab_size) * (num_draft_rows(a) > 0 ? 2 : 1);
    const int blocks = blocks_of_shares(tiles, kDecidingWarps * plan.deciding_share);
    cudaLaunchConfig_t config =
        configure(a.base.batch_size * blocks, kDecidingWarps * kWarp, stream);
    config.gridDim.y = static_cast<unsigned>(a.base.spec_length + 1);
    return launch_overlapping(decide_kernel<T>, config, true, a, blocks, plan.deciding_share,
                              findings);
  }

  static cudaError_t by_rows(const LogitsParams& a, const LogitsPlan& logits_plan, char* workspace,
                             cudaStream_t stream) {
    const Plan& plan = logits_plan.fused;
    const Workspace sizes(a, logits_plan);
    TileStats* stats = reinterpret_cast<TileStats*>(workspace);
    float* thresholds =
        sizes.thresholds_bytes ? reinterpret_cast<float*>(workspace + sizes.stats_bytes) : nullptr;
    float* sums = reinterpret_cast<float*>(workspace + sizes.stats_bytes + sizes.thresholds_bytes);
    const int64_t rows = num_target_rows(a.base) + num_draft_rows(a);
    const int tiles = num_tiles(a.base.vocab_size), warps = warps_per_block(a.base.vocab_size);
    const int threads = warps * kWarp, n = plan.blocks_per_row;
    cudaLaunchConfig_t config = configure(a.base.batch_size * n, threads, stream);
    cudaLaunchConfig_t pass = configure(rows * ((tiles + warps - 1) / warps), threads, stream);
    const float* no_thresholds = nullptr;
    cudaError_t error =
        cudaLaunchKernelEx(&pass, tile_stats_kernel<T>, a, rows, no_thresholds, stats);
    if (error == cudaSuccess && thresholds) {
      cudaLaunchConfig_t search = configure(rows, threads, stream);
      search.dynamicSmemBytes = sizeof(Search);
      error = cudaFuncSetAttribute(threshold_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(sizeof(Search)));
      const TileStats* known = stats;
      if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&search, threshold_kernel<T>, a, known, thresholds);
      }
      const float* found = thresholds;
      if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&pass, tile_stats_kernel<T>, a, rows, found, stats);
      }
    }
    if (error != cudaSuccess) return error;
    const TileStats* known = stats;
    const float* found = thresholds;
    if (plan.exchange == Exchange::kCluster) {
      return launch_in_clusters(logits_kernel<T, Step::kInCluster, true>, config, n,
                                cluster_bytes(a), a, n, known, found, sums);
    }
    config.dynamicSmemBytes = static_cast<size_t>(table_bytes(a));
    const bool block = a.base.block_verification;
    if (!block) {
      error = cudaLaunchKernelEx(&config, logits_kernel<T, Step::kSum, false>, a, n, known, found,
                                 sums);
      if (error != cudaSuccess) return error;
    }
    config.gridDim = dim3(static_cast<unsigned>(a.base.batch_size));
    const auto select =
        block ? logits_kernel<T, Step::kSelect, true> : logits_kernel<T, Step::kSelect, false>;
    return cudaLaunchKernelEx(&config, select, a, 1, known, found, sums);
  }
};

}  // namespace

int plan_from_logits(const LogitsParams& a, Exchange exchange, int blocks, LogitsPlan* plan) {
  if (table_bytes(a) > kDefaultSharedBytes) return cudaErrorInvalidValue;
  const Device* device = nullptr;
  cudaError_t error = current_device(kLogitsKernels, &device);
  if (error == cudaSuccess) {
    error = plan_blocks(*device, a.base.batch_size, a.base.vocab_size, cluster_bytes(a), exchange,
                        blocks, &plan->fused);
  }
  if (error != cudaSuccess) return error;
  plan->blocks_per_position = 0;
  plan->early_exit = false;
  plan->kept_tiles = plan->deciding_share = plan->drawing_share = 0;
  if (plan->fused.exchange == Exchange::kCluster && !a.base.block_verification) {
    plan->blocks_per_position = blocks > 0 ? blocks : blocks_per_position(a, *device);
    plan->kept_tiles =
        tiles_to_keep(a.base.vocab_size, plan->blocks_per_position,
                      warps_per_block(a.base.vocab_size), device->shared_bytes - cluster_bytes(a));
    // With all of them running at once there is no end to be found, and time to draw for nothing.
    const int64_t all = num_target_rows(a.base) * plan->blocks_per_position;
    plan->early_exit = a.base.spec_length > 0 && all > blocks_at_once(a, *device);
    const int tiles = num_tiles(a.base.vocab_size);
    plan->drawing_share = share_of_tiles(a.base.batch_size, tiles, *device);
    // Of few requests the clusters of positions_kernel know the verdict sooner, and float32 rows
    // take it as long. Twice the tiles make as many blocks of twice the share.
    constexpr int kMany = 32;
    const bool many = a.base.batch_size >= kMany && a.base.dtype != Dtype::kFloat32;
    if (plan->early_exit && blocks == 0 && !a.filters() && many) {
      plan->deciding_share = num_draft_rows(a) > 0 ? 8 : 4;
    }
  }
  plan->workspace_bytes = Workspace(a, *plan).bytes();
  return cudaSuccess;
}

int launch_from_logits(const LogitsParams& a, const LogitsPlan& plan, void* workspace,
                       void* stream) {
  if (a.base.batch_size == 0) return cudaSuccess;
  return for_dtype<LaunchLogits>(a.base.dtype, a, plan, static_cast<char*>(workspace),
                                 static_cast<cudaStream_t>(stream));
}

}  // namespace fused_rejection
#endif
