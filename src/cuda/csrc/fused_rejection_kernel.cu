// The CUDA kernels on probabilities: the first design (one GPU thread a batch row) and the fast one
// (many blocks share the one V-row, or pair of rows, that matters). docs/kernel.md tells the story
// between them.
#include "warp.cuh"

#ifndef FR_EMULATION
#include <curand_kernel.h>

#include "launch.cuh"
#endif

namespace fused_rejection {
namespace {

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
  const auto uniform_at = [&](int64_t k) {
    if (a.uniforms) return uniform(a, b, k);
    return to_uniform(curand(&state));  // the next one; not curand_uniform, which is (0, 1]
  };
  const ProbsRequest<T> request(a, b);
  const Decision<ProbsRow<T>> decision = decide(request, uniform_at);

  const float u = uniform(a, b, a.spec_length);
  const int vocab_size = static_cast<int>(a.vocab_size), tiles = num_tiles(vocab_size);
  ProbsRow<T> row = decision.row;
  int token = 0;  // where p has no mass at all
  for (int pass = 0; pass < 2; ++pass) {
    const auto weight_of = [&](int i) { return i < vocab_size ? weight_at(row, i) : 0.0f; };
    const auto sum_of_tile = [&](int tile) {
      return tile_sum([&](int m) { return weight_of(tile * kTile + m); });
    };
    Spans<double> spans;
    sum_spans(tiles, sum_of_tile, spans);
    const Pick tile = pick_in_spans(tiles, sum_of_tile, spans, u * spans.total());
    if (tile.item >= 0) {
      const auto weight_in_tile = [&](int m) { return weight_of(tile.item * kTile + m); };
      Spans<float> in_tile;
      sum_spans(kTile, weight_in_tile, in_tile);
      const float rest = static_cast<float>(tile.rest);
      token = tile.item * kTile + pick_in_spans(kTile, weight_in_tile, in_tile, rest).item;
      break;
    }
    row = row.target();
  }
  request.store(decision.accepted, token);
}

// ---- The fast kernel. The blocks of a row each repeat the accept decision (two dependent loads,
// no exchange), sum their share of the row's tiles, a warp a tile, and tell one another the sums.

template <typename T, Step step>
__global__ void __launch_bounds__(kMaxFusedWarps* kWarp, 1)
    fused_kernel(const Params a, int blocks_per_row, float* workspace) {
  FR_DYNAMIC_SHARED(uint64_t, shared);  // where there is no workspace: `pending`, then `sums`
  const int tiles = num_tiles(a.vocab_size);
  const Place place = place_of<step>(blocks_per_row);
  TileSums sums{workspace + place.b * tiles, nullptr};
  if (step == Step::kInCluster || step == Step::kAlone) {
    sums = {reinterpret_cast<float*>(shared + 2), shared};
  }
  if (step == Step::kInCluster) {
    if (threadIdx.x == blockDim.x - 1) expect_sums(sums, tiles);
    cluster_start();
  }
  wait_for_launch_before();
  sample_request<step>(ProbsRequest<T>(a, place.b), place.rank, blocks_per_row, sums);
}

// Block verification. `workspace` as above where there are no clusters; one block a row then.
template <typename T, Step step>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    block_kernel(const Params a, int blocks_per_row, float* workspace) {
  FR_DYNAMIC_SHARED(double, shared);  // reach [K + 1], then, in a cluster, tile sums [2][tiles]
  if (step == Step::kInCluster) cluster_start();
  wait_for_launch_before();
  const Place place = place_of<step>(blocks_per_row);
  const ProbsRequest<T> request(a, place.b);
  float* sums = step == Step::kInCluster ? reinterpret_cast<float*>(shared + a.spec_length + 1)
                                         : workspace + request.b * num_tiles(a.vocab_size);
  sample_block<step>(request, place.rank, blocks_per_row, sums, shared);
}

}  // namespace
}  // namespace fused_rejection

#ifndef FR_EMULATION
namespace fused_rejection {
namespace {

const void* const kFusedKernels[] = {
    reinterpret_cast<const void*>(&fused_kernel<float, Step::kInCluster>),
    reinterpret_cast<const void*>(&fused_kernel<BFloat16, Step::kInCluster>),
    reinterpret_cast<const void*>(&fused_kernel<Float16, Step::kInCluster>),
    reinterpret_cast<const void*>(&block_kernel<float, Step::kInCluster>),
    reinterpret_cast<const void*>(&block_kernel<BFloat16, Step::kInCluster>),
    reinterpret_cast<const void*>(&block_kernel<Float16, Step::kInCluster>),
};

int64_t reach_bytes(const Params& a) {
  return a.block_verification ? (a.spec_length + 1) * static_cast<int64_t>(sizeof(double)) : 0;
}

template <typename T>
struct LaunchFused {
  static cudaError_t run(const Params& a, const Plan& plan, float* workspace, cudaStream_t stream) {
    const int n = plan.blocks_per_row;
    cudaLaunchConfig_t config = configure(a.batch_size * n, plan.warps_per_block * kWarp, stream);
    if (a.block_verification && plan.exchange == Exchange::kCluster) {
      return launch_in_clusters(block_kernel<T, Step::kInCluster>, config, n,
                                exchange_bytes(a.vocab_size) + reach_bytes(a), a, n, workspace);
    }
    if (a.block_verification) {
      config.gridDim = dim3(static_cast<unsigned>(a.batch_size));
      config.dynamicSmemBytes = static_cast<size_t>(reach_bytes(a));
      return cudaLaunchKernelEx(&config, block_kernel<T, Step::kSelect>, a, 1, workspace);
    }
    if (is_alone(n, a.vocab_size)) {
      config.dynamicSmemBytes = static_cast<size_t>(exchange_bytes(a.vocab_size));
      return launch_overlapping(fused_kernel<T, Step::kAlone>, config,
                                plan.exchange == Exchange::kCluster, a, n, workspace);
    }
    if (plan.exchange == Exchange::kCluster) {
      return launch_in_clusters(fused_kernel<T, Step::kInCluster>, config, n,
                                exchange_bytes(a.vocab_size), a, n, workspace);
    }
    const cudaError_t error =
        cudaLaunchKernelEx(&config, fused_kernel<T, Step::kSum>, a, n, workspace);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(static_cast<unsigned>(a.batch_size));
    config.blockDim = dim3(static_cast<unsigned>(warps_per_block(a.vocab_size) * kWarp));
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
  if (reach_bytes(a) > kDefaultSharedBytes) return cudaErrorInvalidValue;
  const Device* device = nullptr;
  cudaError_t error = current_device(kFusedKernels, &device);
  if (error == cudaSuccess) {
    const int64_t shared_bytes = exchange_bytes(a.vocab_size) + reach_bytes(a);
    error = plan_blocks(*device, a.batch_size, a.vocab_size, shared_bytes, exchange, blocks_per_row,
                        plan);
  }
  if (error != cudaSuccess) return error;
  plan->warps_per_block = a.block_verification
                              ? warps_per_block(a.vocab_size)
                              : balanced_warps(*device, a.batch_size, a.vocab_size, *plan);
  const bool needs_workspace =
      plan->exchange == Exchange::kWorkspace &&
      (a.block_verification || !is_alone(plan->blocks_per_row, a.vocab_size));
  plan->workspace_bytes = needs_workspace ? a.batch_size * tile_sum_bytes(a.vocab_size) : 0;
  return cudaSuccess;
}

int launch_fused(const Params& a, const Plan& plan, void* workspace, void* stream) {
  if (a.batch_size == 0) return cudaSuccess;
  return for_dtype<LaunchFused>(a.dtype, a, plan, static_cast<float*>(workspace),
                                static_cast<cudaStream_t>(stream));
}

int launch_thread_per_row(const Params& a, void* stream) {
  if (a.batch_size == 0) return cudaSuccess;
  return for_dtype<LaunchThreadPerRow>(a.dtype, a, static_cast<cudaStream_t>(stream));
}

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fused_rejection
#endif
