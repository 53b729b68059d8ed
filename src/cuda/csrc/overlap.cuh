// A launch that starts while the one before it in the stream ends (programmatic dependent launch),
// on cards of compute capability 9.0 and later: what its kernel calls, and what it is launched
// with.
#pragma once

#include <cuda_runtime.h>

namespace fused_rejection {
namespace {

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

// What may be asked for before that: it only brings the line to L2.
__device__ __forceinline__ void prefetch_line(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// Whether a kernel's code is for such a card. Code compiled for sm_80 runs on later cards too, but
// its waits are left out.
inline bool is_for_sm_90(const cudaFuncAttributes& attributes) {
  return attributes.binaryVersion >= 90 && attributes.ptxVersion >= 90;
}

// The launch may start while the one before it in the stream ends, or from where that one allows it
// (allow_next_launch). The kernel touches no memory before wait_for_launch_before(), but for what
// was there before that launch. What starting a launch costs is then partly hidden.
inline cudaLaunchAttribute overlapping() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// `waits`: whether the card and the kernel's code have the waits; without them it comes after.
template <typename... Parameters, typename... Args>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), cudaLaunchConfig_t config, bool waits,
                               const Args&... args) {
  cudaLaunchAttribute attribute = overlapping();
  config.attrs = &attribute;
  config.numAttrs = waits ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(args)...);
}

// The same for a kernel of which that is not known: its code is asked.
template <typename... Parameters, typename... Args>
cudaError_t launch_asking(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config,
                          const Args&... args) {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  return launch_overlapping(kernel, config, is_for_sm_90(attributes), args...);
}

}  // namespace
}  // namespace fused_rejection
