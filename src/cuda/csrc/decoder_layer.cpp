// The operators of a decoder layer for a few query tokens: checked arguments, then the launch.
#ifdef WITH_CUDA
#include "decoder_layer.h"

#include "binding.h"

namespace decoder_layer {
namespace {

using fused_rejection::check_cuda;
using fused_rejection::OptionalTensor;

void check(bool fits, const char* name) {
  TORCH_CHECK_VALUE(fits, name, " does not fit the layer; see src/decoding/few_tokens.py");
}

// The caller is src/decoding/few_tokens.py: these only guard the memory.
void check_tensor(const at::Tensor& tensor, const at::Tensor& like, at::IntArrayRef shape,
                  at::ScalarType dtype, const char* name) {
  const bool fits = tensor.device() == like.device() && tensor.scalar_type() == dtype &&
                    tensor.sizes() == shape && tensor.is_contiguous() &&
                    reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  check(fits, name);
}

// x [M, width], weights [rows, width], norm [width].
Product product(const at::Tensor& x, const at::Tensor& weights, const at::Tensor* norm = nullptr,
                double epsilon = 0) {
  check(x.is_cuda() && x.dim() == 2 && x.size(0) > 0 && x.size(0) <= kMostTokens, "x");
  check_tensor(x, x, x.sizes(), at::kBFloat16, "x");
  check(weights.dim() == 2 && weights.size(0) % 64 == 0 && weights.size(1) % 64 == 0, "weights");
  check_tensor(weights, x, {weights.size(0), x.size(1)}, at::kBFloat16, "weights");
  if (norm) check_tensor(*norm, x, {x.size(1)}, at::kBFloat16, "norm");
  return {.x = x.const_data_ptr(),
          .weights = weights.const_data_ptr(),
          .norm = norm ? norm->const_data_ptr() : nullptr,
          .tokens = static_cast<int>(x.size(0)),
          .rows = static_cast<int>(weights.size(0)),
          .width = static_cast<int>(x.size(1)),
          .epsilon = static_cast<float>(epsilon)};
}

// query [M, heads * head_dim], cache [B, capacity, 2 * kv_heads, head_dim], positions [B, Q].
Heads heads_of(const at::Tensor& query, const at::Tensor& cache, const at::Tensor& positions) {
  check(cache.dim() == 4 && (cache.size(3) == 64 || cache.size(3) == 128), "cache");
  check_tensor(cache, query, cache.sizes(), at::kBFloat16, "cache");
  check(positions.dim() == 2 && positions.size(0) == cache.size(0), "positions");
  check_tensor(positions, query, positions.sizes(), at::kLong, "positions");
  const int64_t kv_heads = cache.size(2) / 2, heads = query.size(-1) / cache.size(3);
  check(kv_heads > 0 && heads % kv_heads == 0, "query");
  check_tensor(query, query, {positions.numel(), heads * cache.size(3)}, at::kBFloat16, "query");
  return {.queries = static_cast<int>(positions.size(1)),
          .capacity = static_cast<int>(cache.size(1)),
          .heads = static_cast<int>(heads),
          .kv_heads = static_cast<int>(kv_heads),
          .head_dim = static_cast<int>(cache.size(3))};
}

// Runs `launch`(stream) on the tensor's device.
template <typename Launch>
void on_device_of(const at::Tensor& tensor, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  check_cuda(launch(c10::cuda::getCurrentCUDAStream().stream()));
}

// ids [B, Q] and start [B] int64, table [V, width], rotation [capacity, 2, head_dim].
void embed(const at::Tensor& ids, const at::Tensor& start, int64_t ahead, const at::Tensor& table,
           const at::Tensor& rotation, const at::Tensor& x, const at::Tensor& positions,
           const at::Tensor& rotated) {
  check(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.device() == x.device(), "ids");
  check(table.is_cuda() && table.dim() == 2 && table.size(1) % 64 == 0, "table");
  check(rotation.dim() == 3 && rotation.size(1) == 2 && rotation.size(2) % 8 == 0, "rotation");
  check_tensor(start, x, {ids.size(0)}, at::kLong, "start");
  check_tensor(table, x, table.sizes(), at::kBFloat16, "table");
  check_tensor(rotation, x, rotation.sizes(), at::kBFloat16, "rotation");
  check_tensor(x, table, {ids.numel(), table.size(1)}, at::kBFloat16, "x");
  check_tensor(positions, x, ids.sizes(), at::kLong, "positions");
  check_tensor(rotated, x, {ids.numel(), 2, rotation.size(2)}, at::kBFloat16, "rotated");
  if (ids.numel() == 0) return;
  const Heads heads = {.queries = static_cast<int>(ids.size(1)),
                       .capacity = static_cast<int>(rotation.size(0)),
                       .heads = 0,
                       .kv_heads = 0,
                       .head_dim = static_cast<int>(rotation.size(2))};
  on_device_of(x, [&](void* stream) {
    return launch_embed(ids.const_data_ptr<int64_t>(), start.const_data_ptr<int64_t>(),
                        ids.stride(0), ids.stride(1), ahead, table.size(0),
                        static_cast<int>(ids.numel()), static_cast<int>(table.size(1)), heads,
                        table.const_data_ptr(), rotation.const_data_ptr(), x.mutable_data_ptr(),
                        positions.mutable_data_ptr<int64_t>(), rotated.mutable_data_ptr(), stream);
  });
}

void qkv(const at::Tensor& x, const at::Tensor& norm, double epsilon, const at::Tensor& weights,
         const OptionalTensor& bias, const at::Tensor& rotated, const at::Tensor& positions,
         const at::Tensor& query, const at::Tensor& cache) {
  const Product a = product(x, weights, &norm, epsilon);
  const Heads heads = heads_of(query, cache, positions);
  check(a.tokens == query.size(0) && a.rows == (heads.heads + 2 * heads.kv_heads) * heads.head_dim,
        "weights");
  if (bias) check_tensor(*bias, x, {a.rows}, at::kBFloat16, "bias");
  check_tensor(rotated, x, {a.tokens, 2, heads.head_dim}, at::kBFloat16, "rotated");
  on_device_of(x, [&](void* stream) {
    return launch_qkv(a, heads, bias ? bias->const_data_ptr() : nullptr, rotated.const_data_ptr(),
                      positions.const_data_ptr<int64_t>(), query.mutable_data_ptr(),
                      cache.mutable_data_ptr(), stream);
  });
}

void attention(const at::Tensor& query, const at::Tensor& cache, const at::Tensor& positions,
               double scaling, const at::Tensor& attended) {
  const Heads heads = heads_of(query, cache, positions);
  check_tensor(attended, query, query.sizes(), at::kBFloat16, "attended");
  on_device_of(query, [&](void* stream) {
    return launch_attention(heads, static_cast<int>(query.size(0)), query.const_data_ptr(),
                            cache.const_data_ptr(), positions.const_data_ptr<int64_t>(),
                            static_cast<float>(scaling), attended.mutable_data_ptr(), stream);
  });
}

void add(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& residual) {
  const Product a = product(x, weights);
  check_tensor(residual, x, {a.tokens, a.rows}, at::kBFloat16, "residual");
  on_device_of(x, [&](void* stream) { return launch_add(a, residual.mutable_data_ptr(), stream); });
}

void gated(const at::Tensor& x, const at::Tensor& norm, double epsilon, const at::Tensor& weights,
           const at::Tensor& out, const at::Tensor& later, int64_t later_bytes) {
  const Product a = product(x, weights, &norm, epsilon);
  check_tensor(out, x, {a.tokens, a.rows / 2}, at::kBFloat16, "gated");
  check_tensor(later, x, later.sizes(), at::kBFloat16, "later");
  const int64_t bytes = std::min(later_bytes, static_cast<int64_t>(later.nbytes()));
  on_device_of(x, [&](void* stream) {
    return launch_gated(a, out.mutable_data_ptr(), later.const_data_ptr(), bytes, stream);
  });
}

void logits(const at::Tensor& x, const at::Tensor& norm, double epsilon, const at::Tensor& weights,
            const at::Tensor& out) {
  const Product a = product(x, weights, &norm, epsilon);
  check_tensor(out, x, {a.tokens, a.rows}, at::kBFloat16, "logits");
  on_device_of(x, [&](void* stream) { return launch_logits(a, out.mutable_data_ptr(), stream); });
}

}  // namespace
}  // namespace decoder_layer

#define DL_NORMALIZED "Tensor x, Tensor norm, float epsilon, Tensor weights"

TORCH_LIBRARY(decoder_layer, m) {
  m.def(
      "embed(Tensor ids, Tensor start, int ahead, Tensor table, Tensor rotation, Tensor(a!) x, "
      "Tensor(b!) positions, Tensor(c!) rotated) -> ()");
  m.def("qkv(" DL_NORMALIZED
        ", Tensor? bias, Tensor rotated, Tensor positions, Tensor(a!) query, Tensor(b!) cache) "
        "-> ()");
  m.def(
      "attention(Tensor query, Tensor cache, Tensor positions, float scaling, Tensor(a!) attended) "
      "-> ()");
  m.def("add(Tensor x, Tensor weights, Tensor(a!) residual) -> ()");
  m.def("gated(" DL_NORMALIZED ", Tensor(a!) gated, Tensor later, int later_bytes) -> ()");
  m.def("logits(" DL_NORMALIZED ", Tensor(a!) logits) -> ()");
}

TORCH_LIBRARY_IMPL(decoder_layer, CUDA, m) {
  m.impl("embed", &decoder_layer::embed);
  m.impl("qkv", &decoder_layer::qkv);
  m.impl("attention", &decoder_layer::attention);
  m.impl("add", &decoder_layer::add);
  m.impl("gated", &decoder_layer::gated);
  m.impl("logits", &decoder_layer::logits);
}
#endif
