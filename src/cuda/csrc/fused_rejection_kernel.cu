// The CUDA kernels: the first design (one GPU thread a batch row) and the fast one (many blocks
// share the one V-row, or pair of rows, that matters). docs/kernel.md tells the story between them.
#include "fused_rejection.h"

#ifdef FR_EMULATION
#include "emulation.h"  // tests/emulation: the kernels below on CPU fibers
#else
#include <cuda_runtime.h>
#include <curand_kernel.h>

#include <algorithm>
#include <mutex>

#define FR_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

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

// ---- One GPU thread a batch row: cuRAND, the decision and the search, all in one thread. Of a
// warp's 32 lanes each reads a row of its own, so no load is coalesced, and one thread has only a
// few loads in flight: at V = 128K it waits for memory nearly all of the time.

template <typename T>
__global__ void thread_per_row_kernel(const Params a) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b >= a.batch_size) return;

  curandStatePhilox4_32_10_t state;
  if (!a.uniforms) {
    const Stream stream = stream_of(a, b);
    curand_init(stream.seed, stream.subsequence, stream.position, &state);
  }
  int64_t drawn = 0;
  const auto next_uniform = [&] {
    if (a.uniforms) return uniform(a, b, drawn++);
    return to_uniform(curand(&state));  // not curand_uniform, which is (0, 1]
  };
  const Request<T> request(a, b);
  const Decision<T> decision = decide(request, next_uniform);

  const float u = uniform(a, b, a.spec_length);
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);
  Row<T> row = decision.row;
  int token = 0;  // where p has no mass at all
  for (int pass = 0; pass < 2; ++pass) {
    const auto weight_at = [&](int i) { return i < vocab_size ? row(i) : 0.0f; };
    const auto sum_of_tile = [&](int tile) {
      return tile_sum([&](int m) { return weight_at(tile * kTile + m); });
    };
    Spans spans;
    sum_spans(tiles, sum_of_tile, spans);
    const Pick tile = pick_in_spans(tiles, sum_of_tile, spans, u * spans.total());
    if (tile.item >= 0) {
      const auto weight_in_tile = [&](int m) { return weight_at(tile.item * kTile + m); };
      sum_spans(kTile, weight_in_tile, spans);
      token = tile.item * kTile + pick_in_spans(kTile, weight_in_tile, spans, tile.rest).item;
      break;
    }
    row = row.target();
  }
  request.store(decision.accepted, token);
}

// ---- The fast kernel. The blocks of a row each repeat the accept decision (two dependent loads,
// no exchange), sum their share of the row's tiles, a warp a tile, and tell one another the sums.

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte load
template <typename T>
constexpr int kVectors = kTile / (kWarp * kVector<T>);  // loads a lane makes for a tile

template <typename T>
struct alignas(16) Vector {
  T value[kVector<T>];
};

template <typename T>
__device__ __forceinline__ bool aligned(const Row<T>& row) {
  return ((reinterpret_cast<uintptr_t>(row.p) | reinterpret_cast<uintptr_t>(row.q)) & 15) == 0;
}

// One warp: the sum of a tile, in every lane. Lane l holds vectors l, l + 32, ... of the tile, so
// the step w[m] + w[m + 256] and the first adjacent pairs are local to it.
template <typename T>
__device__ __forceinline__ float warp_tile_sum(const Row<T>& row, int tile, int vocab_size,
                                               bool is_aligned, int lane) {
  constexpr int vector = kVector<T>, vectors = kVectors<T>;
  const int begin = tile * kTile + lane * vector;
  const Row<T> here = row.from(begin);
  const int left = vocab_size - begin;
  float w[vectors][vector];
  if (is_aligned && (tile + 1) * kTile <= vocab_size) {
    Vector<T> p[vectors], q[vectors];
#pragma unroll
    for (int j = 0; j < vectors; ++j) {
      p[j] = *reinterpret_cast<const Vector<T>*>(here.p + j * kWarp * vector);
    }
    if (here.q) {
#pragma unroll
      for (int j = 0; j < vectors; ++j) {
        q[j] = *reinterpret_cast<const Vector<T>*>(here.q + j * kWarp * vector);
      }
#pragma unroll
      for (int j = 0; j < vectors; ++j) {
#pragma unroll
        for (int e = 0; e < vector; ++e) {
          w[j][e] = weight(static_cast<float>(p[j].value[e]), static_cast<float>(q[j].value[e]));
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < vectors; ++j) {
#pragma unroll
        for (int e = 0; e < vector; ++e) {
          const int i = j * kWarp * vector + e;
          w[j][e] = weight(static_cast<float>(p[j].value[e]), i == here.one_hot ? 1.0f : 0.0f);
        }
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < vectors; ++j) {
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        const int i = j * kWarp * vector + e;
        w[j][e] = i < left ? here(i) : 0.0f;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < vectors / 2; ++j) {
#pragma unroll
    for (int e = 0; e < vector; ++e) w[j][e] += w[j + vectors / 2][e];
#pragma unroll
    for (int n = vector / 2; n >= 1; n /= 2) {
#pragma unroll
      for (int e = 0; e < n; ++e) w[j][e] = w[j][2 * e] + w[j][2 * e + 1];
    }
  }
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
#pragma unroll
    for (int j = 0; j < vectors / 2; ++j) w[j][0] += __shfl_xor_sync(kAllLanes, w[j][0], d);
  }
  return vectors == 4 ? w[0][0] + w[1][0] : w[0][0];
}

// One warp: sum_spans and pick_in_spans with a lane a span. `sum` is the lane's span's sum,
// `pick_here(rest)` searches the lane's span. `threshold_of(total)` gives the threshold.
template <typename ThresholdOf, typename PickHere>
__device__ __forceinline__ Pick warp_pick(double sum, const ThresholdOf& threshold_of,
                                          const PickHere& pick_here, int lane) {
  double scan = sum;
#pragma unroll
  for (int d = 1; d < kSpans; d *= 2) {
    const double other = __shfl_up_sync(kAllLanes, scan, d);
    if (lane >= d) scan += other;
  }
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

__device__ __forceinline__ Pick warp_pick_tile(const float* sums, int tiles, float u, int lane) {
  const int length = (tiles + kSpans - 1) / kSpans;
  const int begin = lane * length < tiles ? lane * length : tiles;
  const int end = begin + length < tiles ? begin + length : tiles;
  double sum = 0;
  for (int i = begin; i < end; ++i) sum += sums[i];
  const auto pick_here = [&](double rest) {
    return pick_in_span(begin, end, [&](int i) { return sums[i]; }, rest);
  };
  return warp_pick(sum, [&](double total) { return u * total; }, pick_here, lane);
}

template <typename T>
__device__ __forceinline__ int warp_pick_token(const Row<T>& row, const Pick& tile, int vocab_size,
                                               int lane) {
  constexpr int length = kTile / kSpans;
  const int begin = tile.item * kTile + lane * length;
  const Row<T> here = row.from(begin);
  const int left = vocab_size - begin;
  float w[length];
#pragma unroll
  for (int i = 0; i < length; ++i) w[i] = i < left ? here(i) : 0.0f;
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

// One warp: the first draft that is not accepted, or the end of the drafts.
template <typename T>
__device__ __forceinline__ Decision<T> warp_decide(const Request<T>& request, int lane) {
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

template <typename T, Step step>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kResidentBlocks)
    fused_kernel(const Params a, int blocks_per_row, float* workspace) {
  // A copy of the row's tile sums for each block: no block waits for another's reads.
  FR_DYNAMIC_SHARED(float, shared_sums);  // [2][tiles] in a cluster
  __shared__ Decision<T> decision;
  __shared__ float recovery_uniform;
  __shared__ bool picked;

  if (step == Step::kInCluster) cluster_arrive();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t b = blockIdx.x / blocks_per_row;
  const int rank = blockIdx.x % blocks_per_row;
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);
  const Request<T> request(a, b);
  if (warp == 0) {
    const float u = uniform(a, b, a.spec_length);
    const Decision<T> decided = warp_decide(request, lane);
    if (lane == 0) {
      decision = decided;
      recovery_uniform = u;
    }
  }
  __syncthreads();
  // No block writes into another's shared memory before that block has started.
  if (step == Step::kInCluster) cluster_wait();

  const int64_t accepted = decision.accepted;
  if (step != Step::kSum && rank == 0 && warp == warps - 1) {
    for (int64_t k = lane; k <= a.spec_length; k += kWarp) {
      if (k != accepted) request.store(k, k < accepted ? request.id(k) : kPlaceholderTokenId);
    }
    if (lane == 0) a.num_accepted[b] = static_cast<int32_t>(accepted);
  }

  Row<T> row = decision.row;
  for (int pass = 0; pass < 2; ++pass) {
    float* sums = step == Step::kInCluster ? shared_sums + pass * tiles : workspace + b * tiles;
    if (step != Step::kSelect || pass > 0) {
      const bool is_aligned = aligned(row);
      for (int tile = rank * warps + warp; tile < tiles; tile += warps * blocks_per_row) {
        const float sum = warp_tile_sum(row, tile, vocab_size, is_aligned, lane);
        if (step == Step::kInCluster) {
          if (lane < blocks_per_row) store_to_block(sums + tile, lane, sum);
        } else if (lane == 0) {
          sums[tile] = sum;
        }
      }
    }
    if (step == Step::kSum) return;
    if (step == Step::kInCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    if (warp == 0) {
      const Pick tile = warp_pick_tile(sums, tiles, recovery_uniform, lane);
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

}  // namespace
}  // namespace fused_rejection

#ifndef FR_EMULATION
namespace fused_rejection {
namespace {

constexpr int kPortableCluster = 8, kLargestCluster = 16;
constexpr int kMaxDevices = 64;
constexpr int64_t kMaxSharedBytes = 192 * 1024;  // of sm_90's 227 KiB a block
constexpr int64_t kDefaultSharedBytes = 48 * 1024;

template <template <typename> class Action, typename... Args>
cudaError_t for_dtype(Dtype dtype, Args... args) {
  switch (dtype) {
    case Dtype::kFloat32:
      return Action<float>::run(args...);
    case Dtype::kBFloat16:
      return Action<BFloat16>::run(args...);
    case Dtype::kFloat16:
      return Action<Float16>::run(args...);
  }
  return cudaErrorInvalidValue;
}

int warps_per_block(int64_t vocab_size) {
  return static_cast<int>(std::min<int64_t>(num_tiles(vocab_size), kMaxWarps));
}

cudaLaunchConfig_t configure(const Params& a, int64_t blocks, int64_t shared_bytes,
                             cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(warps_per_block(a.vocab_size) * kWarp));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return config;
}

cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

int64_t shared_bytes(const Params& a) {
  return 2 * num_tiles(a.vocab_size) * static_cast<int64_t>(sizeof(float));
}

template <typename T>
struct AllowLargeCluster {
  static cudaError_t run() {
    return cudaFuncSetAttribute(fused_kernel<T, Step::kInCluster>,
                                cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
};

struct Device {
  int multiprocessors;
  int largest_cluster;  // 0: no clusters, or none in the code compiled for this card
};

cudaError_t describe(int ordinal, Device* device) {
  int major = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  }
  if (error != cudaSuccess) return error;
  device->largest_cluster = 0;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, fused_kernel<float, Step::kInCluster>);
  if (error != cudaSuccess) return error;
  // Code compiled for sm_80 runs on later cards too, but its cluster instructions are left out.
  if (major < 9 || attributes.binaryVersion < 90 || attributes.ptxVersion < 90) return cudaSuccess;
  device->largest_cluster = kPortableCluster;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    if (for_dtype<AllowLargeCluster>(dtype) != cudaSuccess) {
      cudaGetLastError();
      return cudaSuccess;
    }
  }
  cudaLaunchAttribute cluster = cluster_of(kLargestCluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kLargestCluster);
  config.blockDim = dim3(kMaxWarps * kWarp);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, fused_kernel<float, Step::kInCluster>, &config) ==
          cudaSuccess &&
      clusters > 0) {
    device->largest_cluster = kLargestCluster;
  }
  cudaGetLastError();
  return cudaSuccess;
}

cudaError_t current_device(const Device** device) {
  static std::mutex mutex;
  static Device devices[kMaxDevices];
  static bool known[kMaxDevices];
  int ordinal = 0;
  const cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  if (ordinal >= kMaxDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!known[ordinal]) {
    const cudaError_t described = describe(ordinal, &devices[ordinal]);
    if (described != cudaSuccess) return described;
    known[ordinal] = true;
  }
  *device = &devices[ordinal];
  return cudaSuccess;
}

template <typename T>
struct LaunchFused {
  static cudaError_t run(const Params& a, const Plan& plan, float* workspace, cudaStream_t stream) {
    const int64_t blocks = a.batch_size * plan.blocks_per_row;
    if (plan.exchange == Exchange::kCluster) {
      const int64_t bytes = shared_bytes(a);
      if (bytes > kDefaultSharedBytes) {
        const cudaError_t error = cudaFuncSetAttribute(fused_kernel<T, Step::kInCluster>,
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(kMaxSharedBytes));
        if (error != cudaSuccess) return error;
      }
      cudaLaunchConfig_t config = configure(a, blocks, bytes, stream);
      cudaLaunchAttribute cluster = cluster_of(plan.blocks_per_row);
      config.attrs = &cluster;
      config.numAttrs = 1;
      return cudaLaunchKernelEx(&config, fused_kernel<T, Step::kInCluster>, a, plan.blocks_per_row,
                                workspace);
    }
    cudaLaunchConfig_t config = configure(a, blocks, 0, stream);
    const cudaError_t error =
        cudaLaunchKernelEx(&config, fused_kernel<T, Step::kSum>, a, plan.blocks_per_row, workspace);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(static_cast<unsigned>(a.batch_size));
    return cudaLaunchKernelEx(&config, fused_kernel<T, Step::kSelect>, a, 1, workspace);
  }
};

template <typename T>
struct LaunchThreadPerRow {
  static cudaError_t run(const Params& a, cudaStream_t stream) {
    constexpr int threads = 128;
    const unsigned blocks = static_cast<unsigned>((a.batch_size + threads - 1) / threads);
    thread_per_row_kernel<T><<<blocks, threads, 0, stream>>>(a);
    return cudaGetLastError();
  }
};

}  // namespace

int plan_fused(const Params& a, Exchange exchange, int blocks_per_row, Plan* plan) {
  const Device* device = nullptr;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const int64_t tiles = num_tiles(a.vocab_size);
  const bool clusters_fit = device->largest_cluster > 0 && shared_bytes(a) <= kMaxSharedBytes;
  if (exchange == Exchange::kCluster && !clusters_fit) return cudaErrorNotSupported;
  if (exchange == Exchange::kAuto) {
    exchange = clusters_fit ? Exchange::kCluster : Exchange::kWorkspace;
  }
  plan->exchange = exchange;
  const int largest = exchange == Exchange::kCluster ? device->largest_cluster : 64;
  if (blocks_per_row > 0) {
    if (blocks_per_row > largest) return cudaErrorInvalidValue;
    plan->blocks_per_row = blocks_per_row;
  } else {
    // Four blocks a multiprocessor over the whole batch, but no block without a tile for each warp.
    const int64_t warps = warps_per_block(a.vocab_size);
    const int64_t useful = (tiles + warps - 1) / warps;
    const int64_t wanted = 4 * device->multiprocessors / std::max<int64_t>(a.batch_size, 1);
    int blocks = 1;
    while (2 * blocks <= largest && blocks < useful && 2 * blocks <= wanted) blocks *= 2;
    plan->blocks_per_row = blocks;
  }
  plan->workspace_bytes = exchange == Exchange::kWorkspace
                              ? a.batch_size * tiles * static_cast<int64_t>(sizeof(float))
                              : 0;
  return cudaSuccess;
}

int launch_fused(const Params& a, const Plan& plan, void* workspace, void* stream) {
  if (a.batch_size == 0) return cudaSuccess;
  return for_dtype<LaunchFused, const Params&, const Plan&>(
      a.dtype, a, plan, static_cast<float*>(workspace), static_cast<cudaStream_t>(stream));
}

int launch_thread_per_row(const Params& a, void* stream) {
  if (a.batch_size == 0) return cudaSuccess;
  return for_dtype<LaunchThreadPerRow, const Params&>(a.dtype, a,
                                                      static_cast<cudaStream_t>(stream));
}

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fused_rejection
#endif
