// The operator of the decoding loop's bookkeeping: checked arguments, then the launch.
#ifdef WITH_CUDA
#include "decoding_round.h"

#include "binding.h"

namespace decoding_round {
namespace {

// The caller is src/decoding/state.py: this only guards the memory.
void check(const at::Tensor& tensor, const at::Tensor& like, at::IntArrayRef shape,
           const char* name, at::ScalarType dtype = at::kLong) {
  TORCH_CHECK_VALUE(tensor.device() == like.device() && tensor.scalar_type() == dtype &&
                        tensor.sizes() == shape && tensor.is_contiguous(),
                    name, " does not fit the round; see src/decoding/state.py");
}

void advance(const at::Tensor& token_ids, const at::Tensor& num_accepted,
             const at::Tensor& draft_ids, const at::Tensor& eos, const at::Tensor& tokens,
             const at::Tensor& start, const at::Tensor& newest, const at::Tensor& limit,
             const at::Tensor& offsets, const at::Tensor& counts, const at::Tensor& left) {
  TORCH_CHECK_VALUE(tokens.is_cuda() && tokens.dim() == 2 && tokens.size(0) > 0 &&
                        offsets.dim() == 2 && offsets.size(0) >= 1 &&
                        offsets.size(0) <= kMostColumns,
                    "tokens or offsets do not fit the round; see src/decoding/state.py");
  const int64_t batch_size = tokens.size(0), columns = offsets.size(0), spec_length = columns - 1;
  check(token_ids, tokens, {batch_size, columns}, "token_ids");
  check(num_accepted, tokens, {batch_size}, "num_accepted", at::kInt);
  check(draft_ids, tokens, {batch_size, spec_length}, "draft_ids");
  check(eos, tokens, {eos.numel()}, "eos");
  check(tokens, tokens, tokens.sizes(), "tokens");
  check(start, tokens, {batch_size}, "start");
  check(newest, tokens, {batch_size, 2}, "newest");
  check(limit, tokens, {batch_size}, "limit");
  check(offsets, tokens, {columns, batch_size}, "offsets");
  check(counts, tokens, {1 + 3 * spec_length}, "counts");
  check(left, tokens, {}, "left");
  const c10::cuda::CUDAGuard guard(tokens.device());
  fused_rejection::check_cuda(
      launch_advance({.token_ids = token_ids.const_data_ptr<int64_t>(),
                      .draft_ids = draft_ids.const_data_ptr<int64_t>(),
                      .eos = eos.const_data_ptr<int64_t>(),
                      .num_accepted = num_accepted.const_data_ptr<int32_t>(),
                      .tokens = tokens.mutable_data_ptr<int64_t>(),
                      .start = start.mutable_data_ptr<int64_t>(),
                      .newest = newest.mutable_data_ptr<int64_t>(),
                      .limit = limit.mutable_data_ptr<int64_t>(),
                      .offsets = offsets.mutable_data_ptr<int64_t>(),
                      .counts = counts.mutable_data_ptr<int64_t>(),
                      .left = left.mutable_data_ptr<int64_t>(),
                      .batch_size = static_cast<int>(batch_size),
                      .spec_length = static_cast<int>(spec_length),
                      .eos_count = static_cast<int>(eos.numel()),
                      .row_length = static_cast<int>(tokens.size(1))},
                     c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace
}  // namespace decoding_round

TORCH_LIBRARY(decoding_round, m) {
  m.def(
      "advance(Tensor token_ids, Tensor num_accepted, Tensor draft_ids, Tensor eos, "
      "Tensor(a!) tokens, Tensor(b!) start, Tensor(c!) newest, Tensor(d!) limit, "
      "Tensor(e!) offsets, Tensor(f!) counts, Tensor(g!) left) -> ()");
}

TORCH_LIBRARY_IMPL(decoding_round, CUDA, m) { m.impl("advance", &decoding_round::advance); }
#endif
