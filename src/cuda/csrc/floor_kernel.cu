// The floor: a kernel that only reads the V-rows a verification needs and adds them up. No verifier
// that reads those rows can be faster; what it takes above this is decisions, exchange and search.
#include <cuda_runtime.h>

#include "fused_rejection.h"

namespace fused_rejection {
namespace {

constexpr int kThreads = 512, kWarp = 32, kUnroll = 4;

// Adds the bytes of a row as float32 words: the sum only keeps the loads alive.
__device__ float sum_words(const char* row, int64_t bytes, int64_t first, int64_t step) {
  float sum = 0;
  const int64_t vectors = bytes / 16;
#pragma unroll kUnroll
  for (int64_t i = first; i < vectors; i += step) {
    const float4 v = reinterpret_cast<const float4*>(row)[i];
    sum += v.x + v.y + v.z + v.w;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    floor_kernel(const char* target, const char* draft, const int64_t* rows, int64_t bytes,
                 int blocks_per_row, float* sums) {
  const int64_t b = blockIdx.x / blocks_per_row;
  const int64_t first = static_cast<int64_t>(blockIdx.x % blocks_per_row) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(blocks_per_row) * kThreads;
  float sum = sum_words(target + rows[2 * b], bytes, first, step);
  if (rows[2 * b + 1] >= 0) sum += sum_words(draft + rows[2 * b + 1], bytes, first, step);
  for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, d);
  if (threadIdx.x % kWarp == 0) {
    sums[(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp] = sum;
  }
}

}  // namespace

int launch_floor(const void* target, const void* draft, const int64_t* rows, int64_t batch_size,
                 int64_t row_bytes, int blocks_per_row, float* sums, void* stream) {
  if (batch_size == 0) return cudaSuccess;
  floor_kernel<<<static_cast<unsigned>(batch_size * blocks_per_row), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(static_cast<const char*>(target),
                                                      static_cast<const char*>(draft), rows,
                                                      row_bytes, blocks_per_row, sums);
  return cudaGetLastError();
}

}  // namespace fused_rejection
