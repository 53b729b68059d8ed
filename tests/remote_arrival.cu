// What racecheck makes of the way in which blocks of a cluster tell one another what they find in
// src/cuda/csrc/threshold.cuh: a block stores into another's shared memory, arrives at the other's
// mbarrier (release, cluster), and the other waits at it (acquire, cluster) and reads. Nothing
// races here, and no block leaves before the other's stores are there. With an argument, which adds
// cluster barriers that nothing needs, racecheck (of CUDA 13.0, on an H100) is silent; without one
// it reports each store.
//
//     nvcc -arch=sm_90 -o remote_arrival tests/remote_arrival.cu
//     compute-sanitizer --tool racecheck ./remote_arrival
#include <cstdint>
#include <cstdio>

namespace {

constexpr int kThreads = 32;

__device__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ unsigned in_block(const void* shared, unsigned rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address_of(shared)), "r"(rank));
  return there;
}

__device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <bool with_barriers>
__global__ void exchange(int* out) {
  __shared__ int told[kThreads];
  __shared__ uint64_t barrier;
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(&barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_barrier();
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(in_block(told + threadIdx.x, rank ^ 1)),
               "r"(threadIdx.x + 1)
               : "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                     in_block(&barrier, rank ^ 1))
                 : "memory");
  }
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address_of(&barrier))
        : "memory");
  }
  if (with_barriers) cluster_barrier();
  out[blockIdx.x * kThreads + threadIdx.x] = told[kThreads - 1 - threadIdx.x];
  if (with_barriers) cluster_barrier();
}

}  // namespace

int main(int count, char**) {
  int* out = nullptr;
  int found[2 * kThreads] = {};
  cudaMalloc(&out, sizeof found);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(kThreads);
  config.attrs = &cluster;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, count > 1 ? exchange<true> : exchange<false>, out);
  cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost);
  const bool is_right = found[0] == kThreads && found[2 * kThreads - 1] == 1;
  std::printf("%s, %s\n", cudaGetErrorString(cudaGetLastError()), is_right ? "right" : "wrong");
  return is_right ? 0 : 1;
}
