// The CUDA kernels on logits. In clusters and without filters one launch, rounds_kernel, takes a
// few rows at a time and stops at the first rejection. Else two launches: a pass over all rows at
// once (a warp a tile), and the fused kernel of warp.cuh, which finishes the rows' sums, decides,
// and draws from the one row that matters. Filters add a search for each row's threshold and a
// second pass over what it keeps.
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
  const TileStats tile_stats =
      warp_tile_stats(at.x, tile, vocab_size, a.scale(at.b), threshold, lane);
  if (lane == 0) stats[row * tiles + tile] = tile_stats;
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

// ---- Verification without filters in one launch: the blocks of a request take its rows in rounds.
// In a round they share out the tiles of the next few target rows, and of the draft's rows where
// their logsumexp was not given, and tell one another the tiles' statistics; then each block
// finishes the rows and decides. Rows after the round of the first rejection are never read.

struct DraftToken {
  int64_t id;
  float u;
  DraftValues values;
};

// Rows whose tiles' statistics a block keeps: K + 1 of the target, then maybe K of the draft.
FR_HOST_DEVICE constexpr int64_t rounds_rows(const LogitsParams& a) {
  return a.base.spec_length + 1 + (num_draft_rows(a) > 0 ? a.base.spec_length : 0);
}

// The shared memory of rounds_kernel. Every row has a place of its own, so that no round waits for
// another block to have left the one before it.
struct RoundsMemory {
  RowSummary* table;   // [2 K + 1], as TableSummaries
  DraftToken* drafts;  // [K]
  uint64_t* pending;   // [K + 1]: what each round still waits for
  TileSums sums;
  TileStats* stats;  // [rounds_rows][tiles]

  __device__ RoundsMemory(void* shared, int64_t spec_length, int tiles) {
    table = static_cast<RowSummary*>(shared);
    drafts = reinterpret_cast<DraftToken*>(table + 2 * spec_length + 1);
    pending = reinterpret_cast<uint64_t*>(drafts + spec_length);
    sums.pending = pending + spec_length + 1;
    sums.sums = reinterpret_cast<float*>(sums.pending + 2);
    stats = reinterpret_cast<TileStats*>(sums.sums + 2 * tiles);
  }
};

constexpr int64_t rounds_bytes(const LogitsParams& a) {
  const int64_t k = a.base.spec_length, tiles = num_tiles(a.base.vocab_size);
  const int64_t bytes = (2 * k + 1) * sizeof(RowSummary) + k * sizeof(DraftToken) +
                        (k + 3) * sizeof(uint64_t) + 2 * tiles * sizeof(float);
  return bytes + rounds_rows(a) * tiles * static_cast<int64_t>(sizeof(TileStats));
}

// The rows of one round: target rows `first` to `end`, then draft rows `first` to `drafts_end`.
struct Round {
  int64_t first, end, drafts_end;

  __device__ int rows() const { return static_cast<int>(end - first + drafts_end - first); }
  __device__ bool is_draft(int i) const { return i >= end - first; }
  __device__ int64_t position(int i) const {
    return is_draft(i) ? first + i - (end - first) : first + i;
  }
};

// A request's rounds of `size` positions.
struct Rounds {
  int64_t drafts, size;
  bool draft_rows;  // whether they are summed too

  __device__ Round operator[](int64_t round) const {
    const int64_t first = round * size, end = first + size < drafts + 1 ? first + size : drafts + 1;
    return {first, end, !draft_rows ? first : end < drafts ? end : drafts};
  }
  __device__ int64_t count() const { return (drafts + size) / size; }
};

// A row of a round: its logits, and its place in `table` and, by tiles, in `stats`.
template <typename T>
struct RoundRow {
  const T* x;
  int64_t place;
};

template <typename Request>
__device__ __forceinline__ auto row_of_round(const Request& request, const Round& round, int i) {
  const int64_t k = round.position(i);
  using T = std::remove_cv_t<std::remove_pointer_t<decltype(request.p)>>;
  return round.is_draft(i) ? RoundRow<T>{request.draft_row(k), request.params->spec_length + 1 + k}
                           : RoundRow<T>{request.target_row(k), k};
}

// One warp: what decides over the drafts, beside their rows' sums.
template <typename Request>
__device__ __forceinline__ void gather_drafts(const Request& request, const RoundsMemory& memory,
                                              int lane) {
  const LogitsParams& a = *request.logits;
  const int64_t spec_length = a.base.spec_length;
  for (int64_t k = lane; k < request.drafts; k += kWarp) {
    const int64_t id = request.id(k);
    const float u = uniform(a.base, request.b, k);  // while the id is on its way
    memory.drafts[k] = {id, u, request.values(k, id)};
    if (!a.draft_logsumexp) continue;
    const double sum = a.draft_logsumexp[request.b * spec_length + k];
    memory.table[spec_length + 1 + k] = {sum, nullptr, 0.0f, kNegativeInfinity, -1};
  }
}

// This block's share of a round's tiles, each loaded while the one before it is summed. `meanwhile`
// is called while the first is on its way.
template <typename T, typename Request, typename Meanwhile>
__device__ __forceinline__ void send_round(const Request& request, const Round& round,
                                           uint64_t* pending, TileStats* stats, int rank,
                                           int blocks_per_row, const Meanwhile& meanwhile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int vocab_size = static_cast<int>(request.params->vocab_size);
  const int tiles = num_tiles(vocab_size), rows = round.rows(), step = warps * blocks_per_row;
  int i = 0, tile = rank * warps + warp;
  RawTile<T> next;
  TileStats* next_place = nullptr;  // null after the last
  const auto load_next = [&] {
    for (; tile >= tiles; tile -= tiles) ++i;
    next_place = nullptr;
    if (i >= rows) return;
    const RoundRow<T> row = row_of_round(request, round, i);
    load_tile(row.x, tile, vocab_size, lane, next);
    next_place = stats + row.place * tiles + tile;
    tile += step;
  };
  load_next();
  meanwhile();
  while (next_place) {
    const RawTile<T> raw = next;
    float* place = reinterpret_cast<float*>(next_place);
    load_next();
    const TileStats found = warp_tile_stats(raw, request.scale, kNegativeInfinity);
    if (lane < blocks_per_row) {
      send_pair_to_block(place, pending, lane, found.largest, found.sum);
    }
  }
}

// All warps of a block, a warp a row: the summaries of a round's rows, once their tiles are there.
template <typename Request>
__device__ __forceinline__ void summarize_round(const Request& request, const Round& round,
                                                uint64_t* pending, const RoundsMemory& memory) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int vocab_size = static_cast<int>(request.params->vocab_size);
  for (int i = warp; i < round.rows(); i += warps) {
    const auto row = row_of_round(request, round, i);
    wait_for_bytes(pending);
    const RowSummary summary =
        warp_summarize(row.x, memory.stats + row.place * num_tiles(vocab_size), request.scale,
                       kNegativeInfinity, request.greedy, vocab_size, lane);
    if (lane == 0) memory.table[row.place] = summary;
  }
}

// One warp: the first position of a round that ends the request, -1 where its drafts are accepted.
template <typename Request>
__device__ __forceinline__ int64_t warp_stop(const Request& request, const Round& round,
                                             const DraftToken* drafts, int lane) {
  for (int64_t first = round.first; first < round.end; first += kWarp) {
    const int64_t k = first + lane;
    bool stops = k < round.end;
    if (stops && k < request.drafts) {
      const DraftToken& draft = drafts[k];
      stops = !request.accepts_values(k, draft.id, draft.values, [&] { return draft.u; });
    }
    const unsigned any = __ballot_sync(kAllLanes, stops);
    if (any) return first + __ffs(any) - 1;
  }
  return -1;
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    rounds_kernel(const LogitsParams a, int blocks_per_row, int rows_per_round) {
  using Request = LogitsRequest<T, TableSummaries>;
  __shared__ Decision<typename Request::Row> decision;
  __shared__ float recovery_uniform;
  __shared__ bool stopped;
  FR_DYNAMIC_SHARED(uint64_t, shared);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto [b, rank] = place_of<Step::kInCluster>(blocks_per_row);
  const int tiles = num_tiles(a.base.vocab_size);
  const RoundsMemory memory(shared, a.base.spec_length, tiles);
  const Request request(a, b, {memory.table, a.base.spec_length});
  const Rounds rounds{request.drafts > 0 ? request.drafts : 0, rows_per_round,
                      num_draft_rows(a) > 0 && !request.greedy};
  for (int64_t i = threadIdx.x; i < rounds.count(); i += blockDim.x) {
    expect_bytes(memory.pending + i,
                 rounds[i].rows() * tiles * static_cast<int>(sizeof(TileStats)));
  }
  if (threadIdx.x == blockDim.x - 1) expect_sums(memory.sums, tiles);
  __syncwarp();
  cluster_start();

  for (int64_t i = 0;; ++i) {
    const Round round = rounds[i];
    uint64_t* pending = memory.pending + i;
    send_round<T>(request, round, pending, memory.stats, rank, blocks_per_row, [&] {
      if (i > 0) return;
      if (warp == warps - 1) {
        gather_drafts(request, memory, lane);
        if (lane == 0) recovery_uniform = uniform(a.base, b, a.base.spec_length);
      }
      __syncwarp();
      cluster_wait();
    });
    summarize_round(request, round, pending, memory);
    __syncthreads();
    if (warp == 0) {
      const int64_t stop = warp_stop(request, round, memory.drafts, lane);
      if (lane == 0) {
        stopped = stop >= 0;
        if (stop >= 0) {
          const int64_t id = stop < request.drafts ? memory.drafts[stop].id : kPlaceholderTokenId;
          decision = {stop, request.row(stop, id)};
          if (a.logsumexp && rank == 0) a.logsumexp[b] = memory.table[stop].logsumexp;
        }
      }
    }
    __syncthreads();
    if (stopped) break;
  }
  draw_token<Step::kInCluster>(request, decision, recovery_uniform, rank, blocks_per_row,
                               memory.sums);
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
    reinterpret_cast<const void*>(&rounds_kernel<float>),
    reinterpret_cast<const void*>(&rounds_kernel<BFloat16>),
    reinterpret_cast<const void*>(&rounds_kernel<Float16>),
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

// Whether rounds_kernel can do it.
bool runs_in_rounds(const LogitsParams& a, Exchange exchange) {
  return exchange == Exchange::kCluster && !is_plain_sample(a, exchange) &&
         !a.base.block_verification && !(a.top_k || a.top_p || a.min_p) &&
         rounds_bytes(a) <= kMaxSharedBytes;
}

// A round costs its warps, beside their tiles, an exchange, a summary and a decision, which is the
// time of about so many tiles. A round is made at least as long.
constexpr int64_t kTilesOfRound = 4;

int rows_per_round(const LogitsParams& a, int blocks_per_row) {
  const int64_t warps = blocks_per_row * warps_per_block(a.base.vocab_size);
  const int64_t tiles = num_tiles(a.base.vocab_size) * (num_draft_rows(a) > 0 ? 2 : 1);
  const int64_t rows = (kTilesOfRound * warps + tiles / 2) / tiles;
  return static_cast<int>(std::clamp<int64_t>(rows, 1, a.base.spec_length + 1));
}

constexpr int64_t kFewRows = 132;  // about the multiprocessors of a large card

// The workspace: tile statistics, thresholds, tile sums.
struct Workspace {
  int64_t stats_bytes, thresholds_bytes, sums_bytes;

  Workspace(const LogitsParams& a, const LogitsPlan& plan) {
    const Exchange exchange = plan.fused.exchange;
    const bool needed = !is_plain_sample(a, exchange) && plan.rows_per_round == 0;
    const int64_t rows = needed ? num_target_rows(a.base) + num_draft_rows(a) : 0;
    const int64_t tiles = num_tiles(a.base.vocab_size);
    stats_bytes = rows * tiles * static_cast<int64_t>(sizeof(TileStats));
    thresholds_bytes = a.top_k || a.top_p || a.min_p ? (rows + 1) / 2 * 8 : 0;
    sums_bytes = exchange == Exchange::kWorkspace
                     ? a.base.batch_size * tiles * static_cast<int64_t>(sizeof(float))
                     : 0;
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
    if (logits_plan.rows_per_round > 0) {
      return launch_in_clusters(rounds_kernel<T>, config, n, rounds_bytes(a), a, n,
                                logits_plan.rows_per_round);
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
  plan->rows_per_round =
      runs_in_rounds(a, plan->fused.exchange) ? rows_per_round(a, plan->fused.blocks_per_row) : 0;
  const Workspace sizes(a, *plan);
  plan->workspace_bytes = sizes.stats_bytes + sizes.thresholds_bytes + sizes.sums_bytes;
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
