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

// This block's place in its cluster, and its cluster's in the grid.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ unsigned cluster_index() {
  unsigned index = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
#endif
  return index;
}

// Says that this block has started, before any cluster_wait(); publishes nothing but expect_bytes.
__device__ __forceinline__ void cluster_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

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

// A count of the bytes that send_to_block is still to bring, in shared memory. One thread sets it,
// once, before its cluster_start.
__device__ __forceinline__ void expect_bytes(uint64_t* pending, int bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(here) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(here), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// store_to_block, counted by that block's `pending`: its threads need no barrier to see the value.
__device__ __forceinline__ void send_to_block(float* shared, uint64_t* pending, int rank,
                                              float value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t count_here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  uint32_t there, count_there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count_there) : "r"(count_here), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there),
      "f"(value), "r"(count_there)
      : "memory");
#endif
}

// Two adjacent values at once, `shared` being aligned to 8 bytes.
__device__ __forceinline__ void send_pair_to_block(float* shared, uint64_t* pending, int rank,
                                                   float first, float second) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t count_here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  uint32_t there, count_there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count_there) : "r"(count_here), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          there),
      "f"(first), "f"(second), "r"(count_there)
      : "memory");
#endif
}

// Waits until every byte is there. Not .acquire.cluster, which would also empty the L1 cache: what
// arrives is this block's own shared memory.
__device__ __forceinline__ void wait_for_bytes(uint64_t* pending) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(pending));
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(here)
        : "memory");
  }
#endif
}

// The next launch in the stream, if it was launched so, may start once every block has said this;
// it has the memory that this launch wrote once wait_for_launch_before() returns.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void prefetch_line(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

}  // namespace
}  // namespace fused_rejection
#endif

namespace fused_rejection {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;
// What a block of the fused kernel may have, which caps the registers of a thread at 64: two blocks
// of 16 warps then fit a multiprocessor. ptxas spills for sm_120 at 64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMaxFusedWarps = 16;
constexpr int kResidentBlocks = 1;
#else
constexpr int kMaxFusedWarps = 32;
constexpr int kResidentBlocks = 2;
#endif
constexpr unsigned kIdleGrid = 64;  // blocks
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

// Whether rows can be read 16 bytes at a time, the last one's end too.
template <typename T>
__device__ __forceinline__ bool by_vectors(const T* p, const T* q, int vocab_size) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(q);
  return (bits & 15) == 0 && vocab_size % kVector<T> == 0;
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

// Reads a lane's share of a tile, of which `left` elements exist from the lane's first; the others
// become 0. No load waits for another.
template <typename T>
__device__ __forceinline__ void load_share(const T* from, int left, bool vectors,
                                           Share<T, T>& share) {
#pragma unroll
  for (int j = 0; j < kVectors<T>; ++j) {
    const int at = j * kWarp * kVector<T>;
    Vector<T> v = {};
    if (vectors) {
      if (at < left) v = read_argument(reinterpret_cast<const Vector<T>*>(from + at));
    } else {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        if (at + e < left) v.value[e] = read_argument(from + at + e);
      }
    }
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) share.value[j][e] = v.value[e];
  }
}

// One warp: calls read(left, vectors) for a tile, `left` being kTile or more, at compile time, for
// a tile that is whole.
template <typename Read>
__device__ __forceinline__ void read_tile(int tile, int begin, int vocab_size, bool vectors,
                                          const Read& read) {
  if (vectors && (tile + 1) * kTile <= vocab_size) {
    read(kTile, true);
  } else {
    read(vocab_size - begin, vectors);
  }
}

// One warp: a tile's weights, each lane its share. `vectors`: by_vectors of the row.
template <typename Row>
__device__ __forceinline__ void load_weights(const Row& row, int tile, int vocab_size, bool vectors,
                                             int lane, Share<ElementOf<Row>, float>& w) {
  using T = ElementOf<Row>;
  const int begin = tile * kTile + lane * kVector<T>;
  const Row here = row.from(begin);
  read_tile(tile, begin, vocab_size, vectors, [&](int left, bool by_vector) {
    Share<T, T> p, q;
    load_share(here.p, left, by_vector, p);
    const T* p_values = &p.value[0][0];
    int at = 0;
    if (here.q) {
      load_share(here.q, left, by_vector, q);
      const T* q_values = &q.value[0][0];
      const auto weigh = [&](const auto& with_draft) {
        w.each([&](float& w_i, int i) {
          const float p_i = static_cast<float>(p_values[at]);
          const float q_i = static_cast<float>(q_values[at]);
          ++at;
          w_i = i < left ? with_draft(p_i, q_i) : 0.0f;
        });
      };
      if (here.is_plain()) {
        weigh([&](float p_i, float q_i) { return here.with_plain_draft(p_i, q_i); });
      } else {
        weigh([&](float p_i, float q_i) { return here.with_draft(p_i, q_i); });
      }
    } else {
      w.each([&](float& w_i, int i) {
        const float p_i = static_cast<float>(p_values[at++]);
        w_i = i < left ? here.without_draft(p_i, i) : 0.0f;
      });
    }
  });
}

// One warp: brings a tile's lines of both rows into the L2 cache.
template <typename Row>
__device__ __forceinline__ void prefetch_tile(const Row& row, int tile, int vocab_size, int lane) {
  using T = ElementOf<Row>;
  constexpr int line = 128 / sizeof(T), lines = kTile / line, half = kWarp / 2;
  static_assert(lines <= half);
  const T* from = lane < half ? row.p : row.q;
  const int i = tile * kTile + lane % half * line;
  if (from && lane % half < lines && i < vocab_size) prefetch_line(from + i);
}

// One warp: inclusive_scan with a value a lane, where only the first `count` lanes' results matter.
__device__ __forceinline__ double warp_scan(double sum, int lane, int count = kWarp) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    if (d >= count) break;
    const double other = __shfl_up_sync(kAllLanes, sum, d);
    if (lane >= d) sum += other;
  }
  return sum;
}

struct Span {
  int begin, end;
};

__device__ __forceinline__ Span span_of(int count, int lane) {
  const int length = (count + kSpans - 1) / kSpans;
  const int begin = lane * length < count ? lane * length : count;
  return {begin, begin + length < count ? begin + length : count};
}

// One lane: a span's sum. All of a tree's items are fetched before the first is added.
template <typename Item>
__device__ __forceinline__ double lane_span_sum(const Span& span, const Item& item) {
  double sum = 0;
  for (int first = span.begin; first < span.end; first += kLeaves) {
    double w[kLeaves];
#pragma unroll
    for (int i = 0; i < kLeaves; ++i) w[i] = first + i < span.end ? item(first + i) : 0;
#pragma unroll
    for (int size = kLeaves / 2; size >= 1; size /= 2) {
#pragma unroll
      for (int i = 0; i < size; ++i) w[i] = w[2 * i] + w[2 * i + 1];
    }
    sum += w[0];
  }
  return sum;
}

// One warp: pick_in_span with an item a lane.
template <typename Item>
__device__ __forceinline__ Pick warp_pick_in_span(const Span& span, const Item& item, double rest,
                                                  int lane) {
  Pick pick{-1, rest};
  double carry = 0;
  for (int first = span.begin; first < span.end; first += kWarp) {
    const int count = span.end - first;
    const double w = lane < count ? item(first + lane) : 0;
    const double scan = warp_scan(w, lane, count);
    const double previous = __shfl_up_sync(kAllLanes, scan, 1);
    const unsigned weighted = __ballot_sync(kAllLanes, w > 0);
    const unsigned crossing = __ballot_sync(kAllLanes, w > 0 && carry + scan > rest);
    if (weighted) {
      const int chosen = crossing ? __ffs(crossing) - 1 : kWarp - 1 - __clz(weighted);
      const double before = lane ? carry + previous : carry;
      pick = {first + chosen, rest - __shfl_sync(kAllLanes, before, chosen)};
    }
    if (crossing) break;
    carry += __shfl_sync(kAllLanes, scan, kWarp - 1);
  }
  return pick;
}

// One warp: sum_spans and pick_in_spans with a lane a span. `threshold_of(total)` gives the
// threshold.
template <typename Item, typename ThresholdOf>
__device__ __forceinline__ Pick warp_pick(int count, const Item& item,
                                          const ThresholdOf& threshold_of, int lane) {
  const double sum = lane_span_sum(span_of(count, lane), item);
  const double scan = warp_scan(sum, lane);
  const double threshold = threshold_of(__shfl_sync(kAllLanes, scan, kSpans - 1));
  const unsigned weighted = __ballot_sync(kAllLanes, sum > 0);
  const unsigned crossing = __ballot_sync(kAllLanes, sum > 0 && scan > threshold);
  if (!weighted) return {-1, threshold};
  const int chosen = crossing ? __ffs(crossing) - 1 : kWarp - 1 - __clz(weighted);
  const double previous = __shfl_sync(kAllLanes, scan, chosen ? chosen - 1 : 0);
  return warp_pick_in_span(span_of(count, chosen), item, threshold - (chosen ? previous : 0.0),
                           lane);
}

// One warp: the tile to draw from, `weight_of(tile)` being the tiles' weights.
template <typename WeightOf>
__device__ __forceinline__ Pick warp_pick_tile(const WeightOf& weight_of, int tiles, float u,
                                               int lane) {
  return warp_pick(tiles, weight_of, [&](double total) { return u * total; }, lane);
}

// One warp of the block: the token to draw from a tile. Lanes read the tile as they summed it and
// pass it through shared memory to the spans' order.
template <typename Row>
__device__ __forceinline__ int warp_pick_token(const Row& row, const Pick& tile, int vocab_size,
                                               int lane) {
  using T = ElementOf<Row>;
  constexpr int length = kTile / kSpans;
  __shared__ float weights[kTile + kTile / length];
  const auto place = [](int m) { return m + m / length; };  // one bank for each lane's span
  Share<T, float> w;
  load_weights(row, tile.item, vocab_size, by_vectors(row.p, row.q, vocab_size), lane, w);
  w.each([&](float w_i, int i) { weights[place(lane * kVector<T> + i)] = w_i; });
  __syncwarp();
  const auto weight_in_tile = [&](int m) { return weights[place(m)]; };
  return tile.item * kTile +
         warp_pick(kTile, weight_in_tile, [&](double) { return tile.rest; }, lane).item;
}

// The same as a call: inlined, it would take registers that a large kernel has not left.
template <typename Row>
__device__ __noinline__ int warp_call_pick_token(const Row& row, const Pick& tile, int vocab_size,
                                                 int lane) {
  return warp_pick_token(row, tile, vocab_size, lane);
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
    const bool is_draft = k < request.drafts;
    const int64_t id = is_draft ? request.id(k) : kPlaceholderTokenId;
    const float u = is_draft ? uniform(a, request.b, k) : 0.0f;  // while the id is on its way
    const bool accepted = request.accepts_draft(k, id, [&] { return u; });
    const unsigned stops = __ballot_sync(kAllLanes, !accepted);
    if (stops) {
      const int stop = __ffs(stops) - 1;
      return {first + stop, request.row(first + stop, __shfl_sync(kAllLanes, id, stop))};
    }
  }
}

// kInCluster does everything in one launch, and so does kAlone, one block a row. Without clusters
// kSum and kSelect are two launches with the tile sums in `workspace` [B, tiles] between them; the
// stream orders them.
enum class Step { kInCluster, kAlone, kSum, kSelect };

// Which request a block works on, and which of its blocks it is.
struct Place {
  int64_t b;
  int rank;
};

template <Step step>
__device__ __forceinline__ Place place_of(int blocks_per_row) {
  if (step == Step::kInCluster) return {cluster_index(), static_cast<int>(cluster_rank())};
  const int block = static_cast<int>(blockIdx.x);
  if (step == Step::kSum) return {block / blocks_per_row, block % blocks_per_row};
  return {blockIdx.x, 0};
}

// Where tile sums meet.
struct TileSums {
  float* sums;  // in a cluster [2][tiles] of this block's shared memory, a half for each of two
                // passes; alone [tiles] of it; else the request's [tiles] of the workspace
  uint64_t* pending;  // [2] in a cluster: what each half still waits for
};

// One thread of a cluster's block, before its cluster_start().
__device__ __forceinline__ void expect_sums(const TileSums& all, int tiles) {
  for (int pass = 0; pass < 2; ++pass) {
    expect_bytes(all.pending + pass, tiles * static_cast<int>(sizeof(float)));
  }
}

// This block's share of a row's tile sums. `tell(tile, sum)` is called by a whole warp.
template <typename Row, typename Tell>
__device__ __forceinline__ void sweep(const Row& row, int rank, int blocks_per_row, int vocab_size,
                                      const Tell& tell) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int tiles = num_tiles(vocab_size);
  const int step = warps * blocks_per_row;
  const bool vectors = by_vectors(row.p, row.q, vocab_size);
  // Where the card is mostly idle a second tile need not wait for the first; else it would get in
  // the way of other warps' loads.
  const bool ahead = gridDim.x <= kIdleGrid;
  for (int tile = rank * warps + warp; tile < tiles; tile += step) {
    if (ahead && tile + step < tiles) prefetch_tile(row, tile + step, vocab_size, lane);
    Share<ElementOf<Row>, float> w;
    load_weights(row, tile, vocab_size, vectors, lane, w);
    tell(tile, warp_sum(w));
  }
}

// Draws and stores what follows the decision, and stores the decision. For all threads of the
// blocks of a request, of which this one is `rank`.
template <Step step, typename Request>
__device__ __forceinline__ void draw_token(const Request& request,
                                           const Decision<typename Request::Row>& decision,
                                           const float& recovery_uniform, int rank,
                                           int blocks_per_row, const TileSums& all) {
  using Row = typename Request::Row;
  __shared__ bool picked;

  const Params& a = *request.params;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);
  const bool is_last = warp == warps - 1;
  const int64_t accepted = decision.accepted;
  Row row = decision.row;
  // All but the drawn token. By one warp, once it has swept: what waits for memory comes first.
  const auto store_decision = [&] {
    if (step == Step::kSum || rank != 0 || !is_last) return;
    for (int64_t k = lane; k <= a.spec_length; k += kWarp) {
      if (k != accepted) request.store(k, k < accepted ? request.id(k) : kPlaceholderTokenId);
    }
    if (lane == 0) a.num_accepted[request.b] = static_cast<int32_t>(accepted);
  };
  if (row.fixed_token >= 0) {
    store_decision();
    if (step != Step::kSum && rank == 0 && threadIdx.x == 0) {
      request.store(accepted, row.fixed_token);
    }
    return;
  }

  for (int pass = 0; pass < 2; ++pass) {
    if (row.from_stats()) {
      if (pass == 0) store_decision();
      if (step != Step::kSum && rank == 0 && warp == 0) {
        const int token = warp_draw_from_stats(row, vocab_size, recovery_uniform, lane);
        if (lane == 0) request.store(accepted, token);
      }
      return;
    }
    float* sums = step == Step::kInCluster ? all.sums + pass * tiles : all.sums;
    if (step != Step::kSelect || pass > 0) {
      sweep(row, rank, blocks_per_row, vocab_size, [&](int tile, float sum) {
        if (step == Step::kInCluster) {
          if (lane < blocks_per_row) send_to_block(sums + tile, all.pending + pass, lane, sum);
        } else if (lane == 0) {
          sums[tile] = sum;
        }
      });
    }
    if (step == Step::kSum) return;
    if (pass == 0) store_decision();
    if (step != Step::kInCluster) __syncthreads();
    if (warp == 0) {
      if (step == Step::kInCluster) wait_for_bytes(all.pending + pass);
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

// The body of a kernel whose grid has blocks_per_row blocks a request, of which this one is `rank`.
// In a cluster expect_sums() and, by every thread, cluster_start() have been called before.
template <Step step, typename Request>
__device__ __forceinline__ void sample_request(const Request& request, int rank, int blocks_per_row,
                                               const TileSums& all) {
  using Row = typename Request::Row;
  __shared__ Decision<Row> decision;
  __shared__ float recovery_uniform;

  const Params& a = *request.params;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (warp == warps - 1) {
    const float u = uniform(a, request.b, a.spec_length);
    if (lane == 0) recovery_uniform = u;
  }
  if (warp == 0) {
    const Decision<Row> decided = warp_decide(request, lane);
    if (lane == 0) decision = decided;
  }
  __syncthreads();
  // No block writes into another's shared memory before that block has started.
  if (step == Step::kInCluster) cluster_wait();
  draw_token<step>(request, decision, recovery_uniform, rank, blocks_per_row, all);
}

// One warp: Spans::total of tile sums, in every lane.
__device__ __forceinline__ double warp_total(const float* sums, int tiles, int lane) {
  const double sum = lane_span_sum(span_of(tiles, lane), [&](int i) { return sums[i]; });
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
__device__ __forceinline__ void sample_block(const Request& request, int rank, int blocks_per_row,
                                             float* all_sums, double* reach) {
  using Row = ReachRow<typename Request::Row>;
  __shared__ Row shared_row;
  __shared__ int64_t prefix;
  __shared__ bool tested;  // the row's prefix is accepted whatever the sums are
  __shared__ bool done, from_target;
  __shared__ float recovery_uniform;

  const Params& a = *request.params;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = request.b;
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);

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
      recovery_uniform = uniform(a, b, a.spec_length);
      from_target = false;
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

  for (int pass = 0;; ++pass) {
    // `shared_row` is read anew where it is used: kept over the sweep it would take registers that
    // the sweep wants.
    float* sums = step == Step::kInCluster ? all_sums + (pass & 1) * tiles : all_sums;
    const bool swept = shared_row.fixed_token < 0 && !shared_row.from_stats();
    if (swept) {
      sweep(Row(shared_row), rank, blocks_per_row, vocab_size, [&](int tile, float sum) {
        if (step == Step::kInCluster) {
          if (lane < blocks_per_row) store_to_block(sums + tile, lane, sum);
        } else if (lane == 0) {
          sums[tile] = sum;
        }
      });
    }
    if (step == Step::kInCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    if (warp == 0) {
      const Row row = shared_row;
      const bool at_target = from_target;
      const double total = swept ? warp_total(sums, tiles, lane) : 0.0;
      const int64_t k = prefix;
      const bool passes = tested || uniform(a, b, k - 1) < share_of(total, reach[k]);
      __syncwarp();
      int token = row.fixed_token;
      bool mine = rank == 0;
      if (row.from_stats() && token < 0) {
        if (mine) token = warp_draw_from_stats(row, vocab_size, recovery_uniform, lane);
      } else if (passes && token < 0) {
        const Pick tile =
            warp_pick_tile([&](int i) { return sums[i]; }, tiles, recovery_uniform, lane);
        if (tile.item >= 0) {
          mine = tile.item / static_cast<int>(blockDim.x / kWarp) % blocks_per_row == rank;
          if (mine) token = warp_call_pick_token(shared_row, tile, vocab_size, lane);
        } else if (at_target) {
          token = 0;  // p has no mass either
        } else {
          mine = false;
        }
      } else if (!passes) {
        mine = false;
      }
      __syncwarp();
      if (lane == 0) {
        const bool has_weight = !swept || total > 0.0 || at_target;
        done = passes && has_weight;
        if (mine && done) request.store(k, token);
        if (!passes) {
          attempt(k - 1);
        } else if (!done) {  // accepted, but the residual has no weight: draw from p
          shared_row = shared_row.target();
        }
        from_target = passes;
      }
    }
    __syncthreads();
    if (done) break;
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
