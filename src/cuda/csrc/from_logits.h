// The arithmetic of sampling from logits, shared by the C++ and the CUDA kernels. No torch headers.
#pragma once

#include <cmath>

#include "fused_rejection.h"

namespace fused_rejection {

constexpr float kNegativeInfinity = -INFINITY;
constexpr float kLargestFloat = 0x1.fffffep127f;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// max(x, bound), and bound for NaN: one instruction here and there.
FR_FUNCTION float at_least(float x, float bound) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, bound);
#else
  return x > bound ? x : bound;
#endif
}

constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// 2^n * value, n the integer to which `shifted` was rounded by kRoundingShift.
FR_FUNCTION float times_power(float value, float shifted) {
  return float_from_bits(bits_of(value) + (bits_of(shifted) << 23));
}

// 2^f for f in [-0.5, 0.5], within 2e-7, and exactly 1 at 0. The same bits on every machine, which
// neither libm nor the device's ex2 promises.
FR_FUNCTION float exp2_of_fraction(float f) {
  float y = 0x1.5bfc8ep-10f;
  y = fmaf(y, f, 0x1.3cee4cp-7f);
  y = fmaf(y, f, 0x1.c6b62ap-5f);
  y = fmaf(y, f, 0x1.ebf9b2p-3f);
  y = fmaf(y, f, 0x1.62e42cp-1f);
  return fmaf(y, f, 1.0f);
}

// 2^t for t below 127, within 2e-7 down to t = -126; 0 at -127 and below and for NaN.
FR_FUNCTION float exp2_portable(float t) {
  t = at_least(t, -127.0f);
  const float shifted = t + kRoundingShift;
  const float f = t - (shifted - kRoundingShift);
  return times_power(exp2_of_fraction(f), shifted);  // at -127 the bits of 1 and the power cancel
}

// (2^f - 1) / f for f in [-0.5, 0.5], within 2e-7.
FR_FUNCTION float exp2_slope(float f) {
  float y = 0x1.4308f4p-13f;
  y = fmaf(y, f, 0x1.5f07b4p-10f);
  y = fmaf(y, f, 0x1.3b2bap-7f);
  y = fmaf(y, f, 0x1.c6af6ep-5f);
  y = fmaf(y, f, 0x1.ebfbdep-3f);
  return fmaf(y, f, 0x1.62e43p-1f);
}

// 1 - 2^t for t <= 0, without cancellation near 0; 1 for NaN. 2^t is 2^n * (1 + f * slope).
FR_FUNCTION float one_minus_exp2(float t) {
  t = at_least(t, -126.0f);
  const float shifted = t + kRoundingShift;
  const float f = t - (shifted - kRoundingShift);
  const float power = times_power(1.0f, shifted);
  return fmaf(-power, exp2_slope(f) * f, 1.0f - power);
}

// The same in float64, within 3e-12.
FR_FUNCTION double exp2_of_fraction(double f) {
  double y = 0x1.63b2d7971923fp-20;
  y = fma(y, f, 0x1.00c0e4e15189cp-16);
  y = fma(y, f, 0x1.4308c7183d6a2p-13);
  y = fma(y, f, 0x1.5d877598350dep-10);
  y = fma(y, f, 0x1.3b2ab70ad2565p-7);
  y = fma(y, f, 0x1.c6b08da70cce3p-5);
  y = fma(y, f, 0x1.ebfbdff82a734p-3);
  y = fma(y, f, 0x1.62e42fef9cc69p-1);
  return fma(y, f, 1.0);
}

// log2 of a positive, normal number, within 2e-11: the same bits on every machine.
FR_FUNCTION double log2_portable(double value) {
  const uint64_t bits = bits_of(value);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double m = double_from_bits((bits & 0xFFFFFFFFFFFFFull) | (1023ull << 52));
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double z = (m - 1.0) / (m + 1.0), z2 = z * z;  // at most 0.0295
  double series = 1.0 / 13;
  series = fma(series, z2, 1.0 / 11);
  series = fma(series, z2, 1.0 / 9);
  series = fma(series, z2, 1.0 / 7);
  series = fma(series, z2, 1.0 / 5);
  series = fma(series, z2, 1.0 / 3);
  series = fma(series, z2, 1.0);
  return exponent + 2.0 * kLog2E * z * series;
}

// NaN as -inf; +inf as the largest float, so that differences of logits are never NaN.
FR_FUNCTION float finite_logit(float x) {
  return x <= kLargestFloat ? x : x > kLargestFloat ? kLargestFloat : kNegativeInfinity;
}

// Exponents are taken beside the one of the largest logit, rounded to a whole number of octaves, so
// that sums beside different ones differ by a power of two. From `kWide` octaves on a float32
// product has no fraction left: then they are differences of logits, scaled.
constexpr float kWide = 0x1p20f;

FR_FUNCTION bool is_wide(float octaves) { return !(fabsf(octaves) < kWide); }

FR_FUNCTION float whole(float octaves) { return (octaves + kRoundingShift) - kRoundingShift; }

// x * scale less the anchor, which is that of a logit that is not wide: with one rounding.
FR_FUNCTION float octaves_beside(float x, float largest, float scale) {
  const float product = largest * scale;
  return is_wide(product) ? (x - largest) * scale : fmaf(x, scale, -whole(product));
}

// The anchor of the exponents beside `largest`, in octaves.
FR_FUNCTION double anchor_of(float largest, float scale) {
  const float product = largest * scale;
  return is_wide(product) ? static_cast<double>(largest) * scale : whole(product);
}

// The least bfloat16 that is at least x.
FR_FUNCTION float next_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return float_from_bits((bits >> 31 ? bits : bits + 0xFFFFu) & 0xFFFF0000u);
}

// 2^octaves_beside(x, largest, scale) in fewer instructions, for a sum that `largest` is part of:
// the product is rounded to whole octaves as it is made, and what that leaves of it has one
// rounding.
struct PowersBeside {
  float scale, shift;  // kRoundingShift less the anchor
  float floor;         // a bfloat16 far below the largest, for all that is less, and for NaN

  // Where a bfloat16 is at most 16 octaves from the next, so that what is raised to the floor adds
  // at most 2.3e-11 to a tile's sum.
  static FR_FUNCTION bool serve(float largest, float scale) {
    return fabsf(largest * scale) < 0x1p11f;
  }

  FR_FUNCTION PowersBeside(float largest, float scale)
      : scale(scale), shift(kRoundingShift - whole(largest * scale)) {
    // A power of two, from 1 / scale on and below twice that: 60 to 120 octaves below the largest.
    const float reciprocal = float_from_bits((254 - (bits_of(scale) >> 23)) << 23);
    floor = next_bfloat16(largest - 60.0f * reciprocal);
  }

  // Of an x from `floor` on.
  FR_FUNCTION float operator()(float x) const {
    const float shifted = fmaf(x, scale, shift);
    return times_power(exp2_of_fraction(fmaf(x, scale, shift - shifted)), shifted);
  }
};

// How a row of logits becomes probabilities: p_i = 2^(x_i * scale - reference - remainder) where
// x_i >= threshold, else 0. Where the reference would be wide it is in units of logits, and
// p_i = 2^((x_i - reference) * scale - remainder).
struct Softmax {
  float scale;  // log2(e) / temperature
  float reference;
  float remainder;
  float threshold;  // the least kept logit; +inf for a row without mass, whose p_i are all 0
  bool wide;

  FR_FUNCTION bool keeps(float x) const { return x >= threshold && x > kNegativeInfinity; }

  FR_FUNCTION float octaves(float x) const {
    return (wide ? (x - reference) * scale : fmaf(x, scale, -reference)) - remainder;
  }
  FR_FUNCTION float operator()(float logit) const {
    const float x = finite_logit(logit);
    const float power = exp2_portable(octaves(x));
    return keeps(x) ? power : 0.0f;
  }
};

FR_FUNCTION float scale_of(float temperature) {
  const double t = temperature < 1e-30f ? 1e-30 : temperature > 1e30f ? 1e30 : temperature;
  return static_cast<float>(kLog2E / t);
}

FR_FUNCTION bool has_mass(double logsumexp) { return logsumexp > -INFINITY; }

// `logsumexp` in natural units is what goes in and out of the operators, so that a draft's q is the
// same to the bit whether its sum was kept or is taken again.
FR_FUNCTION Softmax softmax_of(double logsumexp, float scale, float threshold) {
  if (!has_mass(logsumexp)) return {scale, 0.0f, 0.0f, INFINITY, false};
  const double octaves = logsumexp * kLog2E;
  const bool wide = is_wide(static_cast<float>(octaves));
  const float reference = static_cast<float>(wide ? octaves / scale : octaves);
  const double rounded = wide ? static_cast<double>(reference) * scale : reference;
  return {scale, reference, static_cast<float>(octaves - rounded), threshold, wide};
}

// What the test of a draft reads of its rows: the token's logit in the target's, and its logit or
// probability in the draft's, 1 for a one-hot draft.
struct DraftValues {
  float target, draft;
};

// How much a draft's row has in all: q = 2^(x * scale + exponent) * factor.
struct DraftMass {
  double factor;
  float exponent;  // a whole number
};

FR_FUNCTION DraftMass draft_mass_of(double logsumexp) {
  const double octaves = -logsumexp * kLog2E;
  const double rounded = (octaves + 0x1.8p52) - 0x1.8p52;
  return {exp2_of_fraction(octaves - rounded), static_cast<float>(rounded)};
}

// q / p of a token of plain rows: all logits are kept, and none is far from 0.
// 2^((x_q - x_p) * scale + octaves) * ratio * (1 + rest).
struct RowRatio {
  bool is_plain;
  float octaves;  // a whole number
  float ratio;    // from 1 to 2
  float rest;     // what a float32 ratio loses

  // Octaves within which a bfloat16 is at most 2 from the next.
  static constexpr float kNear = 0x1p9f;

  // `sum`: of the target's weights beside `largest`, 0 where it is not known.
  FR_FUNCTION static RowRatio of(double sum, float largest, const DraftMass& draft, float scale) {
    if (!(sum > 0 && fabsf(largest * scale) < kNear && fabsf(draft.exponent) < kNear)) return {};
    const uint64_t bits = bits_of(draft.factor * sum);
    const double mantissa = double_from_bits((bits & 0xFFFFFFFFFFFFFull) | (1023ull << 52));
    const float ratio = static_cast<float>(mantissa);
    // 1 / ratio need not be exact: the rest is 2^-24 at most.
    const float rest = static_cast<float>(mantissa - ratio) * (1.457f - 0.5f * ratio);
    const int exponent = static_cast<int>(bits >> 52) - 1023;
    return {true, draft.exponent + whole(largest * scale) + static_cast<float>(exponent), ratio,
            rest};
  }

  // Whether a draft whose logits are of type T is accepted with the uniform that `u()` draws.
  template <typename T, typename Uniform>
  FR_FUNCTION bool accepts_draft(const DraftValues& values, float scale, const Uniform& u) const {
    const float x_p = finite_logit(values.target), x_q = finite_logit(values.draft);
    if (!(x_p > kNegativeInfinity)) return false;
    if (!(x_q > kNegativeInfinity)) return true;
    float exponent;
    if constexpr (sizeof(T) > 2) {
      exponent = static_cast<float>((static_cast<double>(x_q) - x_p) * scale + octaves);
    } else {  // their difference is exact wherever it matters
      exponent = fmaf(x_q - x_p, scale, octaves);
    }
    const float power = exp2_portable(exponent < 126.0f ? exponent : 126.0f);
    return accepts(u(), power * ratio, 1.0f);
  }
};

// The residual of plain rows up to a factor: p - q where that is positive, by p * (1 - q / p),
// without cancellation.
struct PlainResidual {
  float scale;
  float shift;               // of p, as PowersBeside's
  float ratio_shift;         // kRoundingShift and the ratio's octaves
  float ratio, rest;         // as RowRatio's
  float floor, draft_floor;  // bfloat16s, for all that is less, and for NaN

  // A p at its floor, 52 to 60 octaves below the largest, has no weight: a q at its own is more.
  // That changes the weight of a p whose q is less by as little.
  FR_FUNCTION static PlainResidual of(const RowRatio& q_over_p, float largest, float scale) {
    const float octave = 1.0f / scale, floor = next_bfloat16(largest - 60.0f * octave);
    return {scale,
            kRoundingShift - whole(largest * scale),
            kRoundingShift + q_over_p.octaves,
            q_over_p.ratio,
            q_over_p.rest,
            floor,
            next_bfloat16(floor + (1.0f - q_over_p.octaves) * octave)};
  }

  // Of logits of type T.
  template <typename T>
  FR_FUNCTION float raised_weight(float x_p, float x_q) const {
    return weight<T>(at_least(x_p, floor), at_least(x_q, draft_floor));
  }

  // Of logits that are at least their floors.
  template <typename T>
  FR_FUNCTION float weight(float x_p, float x_q) const {
    const float difference = x_q - x_p;
    const float ratio_shifted = fmaf(difference, scale, ratio_shift);
    float fraction = fmaf(difference, scale, ratio_shift - ratio_shifted);
    if constexpr (sizeof(T) > 2) {
      // What rounding the difference lost: where q / p is nearly 1 float32 has no digits left. That
      // of 16-bit logits is exact wherever it matters.
      const float rounded = x_q - difference;  // about x_p
      const float lost = (x_q - (difference + rounded)) + (rounded - x_p);
      fraction = fmaf(lost, scale, fraction);
    }
    const float power = times_power(ratio, ratio_shifted);
    const float less = fmaf(exp2_slope(fraction), fraction, rest);
    const float shifted = fmaf(x_p, scale, shift);
    const float p = times_power(exp2_of_fraction(fmaf(x_p, scale, shift - shifted)), shifted);
    return at_least(p * fmaf(-power, less, 1.0f - power), 0.0f);
  }
};

// The largest kept logit of a tile and the sum of 2^octaves_beside(x, largest) over it.
struct alignas(8) TileStats {
  float largest;
  float sum;
};

// The weight of a tile beside a row's anchor, that of a logit that is not wide: exact, but where it
// underflows.
FR_FUNCTION float near_tile_weight(const TileStats& tile, float anchor, float scale) {
  const float octaves = whole(tile.largest * scale) - anchor;
  return tile.sum * times_power(1.0f, at_least(octaves, -127.0f) + kRoundingShift);  // 0 at -127
}

// The same beside the row's largest logit, wherever that is.
FR_FUNCTION float tile_weight(const TileStats& tile, float largest, float scale) {
  const float product = largest * scale;
  if (!is_wide(product)) return near_tile_weight(tile, whole(product), scale);
  const double octaves = anchor_of(tile.largest, scale) - anchor_of(largest, scale);
  return tile.sum * exp2_portable(static_cast<float>(octaves));
}

FR_FUNCTION double logsumexp_of(double sum, float largest, float scale) {
  if (!(largest > kNegativeInfinity)) return -INFINITY;
  return (log2_portable(sum) + anchor_of(largest, scale)) * kLn2;
}
FR_RARE_FUNCTION double called_logsumexp_of(double sum, float largest, float scale) {
  return logsumexp_of(sum, largest, scale);
}

// Parameters of the logits operators beside Params, whose target_probs and draft_probs then are
// logits (draft_probs: where draft_is_logits).
struct LogitsParams {
  Params base;
  bool draft_is_logits;
  const float* temperature;       // [B] or null: 1; 0 or less is greedy
  const int32_t* top_k;           // [B] or null
  const float* top_p;             // [B] or null
  const float* min_p;             // [B] or null
  const double* draft_logsumexp;  // [B, K] or null
  double* logsumexp;              // [B]: of the one row where K is 0, or null

  FR_HOST_DEVICE bool filters() const { return top_k || top_p || min_p; }
  // Whether those of a request may leave anything out.
  FR_FUNCTION bool filters(int64_t b) const {
    return (top_k && top_k[b] > 0 && top_k[b] < base.vocab_size) || (top_p && top_p[b] < 1.0f) ||
           (min_p && min_p[b] > 0.0f);
  }
  FR_FUNCTION bool is_greedy(int64_t b) const { return temperature && !(temperature[b] > 0); }
  FR_FUNCTION float scale(int64_t b) const { return scale_of(temperature ? temperature[b] : 1.0f); }
};

// What is known of one row of logits after a pass over it.
struct RowSummary {
  double sum;              // of the weights beside `largest` of all logits, or 0:
  double kept_logsumexp;   // then the logsumexp over what is kept
  const TileStats* stats;  // [tiles], or null: a draft's logsumexp that was given
  float largest;
  float threshold;
  int argmax;  // the first of the largest, -1 for a row without mass; known for greedy requests

  FR_FUNCTION bool has_mass() const { return sum > 0 || kept_logsumexp > -INFINITY; }

  // Over what is kept.
  FR_FUNCTION double logsumexp(float scale) const {
    return sum > 0 ? called_logsumexp_of(sum, largest, scale) : kept_logsumexp;
  }
};

// A Row over logits: p a softmax; q a softmax, probabilities, or one-hot.
template <typename T>
struct LogitsRow {
  const T* p;
  const T* q;
  int one_hot;
  int fixed_token;  // a greedy request's token, or -1
  bool q_is_logits;
  bool plain;              // the residual is that of plain rows, and `softmax` not known
  const TileStats* stats;  // of p
  float largest;
  Softmax softmax;          // of p
  float draft_threshold;    // q's least kept logit; +inf where q has no mass
  float shift, shift_rest;  // log2(q / p) = (x_q - x_p) * scale + shift + shift_rest
  PlainResidual plain_residual;

  static constexpr bool kTargetIsLogits = true;

  // A target's row as it is, of a request that is not greedy.
  static FR_FUNCTION LogitsRow of_target(const T* p, const RowSummary& target, float scale) {
    LogitsRow row = {};
    row.p = p;
    row.fixed_token = -1;
    row.stats = target.stats;
    row.largest = target.largest;
    row.softmax.scale = scale;
    row.softmax.threshold = target.has_mass() ? target.threshold : INFINITY;
    return row.target();
  }

  // The residual of plain rows, up to a factor.
  static FR_FUNCTION LogitsRow of_plain(const T* p, const T* q, const RowSummary& target,
                                        const RowRatio& q_over_p, float scale) {
    LogitsRow row = of_target(p, target, scale);
    row.q = q;
    row.q_is_logits = row.plain = true;
    row.plain_residual = PlainResidual::of(q_over_p, target.largest, scale);
    return row;
  }

  FR_FUNCTION bool draft_is_logits() const { return q_is_logits; }
  FR_FUNCTION bool from_stats() const { return !q && one_hot < 0; }
  FR_FUNCTION float tile_mass(int tile) const {
    return tile_weight(stats[tile], largest, softmax.scale);
  }
  FR_FUNCTION float p_value(float p_i) const { return softmax(p_i); }
  FR_FUNCTION bool keeps(float p_i) const { return softmax.keeps(finite_logit(p_i)); }
  FR_FUNCTION float q_value(float q_i) const {
    if (!q_is_logits) return q_i;
    const float x = finite_logit(q_i);
    if (!(x >= draft_threshold && x > kNegativeInfinity)) return 0.0f;
    return exp2_portable(softmax.octaves(x) + shift);
  }

  FR_FUNCTION float with_draft(float p_i, float q_i) const {
    const float probability = softmax(p_i);
    if (!q_is_logits) return weight(probability, q_i);
    const float x_p = finite_logit(p_i), x_q = finite_logit(q_i);
    const float rest = residual(probability, x_p, x_q);
    return x_q >= draft_threshold && x_q > kNegativeInfinity ? rest : probability;
  }

  // Where is_plain(): in fewer instructions.
  FR_FUNCTION bool is_plain() const { return plain; }
  FR_FUNCTION float with_plain_draft(float p_i, float q_i) const {
    return plain_residual.template raised_weight<T>(p_i, q_i);
  }

  // p - q where that is positive, by p * (1 - q / p); p where log2(q / p) is NaN: then q is 0.
  FR_FUNCTION float residual(float probability, float x_p, float x_q) const {
    const float log2_ratio = log2_of_ratio(x_p, x_q);
    const float difference = probability * one_minus_exp2(log2_ratio);
    return log2_ratio >= 0.0f ? 0.0f : difference;
  }

  // log2(q / p), with what the roundings of the logits' difference and of the shift lose: where the
  // two cancel, as on a token that both sides are nearly sure of, float32 has no digits left. Not
  // in float64, which is slow on most cards. A difference of 16-bit logits is exact wherever it
  // matters.
  FR_FUNCTION float log2_of_ratio(float x_p, float x_q) const {
    const float difference = x_q - x_p;
    float rest = shift_rest;
    if constexpr (sizeof(T) > 2) {
      const float rounded = x_q - difference;  // about x_p
      const float lost = (x_q - (difference + rounded)) + (rounded - x_p);
      rest = fmaf(lost, softmax.scale, shift_rest);
    }
    return fmaf(difference, softmax.scale, shift) + rest;
  }

  FR_FUNCTION float without_draft(float p_i, int i) const {
    return weight(softmax(p_i), i == one_hot ? 1.0f : 0.0f);
  }

  FR_FUNCTION LogitsRow from(int i) const {
    LogitsRow row = *this;
    row.p += i;
    if (q) row.q += i;
    row.one_hot -= i;
    return row;
  }

  // The target's weights, beside the largest as tile_mass has them.
  FR_FUNCTION LogitsRow target() const {
    LogitsRow row = *this;
    row.q = nullptr;
    row.one_hot = -1;
    const float product = largest * softmax.scale;
    row.softmax.wide = is_wide(product);
    row.softmax.reference = row.softmax.wide ? largest : whole(product);
    row.softmax.remainder = 0.0f;
    return row;
  }
};

// `Summaries` offers target(k) and draft(k), the RowSummary of a position, and draft_mass(k,
// scale).
template <typename T, typename Summaries>
struct LogitsRequest : Request<T> {
  using Row = LogitsRow<T>;
  const LogitsParams* logits;
  Summaries summaries;
  float scale;
  bool greedy;

  FR_FUNCTION LogitsRequest(const LogitsParams& a, int64_t b, const Summaries& known)
      : LogitsRequest(a, b, known, a.scale(b), a.is_greedy(b)) {}

  // The same where the request's scale and whether it is greedy are known: a scale is a division.
  FR_FUNCTION LogitsRequest(const LogitsParams& a, int64_t b, const Summaries& known, float scale,
                            bool greedy)
      : Request<T>(a.base, b), logits(&a), summaries(known), scale(scale), greedy(greedy) {}

  FR_FUNCTION Softmax softmax(const RowSummary& summary) const {
    return softmax_of(summary.logsumexp(scale), scale, summary.threshold);
  }

  // q / p at position k, which is not plain where the draft is no logits.
  FR_FUNCTION RowRatio ratio(int64_t k) const {
    if (greedy || !this->q || !logits->draft_is_logits) return {};
    const RowSummary target = summaries.target(k);
    if (!(target.sum > 0) || summaries.draft(k).threshold > kNegativeInfinity) return {};
    return RowRatio::of(target.sum, target.largest, summaries.draft_mass(k, scale), scale);
  }

  // Draft k, the token `id`, in the two rows; nothing is read where the test needs neither.
  FR_FUNCTION DraftValues values(int64_t k, int64_t id) const {
    if (!this->in_vocab(id) || greedy) return {};
    const T* draft_row = this->draft_row(k);
    return {static_cast<float>(read_argument(this->target_row(k) + id)),
            draft_row ? static_cast<float>(read_argument(draft_row + id)) : 1.0f};
  }

  template <typename Uniform>
  FR_FUNCTION bool accepts_draft(int64_t k, int64_t id, const Uniform& u) const {
    return accepts_values(k, id, values(k, id), ratio(k), u);
  }

  // `q_over_p`: ratio(k).
  template <typename Uniform>
  FR_FUNCTION bool accepts_values(int64_t k, int64_t id, const DraftValues& values,
                                  const RowRatio& q_over_p, const Uniform& u) const {
    if (!this->in_vocab(id)) return false;
    if (q_over_p.is_plain) return q_over_p.template accepts_draft<T>(values, scale, u);
    const RowSummary target = summaries.target(k);
    if (greedy) return id == target.argmax;
    const float x_p = finite_logit(values.target);
    const Softmax p = softmax(target);
    if (!p.keeps(x_p)) return false;
    if (!this->q || !logits->draft_is_logits) return accepts(u(), values.draft, p(x_p));
    const float x_q = finite_logit(values.draft);
    const RowSummary draft = summaries.draft(k);
    if (!softmax(draft).keeps(x_q)) return true;
    return accepts(u(), exp2_portable(log2_ratio(x_q, draft, x_p, target)), 1);
  }

  // log2 of one probability over another. In log space: far down the tails both underflow.
  FR_FUNCTION float log2_ratio(float x, const RowSummary& row, float other_x,
                               const RowSummary& other) const {
    const double ratio = (static_cast<double>(x) - other_x) * scale +
                         (other.logsumexp(scale) - row.logsumexp(scale)) * kLog2E;
    return static_cast<float>(ratio < 126 ? ratio : 126);
  }

  FR_FUNCTION Odds odds(int64_t k, int64_t id) const {
    if (!this->in_vocab(id)) return {0.0, 1.0};
    const RowSummary target = summaries.target(k);
    if (greedy) return {id == target.argmax ? 1.0 : 0.0, 1.0};
    const float x_p = finite_logit(static_cast<float>(read_argument(this->target_row(k) + id)));
    const Softmax p = softmax(target);
    const T* draft_row = this->draft_row(k);
    if (!p.keeps(x_p)) return {0.0, 1.0};
    if (!draft_row || !logits->draft_is_logits) {
      return {p(x_p), draft_row ? static_cast<float>(read_argument(draft_row + id)) : 1.0f};
    }
    const float x_q = finite_logit(static_cast<float>(read_argument(draft_row + id)));
    const RowSummary draft = summaries.draft(k);
    if (!softmax(draft).keeps(x_q)) return {1.0, 0.0};
    return {exp2_portable(log2_ratio(x_p, target, x_q, draft)), 1.0};
  }

  FR_FUNCTION Row row(int64_t k, int64_t id) const {
    return row(k, id, id == kPlaceholderTokenId ? RowRatio{} : ratio(k));
  }

  FR_FUNCTION Row row(int64_t k, int64_t id, const RowRatio& q_over_p) const {
    Row row = {};
    row.p = this->target_row(k);
    row.one_hot = row.fixed_token = -1;
    const RowSummary target = summaries.target(k);
    if (greedy) {
      row.fixed_token = target.argmax < 0 ? 0 : target.argmax;
      return row;
    }
    if (id == kPlaceholderTokenId) return Row::of_target(row.p, target, scale);
    // Block verification wants a residual that is normalized.
    if (q_over_p.is_plain && !this->params->block_verification) {
      return Row::of_plain(row.p, this->draft_row(k), target, q_over_p, scale);
    }
    row.stats = target.stats;
    row.largest = target.largest;
    row.softmax = softmax(target);
    row.q = this->draft_row(k);
    row.q_is_logits = logits->draft_is_logits;
    if (row.q && row.q_is_logits) {
      const RowSummary draft = summaries.draft(k);
      row.draft_threshold = softmax(draft).threshold;
      const double shift = (target.logsumexp(scale) - draft.logsumexp(scale)) * kLog2E;
      row.shift = static_cast<float>(shift);
      row.shift_rest = static_cast<float>(shift - row.shift);
      // A residual of token verification is drawn from, so that a factor does not matter.
      if (!this->params->block_verification) row.softmax.remainder = 0.0f;
    } else if (!row.q) {
      const bool outside = !this->in_vocab(id);
      // Block verification compares the residual's sum with 1: its p has to be normalized.
      if (outside && !this->params->block_verification) return row.target();
      row.one_hot = static_cast<int>(outside ? this->params->vocab_size : id);
    }
    return row;
  }
};

// ---- Filters. All of them keep the logits from some threshold on.

// Masses are integers, so that their sums do not depend on the order of addition.
FR_FUNCTION float mass_unit(int vocab_size) {
  int shift = 45;  // 2^45 and 2^17 logits fill 62 bits
  while (shift > 30 && (static_cast<int64_t>(vocab_size) >> (62 - shift)) > 0) --shift;
  return static_cast<float>(1ull << shift);
}

FR_FUNCTION uint64_t mass_of(float x, float largest, float scale, float unit) {
  return static_cast<uint64_t>(exp2_portable(octaves_beside(x, largest, scale)) * unit);
}

// The logsumexp of what filters keep, whose masses are so much.
FR_FUNCTION double kept_logsumexp(uint64_t mass, float largest, float scale, float unit) {
  return logsumexp_of(static_cast<double>(mass) / unit, largest, scale);
}

// The least mass that reaches a share of the total, at least 1: the largest logit always stays.
FR_FUNCTION uint64_t mass_wanted(float top_p, double total) {
  if (!(top_p > 0)) return 1;
  const double share = static_cast<double>(top_p) * total;
  uint64_t wanted = static_cast<uint64_t>(share);
  if (static_cast<double>(wanted) < share) ++wanted;
  return wanted < 1 ? 1 : wanted;
}

FR_FUNCTION bool keeps_min_p(float x, float largest, float scale, float min_p) {
  return exp2_portable((x - largest) * scale) >= min_p;
}

// Logits in the order of unsigned integers, and back.
FR_FUNCTION uint32_t key_of(float x) {
  const uint32_t bits = bits_of(x == 0.0f ? 0.0f : x);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
FR_FUNCTION float logit_of(uint32_t key) {
  return float_from_bits(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// ---- CUDA: rows of logits are numbered target rows first, b * (K + 1) + k, then draft rows,
// num_target_rows + b * K + k.

FR_HOST_DEVICE constexpr int64_t num_target_rows(const Params& a) {
  return a.batch_size * (a.spec_length + 1);
}

// Draft rows that need a pass of their own.
FR_HOST_DEVICE constexpr int64_t num_draft_rows(const LogitsParams& a) {
  const bool needed = a.draft_is_logits && (!a.draft_logsumexp || a.top_k || a.top_p || a.min_p);
  return needed ? a.base.batch_size * a.base.spec_length : 0;
}

struct LogitsPlan {
  Plan fused;
  // In clusters, but for block verification: how many blocks share a position's rows, and whether
  // later positions look for an end before they read, and a launch of its own draws. 0: all rows in
  // a launch before.
  int blocks_per_position;
  bool early_exit;
  int blocks_per_walk;  // of the cluster that walks through a request's positions, 0: none does
  int kept_tiles;       // tiles whose weights a block of a position keeps in shared memory
  int deciding_share;  // tiles that a warp of decide_kernel takes, 0 where positions_kernel decides
  int drawing_blocks, drawing_warps;  // of draw_kernel: a request's blocks, a block's warps
  int64_t workspace_bytes;            // uninitialised device memory that launch_from_logits wants
};

// As plan_fused; `blocks`: of a position in clusters, else of a request.
int plan_from_logits(const LogitsParams& params, Exchange exchange, int blocks, LogitsPlan* plan);
int launch_from_logits(const LogitsParams& params, const LogitsPlan& plan, void* workspace,
                       void* stream);

}  // namespace fused_rejection
