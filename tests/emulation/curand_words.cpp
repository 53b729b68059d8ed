// cuRAND's own Philox, which its headers also define for the host.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#define QUALIFIERS static inline
#include <curand_kernel.h>

extern "C" void curand_words(uint64_t seed, uint64_t subsequence, uint64_t position, int count,
                             uint32_t* words) {
  curandStatePhilox4_32_10_t state;
  curand_init(seed, subsequence, position, &state);
  for (int i = 0; i < count; ++i) words[i] = curand(&state);
}
