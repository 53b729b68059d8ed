// The CUDA kernels on logits. In clusters and without filters two launches: positions_kernel, a
// cluster a row, reads the rows and decides, and draw_kernel draws from the one row that matters.
// Else: a pass over all rows (a warp a tile), and the fused kernel of warp.cuh, which finishes the
// rows' sums, decides, and draws. Filters add a search for each row's threshold and a second pass
// over what it keeps.
#include "from_logits.h"
#include "threshold.cuh"
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

// One warp: the largest of the lanes' values, in every lane.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, d));
  }
  return value;
}

// 16 bytes of logits as they are loaded: unpacked, two 16-bit logits would take two registers.
struct alignas(16) Words {
  uint32_t word[4];
};

template <typename T>
constexpr uint32_t kNegativeInfinityWord = 0xFF800000u;
template <>
constexpr uint32_t kNegativeInfinityWord<BFloat16> = 0xFF80FF80u;
template <>
constexpr uint32_t kNegativeInfinityWord<Float16> = 0xFC00FC00u;

// A lane's share of a tile of logits, -inf beyond the vocabulary.
template <typename T>
struct RawTile {
  Words words[kVectors<T>];

  __device__ __forceinline__ float at(int j, int e) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[j].word[e]);
    } else {
      return static_cast<float>(T{static_cast<uint16_t>(words[j].word[e / 2] >> (e % 2 * 16))});
    }
  }
};

__device__ __forceinline__ uint32_t word_of(const float& x) { return bits_of(x); }
template <typename T>
__device__ __forceinline__ uint32_t word_of(const T& x) {
  return x.bits;
}

// 16 bytes one element at a time; the first `left` of them exist. Packed only once all are there.
template <typename T>
__device__ __forceinline__ Words load_elements(const T* from, int left) {
  constexpr int per_word = 4 / sizeof(T), bits = 8 * sizeof(T);
  uint32_t element[kVector<T>];
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    element[e] = kNegativeInfinityWord<T> >> (32 - bits);
    if (e < left) element[e] = word_of(read_argument(from + e));
  }
  Words words = {};
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    words.word[e / per_word] |= element[e] << (e % per_word * bits);
  }
  return words;
}

// One warp: reads a tile. No load waits for another.
template <typename T>
__device__ __forceinline__ void load_tile(const T* x, int tile, int vocab_size, int lane,
                                          RawTile<T>& raw) {
  constexpr int step = kWarp * kVector<T>;
  const int begin = tile * kTile + lane * kVector<T>, left = vocab_size - begin;
  if (by_vectors<T>(x, nullptr, vocab_size)) {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
#pragma unroll
      for (uint32_t& word : raw.words[j].word) word = kNegativeInfinityWord<T>;
      if (j * step < left) {
        raw.words[j] = read_argument(reinterpret_cast<const Words*>(x + begin + j * step));
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
      raw.words[j] = load_elements(x + begin + j * step, left - j * step);
    }
  }
}

// One warp: the statistics of a tile, in every lane.
template <typename T>
__device__ __forceinline__ TileStats warp_tile_stats(const RawTile<T>& raw, float scale,
                                                     float threshold) {
  Share<T, float> w;
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) w.value[j][e] = raw.at(j, e);
  }
  if (threshold > kNegativeInfinity) {
    w.each([&](float& w_i, int) {
      const float logit = finite_logit(w_i);
      w_i = logit >= threshold ? logit : kNegativeInfinity;
    });
  }
  float largest = kNegativeInfinity;
  w.each([&](float w_i, int) { largest = fmaxf(largest, w_i); });  // a NaN is left out
  largest = warp_max(largest);
  if (!(largest > kNegativeInfinity)) return {largest, 0.0f};
  if (largest > kLargestFloat) {
    w.each([&](float& w_i, int) { w_i = finite_logit(w_i); });
    largest = kLargestFloat;
  }
  w.each([&](float& w_i, int) { w_i = exp2_portable((w_i - largest) * scale); });  // 0 for a NaN
  return {largest, warp_sum(w)};
}

template <typename T>
__device__ __forceinline__ TileStats warp_tile_stats(const T* x, int tile, int vocab_size,
                                                     float scale, float threshold, int lane) {
  RawTile<T> raw;
  load_tile(x, tile, vocab_size, lane, raw);
  return warp_tile_stats(raw, scale, threshold);
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

// One warp: the largest logit of a row, from its tiles' statistics.
__device__ __forceinline__ float warp_largest(const TileStats* stats, int tiles, int lane) {
  float largest = kNegativeInfinity;
  for (int tile = lane; tile < tiles; tile += kWarp) {
    largest = stats[tile].largest > largest ? stats[tile].largest : largest;
  }
  return warp_max(largest);
}

// One warp: the first index whose logit is `largest`.
template <typename T>
__device__ int warp_argmax(const T* x, const TileStats* stats, float largest, int vocab_size,
                           int lane) {
  if (!(largest > kNegativeInfinity)) return -1;
  const int tiles = num_tiles(vocab_size);
  int tile = 0;
  for (;; tile += kWarp) {
    const int t = tile + lane;
    const unsigned hits = __ballot_sync(kAllLanes, t < tiles && stats[t].largest == largest);
    if (!hits) continue;
    tile += __ffs(hits) - 1;
    break;
  }
  for (int first = tile * kTile;; first += kWarp) {
    const int i = first + lane;
    const bool hit =
        i < vocab_size && finite_logit(static_cast<float>(read_argument(x + i))) == largest;
    const unsigned hits = __ballot_sync(kAllLanes, hit);
    if (hits) return first + __ffs(hits) - 1;
  }
}

// One warp: a row's summary, in every lane.
template <typename T>
__device__ RowSummary warp_summarize(const T* x, const TileStats* stats, float scale,
                                     float threshold, bool greedy, int vocab_size, int lane) {
  const int tiles = num_tiles(vocab_size);
  const float largest = warp_largest(stats, tiles, lane);
  if (greedy) {
    const int argmax = warp_argmax(x, stats, largest, vocab_size, lane);
    return {largest, stats, largest, kNegativeInfinity, argmax};
  }
  const double sum = lane_span_sum(span_of(tiles, lane),
                                   [&](int i) { return tile_weight(stats[i], largest, scale); });
  const double total = __shfl_sync(kAllLanes, warp_scan(sum, lane), kSpans - 1);
  return {logsumexp_of(total, largest, scale), stats, largest, threshold, -1};
}

// ---- Filters: a block a row looks for the threshold.

template <typename T>
__global__ void __launch_bounds__(kThresholdWarps* kWarp)
    threshold_kernel(const LogitsParams a, const TileStats* stats, float* thresholds) {
  __shared__ Search search;
  const int64_t row = blockIdx.x;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const LogitsRowAt<T> at = locate_row<T>(a, row);
  if (!at.x) return;
  const int top_k = a.top_k ? a.top_k[at.b] : 0;
  const float top_p = a.top_p ? a.top_p[at.b] : 1.0f, min_p = a.min_p ? a.min_p[at.b] : 0.0f;
  const bool by_rank = top_k > 0 && top_k < vocab_size;
  const bool filtered = !a.is_greedy(at.b) && (by_rank || top_p < 1.0f || min_p > 0.0f);
  const TileStats* row_stats = stats + row * tiles;
  float threshold = kNegativeInfinity;
  if (filtered) {
    if (block_warp() == 0) {
      const float largest = warp_largest(row_stats, tiles, block_lane());
      if (threadIdx.x == 0) search.largest = largest;
    }
    __syncthreads();
    const Distance distance{search.largest, a.scale(at.b)};
    if (distance.largest > kNegativeInfinity) {
      ThresholdSearch<T> found{search, {at.x, row_stats, vocab_size}, distance};
      if (by_rank) found.keep_top(top_k);
      if (top_p < 1.0f) found.keep_share(top_p);
      if (min_p > 0.0f) found.keep_near(min_p);
      threshold = found.threshold;
    }
  }
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
    sums.pending = reinterpret_cast<uint64_t*>(reach + (block ? a.base.spec_length + 1 : 0));
    sums.sums = reinterpret_cast<float*>(sums.pending + 2);
    if (!block && threadIdx.x == blockDim.x - 1) expect_sums(sums, tiles);
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

// ---- Verification without filters in two launches. In the first, every position of every request
// has a cluster of blocks: they share out the tiles of its target row, and of its draft row where
// the logsumexp was not given, and the cluster's first block decides over the draft. In the second
// a cluster a request draws after the first position that ends it. First positions come first, so
// that where not all blocks run at once, those of rows after a rejection find it and read nothing.

// What the first launch leaves to the second, in global memory.
template <typename T>
struct Findings {
  LogitsRow<T>* rows;  // [B][K + 1], to draw from where the position ends the request
  TileStats* stats;    // [B][K + 1][tiles], of the target's rows
  uint8_t* verdicts;   // [B][K + 1]
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

  __device__ RowSummary target(int64_t) const { return rows[0]; }
  __device__ RowSummary draft(int64_t) const { return rows[1]; }
};

// One warp: whether a position before k is known to end the request. Only a hint: what other blocks
// find is seen late or not at all.
__device__ __forceinline__ bool warp_is_over(const volatile uint8_t* verdicts, int64_t k,
                                             int lane) {
  for (int64_t first = 0; first < k; first += kWarp) {
    const bool ends = first + lane < k && verdicts[first + lane] == kEnds;
    if (__ballot_sync(kAllLanes, ends)) return true;
  }
  return false;
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentBlocks)
    positions_kernel(const LogitsParams a, int blocks_per_row, bool early_exit,
                     Findings<T> findings) {
  __shared__ RowSummary summaries[2];
  __shared__ DraftToken draft;
  FR_DYNAMIC_SHARED(uint64_t,
                    pending);  // then TileStats [2][tiles], both of a cluster's first block

  allow_next_launch();
  wait_for_launch_before();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto [cluster, rank] = place_of<Step::kInCluster>(blocks_per_row);
  const int64_t k = cluster / a.base.batch_size, b = cluster % a.base.batch_size;
  const int64_t spec_length = a.base.spec_length;
  const LogitsRequest<T, PositionSummaries> request(a, b, {summaries});
  const bool is_last = k >= request.drafts;
  if (k > 0 && k > request.drafts) return;

  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const int rows = num_draft_rows(a) > 0 && !request.greedy && !is_last ? 2 : 1;
  float* stats = reinterpret_cast<float*>(pending + 1);
  if (rank == 0 && threadIdx.x == 0) {
    expect_bytes(pending, rows * tiles * static_cast<int>(sizeof(TileStats)));
  }
  __syncwarp();
  cluster_start();

  const int64_t position = b * (spec_length + 1) + k;
  TileStats* target_stats = findings.stats + position * tiles;
  const auto looks_over = [&] {
    return early_exit && warp_is_over(findings.verdicts + position - k, k, lane);
  };
  bool is_over = looks_over();
  const auto load = [&](int i, RawTile<T>& raw) {
    const T* x = i < tiles ? request.target_row(k) : request.draft_row(k);
    load_tile(x, i < tiles ? i : i - tiles, vocab_size, lane, raw);
  };
  int i = rank * warps + warp;
  RawTile<T> raw;
  if (i < rows * tiles && !is_over) load(i, raw);
  if (rank == 0 && warp == warps - 1 && lane == 0 && !is_last) {
    const int64_t id = request.id(k);
    const float u = uniform(a.base, b, k);  // while the id is on its way
    draft = {id, u, request.values(k, id)};
    if (a.draft_logsumexp) {
      const double sum = a.draft_logsumexp[b * spec_length + k];
      summaries[1] = {sum, nullptr, 0.0f, kNegativeInfinity, -1};
    }
  }
  __syncwarp();
  cluster_wait();
  while (i < rows * tiles) {
    TileStats found = {kNegativeInfinity, 0.0f};  // something, since the first block waits for it
    if (!is_over) {
      is_over = looks_over();
      found = warp_tile_stats(raw, request.scale, kNegativeInfinity);
    }
    if (lane == 0) {
      send_pair_to_block(stats + 2 * i, pending, 0, found.largest, found.sum);
      if (i < tiles) target_stats[i] = found;
    }
    i += warps * blocks_per_row;
    if (i < rows * tiles && !is_over) load(i, raw);
  }
  if (rank != 0) return;

  if (warp < rows) {
    wait_for_bytes(pending);
    const T* x = warp == 0 ? request.target_row(k) : request.draft_row(k);
    const TileStats* known = reinterpret_cast<const TileStats*>(stats) + warp * tiles;
    RowSummary summary = {};
    if (!is_over) {
      summary = warp_summarize(x, known, request.scale, kNegativeInfinity, request.greedy,
                               vocab_size, lane);
    }
    summary.stats = target_stats;  // not this block's copy; of the draft's row they are not kept
    if (lane == 0) summaries[warp] = summary;
  }
  __syncthreads();
  if (threadIdx.x == 0 && !is_over) {
    const bool ends =
        is_last || !request.accepts_values(k, draft.id, draft.values, [&] { return draft.u; });
    findings.verdicts[position] = ends ? kEnds : kGoesOn;
    if (ends) {
      findings.rows[position] = request.row(k, is_last ? kPlaceholderTokenId : draft.id);
    }
  }
}

// A request whose drafts have been decided over.
template <typename T>
struct VerifiedRequest : Request<T> {
  using Row = LogitsRow<T>;
  const Row* rows;
  const uint8_t* verdicts;

  __device__ VerifiedRequest(const LogitsParams& a, int64_t b, const Findings<T>& findings)
      : Request<T>(a.base, b),
        rows(findings.rows + b * (a.base.spec_length + 1)),
        verdicts(findings.verdicts + b * (a.base.spec_length + 1)) {}
};

template <typename T>
__device__ __forceinline__ Decision<LogitsRow<T>> warp_decide(const VerifiedRequest<T>& request,
                                                              int lane) {
  wait_for_launch_before();
  for (int64_t first = 0;; first += kWarp) {
    const int64_t k = first + lane;
    const bool ends = k >= request.drafts || request.verdicts[k] == kEnds;
    const unsigned all = __ballot_sync(kAllLanes, ends);
    if (all) return {first + __ffs(all) - 1, request.rows[first + __ffs(all) - 1]};
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentBlocks)
    draw_kernel(const LogitsParams a, int blocks_per_row, Findings<T> findings) {
  FR_DYNAMIC_SHARED(uint64_t, shared);
  const auto [b, rank] = place_of<Step::kInCluster>(blocks_per_row);
  const int tiles = num_tiles(a.base.vocab_size);
  const TileSums sums{reinterpret_cast<float*>(shared + 2), shared};
  if (threadIdx.x == blockDim.x - 1) expect_sums(sums, tiles);
  __syncwarp();
  cluster_start();
  const VerifiedRequest<T> request(a, b, findings);
  sample_request<Step::kInCluster>(request, rank, blocks_per_row, sums);
}

// sample_from_logits without filters, in one launch and one pass: the blocks of a request tell one
// another their tiles' statistics, and the one that owns the drawn tile finds it in its own L1.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentBlocks)
    sample_kernel(const LogitsParams a, int blocks_per_row) {
  FR_DYNAMIC_SHARED(uint64_t, pending);  // then TileStats [tiles]
  float* shared = reinterpret_cast<float*>(pending + 1);
  if (threadIdx.x == 0) {
    expect_bytes(pending, num_tiles(a.base.vocab_size) * static_cast<int>(sizeof(TileStats)));
  }
  cluster_start();
  wait_for_launch_before();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto [b, rank] = place_of<Step::kInCluster>(blocks_per_row);
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const Request<T> request(a.base, b);
  const T* x = request.target_row(0);
  const bool greedy = a.is_greedy(b);
  const float scale = a.scale(b);
  cluster_wait();
  for (int tile = rank * warps + warp; tile < tiles; tile += warps * blocks_per_row) {
    const TileStats found = warp_tile_stats(x, tile, vocab_size, scale, kNegativeInfinity, lane);
    if (lane < blocks_per_row) {
      send_pair_to_block(shared + 2 * tile, pending, lane, found.largest, found.sum);
    }
  }
  if (warp != 0) return;
  wait_for_bytes(pending);
  const TileStats* stats = reinterpret_cast<const TileStats*>(shared);
  const RowSummary summary =
      warp_summarize(x, stats, scale, kNegativeInfinity, greedy && rank == 0, vocab_size, lane);
  if (rank == 0 && lane == 0) {
    a.logsumexp[b] = summary.logsumexp;
    a.base.num_accepted[b] = 0;
  }
  if (greedy || !has_mass(summary.logsumexp)) {
    if (rank == 0 && lane == 0) request.store(0, summary.argmax < 0 ? 0 : summary.argmax);
    return;
  }
  LogitsRow<T> row = {};
  row.p = x;
  row.one_hot = row.fixed_token = -1;
  row.stats = stats;
  row.largest = summary.largest;
  row.softmax = softmax_of(summary.logsumexp, scale, kNegativeInfinity);
  const auto mass = [&](int tile) { return row.tile_mass(tile); };
  const Pick tile = warp_pick_tile(mass, tiles, uniform(a.base, b, 0), lane);
  if (tile.item / warps % blocks_per_row != rank) return;
  const int token = warp_pick_token(row.beside_largest(), tile, vocab_size, lane);
  if (lane == 0) request.store(0, token);
}

}  // namespace
}  // namespace fused_rejection

#ifndef FR_EMULATION
namespace fused_rejection {
namespace {

const void* const kLogitsKernels[] = {
    reinterpret_cast<const void*>(&sample_kernel<float>),
    reinterpret_cast<const void*>(&sample_kernel<BFloat16>),
    reinterpret_cast<const void*>(&sample_kernel<Float16>),
    reinterpret_cast<const void*>(&draw_kernel<float>),
    reinterpret_cast<const void*>(&draw_kernel<BFloat16>),
    reinterpret_cast<const void*>(&draw_kernel<Float16>),
    reinterpret_cast<const void*>(&logits_kernel<float, Step::kInCluster, false>),
    reinterpret_cast<const void*>(&logits_kernel<BFloat16, Step::kInCluster, false>),
    reinterpret_cast<const void*>(&logits_kernel<Float16, Step::kInCluster, false>),
    reinterpret_cast<const void*>(&logits_kernel<float, Step::kInCluster, true>),
    reinterpret_cast<const void*>(&logits_kernel<BFloat16, Step::kInCluster, true>),
    reinterpret_cast<const void*>(&logits_kernel<Float16, Step::kInCluster, true>),
};

// A draft step: one launch does it.
bool is_plain_sample(const LogitsParams& a, Exchange exchange) {
  return exchange == Exchange::kCluster && a.base.spec_length == 0 && a.logsumexp &&
         !(a.top_k || a.top_p || a.min_p);
}

int64_t positions_bytes(const LogitsParams& a) {
  return static_cast<int64_t>(sizeof(uint64_t)) +
         2 * num_tiles(a.base.vocab_size) * static_cast<int64_t>(sizeof(TileStats));
}

// Whether positions_kernel and draw_kernel can do it.
bool runs_by_positions(const LogitsParams& a, Exchange exchange) {
  return exchange == Exchange::kCluster && !is_plain_sample(a, exchange) &&
         !a.base.block_verification && !a.filters() && positions_bytes(a) <= kDefaultSharedBytes;
}

// Blocks that share a position's rows, at least two: as many as have a tile for each warp, and as
// long as there are not too many of them for the card to start.
constexpr int64_t kBlocksAMultiprocessor = 9;

int blocks_per_position(const LogitsParams& a, int multiprocessors) {
  const int64_t positions = num_target_rows(a.base);
  const int64_t tiles = num_tiles(a.base.vocab_size) * (num_draft_rows(a) > 0 ? 2 : 1);
  int blocks = kPortableCluster;
  while (blocks > 2 && (blocks / 2 * kMaxWarps >= tiles ||
                        positions * blocks > kBlocksAMultiprocessor * multiprocessors)) {
    blocks /= 2;
  }
  return blocks;
}

constexpr int64_t kFewRows = 132;  // about the multiprocessors of a large card

// The workspace: tile statistics, then Findings' rows and verdicts, or thresholds and tile sums.
struct Workspace {
  int64_t stats_bytes, rows_bytes, verdicts_bytes, thresholds_bytes, sums_bytes;

  Workspace(const LogitsParams& a, const LogitsPlan& plan) {
    const Exchange exchange = plan.fused.exchange;
    const bool by_positions = plan.blocks_per_position > 0;
    const int64_t targets = num_target_rows(a.base);
    const int64_t rows = is_plain_sample(a, exchange) ? 0
                         : by_positions               ? targets
                                                      : targets + num_draft_rows(a);
    const int64_t tiles = num_tiles(a.base.vocab_size);
    stats_bytes = rows * tiles * static_cast<int64_t>(sizeof(TileStats));
    rows_bytes = by_positions ? targets * static_cast<int64_t>(sizeof(LogitsRow<float>)) : 0;
    verdicts_bytes = by_positions ? targets : 0;
    thresholds_bytes = a.filters() ? (rows + 1) / 2 * 8 : 0;
    sums_bytes = exchange == Exchange::kWorkspace
                     ? a.base.batch_size * tiles * static_cast<int64_t>(sizeof(float))
                     : 0;
  }

  int64_t bytes() const {
    return stats_bytes + rows_bytes + verdicts_bytes + thresholds_bytes + sums_bytes;
  }
};

// Summaries and, for block verification, reach.
int64_t table_bytes(const LogitsParams& a) {
  const int64_t table = (2 * a.base.spec_length + 1) * static_cast<int64_t>(sizeof(RowSummary));
  const int64_t reach = (a.base.spec_length + 1) * static_cast<int64_t>(sizeof(double));
  return table + (a.base.block_verification ? reach : 0);
}

int64_t cluster_bytes(const LogitsParams& a) {
  return exchange_bytes(a.base.vocab_size) + table_bytes(a);
}

// Few rows leave multiprocessors idle: then a row has as many loads in flight as one block can
// have.
int threshold_warps(int64_t rows, int tiles) {
  return std::min(std::max(tiles, 2), rows <= kFewRows ? kThresholdWarps : kMaxWarps);
}

template <typename T>
struct LaunchLogits {
  static cudaError_t run(const LogitsParams& a, const LogitsPlan& logits_plan, char* workspace,
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
    if (is_plain_sample(a, plan.exchange)) {
      const size_t shared_bytes = sizeof(uint64_t) + tiles * sizeof(TileStats);
      return launch_in_clusters(sample_kernel<T>, config, n, static_cast<int64_t>(shared_bytes), a,
                                n);
    }
    if (logits_plan.blocks_per_position > 0) {
      const int blocks = logits_plan.blocks_per_position;
      char* rows_at = workspace + sizes.stats_bytes;
      const Findings<T> findings{reinterpret_cast<LogitsRow<T>*>(rows_at), stats,
                                 reinterpret_cast<uint8_t*>(rows_at + sizes.rows_bytes)};
      const bool early_exit = logits_plan.early_exit;
      cudaError_t error = cudaSuccess;
      if (early_exit) {
        error = cudaMemsetAsync(findings.verdicts, kGoesOn,
                                static_cast<size_t>(sizes.verdicts_bytes), stream);
      }
      if (error == cudaSuccess) {
        const cudaLaunchConfig_t first =
            configure(num_target_rows(a.base) * blocks, threads, stream);
        error = launch_in_clusters(positions_kernel<T>, first, blocks, positions_bytes(a), a,
                                   blocks, early_exit, findings);
      }
      if (error != cudaSuccess) return error;
      return launch_in_clusters(draw_kernel<T>, config, n, exchange_bytes(a.base.vocab_size), a, n,
                                findings);
    }

    cudaLaunchConfig_t pass = configure(rows * ((tiles + warps - 1) / warps), threads, stream);
    const float* no_thresholds = nullptr;
    cudaError_t error =
        cudaLaunchKernelEx(&pass, tile_stats_kernel<T>, a, rows, no_thresholds, stats);
    if (error == cudaSuccess && thresholds) {
      cudaLaunchConfig_t search = configure(rows, threshold_warps(rows, tiles) * kWarp, stream);
      const TileStats* known = stats;
      error = cudaLaunchKernelEx(&search, threshold_kernel<T>, a, known, thresholds);
      const float* found = thresholds;
      if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&pass, tile_stats_kernel<T>, a, rows, found, stats);
      }
    }
    if (error != cudaSuccess) return error;
    const TileStats* known = stats;
    const float* found = thresholds;
    const bool block = a.base.block_verification;
    if (plan.exchange == Exchange::kCluster) {
      const auto kernel = block ? logits_kernel<T, Step::kInCluster, true>
                                : logits_kernel<T, Step::kInCluster, false>;
      return launch_in_clusters(kernel, config, n, cluster_bytes(a), a, n, known, found, sums);
    }
    config.dynamicSmemBytes = static_cast<size_t>(table_bytes(a));
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

int plan_from_logits(const LogitsParams& a, Exchange exchange, int blocks_per_row,
                     LogitsPlan* plan) {
  if (table_bytes(a) > kDefaultSharedBytes) return cudaErrorInvalidValue;
  const Device* device = nullptr;
  cudaError_t error = current_device(kLogitsKernels, &device);
  if (error == cudaSuccess) {
    error = plan_blocks(*device, a.base.batch_size, a.base.vocab_size, cluster_bytes(a), exchange,
                        blocks_per_row, &plan->fused);
  }
  if (error != cudaSuccess) return error;
  // What blocks send to one another wants a cluster of at least two.
  int& drawing = plan->fused.blocks_per_row;
  if (plan->fused.exchange == Exchange::kCluster && blocks_per_row == 0) {
    drawing = std::max(drawing, 2);
  }
  plan->blocks_per_position = 0;
  if (runs_by_positions(a, plan->fused.exchange)) {
    plan->blocks_per_position = blocks_per_position(a, device->multiprocessors);
    const int64_t blocks = num_target_rows(a.base) * plan->blocks_per_position;
    plan->early_exit = blocks > 2 * kResidentBlocks * device->multiprocessors;
    if (blocks_per_row == 0 && 2 * drawing <= kPortableCluster &&
        2 * drawing * a.base.batch_size <= kResidentBlocks * device->multiprocessors) {
      drawing *= 2;
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
