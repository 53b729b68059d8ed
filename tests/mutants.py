"""Plants faults, one at a time, in a temporary copy of this tree and shows which test fails.

python -m tests.mutants [--only TEXT ...] [--output FILE]

Faults in the shared header and in the C++ kernel are compiled into the extension (half a minute
each); the CUDA kernels' are compiled by tests/emulation. Exit status 1 where a fault survives, 2
where one cannot be planted. tests/test_mutants.py checks in CI that every fault still fits.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = Path("src/cuda/csrc")
HEADER = f"{CSRC}/fused_rejection.h"
CPP = f"{CSRC}/binding.h"
DIRECT = f"{CSRC}/direct.h"
KERNELS = f"{CSRC}/warp.cuh"
TEACHING = f"{CSRC}/fused_rejection_kernel.cu"
LOGITS = f"{CSRC}/from_logits.h"
POSITIONS = f"{CSRC}/positions.cuh"
WALK = f"{CSRC}/walk.cuh"
SHARES = f"{CSRC}/shares.cuh"
THRESHOLDS = f"{CSRC}/threshold.cuh"
KEPT = f"{CSRC}/kept.cuh"
TILES = f"{CSRC}/tiles.cuh"
LEFT_BEHIND = (".git", ".venv", "build", "__pycache__", ".hypothesis", ".pytest_cache")
LEFT_BEHIND += (".ruff_cache", "benchmark_results")
EXTENSION_TESTS = ("tests/test_samplers.py", "tests/test_properties.py")
EXTENSION_TESTS += ("tests/test_emulated_kernels.py", "tests/test_operator.py")
EXTENSION_TESTS += ("tests/test_block.py",)
TESTS = {  # of a file: the test files, and pytest's -k
    HEADER: (EXTENSION_TESTS, "cpp or emulated or kernels or flattened"),
    CPP: (EXTENSION_TESTS, "cpp or flattened"),
    DIRECT: (("tests/test_direct.py",), ""),
    TEACHING: (("tests/test_emulated_kernels.py",), "seeds or kernel"),
    KERNELS: (("tests/test_emulated_kernels.py", "tests/test_properties.py"), "kernel"),
    LOGITS: (("tests/test_from_logits.py", "tests/test_logits_distribution.py"), "cpp"),
    **dict.fromkeys((POSITIONS, SHARES, WALK), (("tests/test_emulated_logits.py",), "positions")),
    THRESHOLDS: (("tests/test_emulated_logits.py",), "thresholds"),
    KEPT: (("tests/test_emulated_logits.py",), "positions or thresholds or kept"),
    TILES: (("tests/test_emulated_logits.py",), "positions or thresholds"),
    "src/baseline/rejection_sampler.py": (
        ("tests/test_samplers.py", "tests/test_properties.py"),
        "baseline",
    ),
    "src/compiled/rejection_sampler.py": (
        ("tests/test_samplers.py", "tests/test_properties.py", "tests/test_block.py"),
        "vectorized and not compiled",
    ),
    "src/compiled/from_logits.py": (("tests/test_from_logits.py",), "vectorized"),
    "src/randomness.py": (("tests/test_philox.py", "tests/test_samplers.py"), ""),
    "src/contract.py": (("tests/test_contract.py", "tests/test_samplers.py"), ""),
    "src/peers/compat.py": (("tests/test_peers_compat.py",), ""),
    "src/decoding/from_logits.py": (
        ("tests/test_decoding.py", "tests/test_decoding_lossless.py"),
        "from_logits",
    ),
    "src/decoding/state.py": (("tests/test_decoding_state.py", "tests/test_decoding.py"), ""),
    "src/decoding/spec_length.py": (("tests/test_decoding_spec_length.py",), ""),
    "src/decoding/drafts.py": (("tests/test_decoding.py",), "always_accepted"),
}


class Mutant(NamedTuple):
    fault: str  # what is wrong now
    file: str
    old: str  # occurs once in the file
    new: str


MUTANTS = [
    Mutant(
        "accepts u * q == p, so a token the target gives 0 where u is 0",
        HEADER,
        "static_cast<double>(q) < static_cast<double>(p)",
        "static_cast<double>(q) <= static_cast<double>(p)",
    ),
    Mutant(
        "u * q rounded to float32, which rejects p == q among denormals",
        HEADER,
        "static_cast<double>(u) * static_cast<double>(q) < static_cast<double>(p)",
        "u * q < p",
    ),
    Mutant(
        "uniforms in (0, 1] as curand_uniform has them",
        HEADER,
        "(word >> 8) * 0x1p-24f",
        "((word >> 8) + 1) * 0x1p-24f",
    ),
    Mutant("Philox with 9 rounds", HEADER, "round < 10", "round < 9"),
    Mutant("the stream's offset is not read", HEADER, "static_cast<uint64_t>(a.offsets[b])", "0"),
    Mutant(
        "infinite weights are not capped",
        HEADER,
        "return difference < kMaxWeight ? difference : kMaxWeight;",
        "return difference;",
    ),
    Mutant(
        "NaN has weight",
        HEADER,
        "if (!(difference > 0.0f)) return 0.0f;",
        "if (difference <= 0.0f) return 0.0f;",
    ),
    Mutant(
        "a draft id of V is an address",
        HEADER,
        "id < params->vocab_size",
        "id <= params->vocab_size",
    ),
    Mutant("a draft id below -1 is an address", HEADER, "return id >= 0 && id <", "return id <"),
    Mutant(
        "recovers from p instead of the residual",
        HEADER,
        "row.q = this->draft_row(k);",
        "row.q = nullptr;",
    ),
    Mutant(
        "a one-hot draft that was rejected may be recovered",
        HEADER,
        "row.one_hot = static_cast<int>(id);",
        "row.one_hot = -1;",
    ),
    Mutant(
        "the flattened layout recovers from the bonus row",
        HEADER,
        "return bonus && k == drafts ? bonus :",
        "return bonus ? bonus :",
    ),
    Mutant(
        "of more drafts than count, the extra token comes from the bonus row",
        HEADER,
        "if (count <= a.spec_length) {",
        "{",
    ),
    Mutant(
        "flattened ends are not held inside the drafts",
        HEADER,
        "(end < a.num_flat ? end : a.num_flat) - first_id",
        "end - first_id",
    ),
    Mutant(
        "one place after the last token is not padded",
        HEADER,
        "int64_t k = accepted + 1; k <=",
        "int64_t k = accepted + 2; k <=",
    ),
    Mutant(
        "draws the index whose cumulative weight equals the threshold",
        HEADER,
        "if (cumulated > rest) return pick;",
        "if (cumulated >= rest) return pick;",
    ),
    Mutant("an index without weight may be drawn", HEADER, "if (cumulated > before) pick", "pick"),
    Mutant(
        "a tile is summed in another order",
        HEADER,
        "w(i * n + j) + w(i * n + j + kTile / 2)",
        "w(2 * (i * n + j)) + w(2 * (i * n + j) + 1)",
    ),
    Mutant(
        "a zero residual gives token 0",
        CPP,
        "row = row.target();  // no residual: draw from p",
        "break;",
    ),
    Mutant(
        "the recovery's uniform is the first draft's",
        CPP,
        "const float u = uniform(a, b, a.spec_length);",
        "const float u = uniform(a, b, 0);",
    ),
    Mutant(
        "a direct call passes over a dispatch mode",
        DIRECT,
        "c10::DispatchKeySet(c10::DispatchKey::BackendSelect);",
        "c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::Python, "
        "c10::DispatchKey::PythonTLSSnapshot});",
    ),
    Mutant(
        "a direct call passes over a function mode",
        DIRECT,
        "on_device && !at::impl::torch_function_mode_enabled()",
        "on_device",
    ),
    Mutant(
        "a direct call passes over a subclass of torch.Tensor",
        DIRECT,
        "!THPVariable_CheckExact(object)",
        "!THPVariable_Check(object)",
    ),
    Mutant(
        "a direct call passes over autograd",
        DIRECT,
        "at::GradMode::is_enabled()",
        "false",
    ),
    Mutant(
        "a direct call keeps the GIL",
        DIRECT,
        "const WithoutGil without_gil;",
        "",
    ),
    Mutant(
        "reads beyond the row's end in its last tile",
        KERNELS,
        "      if (j * step < left) {",
        "      {",
    ),
    Mutant(
        "no barrier between the decision and its readers",
        KERNELS,
        "  __syncthreads();\n  // No block writes",
        "  // No block writes",
    ),
    Mutant(
        "the blocks of a row do not wait for one another's sums",
        KERNELS,
        "wait_for_bytes(all.pending + pass);",
        "",
    ),
    Mutant(
        "what a span cumulates to begins anew with its second group",
        KERNELS,
        "to[first + i] = sum + group;",
        "to[first + i] = group;",
    ),
    Mutant(
        "a long span's second group forgets the first",
        KERNELS,
        "if (lane >= i) own = carry + sum;",
        "if (lane >= i) own = sum;",
    ),
    Mutant("every lane adds in the scan", KERNELS, "if (lane >= d) sum += other;", "sum += other;"),
    Mutant(
        "the draw in the tile forgets the spans before",
        KERNELS,
        "threshold - (chosen ? previous : 0)",
        "threshold",
    ),
    Mutant(
        "a row without mass keeps what was in memory",
        KERNELS,
        "output.store_token(0);  // p has no mass either",
        "",
    ),
    Mutant(
        "the thread-per-row kernel starts its stream at 0",
        TEACHING,
        "curand_init(stream.seed, stream.subsequence, stream.position, &state)",
        "curand_init(stream.seed, stream.subsequence, 0, &state)",
    ),
    Mutant(
        "the rest of the output row is 0, not -1",
        KERNELS,
        "k < accepted ? request.id(k) : kPlaceholderTokenId",
        "k < accepted ? request.id(k) : 0",
    ),
    Mutant(
        "logits: a drafted token that the draft's filters drop is rejected",
        LOGITS,
        "if (!softmax(draft).keeps(x_q)) return true;",
        "if (!softmax(draft).keeps(x_q)) return false;",
    ),
    Mutant(
        "logits: the residual where q is larger is not 0",
        LOGITS,
        "return log2_ratio >= 0.0f ? 0.0f : difference;",
        "return log2_ratio >= 0.0f ? -difference : difference;",
    ),
    Mutant(
        "logits: top-p rounds its share down",
        LOGITS,
        "if (static_cast<double>(wanted) < share) ++wanted;",
        "if (wanted > 1) wanted -= wanted / 8;",
    ),
    Mutant(
        "logits: a position does not wait for its tiles' statistics",
        POSITIONS,
        "if (filtered || warp < rows) wait_for_bytes(at.pending + At::kStats);",
        "",
    ),
    Mutant(
        "logits: the launch that draws has no statistics of the target's row",
        POSITIONS,
        "findings.stats[position() * tiles + i] = at.stats[i];",
        "",
    ),
    Mutant(
        "logits: what a request ends with is its last position's",
        POSITIONS,
        "if (ends) return first + __ffs(ends) - 1;",
        "if (ends) return drafts > 0 ? drafts : 0;",
    ),
    Mutant(
        "logits: the draft's row is filtered by the target's threshold",
        POSITIONS,
        "if (filtered && rows > 1) known.threshold = at.kept_of[1].threshold;",
        "if (filtered && rows > 1) known.threshold = at.kept_of[0].threshold;",
    ),
    Mutant(
        "thresholds: what is kept is not summed where the search did not come upon it",
        THRESHOLDS,
        "if (search.mass == 0) search.find_mass();",
        "",
    ),
    Mutant(
        "logits: half a cluster does not wait for the other half's threshold",
        POSITIONS,
        "wait_for_bytes(pending, phase & 1);",
        "",
    ),
    Mutant(
        "thresholds: who searches together does not wait for what is told",
        THRESHOLDS,
        "if (blocks > 1) wait_for_bytes(word(times), times >> 1 & 1);",
        "",
    ),
    Mutant(
        "thresholds: of two logits in a word only the first is collected",
        TILES,
        "& 0x10001u << w",
        "& 0x1u << w",
    ),
    Mutant(
        "thresholds: all that was seen counts, whatever the range",
        THRESHOLDS,
        "f(i < held && logit >= lo && logit <= hi, logit);",
        "f(i < held, logit);",
    ),
    Mutant(
        "thresholds: a place counts as empty where the first half keeps nothing",
        TILES,
        "RawTile<T>::bit(half * kElements + i);",
        "RawTile<T>::bit(i);",
    ),
    Mutant(
        "logits: a draft is surely accepted though top-p may leave it out",
        WALK,
        "const bool is_kept = share >= 1.0f || above < (1.0f - kMargin) * share * sum;",
        "const bool is_kept = true;",
    ),
    Mutant(
        "logits: a draft is surely accepted by the whole row's share of a kept one",
        WALK,
        "accepts(draft.token.u, ratio * (1.0f + kMargin), 1.0f)) {",
        "accepts(draft.token.u, ratio * 0.9f, 1.0f)) {",
    ),
    Mutant(
        "logits: a draft whose sum is not known counts as if its filters left nothing out",
        WALK,
        "filters.top_p < 1.0f ? total * filters.top_p : total;",
        "total;",
    ),
    Mutant(
        "logits: who walks does not wait for the statistics of the draft's row",
        WALK,
        "wait_for_bytes(at.pending + At::kDraftStats, drafts_read++ & 1);",
        "++drafts_read;",
    ),
    Mutant(
        "logits: the draft's own filters do not count where a cluster walks",
        WALK,
        "if (rows > 1) decided.summaries.threshold = at.kept_of[1].threshold;",
        "",
    ),
    Mutant(
        "logits: a cluster walks on after a draft that filters may leave out",
        WALK,
        "if (is_accepted) continue;",
        "if (rows == 2) continue;",
    ),
    Mutant(
        "thresholds: what overflowed a warp's list counts as seen",
        THRESHOLDS,
        "{overflows ? -1 : held, lo, hi, hi >= largest}",
        "{held, lo, hi, hi >= largest}",
    ),
    Mutant(
        "thresholds: the floor that was only guessed is the last",
        THRESHOLDS,
        "if (floor == floors.massless) return;",
        "if (floor >= floors.surest) return;",
    ),
    Mutant(
        "thresholds: of values counted the share is of those from the floor on",
        THRESHOLDS,
        "top_k > 0 ? static_cast<double>(s.merged[last]) : s.sum * unit;",
        "static_cast<double>(s.merged[last]);",
    ),
    Mutant(
        "thresholds: of values counted the least that min-p keeps is left out",
        THRESHOLDS,
        "keeps_min_p(value_of(bin), largest, scale, min_p)) kept = bin;",
        "keeps_min_p(value_of(bin), largest, scale, min_p)) kept = bin - 1;",
    ),
    Mutant(
        "thresholds: what blocks tell one another next is counted with this",
        THRESHOLDS,
        "if (blocks > 1) wait_for_bytes(word(times), times >> 1 & 1);\n    __syncthreads();",
        "if (blocks > 1) wait_for_bytes(word(times), times >> 1 & 1);",
    ),
    Mutant(
        "kept: of three logits of a tile only two are summed",
        KEPT,
        "if (others & (others - 1)) {",
        "if (false) {",
    ),
    Mutant(
        "kept: logits of a tile are added in the order of their places",
        KEPT,
        "const int leaf = place % (kTile / 2) * 2 + place / (kTile / 2);",
        "const int leaf = place;",
    ),
    Mutant(
        "kept: the tile behind the lanes of a list counts as one that ends with them",
        KEPT,
        "const int count = cut ? __ffs(cut) - 1 : kWarp;",
        "const int count = kWarp;",
    ),
    Mutant(
        "kept: a list that had no room for all counts as whole",
        KEPT,
        "{is_whole ? held : -1, threshold, kLargestFloat, true}",
        "{held, threshold, kLargestFloat, true}",
    ),
    Mutant(
        "logits: a draft that top-p leaves out of the target's row is accepted by a walk",
        WALK,
        "if (!(finite_logit(draft.token.values.target) >= kept.threshold)) return false;",
        "",
    ),
    Mutant(
        "logits: a walk draws from the lists of the draft's row",
        WALK,
        "if (alone && lane == 0) at.search->seen[warp].count = -1;",
        "",
    ),
    Mutant(
        "logits: a walk's blocks do not say that they have read the position before",
        WALK,
        "expect_announcements(at.pending + At::kStats + turn, blocks + 1);",
        "expect_announcements(at.pending + At::kStats + turn, 2);",
    ),
    Mutant(
        "thresholds: the logit that reaches the share is left out",
        THRESHOLDS,
        "lane == 0 && before < goal.wanted && goal.wanted <= with",
        "lane == 0 && before <= goal.wanted && goal.wanted < with",
    ),
    Mutant(
        "thresholds: of few logits the one that reaches the share is left out",
        THRESHOLDS,
        "block_lane() < count && before < goal.wanted && goal.wanted <= with",
        "block_lane() < count && before <= goal.wanted && goal.wanted < with",
    ),
    Mutant(
        "thresholds: the carry of a bin's sum is lost",
        THRESHOLDS,
        "high += atomicAdd(&s.low[bin], low) + low < low;",
        "atomicAdd(&s.low[bin], low);",
    ),
    Mutant(
        "statistics: a tile keeps what is below the threshold",
        TILES,
        "if (!(own_bits >> RawTile<T>::bit(half * kElements + i) & 1)) w[i] = 0.0f;",
        "",
    ),
    Mutant(
        "statistics: what is far below a tile's largest logit is not raised to the floor",
        TILES,
        "if (has_floor) raise_to(own, power.floor);",
        "",
    ),
    Mutant(
        "statistics: the last tile of a lane's span is left out of the row's sum",
        TILES,
        "if (i < count) own[i] = stats[lane * length + i];",
        "if (i < count - 1) own[i] = stats[lane * length + i];",
    ),
    Mutant(
        "baseline: accepts u * q == p",
        "src/baseline/rejection_sampler.py",
        ".item() * q_x < p[x].item()",
        ".item() * q_x <= p[x].item()",
    ),
    Mutant(
        "baseline: a zero residual draws token 0",
        "src/baseline/rejection_sampler.py",
        "if weights is None or weights.sum().item() == 0:",
        "if weights is None:",
    ),
    Mutant(
        "baseline: a draft id of V is looked up",
        "src/baseline/rejection_sampler.py",
        "0 <= x < shape.vocab_size",
        "0 <= x <= shape.vocab_size",
    ),
    Mutant(
        "vectorized: drafts after a rejection count",
        "src/compiled/rejection_sampler.py",
        "(within & in_vocab).long().cumprod(1).sum(1)",
        "(within & in_vocab).long().sum(1)",
    ),
    Mutant(
        "vectorized: float32 accept threshold",
        "src/compiled/rejection_sampler.py",
        "within = uniforms[:, :spec_length].double() * q_x < p_x",
        "within = uniforms[:, :spec_length] * q_x.float() < p_x",
    ),
    Mutant(
        "vectorized: the row after the rejected one",
        "src/compiled/rejection_sampler.py",
        "p = target_probs[rows, num_accepted].float()",
        "p = target_probs[rows, (num_accepted + 1).clamp(max=spec_length)].float()",
    ),
    Mutant(
        "vectorized: NaN has weight",
        "src/compiled/rejection_sampler.py",
        "torch.where(values > 0, values, 0.0).clamp(max=MAX_WEIGHT)",
        "values.clamp(0, MAX_WEIGHT)",
    ),
    Mutant(
        "PyTorch's stream shifts offsets arithmetically",
        "src/randomness.py",
        "(position >> 2) & 0x3FFFFFFFFFFFFFFF",
        "position >> 2",
    ),
    Mutant(
        "a vocabulary with a stride is let through",
        "src/contract.py",
        "if is_row and tensor.stride(-1) != 1:",
        "if False:",
    ),
    Mutant(
        "vLLM V1: the bonus token also after a rejection",
        "src/peers/compat.py",
        "is_bonus = (columns == lengths[:, None]) & (output.num_accepted == lengths)[:, None]",
        "is_bonus = columns == lengths[:, None]",
    ),
    Mutant(
        "vLLM V2: draft rows looked up by request, not by its entry",
        "src/peers/compat.py",
        "draft_probs = draft_logits[expanded_idx_mapping.long(), step]",
        "draft_probs = draft_logits[expanded_idx_mapping.long() * 0, step]",
    ),
    Mutant(
        "without drafts nobody says that none was accepted",
        POSITIONS,
        "if (spec_length == 0) a.base",
        "if (spec_length == 0 && a.logsumexp) a.base",
    ),
    Mutant(
        "the loop from logits drops top-k",
        "src/decoding/from_logits.py",
        "if top_k and not self.greedy:",
        "if False:",
    ),
    Mutant(
        "the loop from logits verifies drafts as if they were one-hot",
        "src/decoding/from_logits.py",
        "draft_logits=draft_logits,",
        "draft_logits=None,",
    ),
    Mutant(
        "a draft forgets the token that was its last",
        "src/decoding/drafts.py",
        "query, ahead = state.newest, -1",
        "query, ahead = state.newest[:, 1:], 0",
    ),
    Mutant(
        "block: the longest prefix is taken with the accept uniform before the last",
        HEADER,
        "if (drafts > 0 && !(uniform(a, request.b, drafts - 1) < reach[drafts])) {",
        "if (drafts > 0 && !(uniform(a, request.b, 0) < reach[drafts])) {",
    ),
    Mutant(
        "block: what is recovered after a prefix is not weighed by its reach",
        HEADER,
        "row = {request.row(accepted, request.id(accepted)), reach[accepted]};",
        "row = {request.row(accepted, request.id(accepted)), 1.0};",
    ),
    Mutant(
        "block: a prefix without reach may be taken",
        HEADER,
        "if (!(reach[accepted] > 0.0)) continue;",
        "",
    ),
    Mutant(
        "logits: the first block that is done with its share decides",
        SHARES,
        "completes = done == static_cast<unsigned>(wanted);",
        "completes = done == static_cast<unsigned>(count);",
    ),
    Mutant(
        "logits: statistics of a draft's row are stored in the target's",
        SHARES,
        "findings.stats[(is_draft ? draft_row : position) * tiles + begin + lane] = own;",
        "findings.stats[position * tiles + begin + lane] = own;",
    ),
    Mutant(
        "logits: a draft's row is taken for the target's where a block begins in it",
        SHARES,
        "const bool is_draft = static_cast<int>(blockIdx.x) >= blocks;",
        "const bool is_draft = static_cast<int>(blockIdx.x) > blocks;",
    ),
    Mutant(
        "logits: a position that does not end its request leaves no sign of that",
        POSITIONS,
        "if (findings.tokens && found == kGoesOn) ",
        "if (false) ",
    ),
    Mutant(
        "logits: of more drafts than a warp has lanes the first end of every 32 counts",
        POSITIONS,
        "const int64_t end = has_ended ? -1 : ends",
        "const int64_t end = ends",
    ),
    Mutant(
        "logits: the launch that draws begins each block's tiles at the row's first",
        SHARES,
        "const OwnTiles own(rank, blocks);",
        "const OwnTiles own(0, blocks);",
    ),
    Mutant(
        "logits: a position of plain rows forgets what the ratio of their sums lost by rounding",
        LOGITS,
        "const float less = fmaf(exp2_slope(fraction), fraction, rest);",
        "const float less = exp2_slope(fraction) * fraction;",
    ),
    Mutant(
        "logits: a token that the target excludes keeps a weight where the draft excludes it too",
        LOGITS,
        "next_bfloat16(floor + (1.0f - q_over_p.octaves) * octave)",
        "next_bfloat16(floor - (9.0f + q_over_p.octaves) * octave)",
    ),
    Mutant(
        "logits: of plain float32 rows what rounding the difference lost is left out",
        LOGITS,
        "fraction = fmaf(lost, scale, fraction);",
        ";",
    ),
    Mutant(
        "logits: where the drafts end with a placeholder a residual is drawn from",
        POSITIONS,
        "if (draft.id == kPlaceholderTokenId && !greedy) {",
        "if (draft.id == kPlaceholderTokenId && !x_q && !greedy) {",
    ),
    Mutant(
        "logits: the sums of a row's last tiles, fewer than four, are not told",
        POSITIONS,
        "} else if (lane < blocks && warp >= 4 * fours && warp < own) {",
        "} else if (lane < blocks && warp > 4 * fours && warp < own) {",
    ),
    Mutant(
        "logits: of a tile above a draft's token a walk counts the largest logit only",
        WALK,
        "found += known.largest > x ? all : 0.0f;",
        "found += known.largest > x ? one : 0.0f;",
    ),
    Mutant(
        "logits: where a warp keeps its tile the draft's is taken for it",
        POSITIONS,
        "RawTile<T> now = keeps_raw && i >= tiles ? raw_q : raw;",
        "RawTile<T> now = raw;",
    ),
    Mutant(
        "vectorized: a prefix may reach beyond 1 and come back",
        "src/compiled/rejection_sampler.py",
        "reach = (walk - walk.cummax(1).values).exp()",
        "reach = walk.exp().clamp(max=1.0)",
    ),
    Mutant(
        "vectorized from logits: top-p is taken before the temperature",
        "src/compiled/from_logits.py",
        "weights = shifted.exp()\n",
        "weights = (x - largest).exp()\n",
    ),
    Mutant(
        "vectorized from logits: of equal logits at the k-th only some are kept",
        "src/compiled/from_logits.py",
        "weights = torch.where(x >= threshold, weights, 0.0)",
        "weights = torch.where(x > threshold, weights, 0.0)",
    ),
    Mutant(
        "vectorized from logits: a greedy row takes all that tie",
        "src/compiled/from_logits.py",
        "torch.where(vocabulary == first, 0.0, -torch.inf)",
        "torch.where(x == largest, 0.0, -torch.inf)",
    ),
    Mutant(
        "bookkeeping: tokens behind an EOS are kept",
        "src/decoding/state.py",
        "keep = keep & (is_eos.cumsum(1) == is_eos)",
        "keep = keep & (is_eos.cumsum(1) >= 0)",
    ),
    Mutant(
        "bookkeeping: a row takes tokens beyond its limit",
        "src/decoding/state.py",
        "& (position <= self.limit[:, None])",
        "",
    ),
    Mutant(
        "bookkeeping: a round's stream begins where the last one's did",
        "src/decoding/state.py",
        "self.offsets += 2 * self.spec_length + 1",
        "self.offsets += 0",
    ),
    Mutant(
        "the choice of a length takes all drafts for the price of one",
        "src/decoding/spec_length.py",
        "/ (len(shares) * cost.draft + cost.verify + cost.other)",
        "/ (cost.draft + cost.verify + cost.other)",
    ),
]


def plant(folder: Path, mutant: Mutant) -> str:
    """Plants the fault in the tree at `folder`; returns the file's text of before. Raises
    ValueError where `old` does not occur exactly once."""
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}")
    path.write_text(text.replace(mutant.old, mutant.new))
    return text


def build(folder: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder / CSRC, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"does not build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def run_tests(folder: Path, file: str) -> str | None:
    """The first test that fails, or None where all pass."""
    files, expression = TESTS[file]
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider"]
    command += ["--hypothesis-profile=mutants", *files]
    command += ["-k", expression] if expression else []
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = re.search(r"^FAILED tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    if done.returncode < 0:  # a signal: the fault crashed the interpreter
        return f"crash (signal {-done.returncode})"
    raise ValueError(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def try_mutant(folder: Path, mutant: Mutant, extension: dict[Path, bytes]) -> str | None:
    before = plant(folder, mutant)
    try:
        if mutant.file in (HEADER, CPP, DIRECT, LOGITS):
            build(folder)
        return run_tests(folder, mutant.file)
    finally:
        (folder / mutant.file).write_text(before)
        for path, content in extension.items():
            path.unlink()  # a new file: the old one may still be mapped
            path.write_bytes(content)


def table(results) -> str:
    lines = ["| fault | file | caught by |", "|---|---|---|"]
    for mutant, killer in results:
        caught = f"`{killer}`" if killer else "**survives**"
        lines.append(f"| {mutant.fault} | {Path(mutant.file).name} | {caught} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], help="faults whose description contains any of these"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    only = options.only
    chosen = [m for m in MUTANTS if not only or any(text in m.fault for text in only)]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        extension = {p: p.read_bytes() for p in (folder / CSRC).glob("fused_rejection_C.*")}
        try:
            build(folder)  # its object files, so that what follows is a rebuild
            for file in sorted({mutant.file for mutant in chosen}):
                failed = run_tests(folder, file)
                if failed:
                    raise ValueError(f"{failed} fails without any fault")
            for mutant in chosen:
                start = time.monotonic()
                results.append((mutant, try_mutant(folder, mutant, extension)))
                seconds = time.monotonic() - start
                killer = results[-1][1] or "SURVIVES"
                print(f"{mutant.fault}: {killer} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    print(table(results))
    survivors = sum(killer is None for _, killer in results)
    print(f"{len(results) - survivors} of {len(results)} faults caught")
    if options.output:
        options.output.write_text(f"# Planted faults (`make mutants`)\n\n{table(results)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
