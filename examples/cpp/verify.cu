// The fast kernel without Python or PyTorch, for engines of their own:
//   nvcc -std=c++20 --fmad=false -arch=native -Isrc/cuda/csrc examples/cpp/verify.cu
//        src/cuda/csrc/fused_rejection_kernel.cu -o verify && ./verify
// Two requests, three drafts each, a vocabulary of 1000 and one-hot drafts: the target of the first
// agrees with all of its drafts; the second's is sure of token 7 where the draft said 11.
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "fused_rejection.h"

namespace {

void check(int error, const char* what) {
  if (error == 0) return;
  std::fprintf(stderr, "%s: %s\n", what, fused_rejection::cuda_error_string(error));
  std::exit(1);
}

template <typename T>
T* to_device(const std::vector<T>& values) {
  T* pointer = nullptr;
  check(cudaMalloc(&pointer, values.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  return pointer;
}

}  // namespace

int main() {
  const int batch_size = 2, spec_length = 3, vocab_size = 1000, positions = spec_length + 1;
  const std::vector<int32_t> drafts = {3, 4, 5, 3, 11, 5};
  const std::vector<int32_t> sure = {3, 4, 5, 6, 3, 7, 5, 6};  // what the target is certain of
  std::vector<float> target(batch_size * positions * vocab_size, 0.0f);
  for (size_t i = 0; i < sure.size(); ++i) target[i * vocab_size + sure[i]] = 1.0f;

  fused_rejection::Params params = {};  // what is not set is absent: no draft_probs, no lengths
  params.batch_size = batch_size;
  params.spec_length = spec_length;
  params.vocab_size = vocab_size;
  params.dtype = fused_rejection::Dtype::kFloat32;
  params.draft_token_ids = to_device(drafts);
  params.target_probs = to_device(target);
  params.target_row_stride = int64_t{positions} * vocab_size;
  params.target_position_stride = vocab_size;
  params.seeds = to_device(std::vector<int64_t>{1, 2});
  params.offsets = to_device(std::vector<int64_t>{0, 0});
  params.token_ids = to_device(std::vector<int32_t>(batch_size * positions, 0));
  params.num_accepted = to_device(std::vector<int32_t>(batch_size, 0));

  fused_rejection::Plan plan = {};
  void* workspace = nullptr;
  check(fused_rejection::plan_fused(params, fused_rejection::Exchange::kAuto, 0, &plan), "plan");
  if (plan.workspace_bytes) check(cudaMalloc(&workspace, plan.workspace_bytes), "cudaMalloc");
  check(fused_rejection::launch_fused(params, plan, workspace, nullptr), "launch");

  std::vector<int32_t> tokens(batch_size * positions);
  check(cudaMemcpy(tokens.data(), params.token_ids, tokens.size() * sizeof(int32_t),
                   cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::printf("%d%c", tokens[i], (i + 1) % positions ? ' ' : '\n');
  }
  return tokens == std::vector<int32_t>{3, 4, 5, 6, 3, 7, -1, -1} ? 0 : 1;
}
