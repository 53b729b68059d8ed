// Host code that the launchers share: what the device can do, blocks a row, cluster launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <mutex>

#include "warp.cuh"

namespace fused_rejection {
namespace {

constexpr int kPortableCluster = 8, kLargestCluster = 16;
constexpr int kMostBlocksWithoutClusters = 64;
constexpr int kMaxDevices = 64;
constexpr int64_t kMaxSharedBytes = 192 * 1024;    // of sm_90's 227 KiB a block
constexpr int64_t kStaticSharedBytes = 16 * 1024;  // more than any kernel's own variables
constexpr int64_t kDefaultSharedBytes =
    40 * 1024;  // of 48 KiB: kernels have variables of their own

int64_t tile_sum_bytes(int64_t vocab_size) {
  return num_tiles(vocab_size) * static_cast<int64_t>(sizeof(float));
}

// TileSums in a cluster.
int64_t exchange_bytes(int64_t vocab_size) {
  return 2 * (tile_sum_bytes(vocab_size) + static_cast<int64_t>(sizeof(uint64_t)));
}

// Whether a row's one block keeps the tile sums to itself.
bool is_alone(int blocks_per_row, int64_t vocab_size) {
  return blocks_per_row == 1 && exchange_bytes(vocab_size) <= kDefaultSharedBytes;
}

// Tiles whose weights a block keeps in `room` bytes: all that it sums where these are at most two a
// warp, since then few requests are to be answered soon; else none.
int tiles_to_keep(int64_t vocab_size, int blocks, int warps, int64_t room) {
  const int rounds = (num_tiles(vocab_size) + warps * blocks - 1) / (warps * blocks);
  return rounds <= 2 && kept_bytes(rounds * warps) <= room ? rounds * warps : 0;
}

// Calls Action<T>::run(args...) for the element type of `dtype`.
template <template <typename> class Action, typename... Args>
cudaError_t for_dtype(Dtype dtype, const Args&... args) {
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

// Two at least: one stores the decision while another searches.
int warps_per_block(int64_t vocab_size) {
  return std::min(std::max(num_tiles(vocab_size), 2), kMaxWarps);
}

cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

struct Device {
  int multiprocessors;
  int major;                                 // of the compute capability
  int most_warps;                            // a block of kernels[0] may have
  int large_clusters[kLargestCluster + 1];   // of n such blocks that run at once: a block there may
                                             // have a multiprocessor to itself
  int whole_clusters[kPortableCluster + 1];  // of n blocks that have a multiprocessor each
  int64_t shared_bytes;                      // that a kernel may ask for
  int largest_cluster;  // 0: no clusters, or none in the code compiled for this card
};

int clusters_at_once(const void* kernel, int size, int warps, int64_t shared_bytes) {
  cudaLaunchAttribute cluster = cluster_of(size);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(static_cast<unsigned>(warps * kWarp));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess ? clusters : 0;
}

// `kernels`: the kernels that would run in clusters, one for each dtype.
template <int n>
cudaError_t describe(const void* const (&kernels)[n], int ordinal, Device* device) {
  int most_shared = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->major, cudaDevAttrComputeCapabilityMajor, ordinal);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  }
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernels[0]);
  if (error != cudaSuccess) return error;
  *device = {
      device->multiprocessors, device->major, attributes.maxThreadsPerBlock / kWarp, {}, {}, 0, 0};
  device->shared_bytes = std::min(kMaxSharedBytes, most_shared - kStaticSharedBytes);
  // Without such code the cluster instructions are left out too.
  if (device->major < 9 || !is_for_sm_90(attributes)) return cudaSuccess;
  device->largest_cluster = kLargestCluster;
  for (const void* kernel : kernels) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(device->shared_bytes));
    if (error != cudaSuccess) return error;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
            cudaSuccess ||
        clusters_at_once(kernel, kLargestCluster, kMaxWarps, 0) == 0) {
      cudaGetLastError();  // not an error: every card with clusters has the portable size
      device->largest_cluster = kPortableCluster;
    }
  }
  for (int size = 1; size <= device->largest_cluster; ++size) {
    device->large_clusters[size] = clusters_at_once(kernels[0], size, device->most_warps, 0);
  }
  for (int size = 1; size <= kPortableCluster; ++size) {
    device->whole_clusters[size] =
        clusters_at_once(kernels[0], size, device->most_warps, device->shared_bytes);
  }
  return cudaSuccess;
}

// Described once a device. One copy for each set of kernels: `n` is deduced, the statics are local.
template <int n>
cudaError_t current_device(const void* const (&kernels)[n], const Device** device) {
  static std::mutex mutex;
  static Device devices[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];  // read by every call, without the lock
  int ordinal = 0;
  const cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  if (ordinal >= kMaxDevices) return cudaErrorInvalidDevice;
  if (!known[ordinal].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!known[ordinal].load(std::memory_order_relaxed)) {
      const cudaError_t described = describe(kernels, ordinal, &devices[ordinal]);
      if (described != cudaSuccess) return described;
      known[ordinal].store(true, std::memory_order_release);
    }
  }
  *device = &devices[ordinal];
  return cudaSuccess;
}

// How many warps a block of kernels[0] may have where a row has `n` blocks: more than kMaxWarps
// only where all blocks run at once even so.
int most_warps(const Device& device, int64_t batch_size, Exchange exchange, int n) {
  const int64_t at_once =
      exchange == Exchange::kCluster ? device.large_clusters[n] : device.multiprocessors / n;
  return batch_size <= at_once ? device.most_warps : kMaxWarps;
}

// How often a row's warps take a tile.
int rounds(const Device& device, int64_t batch_size, int tiles, Exchange exchange, int n) {
  const int warps = n * most_warps(device, batch_size, exchange, n);
  return (tiles + warps - 1) / warps;
}

// Fills a plan's exchange and blocks_per_row. At most one block a multiprocessor, over the whole
// batch (more are not placed evenly where they come in clusters), and no block without eight tiles.
cudaError_t plan_blocks(const Device& device, int64_t batch_size, int64_t vocab_size,
                        int64_t shared_bytes, Exchange exchange, int blocks_per_row, Plan* plan) {
  const bool clusters_fit = device.largest_cluster > 0 && shared_bytes <= device.shared_bytes;
  if (exchange == Exchange::kCluster && !clusters_fit) return cudaErrorNotSupported;
  if (exchange == Exchange::kAuto) {
    exchange = clusters_fit ? Exchange::kCluster : Exchange::kWorkspace;
  }
  plan->exchange = exchange;
  const int largest =
      exchange == Exchange::kCluster ? device.largest_cluster : kMostBlocksWithoutClusters;
  if (blocks_per_row > 0) {
    if (blocks_per_row > largest) return cudaErrorInvalidValue;
    plan->blocks_per_row = blocks_per_row;
    return cudaSuccess;
  }
  const int tiles = num_tiles(vocab_size);
  const int64_t wanted = device.multiprocessors / std::max<int64_t>(batch_size, 1);
  const auto rounds_of = [&](int n) { return rounds(device, batch_size, tiles, exchange, n); };
  int blocks = 1;
  while (2 * blocks <= largest && 8 * blocks < tiles && 2 * blocks <= wanted) {
    // A cluster beyond the portable size wants nearly all of a group of multiprocessors: where the
    // groups do not suffice, it must at least save a round; else as many blocks as the groups have
    // room for, or none more where each warp already has one tile.
    if (2 * blocks > kPortableCluster && exchange == Exchange::kCluster &&
        most_warps(device, batch_size, exchange, 2 * blocks) == kMaxWarps &&
        rounds_of(blocks) <= rounds_of(2 * blocks)) {
      for (int n = largest; n > blocks && rounds_of(blocks) > 1; --n) {
        if (device.large_clusters[n] >= batch_size) blocks = n;
      }
      break;
    }
    blocks *= 2;
  }
  plan->blocks_per_row = blocks;
  return cudaSuccess;
}

// Fewer warps than allowed where each of a row's then has equally many tiles.
int balanced_warps(const Device& device, int64_t batch_size, int64_t vocab_size, const Plan& plan) {
  const int tiles = num_tiles(vocab_size), n = plan.blocks_per_row;
  const int shares = n * rounds(device, batch_size, tiles, plan.exchange, n);
  return std::max((tiles + shares - 1) / shares, 2);
}

cudaLaunchConfig_t configure(int64_t blocks, int threads, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return config;
}

template <typename... Parameters, typename... Args>
cudaError_t launch_in_clusters(void (*kernel)(Parameters...), cudaLaunchConfig_t config,
                               int cluster_size, int64_t shared_bytes, const Args&... args) {
  cudaLaunchAttribute attributes[2] = {cluster_of(cluster_size), overlapping()};
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, Parameters(args)...);
}

}  // namespace
}  // namespace fused_rejection
