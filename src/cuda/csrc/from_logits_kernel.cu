// The CUDA kernels on logits. With top-p, for more than a few requests, walk_kernel: a cluster
// walks through a request's positions, and draws where that ends. Where all positions of all
// requests can run at once (small batches), and with other filters, positions_kernel: a cluster a
// position reads its rows and decides whether the request would end there. Else decide_kernel: a
// few warps a position, whichever is done last decides. In both, positions behind a known end
// leave. Where all ran at once they have also drawn, and finish_kernel takes the first position
// that ends each request; else draw_kernel draws there. For block verification, and on cards
// without clusters: a pass over all rows (a warp a tile), with filters a search for each row's
// threshold and a second pass over what it keeps, and the fused kernel of warp.cuh, which finishes
// the rows' sums, decides, and draws.

#include "from_logits.h"
#include "positions.cuh"
#include "shares.cuh"
#include "threshold.cuh"
#include "tiles.cuh"
#include "walk.cuh"
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

// A warp a tile, over all rows. `kept` [rows] or null.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentBlocks)
    tile_stats_kernel(const LogitsParams a, int64_t rows, const Kept* kept, TileStats* stats) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  // A block takes consecutive tiles of one row.
  const int blocks_per_row = (tiles + warps - 1) / warps;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int tile = static_cast<int>(blockIdx.x % blocks_per_row) * warps + warp;
  const LogitsRowAt<T> at = locate_row<T>(a, row);
  if (!at.x || tile >= tiles) return;
  const float threshold = kept ? kept[row].threshold : kNegativeInfinity;
  TileStats& tile_stats = stats[row * tiles + tile];
  TileStats found = {kNegativeInfinity, 0.0f};
  // Where a tile was seen to have nothing to keep, it is not read again.
  const bool is_empty = kept && tile_stats.largest < threshold;
  __syncwarp();
  if (!is_empty) {
    found = warp_tile_stats(at.x, tile, vocab_size, a.scale(at.b), threshold, lane);
  }
  if (lane == 0) tile_stats = found;
}

// Filters: a block a row looks for what they keep. `kept` [rows].
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    threshold_kernel(const LogitsParams a, const TileStats* stats, Kept* kept) {
  FR_DYNAMIC_SHARED(uint64_t, shared);  // a Search
  const int64_t row = blockIdx.x;
  const LogitsRowAt<T> at = locate_row<T>(a, row);
  if (!at.x) return;
  const int vocab_size = static_cast<int>(a.base.vocab_size);
  int exchange = 0;
  const Kept found =
      find_kept(*reinterpret_cast<Search*>(shared), Team{0, 1, 0, nullptr}, Filters(a, at.b), at.x,
                stats + row * num_tiles(vocab_size), vocab_size, &exchange);
  if (threadIdx.x == 0) kept[row] = found;
}

// The counters and verdicts that begin as zeros. Not a memset, for which the launches before and
// after it would wait.
__global__ void clear_kernel(unsigned* words, int64_t count) {
  allow_next_launch();
  wait_for_launch_before();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) words[i] = 0;
}

// ---- Verification

// The summaries of a request's rows: K + 1 of the target, then K of the draft.
struct TableSummaries {
  const RowSummary* table;
  int64_t spec_length;

  __device__ RowSummary target(int64_t k) const { return table[k]; }
  __device__ RowSummary draft(int64_t k) const { return table[spec_length + 1 + k]; }
  __device__ DraftMass draft_mass(int64_t k, float scale) const {
    return draft_mass_of(draft(k).logsumexp(scale));
  }
};

// All warps of a block: the table of request b.
template <typename T>
__device__ void summarize_request(const LogitsParams& a, int64_t b, const TileStats* stats,
                                  const Kept* kept, RowSummary* table) {
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
    const float threshold = kept && !greedy ? kept[row].threshold : kNegativeInfinity;
    RowSummary summary;
    if (is_draft && a.draft_logsumexp) {
      summary = {0.0, a.draft_logsumexp[b * spec_length + k], nullptr, 0.0f, threshold, -1};
    } else if (threshold > kNegativeInfinity) {
      summary = {0.0, kept[row].logsumexp, stats + row * tiles, kept[row].largest, threshold, -1};
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
                  const Kept* kept, float* workspace) {
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
  summarize_request<T>(a, b, stats, kept, table);
  const LogitsRequest<T, TableSummaries> request(a, b, {table, a.base.spec_length});
  if (step != Step::kSum && a.logsumexp && place.rank == 0 && threadIdx.x == 0) {
    a.logsumexp[b] = table[request.drafts > 0 ? request.drafts : 0].logsumexp(request.scale);
  }
  if (block) {
    sample_block<step>(request, place.rank, blocks_per_row, sums.sums, reach);
  } else {
    sample_request<step>(request, place.rank, blocks_per_row, sums);
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
    reinterpret_cast<const void*>(&draw_kernel<float>),
    reinterpret_cast<const void*>(&draw_kernel<BFloat16>),
    reinterpret_cast<const void*>(&draw_kernel<Float16>),
    reinterpret_cast<const void*>(&walk_kernel<float>),
    reinterpret_cast<const void*>(&walk_kernel<BFloat16>),
    reinterpret_cast<const void*>(&walk_kernel<Float16>),
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
  int blocks = 2;
  if (4 * positions <= (one ? 5 : 18) * device.multiprocessors) blocks = 4;
  if (8 * positions <= at_once * 5 / 4) blocks = kPortableCluster;
  static_assert(kPortableCluster <= kLargestTeam);
  if (!one && positions <= device.large_clusters[kLargestCluster]) blocks = kLargestCluster;
  while (blocks > 2 && blocks / 2 * kMaxWarps >= tiles) blocks /= 2;
  return blocks;
}

// Blocks that walk through a request's positions, 0 where several positions at once are faster, as
// for few requests, which have the card to themselves. As many blocks as let all requests have
// theirs at once, or two; a search by more than eight waits more than it saves.
int blocks_per_walk(const LogitsParams& a, const Device& device) {
  const bool many = 4 * num_target_rows(a.base) > device.multiprocessors;
  if (!may_walk(a) || !many) return 0;
  int blocks = kPortableCluster;
  const int tiles = num_tiles(a.base.vocab_size);
  while (blocks > 2 &&
         (blocks * a.base.batch_size > device.multiprocessors || blocks / 2 * kMaxWarps >= tiles)) {
    blocks /= 2;
  }
  static_assert(kPortableCluster <= kLargestTeam);
  return blocks;
}

// Blocks of a cluster that draws: as many as let all requests have theirs at once, each block a
// multiprocessor.
int blocks_per_draw(const LogitsParams& a, const Device& device) {
  int blocks = kPortableCluster;
  while (blocks > 1 && device.whole_clusters[blocks] < a.base.batch_size) --blocks;
  return blocks;
}

int blocks_of_shares(int tiles, int of_block) { return (tiles + of_block - 1) / of_block; }

// Whether positions_kernel draws where a position ends its request: where all run at once, or
// filters leave little to draw from.
bool draws_at_once(const LogitsParams& a, const LogitsPlan& plan) {
  return !plan.early_exit || a.filters();
}

// The workspace: what filters keep of rows, tile statistics and tile sums; or Findings.
struct Workspace {
  int64_t found_bytes = 0, stats_bytes = 0, sums_bytes = 0;
  int64_t rows_bytes = 0, tokens_bytes = 0;
  int64_t counters_bytes = 0, verdicts_bytes = 0;  // these two begin as zeros

  Workspace(const LogitsParams& a, const LogitsPlan& plan) {
    const int64_t targets = num_target_rows(a.base), rows = targets + num_draft_rows(a);
    const int64_t tiles = num_tiles(a.base.vocab_size), row_bytes = tiles * sizeof(TileStats);
    const int64_t sums = a.base.batch_size * tiles * static_cast<int64_t>(sizeof(float));
    if (plan.blocks_per_walk > 0) return;
    if (plan.blocks_per_position > 0) {
      if (a.base.spec_length == 0) return;  // the token goes to the outputs
      if (plan.early_exit) verdicts_bytes = (targets + 3) / 4 * 4;
      if (draws_at_once(a, plan)) {
        tokens_bytes = targets * static_cast<int64_t>(sizeof(int32_t));
        return;
      }
      stats_bytes = (plan.deciding_share ? rows : targets) * row_bytes;
      rows_bytes = targets * static_cast<int64_t>(sizeof(LogitsRow<float>));
      counters_bytes = targets * static_cast<int64_t>(sizeof(unsigned));
      return;
    }
    stats_bytes = rows * row_bytes;
    found_bytes = a.filters() ? rows * static_cast<int64_t>(sizeof(Kept)) : 0;
    sums_bytes = plan.fused.exchange == Exchange::kWorkspace ? sums : 0;
  }

  int64_t bytes() const {
    return found_bytes + stats_bytes + sums_bytes + rows_bytes + tokens_bytes + counters_bytes +
           verdicts_bytes;
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
    if (plan.blocks_per_walk > 0) return by_walking(a, plan, stream);
    return plan.blocks_per_position > 0 ? by_positions(a, plan, workspace, stream)
                                        : by_rows(a, plan, workspace, stream);
  }

 private:
  static cudaError_t by_walking(const LogitsParams& a, const LogitsPlan& plan,
                                cudaStream_t stream) {
    const int blocks = plan.blocks_per_walk;
    const cudaLaunchConfig_t config =
        configure(a.base.batch_size * blocks, warps_per_block(a.base.vocab_size) * kWarp, stream);
    return launch_in_clusters(walk_kernel<T>, config, blocks, cluster_bytes(a), a, blocks);
  }

  static cudaError_t by_positions(const LogitsParams& a, const LogitsPlan& plan, char* workspace,
                                  cudaStream_t stream) {
    const Workspace sizes(a, plan);
    const int64_t targets = num_target_rows(a.base);
    const int tiles = num_tiles(a.base.vocab_size);
    Findings<T> findings = {};
    if (a.base.spec_length > 0) {
      char* at = workspace;
      if (draws_at_once(a, plan)) {
        findings.tokens = reinterpret_cast<int32_t*>(at);
      } else {
        findings.stats = reinterpret_cast<TileStats*>(at);
        findings.rows = reinterpret_cast<LogitsRow<T>*>(at += sizes.stats_bytes);
        findings.arrived = reinterpret_cast<unsigned*>(at += sizes.rows_bytes);
      }
      if (plan.early_exit) {
        const int64_t cleared = sizes.counters_bytes + sizes.verdicts_bytes;
        at = workspace + sizes.bytes() - cleared;
        findings.verdicts = reinterpret_cast<uint8_t*>(at + sizes.counters_bytes);
        constexpr int threads = 256;
        const int64_t words = cleared / 4;
        const cudaError_t error = launch_overlapping(
            clear_kernel, configure((words + threads - 1) / threads, threads, stream), true,
            reinterpret_cast<unsigned*>(at), words);
        if (error != cudaSuccess) return error;
      }
    }
    const cudaError_t error =
        plan.deciding_share ? decide(a, plan, findings, stream) : find(a, plan, findings, stream);
    if (error != cudaSuccess || a.base.spec_length == 0) return error;
    if (!draws_at_once(a, plan)) {
      const int blocks = plan.drawing_blocks;
      const cudaLaunchConfig_t draw =
          configure(a.base.batch_size * blocks, plan.drawing_warps * kWarp, stream);
      return launch_in_clusters(draw_kernel<T>, draw, blocks, exchange_bytes(a.base.vocab_size), a,
                                blocks, findings);
    }
    constexpr int requests = 4;  // a block
    const cudaLaunchConfig_t finish =
        configure((a.base.batch_size + requests - 1) / requests, requests * kWarp, stream);
    return launch_overlapping(finish_kernel, finish, true, a, findings.tokens);
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
    const int tiles = num_tiles(a.base.vocab_size), rows = num_draft_rows(a) > 0 ? 2 : 1;
    const int blocks = blocks_of_shares(tiles, kDecidingWarps * plan.deciding_share);
    cudaLaunchConfig_t config = configure(rows * blocks, kDecidingWarps * kWarp, stream);
    config.gridDim.y = static_cast<unsigned>(a.base.batch_size);
    config.gridDim.z = static_cast<unsigned>(a.base.spec_length + 1);
    return launch_overlapping(decide_kernel<T>, config, true, a, blocks, plan.deciding_share,
                              findings);
  }

  static cudaError_t by_rows(const LogitsParams& a, const LogitsPlan& logits_plan, char* workspace,
                             cudaStream_t stream) {
    const Plan& plan = logits_plan.fused;
    const Workspace sizes(a, logits_plan);
    Kept* kept = sizes.found_bytes ? reinterpret_cast<Kept*>(workspace) : nullptr;
    TileStats* stats = reinterpret_cast<TileStats*>(workspace + sizes.found_bytes);
    float* sums = reinterpret_cast<float*>(workspace + sizes.found_bytes + sizes.stats_bytes);
    const int64_t rows = num_target_rows(a.base) + num_draft_rows(a);
    const int tiles = num_tiles(a.base.vocab_size), warps = warps_per_block(a.base.vocab_size);
    const int threads = warps * kWarp, n = plan.blocks_per_row;
    cudaLaunchConfig_t config = configure(a.base.batch_size * n, threads, stream);
    cudaLaunchConfig_t pass = configure(rows * ((tiles + warps - 1) / warps), threads, stream);
    const Kept* none = nullptr;
    cudaError_t error = cudaLaunchKernelEx(&pass, tile_stats_kernel<T>, a, rows, none, stats);
    if (error == cudaSuccess && kept) {
      cudaLaunchConfig_t search = configure(rows, threads, stream);
      search.dynamicSmemBytes = sizeof(Search);
      error = cudaFuncSetAttribute(threshold_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(sizeof(Search)));
      const TileStats* known = stats;
      if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&search, threshold_kernel<T>, a, known, kept);
      }
      const Kept* found = kept;
      if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&pass, tile_stats_kernel<T>, a, rows, found, stats);
      }
    }
    if (error != cudaSuccess) return error;
    const TileStats* known = stats;
    const Kept* found = kept;
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
  plan->blocks_per_walk = 0;
  plan->kept_tiles = plan->deciding_share = 0;
  plan->drawing_blocks = plan->drawing_warps = 0;
  if (plan->fused.exchange == Exchange::kCluster && !a.base.block_verification) {
    plan->blocks_per_position = blocks > 0 ? blocks : blocks_per_position(a, *device);
    if (!a.filters()) {
      const int warps = warps_per_block(a.base.vocab_size);
      plan->kept_tiles = tiles_to_keep(a.base.vocab_size, plan->blocks_per_position, warps,
                                       device->shared_bytes - cluster_bytes(a));
    }
    // With all of them running at once there is no end to be found, and time to draw for nothing.
    const int64_t all = num_target_rows(a.base) * plan->blocks_per_position;
    plan->early_exit = a.base.spec_length > 0 && all > blocks_at_once(a, *device);
    if (plan->early_exit && blocks == 0) plan->blocks_per_walk = blocks_per_walk(a, *device);
    if (!draws_at_once(a, *plan)) {
      plan->drawing_blocks = blocks_per_draw(a, *device);
      // Of more requests than multiprocessors two at a time share one, as well where registers of a
      // larger block would not do.
      const bool small = device->major >= 12 || a.base.batch_size > device->multiprocessors;
      plan->drawing_warps = small ? kMaxWarps : kMaxFusedWarps;
    }
    // Of very few requests the clusters of positions_kernel know the verdict sooner. The more rows
    // there are at a position, the less it matters how soon its last tile is done.
    constexpr int64_t kMany = 8, kMostInGrid = 65535;
    const bool many = a.base.batch_size >= kMany && a.base.batch_size <= kMostInGrid;
    if (plan->early_exit && blocks == 0 && !a.filters() && many) {
      const int64_t rows = a.base.batch_size * (num_draft_rows(a) > 0 ? 2 : 1);
      if (a.base.dtype == Dtype::kFloat32) {
        plan->deciding_share = rows >= 256 ? 4 : rows > 32 ? 3 : 2;
      } else {
        plan->deciding_share = rows >= 256 ? 8 : rows > 32 ? 4 : 3;
      }
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
