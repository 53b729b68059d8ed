// The operator's schema, its checks and its C++ CPU kernel.
#include "fused_rejection.h"

#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <vector>

namespace fused_rejection {
namespace {

template <typename T>
struct Row {  // the V weights that a row's last token is drawn from
  const T* p;
  const T* q;       // null where the draft is one-hot or nothing was rejected
  int64_t one_hot;  // the index where q is 1, or -1
  int64_t vocab_size;

  float operator()(int64_t i) const {
    const float draft = q ? static_cast<float>(q[i]) : (i == one_hot ? 1.0f : 0.0f);
    return weight(static_cast<float>(p[i]), draft);
  }
};

template <typename T>
float tile_sum(const Row<T>& row, int64_t tile) {
  float w[kTile] = {0};
  const int64_t begin = tile * kTile;
  const int64_t count = std::min<int64_t>(kTile, row.vocab_size - begin);
  for (int64_t m = 0; m < count; ++m) w[m] = row(begin + m);
  for (int m = 0; m < kTile / 2; ++m) w[m] += w[m + kTile / 2];
  for (int n = kTile / 4; n >= 1; n /= 2) {
    for (int m = 0; m < n; ++m) w[m] = w[2 * m] + w[2 * m + 1];
  }
  return w[0];
}

template <typename T>
int64_t select(const Row<T>& row, const std::vector<float>& sums, double total, float u) {
  const int64_t tiles = sums.size();
  const double threshold = static_cast<double>(u) * total;
  // `run`, `tile` and `token` are the last candidates with weight: they stand where rounding leaves
  // the threshold beyond the end. `before` is the weight ahead of the candidate.
  int64_t run = 0, tile = 0, token = 0;
  double rest = threshold, before = 0;
  for (int64_t first = 0; first < tiles; first += kRun) {
    double sum = 0;
    for (int64_t t = first; t < std::min(first + kRun, tiles); ++t) sum += sums[t];
    if (sum > 0) {
      run = first;
      rest = threshold - before;
    }
    before += sum;
    if (before > threshold) break;
  }
  const double run_rest = rest;
  before = 0;
  for (int64_t t = run; t < std::min(run + kRun, tiles); ++t) {
    if (sums[t] > 0) {
      tile = t;
      rest = run_rest - before;
    }
    before += sums[t];
    if (before > run_rest) break;
  }
  double cumulative = 0;
  for (int64_t i = tile * kTile; i < std::min((tile + 1) * kTile, row.vocab_size); ++i) {
    const float w = row(i);
    if (w > 0) token = i;
    cumulative += w;
    if (w > 0 && cumulative > rest) break;
  }
  return token;
}

template <typename T>
int64_t draw(Row<T> row, float u) {
  const int64_t tiles = (row.vocab_size + kTile - 1) / kTile;
  std::vector<float> sums(tiles);
  for (int pass = 0; pass < 2; ++pass) {
    double total = 0;
    for (int64_t first = 0; first < tiles; first += kRun) {
      double sum = 0;
      for (int64_t t = first; t < std::min(first + kRun, tiles); ++t) {
        sums[t] = tile_sum(row, t);
        sum += sums[t];
      }
      total += sum;
    }
    if (total > 0) return select(row, sums, total, u);
    row.q = nullptr;  // no residual: draw from p
    row.one_hot = -1;
  }
  return 0;  // p has no positive mass either
}

void check(bool ok, const char* argument) {
  // src/contract.py has the sentences; this guards the memory when it is not called first.
  TORCH_CHECK_VALUE(ok, argument, " does not fit the other arguments; see src/contract.py");
}

std::tuple<at::Tensor, at::Tensor> rejection_sample_cpu(
    const at::Tensor& ids, const std::optional<at::Tensor>& draft_probs,
    const at::Tensor& target_probs, const std::optional<at::Tensor>& num_draft_tokens,
    const std::optional<at::Tensor>& uniforms, const std::optional<at::Tensor>& seeds,
    const std::optional<at::Tensor>& offsets) {
  check(ids.dim() == 2, "draft_token_ids");
  const int64_t batch_size = ids.size(0), spec_length = ids.size(1);
  check(target_probs.dim() == 3 && target_probs.size(0) == batch_size &&
            target_probs.size(1) == spec_length + 1 && target_probs.size(2) > 0,
        "target_probs");
  const int64_t vocab_size = target_probs.size(2);
  check(vocab_size == 1 || target_probs.stride(2) == 1, "target_probs");
  if (draft_probs) {
    check(draft_probs->sizes() == at::IntArrayRef({batch_size, spec_length, vocab_size}) &&
              draft_probs->scalar_type() == target_probs.scalar_type() &&
              (vocab_size == 1 || draft_probs->stride(2) == 1) && draft_probs->is_cpu(),
          "draft_probs");
  }
  check(uniforms.has_value() != (seeds.has_value() && offsets.has_value()), "uniforms");
  if (uniforms) {
    check(uniforms->sizes() == at::IntArrayRef({batch_size, spec_length + 1}), "uniforms");
  }
  for (const auto* rows : {&num_draft_tokens, &seeds, &offsets}) {
    if (*rows) check((*rows)->sizes() == at::IntArrayRef({batch_size}), "a [B] argument");
  }

  at::Tensor token_ids =
      at::full({batch_size, spec_length + 1}, kPlaceholderTokenId, ids.options());
  at::Tensor num_accepted = at::empty({batch_size}, ids.options().dtype(at::kInt));
  // Small tensors: read through int64 copies rather than a template for each id dtype.
  const at::Tensor ids64 = ids.to(at::kLong);
  const auto x = ids64.accessor<int64_t, 2>();
  auto accepted_out = num_accepted.accessor<int32_t, 1>();
  at::Tensor last = at::empty({batch_size}, ids64.options());
  auto last_token = last.accessor<int64_t, 1>();

  const auto sample = [&](auto type_tag) {
    using scalar_t = decltype(type_tag);
    const auto p = target_probs.accessor<scalar_t, 3>();
    at::parallel_for(0, batch_size, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const auto uniform = [&](int64_t k) {
          if (uniforms) return uniforms->accessor<float, 2>()[b][k];
          return to_uniform(philox_word(seeds->accessor<int64_t, 1>()[b], 0,
                                        offsets->accessor<int64_t, 1>()[b] + k));
        };
        const auto q_row = [&](int64_t k) {
          return draft_probs ? draft_probs->accessor<scalar_t, 3>()[b][k].data() : nullptr;
        };
        int64_t length = spec_length;
        if (num_draft_tokens) {
          length = std::min<int64_t>(num_draft_tokens->accessor<int32_t, 1>()[b], length);
        }
        Row<scalar_t> row{nullptr, nullptr, -1, vocab_size};
        int64_t k = 0;
        for (; k < length && x[b][k] != kPlaceholderTokenId; ++k) {
          const int64_t id = x[b][k];
          const bool in_vocab = id >= 0 && id < vocab_size;
          const scalar_t* q = q_row(k);
          if (in_vocab && accepts(uniform(k), q ? static_cast<float>(q[id]) : 1.0f,
                                  static_cast<float>(p[b][k][id]))) {
            continue;
          }
          row.q = q;
          row.one_hot = !q && in_vocab ? id : -1;
          break;
        }
        row.p = p[b][k].data();
        accepted_out[b] = static_cast<int32_t>(k);
        last_token[b] = draw(row, uniform(spec_length));
      }
    });
  };
  switch (target_probs.scalar_type()) {
    case at::kFloat:
      sample(float{});
      break;
    case at::kBFloat16:
      sample(at::BFloat16{});
      break;
    case at::kHalf:
      sample(at::Half{});
      break;
    default:
      check(false, "target_probs");
  }
  const at::Tensor count = num_accepted.to(at::kLong).unsqueeze(1);
  const at::Tensor columns = at::arange(spec_length, count.options()).unsqueeze(0);
  token_ids.narrow(1, 0, spec_length)
      .copy_(at::where(columns < count, ids, token_ids.narrow(1, 0, spec_length)));
  token_ids.scatter_(1, count, last.unsqueeze(1).to(ids.scalar_type()));
  return {token_ids, num_accepted};
}

}  // namespace
}  // namespace fused_rejection

TORCH_LIBRARY(fused_rejection, m) {
  m.def(
      "rejection_sample(Tensor draft_token_ids, Tensor? draft_probs, Tensor target_probs, "
      "Tensor? num_draft_tokens, Tensor? uniforms, Tensor? seeds, Tensor? offsets) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fused_rejection, CPU, m) {
  m.impl("rejection_sample", &fused_rejection::rejection_sample_cpu);
}

// setuptools wants a module to import; importing it registers the operator.
PyMODINIT_FUNC PyInit_fused_rejection_C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "fused_rejection_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
