// The CUDA kernels on logits. Two launches: a pass over all rows at once (a warp a tile), and the
// fused kernel of warp.cuh, which finishes the rows' sums, decides, and draws from the one row that
// matters. Filters add a search for each row's threshold and a second pass over what it keeps.
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
    const float other = __shfl_xor_sync(kAllLanes, value, d);
    value = other > value ? other : value;
  }
  return value;
}

// One warp: the statistics of a tile, in every lane.
template <typename T>
__device__ __forceinline__ TileStats warp_tile_stats(const T* x, int tile, int vocab_size,
                                                     bool vectors, float scale, float threshold,
                                                     int lane) {
  const int begin = tile * kTile + lane * kVector<T>;
  Share<T, float> w;
  read_tile(tile, begin, vocab_size, vectors, [&](int left, bool by_vector) {
    Share<T, T> raw;
    load_share(x + begin, left, by_vector, raw);
    const T* values = &raw.value[0][0];
    int at = 0;
    w.each([&](float& w_i, int i) {
      const float x_i = static_cast<float>(values[at++]);
      w_i = i < left ? x_i : kNegativeInfinity;
    });
  });
  float largest = kNegativeInfinity;
  w.each([&](float& w_i, int) {
    const float logit = finite_logit(w_i);
    w_i = logit >= threshold ? logit : kNegativeInfinity;
    largest = w_i > largest ? w_i : largest;
  });
  largest = warp_max(largest);
  const bool empty = !(largest > kNegativeInfinity);
  w.each([&](float& w_i, int) { w_i = empty ? 0.0f : exp2_portable((w_i - largest) * scale); });
  return {largest, warp_sum(w)};
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
      warp_tile_stats(at.x, tile, vocab_size, by_vectors<T>(at.x, nullptr, vocab_size),
                      a.scale(at.b), threshold, lane);
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
  const double sum =
      span_sum(span_of(tiles, lane), [&](int i) { return tile_weight(stats[i], largest, scale); });
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
  const bool vectors = by_vectors<T>(x, nullptr, vocab_size), greedy = a.is_greedy(b);
  const float scale = a.scale(b);
  cluster_wait();
  for (int tile = rank * warps + warp; tile < tiles; tile += warps * blocks_per_row) {
    const TileStats found =
        warp_tile_stats(x, tile, vocab_size, vectors, scale, kNegativeInfinity, lane);
    if (lane < blocks_per_row) {
      send_to_block(shared + 2 * tile, pending, lane, found.largest);
      send_to_block(shared + 2 * tile + 1, pending, lane, found.sum);
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

constexpr int64_t kFewRows = 132;  // about the multiprocessors of a large card

// The workspace: tile statistics, thresholds, tile sums.
struct Workspace {
  int64_t stats_bytes, thresholds_bytes, sums_bytes;

  Workspace(const LogitsParams& a, Exchange exchange) {
    const bool needed = !is_plain_sample(a, exchange);
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
  static cudaError_t run(const LogitsParams& a, const Plan& plan, char* workspace,
                         cudaStream_t stream) {
    const Workspace sizes(a, plan.exchange);
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
  const Workspace sizes(a, plan->fused.exchange);
  plan->workspace_bytes = sizes.stats_bytes + sizes.thresholds_bytes + sizes.sums_bytes;
  return cudaSuccess;
}

int launch_from_logits(const LogitsParams& a, const LogitsPlan& plan, void* workspace,
                       void* stream) {
  if (a.base.batch_size == 0) return cudaSuccess;
  return for_dtype<LaunchLogits>(a.base.dtype, a, plan.fused, static_cast<char*>(workspace),
                                 static_cast<cudaStream_t>(stream));
}

}  // namespace fused_rejection
#endif
