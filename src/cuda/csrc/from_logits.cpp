// The operators on logits.
#include "from_logits.h"

#include <limits>
#include <memory>
#include <optional>

#include "binding.h"
#include "direct.h"

namespace fused_rejection {
namespace {

// What a request's parameters are, beside Arguments, whose target_probs and draft_probs are logits
// here.
struct LogitsArguments {
  Arguments base;
  bool draft_is_logits;
  const at::Tensor *draft_logsumexp, *temperature, *top_k, *top_p, *min_p;

  void check_parameters() {
    base.make_rows(temperature, at::kFloat, "temperature");
    base.make_rows(top_k, at::kInt, "top_k");
    base.make_rows(top_p, at::kFloat, "top_p");
    base.make_rows(min_p, at::kFloat, "min_p");
    check(draft_is_logits || !draft_logsumexp, "draft_logsumexp");
    base.make_shape(draft_logsumexp, base.ids->sizes(), at::kDouble, "draft_logsumexp");
  }
};

LogitsParams params_of(const LogitsArguments& a, const OutputReference& output, double* logsumexp) {
  LogitsParams p = {};
  p.base = params_of(a.base, output);
  p.draft_is_logits = a.draft_is_logits;
  p.temperature = pointer<float>(a.temperature);
  p.top_k = pointer<int32_t>(a.top_k);
  p.top_p = pointer<float>(a.top_p);
  p.min_p = pointer<float>(a.min_p);
  p.draft_logsumexp = pointer<double>(a.draft_logsumexp);
  p.logsumexp = logsumexp;
  return p;
}

// ---- CPU

// The statistics of the logits of a tile that are kept. Beyond the vocabulary there are others of
// -inf.
template <typename T>
TileStats tile_stats(const T* x, int tile, int vocab_size, float scale, float threshold) {
  const int begin = tile * kTile, count = std::min(kTile, vocab_size - begin);
  float logits[kTile], w[kTile];
  std::fill(logits + count, logits + kTile, kNegativeInfinity);
  float largest = kNegativeInfinity;
  for (int m = 0; m < count; ++m) {
    logits[m] = finite_logit(static_cast<float>(x[begin + m]));
    largest = std::max(largest, logits[m]);
  }
  if (!(largest >= threshold) || !(largest > kNegativeInfinity)) return {kNegativeInfinity, 0.0f};
  if (PowersBeside::serve(largest, scale)) {
    const PowersBeside power(largest, scale);
    for (int m = 0; m < kTile; ++m) w[m] = power(at_least(logits[m], power.floor));
  } else {
    for (int m = 0; m < kTile; ++m) w[m] = exp2_portable(octaves_beside(logits[m], largest, scale));
  }
  for (int m = 0; m < kTile; ++m) w[m] = logits[m] >= threshold ? w[m] : 0.0f;
  return {largest, tile_sum([&](int m) { return w[m]; })};
}

// What filters keep: the logits from `threshold` on, and their masses.
struct Kept {
  float threshold;
  uint64_t mass;
};

// `sum`: of the row's tiles' weights. The same wherever it is searched for: a mass is an integer,
// and the share of top-p is of `sum`, or after top-k of the masses that it left.
template <typename T>
Kept find_kept(const LogitsParams& a, int64_t b, const T* x, float largest, float scale,
               double sum) {
  const int vocab_size = static_cast<int>(a.base.vocab_size);
  const float unit = mass_unit(vocab_size);
  const auto mass = [&](float logit) { return mass_of(logit, largest, scale, unit); };
  std::vector<float> kept;  // in descending order
  for (int i = 0; i < vocab_size; ++i) {
    const float logit = finite_logit(static_cast<float>(x[i]));
    if (logit > kNegativeInfinity) kept.push_back(logit == 0.0f ? 0.0f : logit);
  }
  std::sort(kept.begin(), kept.end(), std::greater<float>());
  const auto keep_from = [&](float threshold) {
    while (kept.back() < threshold) kept.pop_back();
  };
  const int64_t top_k = a.top_k ? a.top_k[b] : 0;
  const bool by_rank = top_k > 0 && top_k < vocab_size;
  if (by_rank && top_k <= static_cast<int64_t>(kept.size())) keep_from(kept[top_k - 1]);
  const float top_p = a.top_p ? a.top_p[b] : 1.0f;
  if (top_p < 1.0f) {
    double total = sum * unit;
    if (by_rank) {
      uint64_t masses = 0;
      for (const float logit : kept) masses += mass(logit);
      total = static_cast<double>(masses);
    }
    const uint64_t wanted = mass_wanted(top_p, total);
    uint64_t reached = 0;
    for (const float logit : kept) {
      reached += mass(logit);
      if (reached >= wanted) {
        keep_from(logit);
        break;
      }
    }
  }
  const float min_p = a.min_p ? a.min_p[b] : 0.0f;
  if (min_p > 0.0f) {
    // A min_p above 1 would keep nothing: the largest always stays.
    while (kept.back() < largest && !keeps_min_p(kept.back(), largest, scale, min_p)) {
      kept.pop_back();
    }
  }
  uint64_t masses = 0;
  for (const float logit : kept) masses += mass(logit);
  return {kept.back(), masses};
}

// `stats` gets the row's tiles.
template <typename T>
RowSummary summarize(const LogitsParams& a, int64_t b, const T* x, std::vector<TileStats>& stats) {
  const int vocab_size = static_cast<int>(a.base.vocab_size), tiles = num_tiles(vocab_size);
  const float scale = a.scale(b);
  stats.resize(tiles);
  const auto pass = [&](float threshold) {
    for (int tile = 0; tile < tiles; ++tile) {
      stats[tile] = tile_stats(x, tile, vocab_size, scale, threshold);
    }
  };
  pass(kNegativeInfinity);
  float largest = kNegativeInfinity;
  for (const TileStats& tile : stats) largest = std::max(largest, tile.largest);
  if (a.is_greedy(b)) {
    int argmax = -1;
    if (largest > kNegativeInfinity) {
      for (argmax = 0; finite_logit(static_cast<float>(x[argmax])) != largest;) ++argmax;
    }
    return {0.0, largest, stats.data(), largest, kNegativeInfinity, argmax};
  }
  const auto sum = [&] {
    Spans<double> spans;
    sum_spans(tiles, [&](int tile) { return tile_weight(stats[tile], largest, scale); }, spans);
    return spans.total();
  };
  const double total = sum();
  if (!a.filters(b) || !(largest > kNegativeInfinity)) {
    return {total, -INFINITY, stats.data(), largest, kNegativeInfinity, -1};
  }
  const Kept kept = find_kept(a, b, x, largest, scale, total);
  pass(kept.threshold);
  const double logsumexp = kept_logsumexp(kept.mass, largest, scale, mass_unit(vocab_size));
  return {0.0, logsumexp, stats.data(), largest, kept.threshold, -1};
}

// A request's summaries, made when they are first asked for: rows after the first rejection never
// are.
template <typename T>
struct LazySummaries {
  struct Known {
    std::vector<std::optional<RowSummary>> rows;  // K + 1 of the target, then K of the draft
    std::vector<std::vector<TileStats>> stats;
  };
  const LogitsParams* params;
  Request<T> request;
  std::shared_ptr<Known> known;

  LazySummaries(const LogitsParams& a, int64_t b)
      : params(&a), request(a.base, b), known(std::make_shared<Known>()) {
    known->rows.resize(2 * a.base.spec_length + 1);
    known->stats.resize(known->rows.size());
  }

  RowSummary target(int64_t k) const {
    auto& summary = known->rows[k];
    if (!summary) summary = summarize(*params, request.b, request.target_row(k), known->stats[k]);
    return *summary;
  }

  RowSummary draft(int64_t k) const {
    const int64_t i = params->base.spec_length + 1 + k;
    auto& summary = known->rows[i];
    if (summary) return *summary;
    const bool given = params->draft_logsumexp != nullptr;
    if (!given || params->filters()) {
      summary = summarize(*params, request.b, request.draft_row(k), known->stats[i]);
    }
    if (given) {
      const double sum = params->draft_logsumexp[request.b * params->base.spec_length + k];
      const float threshold = summary ? summary->threshold : kNegativeInfinity;
      summary = RowSummary{0.0, sum, nullptr, 0.0f, threshold, -1};
    }
    return *summary;
  }

  DraftMass draft_mass(int64_t k, float scale) const {
    return draft_mass_of(draft(k).logsumexp(scale));
  }
};

template <typename T>
struct LazyRequest : LogitsRequest<T, LazySummaries<T>> {
  using Base = LogitsRequest<T, LazySummaries<T>>;

  LazyRequest(const LogitsParams& a, int64_t b) : Base(a, b, LazySummaries<T>(a, b)) {}

  typename Base::Row row(int64_t k, int64_t id) const {
    if (this->logits->logsumexp) {
      this->logits->logsumexp[this->b] = this->summaries.target(k).logsumexp(this->scale);
    }
    return Base::row(k, id);
  }
};

void sample_logits_on_cpu(LogitsArguments& a, const OutputReference& output, double* logsumexp) {
  draw_uniforms(a.base);
  const LogitsParams params = params_of(a, output, logsumexp);
  for_element(params.base.dtype, [&](auto element) {
    using T = decltype(element);
    sample_batch(params.base, [&](int64_t b) { return LazyRequest<T>(params, b); });
  });
}

// ---- CUDA

#ifdef WITH_CUDA
void sample_logits_on_cuda(const LogitsArguments& a, const OutputReference& output,
                           double* logsumexp) {
  launch_on_device(a.base, output, [&](const Params& base, void* stream) {
    LogitsParams params = params_of(a, output, logsumexp);
    params.base = base;  // with the generator's state
    LogitsPlan plan = {};
    check_cuda(plan_from_logits(params, Exchange::kAuto, 0, &plan));
    at::Tensor workspace = empty({plan.workspace_bytes}, at::kByte, a.base.device());
    check_cuda(launch_from_logits(params, plan, workspace.mutable_data_ptr(), stream));
  });
}
#endif

// ---- What both devices offer

void sample(LogitsArguments& a, const OutputReference& output, double* logsumexp) {
#ifdef WITH_CUDA
  if (a.base.device().is_cuda()) return sample_logits_on_cuda(a, output, logsumexp);
#endif
  sample_logits_on_cpu(a, output, logsumexp);
}

Output rejection_sample_from_logits(
    const at::Tensor& ids, const at::Tensor& target_logits, const OptionalTensor& draft_logits,
    const OptionalTensor& draft_probs, const OptionalTensor& draft_logsumexp,
    const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
    const OptionalTensor& min_p, const OptionalTensor& num_draft_tokens,
    const OptionalTensor& uniforms, const OptionalTensor& seeds, const OptionalTensor& offsets,
    const OptionalGenerator& generator, bool block) {
  check(!draft_logits || !draft_probs, "draft_probs");
  LogitsArguments a{padded(ids, draft_logits ? draft_logits : draft_probs, target_logits,
                           num_draft_tokens, uniforms, seeds, offsets, generator),
                    draft_logits.has_value(),
                    address(draft_logsumexp),
                    address(temperature),
                    address(top_k),
                    address(top_p),
                    address(min_p)};
  a.check_parameters();
  a.base.block_verification = block;
  Output output = allocate(a.base);
  sample(a, output, nullptr);
  return output;
}

Output sample_from_logits(const at::Tensor& logits, const OptionalTensor& temperature,
                          const OptionalTensor& top_k, const OptionalTensor& top_p,
                          const OptionalTensor& min_p, const OptionalTensor& uniforms,
                          const OptionalTensor& seeds, const OptionalTensor& offsets,
                          const OptionalGenerator& generator) {
  check(logits.dim() == 2, "logits");
  const int64_t rows = logits.size(0);
  const at::Device device = logits.device();
  const OnDevice on_device(device);
  // A verification without drafts: the bonus token is the sample.
  const at::Tensor no_drafts = empty({rows, 0}, at::kLong, device);
  Arguments base{.ids = &no_drafts,
                 .target_probs = &logits,
                 .uniforms = address(uniforms),
                 .seeds = address(seeds),
                 .offsets = address(offsets),
                 .generator = generator,
                 .batch_size = rows,
                 .spec_length = 0};
  base.check_common({rows});
  LogitsArguments a{std::move(base), false,          nullptr,       address(temperature),
                    address(top_k),  address(top_p), address(min_p)};
  a.check_parameters();
  at::Tensor token_ids = empty({rows}, at::kLong, device);
  at::Tensor logsumexp = empty({rows}, at::kDouble, device);
  const at::Tensor num_accepted = empty({rows}, at::kInt, device);  // zeros, which nobody wants
  sample(a, {token_ids, num_accepted}, logsumexp.mutable_data_ptr<double>());
  return {std::move(token_ids), std::move(logsumexp)};
}

void implement(torch::Library& m) {
  m.impl("rejection_sample_from_logits", &rejection_sample_from_logits);
  m.impl("sample_from_logits", &sample_from_logits);
}

}  // namespace

PyMethodDef* logits_methods() {
  static PyMethodDef methods[] = {
      method<"fused_rejection::rejection_sample_from_logits", &rejection_sample_from_logits>(),
      method<"fused_rejection::sample_from_logits", &sample_from_logits>(),
      {}};
  return methods;
}

}  // namespace fused_rejection

#define FR_PARAMETERS "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
#define FR_RANDOMNESS "Tensor? uniforms, Tensor? seeds, Tensor? offsets, Generator? generator"

TORCH_LIBRARY_FRAGMENT(fused_rejection, m) {
  const std::vector<at::Tag> tags = {at::Tag::nondeterministic_seeded};
  m.def(
      "rejection_sample_from_logits(Tensor draft_token_ids, Tensor target_logits, "
      "Tensor? draft_logits, Tensor? draft_probs, Tensor? draft_logsumexp, " FR_PARAMETERS
      "Tensor? num_draft_tokens, " FR_RANDOMNESS
      ", bool block=False) -> (Tensor token_ids, Tensor num_accepted)",
      tags);
  m.def("sample_from_logits(Tensor logits, " FR_PARAMETERS FR_RANDOMNESS
        ") -> (Tensor token_ids, Tensor logsumexp)",
        tags);
}

TORCH_LIBRARY_IMPL(fused_rejection, CPU, m) { fused_rejection::implement(m); }

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(fused_rejection, CUDA, m) { fused_rejection::implement(m); }
#endif
