// The fast kernels' building blocks: a warp sums a tile, a warp searches, the blocks of a row
// exchange tile sums. Included by kernels, for the device, or by tests/emulation for the CPU.
#pragma once

#include <type_traits>

#include "fused_rejection.h"

#ifdef FR_EMULATION
#include "emulation.h"  // tests/emulation: the kernels on CPU fibers
#else
#include <cuda_runtime.h>

#define FR_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)

namespace fused_rejection {
namespace {

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Clusters exist from sm_90 on. Below it these are never reached: plan_fused chooses a workspace.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores into the same shared variable of block `rank` of this cluster.
__device__ __forceinline__ void store_to_block(float* shared, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#endif
}

}  // namespace
}  // namespace fused_rejection
#endif

namespace fused_rejection {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;
// Blocks a multiprocessor holds, which caps the registers of a thread: ptxas spills for sm_120 at
// the 64 that two blocks leave, and one block there already has 64 KiB of loads in flight.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResidentBlocks = 1;
#else
constexpr int kResidentBlocks = 2;
#endif
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct BFloat16 {
  uint16_t bits;
  __device__ explicit operator float() const {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};
struct Float16 {
  uint16_t bits;
  __device__ explicit operator float() const { return half_to_float(bits); }
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte load
template <typename T>
constexpr int kVectors = kTile / (kWarp * kVector<T>);  // loads a lane makes for a tile

template <typename T>
struct alignas(16) Vector {
  T value[kVector<T>];
};

template <typename Row>
using ElementOf = std::remove_cv_t<std::remove_pointer_t<decltype(Row::p)>>;

template <typename T>
__device__ __forceinline__ bool aligned(const T* p, const T* q) {
  return ((reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(q)) & 15) == 0;
}

// A lane's share of a tile: vectors l, l + 32, ... for lane l, so that the step w[m] + w[m + 256]
// and the first adjacent pairs are local to it.
template <typename T, typename Value>
struct Share {
  Value value[kVectors<T>][kVector<T>];

  // Calls f(value, index from the lane's first) for each.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int j = 0; j < kVectors<T>; ++j) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) f(value[j][e], j * kWarp * kVector<T> + e);
    }
  }
};

// One warp: tile_sum of a tile of weights, in every lane.
template <typename T>
__device__ __forceinline__ float warp_sum(Share<T, float>& w) {
  constexpr int vector = kVector<T>, vectors = kVectors<T>;
#pragma unroll
  for (int j = 0; j < vectors / 2; ++j) {
#pragma unroll
    for (int e = 0; e < vector; ++e) w.value[j][e] += w.value[j + vectors / 2][e];
#pragma unroll
    for (int n = vector / 2; n >= 1; n /= 2) {
#pragma unroll
      for (int e = 0; e < n; ++e) w.value[j][e] = w.value[j][2 * e] + w.value[j][2 * e + 1];
    }
  }
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
#pragma unroll
    for (int j = 0; j < vectors / 2; ++j) {
      w.value[j][0] += __shfl_xor_sync(kAllLanes, w.value[j][0], d);
    }
  }
  return vectors == 4 ? w.value[0][0] + w.value[1][0] : w.value[0][0];
}

// Reads a lane's share of 16-byte aligned memory.
template <typename T>
__device__ __forceinline__ void load_share(const T* from, Share<T, T>& share) {
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) {
    const auto v = read_argument(reinterpret_cast<const Vector<T>*>(from + j * kWarp * kVector<T>));
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) share.value[j][e] = v.value[e];
  }
}

// One warp: the sum of a tile's weights, in every lane.
template <typename Row>
__device__ __forceinline__ float warp_tile_sum(const Row& row, int tile, int vocab_size,
                                               bool is_aligned, int lane) {
  using T = ElementOf<Row>;
  const int begin = tile * kTile + lane * kVector<T>;
  const Row here = row.from(begin);
  const int left = vocab_size - begin;
  Share<T, float> w;
  if (is_aligned && (tile + 1) * kTile <= vocab_size) {
    Share<T, T> p, q;
    load_share(here.p, p);
    const T* p_values = &p.value[0][0];
    if (here.q) {
      load_share(here.q, q);
      const T* q_values = &q.value[0][0];
      int at = 0;
      w.each([&](float& w_i, int) {
        w_i = here.with_draft(static_cast<float>(p_values[at]), static_cast<float>(q_values[at]));
        ++at;
      });
    } else {
      int at = 0;
      w.each([&](float& w_i, int i) {
        w_i = here.without_draft(static_cast<float>(p_values[at++]), i);
      });
    }
  } else {
    w.each([&](float& w_i, int i) { w_i = i < left ? weight_at(here, i) : 0.0f; });
  }
  return warp_sum(w);
}

// One warp: the inclusive scan of Spans.
__device__ __forceinline__ double warp_scan(double sum, int lane) {
#pragma unroll
  for (int d = 1; d < kSpans; d *= 2) {
    const double other = __shfl_up_sync(kAllLanes, sum, d);
    if (lane >= d) sum += other;
  }
  return sum;
}

// One warp: sum_spans and pick_in_spans with a lane a span. `sum` is the lane's span's sum,
// `pick_here(rest)` searches the lane's span. `threshold_of(total)` gives the threshold.
template <typename ThresholdOf, typename PickHere>
__device__ __forceinline__ Pick warp_pick(double sum, const ThresholdOf& threshold_of,
                                          const PickHere& pick_here, int lane) {
  const double scan = warp_scan(sum, lane);
  const double threshold = threshold_of(__shfl_sync(kAllLanes, scan, kSpans - 1));
  const unsigned weighted = __ballot_sync(kAllLanes, sum > 0);
  const unsigned crossing = __ballot_sync(kAllLanes, sum > 0 && scan > threshold);
  if (!weighted) return {-1, threshold};
  const int chosen = crossing ? __ffs(crossing) - 1 : kWarp - 1 - __clz(weighted);
  const double previous = __shfl_up_sync(kAllLanes, scan, 1);
  Pick pick{-1, 0};
  if (lane == chosen) pick = pick_here(threshold - (lane ? previous : 0.0));
  return {__shfl_sync(kAllLanes, pick.item, chosen), __shfl_sync(kAllLanes, pick.rest, chosen)};
}

struct Span {
  int begin, end;
};

__device__ __forceinline__ Span span_of(int count, int lane) {
  const int length = (count + kSpans - 1) / kSpans;
  const int begin = lane * length < count ? lane * length : count;
  return {begin, begin + length < count ? begin + length : count};
}

// One warp: the tile to draw from, `weight_of(tile)` being the tiles' weights.
template <typename WeightOf>
__device__ __forceinline__ Pick warp_pick_tile(const WeightOf& weight_of, int tiles, float u,
                                               int lane) {
  const Span span = span_of(tiles, lane);
  double sum = 0;
  for (int i = span.begin; i < span.end; ++i) sum += weight_of(i);
  const auto pick_here = [&](double rest) {
    return pick_in_span(span.begin, span.end, weight_of, rest);
  };
  return warp_pick(sum, [&](double total) { return u * total; }, pick_here, lane);
}

template <typename Row>
__device__ __forceinline__ int warp_pick_token(const Row& row, const Pick& tile, int vocab_size,
                                               int lane) {
  constexpr int length = kTile / kSpans;
  const int begin = tile.item * kTile + lane * length;
  const Row here = row.from(begin);
  const int left = vocab_size - begin;
  float w[length];
#pragma unroll
  for (int i = 0; i < length; ++i) w[i] = i < left ? weight_at(here, i) : 0.0f;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < length; ++i) sum += w[i];
  const auto pick_here = [&](double rest) {
    Pick pick = pick_in_span<length>(0, length, [&](int i) { return w[i]; }, rest);
    pick.item += begin;
    return pick;
  };
  return warp_pick(sum, [&](double) { return tile.rest; }, pick_here, lane).item;
}

// One warp: a token of a row whose from_stats() holds; 0 where it has no mass.
template <typename Row>
__device__ __forceinline__ int warp_draw_from_stats(const Row& row, int vocab_size, float u,
                                                    int lane) {
  const auto mass = [&](int tile) { return row.tile_mass(tile); };
  const Pick tile = warp_pick_tile(mass, num_tiles(vocab_size), u, lane);
  return tile.item < 0 ? 0 : warp_pick_token(row.beside_largest(), tile, vocab_size, lane);
}

template <typename T>
__device__ __forceinline__ int warp_draw_from_stats(const ProbsRow<T>&, int, float, int) {
  return 0;  // a row of probabilities has no statistics
}
template <typename T>
__device__ __forceinline__ int warp_draw_from_stats(const ReachRow<ProbsRow<T>>&, int, float, int) {
  return 0;
}

// One warp: the first draft that is not accepted, or the end of the drafts.
template <typename Request>
__device__ __forceinline__ Decision<typename Request::Row> warp_decide(const Request& request,
                                                                       int lane) {
  const Params& a = *request.params;
  for (int64_t first = 0;; first += kWarp) {
    const int64_t k = first + lane;
    const int64_t id = k < request.drafts ? request.id(k) : kPlaceholderTokenId;
    const bool accepted = request.accepts_draft(k, id, [&] { return uniform(a, request.b, k); });
    const unsigned stops = __ballot_sync(kAllLanes, !accepted);
    if (stops) {
      const int stop = __ffs(stops) - 1;
      return {first + stop, request.row(first + stop, __shfl_sync(kAllLanes, id, stop))};
    }
  }
}

// kInCluster does everything in one launch. Without clusters kSum and kSelect are two launches with
// the tile sums in `workspace` [B, tiles] between them; the stream orders them.
enum class Step { kInCluster, kSum, kSelect };

// This block's share of a row's tile sums, for every block of the row.
template <Step step, typename Row>
__device__ __forceinline__ void sweep(const Row& row, int blocks_per_row, int vocab_size,
                                      float* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int rank = blockIdx.x % blocks_per_row, tiles = num_tiles(vocab_size);
  const bool is_aligned = aligned(row.p, row.q);
  for (int tile = rank * warps + warp; tile < tiles; tile += warps * blocks_per_row) {
    const float sum = warp_tile_sum(row, tile, vocab_size, is_aligned, lane);
    if (step == Step::kInCluster) {
      if (lane < blocks_per_row) store_to_block(sums + tile, lane, sum);
    } else if (lane == 0) {
      sums[tile] = sum;
    }
  }
}

// All threads that share tile sums wait for one another's.
template <Step step>
__device__ __forceinline__ void meet() {
  if (step == Step::kInCluster) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

// The body of a kernel whose grid has blocks_per_row blocks a request. `sums`: this block's copy of
// the tile sums, [2][tiles] of shared memory, in a cluster; else the request's [tiles] of the
// workspace. In a cluster every thread has called cluster_arrive() before.
template <Step step, typename Request>
__device__ __forceinline__ void sample_request(const Request& request, int blocks_per_row,
                                               float* all_sums) {
  using Row = typename Request::Row;
  __shared__ Decision<Row> decision;
  __shared__ float recovery_uniform;
  __shared__ bool picked;

  const Params& a = *request.params;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t b = request.b;
  const int rank = blockIdx.x % blocks_per_row;
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);
  if (warp == 0) {
    const float u = uniform(a, b, a.spec_length);
    const Decision<Row> decided = warp_decide(request, lane);
    if (lane == 0) {
      decision = decided;
      recovery_uniform = u;
    }
  }
  __syncthreads();
  // No block writes into another's shared memory before that block has started.
  if (step == Step::kInCluster) cluster_wait();

  const int64_t accepted = decision.accepted;
  Row row = decision.row;
  if (step != Step::kSum && rank == 0 && warp == warps - 1) {
    for (int64_t k = lane; k <= a.spec_length; k += kWarp) {
      if (k != accepted) request.store(k, k < accepted ? request.id(k) : kPlaceholderTokenId);
    }
    if (lane == 0) {
      a.num_accepted[b] = static_cast<int32_t>(accepted);
      if (row.fixed_token >= 0) request.store(accepted, row.fixed_token);
    }
  }
  if (row.fixed_token >= 0) return;

  for (int pass = 0; pass < 2; ++pass) {
    if (row.from_stats()) {
      if (step != Step::kSum && rank == 0 && warp == 0) {
        const int token = warp_draw_from_stats(row, vocab_size, recovery_uniform, lane);
        if (lane == 0) request.store(accepted, token);
      }
      return;
    }
    float* sums = step == Step::kInCluster ? all_sums + pass * tiles : all_sums;
    if (step != Step::kSelect || pass > 0) {
      sweep<step>(row, blocks_per_row, vocab_size, sums);
    }
    if (step == Step::kSum) return;
    meet<step>();
    if (warp == 0) {
      const Pick tile =
          warp_pick_tile([&](int i) { return sums[i]; }, tiles, recovery_uniform, lane);
      if (lane == 0) picked = tile.item >= 0;
      if (tile.item >= 0) {
        // The block that summed the tile finds it in its own L1.
        if (tile.item / warps % blocks_per_row == rank) {
          const int token = warp_pick_token(row, tile, vocab_size, lane);
          if (lane == 0) request.store(accepted, token);
        }
      } else if (pass == 1 && rank == 0 && lane == 0) {
        request.store(accepted, 0);  // p has no mass either
      }
    }
    __syncthreads();
    if (picked) return;
    row = row.target();  // no residual: draw from p
  }
}

// One warp: Spans::total of tile sums, in every lane.
__device__ __forceinline__ double warp_total(const float* sums, int tiles, int lane) {
  const Span span = span_of(tiles, lane);
  double sum = 0;
  for (int i = span.begin; i < span.end; ++i) sum += sums[i];
  return __shfl_sync(kAllLanes, warp_scan(sum, lane), kSpans - 1);
}

// One warp: the reach of every prefix, and the number of drafts. Lanes gather, all walk.
template <typename Request>
__device__ __forceinline__ int64_t warp_reach(const Request& request, double* reach, int lane) {
  double last = 1.0;
  if (lane == 0) reach[0] = last;
  for (int64_t first = 0;; first += kWarp) {
    const int64_t k = first + lane;
    const int64_t id = k < request.drafts ? request.id(k) : kPlaceholderTokenId;
    const Odds odds = request.odds(k, id);
    const unsigned ends = __ballot_sync(kAllLanes, id == kPlaceholderTokenId);
    const int count = ends ? __ffs(ends) - 1 : kWarp;
    for (int i = 0; i < count; ++i) {
      const Odds here{__shfl_sync(kAllLanes, odds.p, i), __shfl_sync(kAllLanes, odds.q, i)};
      last = here.step(last);
      if (lane == 0) reach[first + i + 1] = last;
    }
    if (ends) return first + count;
  }
}

// sample_request for block verification, decide_block's tests: the rows of ever shorter prefixes
// are swept until a test passes; the token is drawn from the sums that passed it. `reach` is room
// for K + 1 numbers. Not split over launches: without clusters it runs as kSelect, one block a
// request.
template <Step step, typename Request>
__device__ __forceinline__ void sample_block(const Request& request, int blocks_per_row,
                                             float* all_sums, double* reach) {
  using Row = ReachRow<typename Request::Row>;
  __shared__ Row shared_row;
  __shared__ int64_t prefix;
  __shared__ bool tested;  // the row's prefix is accepted whatever the sums are
  __shared__ bool done, rejected;

  const Params& a = *request.params;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = request.b;
  const int rank = blockIdx.x % blocks_per_row;
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);
  const float u = uniform(a, b, a.spec_length);

  // The longest prefix not longer than `k` that can be accepted, and its residual.
  const auto attempt = [&](int64_t k) {
    while (!(reach[k] > 0.0)) --k;  // the empty prefix has reach 1
    prefix = k;
    tested = k == 0 || !(reach[k] < 1.0);
    shared_row = {request.row(k, request.id(k)), reach[k]};
  };
  if (warp == 0) {
    const int64_t drafts = warp_reach(request, reach, lane);
    __syncwarp();
    if (lane == 0) {
      if (drafts == 0 || uniform(a, b, drafts - 1) < reach[drafts]) {
        prefix = drafts;
        tested = true;
        shared_row = {request.row(drafts, kPlaceholderTokenId), 1.0};
      } else {
        attempt(drafts - 1);
      }
    }
  }
  __syncthreads();
  if (step == Step::kInCluster) cluster_wait();

  bool from_target = false;
  for (int pass = 0;; ++pass) {
    Row row = shared_row;
    if (from_target) row = row.target();
    float* sums = step == Step::kInCluster ? all_sums + (pass & 1) * tiles : all_sums;
    const bool swept = row.fixed_token < 0 && !row.from_stats();
    if (swept) sweep<step>(row, blocks_per_row, vocab_size, sums);
    meet<step>();
    if (warp == 0) {
      const double total = swept ? warp_total(sums, tiles, lane) : 0.0;
      const int64_t k = prefix;
      const bool passes = tested || uniform(a, b, k - 1) < share_of(total, reach[k]);
      __syncwarp();
      int token = row.fixed_token;
      bool mine = rank == 0;
      if (row.from_stats() && token < 0) {
        if (mine) token = warp_draw_from_stats(row, vocab_size, u, lane);
      } else if (passes && token < 0) {
        const Pick tile = warp_pick_tile([&](int i) { return sums[i]; }, tiles, u, lane);
        if (tile.item >= 0) {
          mine = tile.item / static_cast<int>(blockDim.x / kWarp) % blocks_per_row == rank;
          if (mine) token = warp_pick_token(row, tile, vocab_size, lane);
        } else if (from_target) {
          token = 0;  // p has no mass either
        } else {
          mine = false;
        }
      } else if (!passes) {
        mine = false;
      }
      if (lane == 0) {
        const bool has_weight = !swept || total > 0.0 || from_target;
        done = passes && has_weight;
        rejected = !passes;
        if (mine && done) request.store(k, token);
        if (rejected) attempt(k - 1);
      }
    }
    __syncthreads();
    if (done) break;
    from_target = !rejected;  // accepted, but the residual has no weight: draw from p
    __syncthreads();
  }
  if (rank == 0) {
    for (int64_t k = threadIdx.x; k <= a.spec_length; k += blockDim.x) {
      if (k != prefix) request.store(k, k < prefix ? request.id(k) : kPlaceholderTokenId);
    }
    if (threadIdx.x == 0) a.num_accepted[b] = static_cast<int32_t>(prefix);
  }
}

}  // namespace
}  // namespace fused_rejection
