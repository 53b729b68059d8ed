"""Our operator under the names and signatures that engines already call.

Swap in: `flashinfer.sampling.chain_speculative_sampling = compat.chain_speculative_sampling`,
`vllm.v1.sample.rejection_sampler.rejection_sample = compat.vllm_rejection_sample`,
`vllm.v1.worker.gpu.spec_decode.rejection_sampler.rejection_sample =
compat.vllm_v2_rejection_sample` (the name in the module that calls it),
`sglang.srt.speculative.eagle_utils.chain_speculative_sampling_triton =
compat.sglang_chain_speculative_sampling` (and in the other modules that call it),
`sglang.kernels.ops.speculative.dspark.blockwise_rejection.blockwise_rejection_triton =
compat.sglang_blockwise_rejection`.

Same arguments, result types and distribution; the same seed gives other tokens, because the peers
draw from the residual in other ways (SGLang's chain, which is given uniforms, draws as we do). What
else differs is listed with each function, and tests/test_peers_compat.py holds each line.
"""

from __future__ import annotations

import torch

from src.contract import PLACEHOLDER_TOKEN_ID, Shape
from src.cuda import fused_sampler
from src.randomness import row_uniforms

# Rows that share a scalar seed read one stream this far apart: more than any row will ever draw.
_ROW_SPACING = 2**40


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """flashinfer.sampling.chain_speculative_sampling (signature of FlashInfer 0.6.18).

    draft_probs: [B, K, V] float32, bfloat16 or float16.
    draft_token_ids: [B, K], any integer dtype.
    target_probs: [B, K+1, V].
    maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: [B] integers, added to
        in place.
    seed, offset: both ints, or both int64/uint64 tensors [1] or [B].
    Returns output_token_ids [B, K+1] int32, the accepted and the emitted counts [B] int32 (or the
    tensors given). "Accepted" counts every draft that its own test accepts, beyond the first
    rejection too; "emitted" stops at it.

    Differs from FlashInfer:
    - A draft id of -1 ends its row, and other ids outside [0, V) are rejected; FlashInfer reads
      outside the row (flashinfer #879).
    - A zero residual or a NaN row gives a token of the target, or token 0 where the target has no
      mass either; FlashInfer returns an uninitialised index.
    - A draft with p >= q > 0 is never rejected; u = 1 of curand_uniform's (0, 1] rejects p == q.
    - Each draft has one uniform. FlashInfer draws the rejected draft's again for the accepted
      count, so that its "accepted" may count the draft it rejected.
    - seed and offset tensors of B entries give row b its own stream, whatever its place in the
      batch; FlashInfer reads entry 0 of each and numbers the rows.
    - int or one-entry seed and offset: row b reads the seed's stream from offset + b * 2**40;
      FlashInfer gives it subsequence b. Both tie a row's tokens to its place.
    - seed without offset is a ValueError; FlashInfer drops it and uses the generator.
    - Outputs of a dtype other than int32 are added to; FlashInfer adds to a copy.
    - bfloat16 and float16 probabilities are read as they are, without a float32 copy.
    - `deterministic` changes nothing: the order of summation is always fixed.
    Raises TypeError and ValueError as contract.validate does, SamplerUnavailable without the
    extension.
    """
    ids = draft_token_ids.to(torch.int32)
    if draft_probs.dtype != target_probs.dtype:
        draft_probs, target_probs = draft_probs.float(), target_probs.float()
    batch_size, spec_length = ids.shape
    shape = Shape(batch_size, spec_length, target_probs.shape[-1])
    seeds = offsets = None
    if seed is not None or offset is not None:
        if seed is None or offset is None:
            missing = "seed" if seed is None else "offset"
            raise ValueError(f"{missing} is None; wanted seed and offset both, or neither")
        seeds = _rows("seed", seed, batch_size, ids.device)
        offsets = _rows("offset", offset, batch_size, ids.device)
        if not (_has_entry_per_row(seed, batch_size) or _has_entry_per_row(offset, batch_size)):
            offsets = offsets + torch.arange(batch_size, device=ids.device) * _ROW_SPACING
        generator = None  # as there: seed and offset win
    uniforms = row_uniforms(shape, ids.device, None, seeds, offsets, generator)
    output = fused_sampler.rejection_sample(ids, draft_probs, target_probs, uniforms=uniforms)
    accepted = _accepted_alone(ids, draft_probs, target_probs, uniforms)
    return (
        output.token_ids,
        _added(maybe_output_accepted_token_num, accepted),
        _added(maybe_output_emitted_draft_token_num, output.num_accepted),
    )


def _rows(name, value, batch_size, device) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        value = (int(value) + 2**63) % 2**64 - 2**63  # uint64 values keep their bits
        return torch.full((batch_size,), value, dtype=torch.int64, device=device)
    if value.dtype not in (torch.int64, torch.uint64):
        raise TypeError(f"{name} has dtype {value.dtype}; wanted torch.int64 or torch.uint64")
    if value.shape not in ((1,), (batch_size,)):
        raise ValueError(f"{name} has shape {list(value.shape)}; wanted [1] or [{batch_size}]")
    return value.view(torch.int64).to(device).expand(batch_size)


def _has_entry_per_row(value, batch_size) -> bool:
    return isinstance(value, torch.Tensor) and len(value) == batch_size


def _accepted_alone(ids, draft_probs, target_probs, uniforms) -> torch.Tensor:
    spec_length, vocab_size = ids.shape[1], target_probs.shape[-1]
    in_vocab = (ids >= 0) & (ids < vocab_size)
    index = ids.long().clamp(0, vocab_size - 1)[..., None]
    q = draft_probs.gather(-1, index).squeeze(-1).double()
    p = target_probs[:, :spec_length].gather(-1, index).squeeze(-1).double()
    accepted = (uniforms[:, :spec_length].double() * q < p) & in_vocab
    return accepted.sum(1, dtype=torch.int32)


def _added(total, counts) -> torch.Tensor:
    return counts if total is None else total.add_(counts)


def vllm_rejection_sample(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata,
    synthetic_mode: bool = False,
    synthetic_conditional_rates: torch.Tensor | None = None,
    use_fp64_gumbel: bool = False,
    fly_window_size: int | None = None,
    fly_entropy_threshold: float | None = None,
    fly_entropy_top_k: int = 3,
) -> torch.Tensor:
    """vLLM V1's rejection_sample as later versions have it, on target logits.

    draft_token_ids: [N] int32 or int64, the requests' drafts one after the other.
    num_draft_tokens: B ints. cu_num_draft_tokens: [B] int32, their running sum.
    draft_probs: [N, V], or None where the draft is one-hot.
    target_logits: [N, V], temperature, top-k and top-p applied.
    bonus_token_ids: [B] or [B, 1], sampled by the caller: the token of a row with every draft
        accepted. So no target row after the last draft is wanted.
    sampling_metadata: has all_greedy, all_random, temperature [B] (None where all_greedy; 0 or
        less means greedy) and generators {request: torch.Generator}.
    Returns [B, max_spec_len + 1] int32, padded with -1.

    Differs from vLLM:
    - A draft of -1 ends its row, whose last token then comes from the target at that place; other
      ids outside [0, V) are rejected. vLLM reads outside the row.
    - A draft with u * q < p is accepted; vLLM wants p / q >= u, which accepts u = 0 with p = 0.
    - A recovered token always has weight and is inside the vocabulary (vllm #44744).
    - A seeded request takes max_spec_len + 1 float32 numbers from its generator; vLLM takes one
      float64 number a draft and V exponentials.
    - use_fp64_gumbel changes nothing: no Gumbel noise is drawn. synthetic_mode, which accepts at a
      set rate for load tests, and fly_window_size, which accepts some rejected drafts too, are a
      NotImplementedError: neither samples from the target.
    Raises TypeError and ValueError as contract.validate_flattened does, SamplerUnavailable without
    the extension.
    """
    if synthetic_mode:
        raise NotImplementedError("synthetic_mode does not sample; wanted synthetic_mode=False")
    _refuse_fly(fly_window_size)
    greedy = _greedy_requests(sampling_metadata)
    target_probs = _probs(target_logits, greedy, cu_num_draft_tokens)
    return _v1(
        draft_token_ids,
        num_draft_tokens,
        max_spec_len,
        cu_num_draft_tokens,
        draft_probs,
        target_probs,
        bonus_token_ids,
        sampling_metadata,
    )


def vllm_rejection_sample_from_probs(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata,
) -> torch.Tensor:
    """vllm_rejection_sample as earlier vLLM versions have it: target_probs [N, V] in place of
    logits (raw logits where all_greedy). Everything else is the same."""
    greedy = _greedy_requests(sampling_metadata)
    if greedy is not None:
        one_hot = _argmax_one_hot(target_probs)
        if sampling_metadata.all_greedy:
            target_probs = one_hot
        else:
            greedy = _expand(greedy, cu_num_draft_tokens, len(target_probs))
            target_probs = torch.where(greedy[:, None], one_hot, target_probs)
    return _v1(
        draft_token_ids,
        num_draft_tokens,
        max_spec_len,
        cu_num_draft_tokens,
        draft_probs,
        target_probs,
        bonus_token_ids,
        sampling_metadata,
    )


def _v1(
    ids, num_draft_tokens, max_spec_len, ends, draft_probs, target_probs, bonus_token_ids, metadata
) -> torch.Tensor:
    batch_size, device = len(num_draft_tokens), target_probs.device
    uniforms = torch.rand((batch_size, max_spec_len + 1), device=device)
    for request, generator in metadata.generators.items():
        if num_draft_tokens[request] > 0:  # as there: a step without drafts leaves it alone
            uniforms[request].uniform_(generator=generator)
    output = fused_sampler.rejection_sample_flattened(
        ids.to(torch.int32),
        ends,
        None if draft_probs is None else draft_probs.to(target_probs.dtype),
        target_probs,
        # One row for all requests: what is drawn from it is overwritten below.
        target_probs.new_ones((1, target_probs.shape[1])).expand(batch_size, -1),
        max_spec_len,
        uniforms=uniforms,
    )
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).clamp(min=0)
    columns = torch.arange(max_spec_len + 1, device=device)
    is_bonus = (columns == lengths[:, None]) & (output.num_accepted == lengths)[:, None]
    bonus = bonus_token_ids.reshape(batch_size, 1).to(torch.int32)
    return torch.where(is_bonus, bonus, output.token_ids)


def _refuse_fly(window_size) -> None:
    if window_size:
        raise NotImplementedError(
            f"fly_window_size is {window_size}, which keeps rejected drafts; wanted none"
        )


def _greedy_requests(metadata) -> torch.Tensor | None:
    """[B] bool, or None where no request is greedy; a scalar True where all are."""
    if metadata.all_greedy:
        return torch.ones((), dtype=torch.bool)
    return None if metadata.all_random else metadata.temperature <= 0


def _probs(logits, greedy, ends) -> torch.Tensor:
    """[N, V] float32: the softmax, or for greedy requests one-hot at the largest logit."""
    if greedy is None:
        return logits.softmax(-1, dtype=torch.float32)
    if greedy.ndim == 0:
        return _argmax_one_hot(logits).float()
    rows = _expand(greedy, ends, len(logits))
    probs = logits.softmax(-1, dtype=torch.float32)
    return torch.where(rows[:, None], _argmax_one_hot(logits), probs)


def _argmax_one_hot(logits) -> torch.Tensor:
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    # With p one-hot the sampler is greedy: u * q < 1 accepts, u * q < 0 rejects, and the residual
    # (or, where q is 1 there, p itself) leaves one token.
    return (vocabulary == logits.argmax(-1, keepdim=True)).to(logits.dtype)


def _expand(values, ends, count) -> torch.Tensor:
    """values [B] -> [count], entry b for the places up to ends[b]; without a synchronisation."""
    places = torch.arange(count, device=ends.device, dtype=ends.dtype)
    request = torch.searchsorted(ends, places, right=True)
    return values[request.clamp(max=len(values) - 1)]


def vllm_v2_rejection_sample(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_sampled: torch.Tensor,
    cu_num_logits: torch.Tensor,
    pos: torch.Tensor,
    idx_mapping: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    num_speculative_steps: int,
    synthetic_conditional_rates: torch.Tensor | None = None,
    use_fp64: bool = False,
    use_block_verification: bool = False,
    contexts: torch.Tensor | None = None,
    watermarking: torch.Tensor | None = None,
    watermarking_skip_mask: torch.Tensor | None = None,
    watermark_key: int | None = None,
    fly_window_size: int = 0,
    fly_entropy_threshold: float = 0.3,
    fly_entropy_top_k: int = 3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM V2's rejection_sample as from 0.28 on: S = num_speculative_steps, L logits over R
    requests, per-request state kept in tables of M entries that idx_mapping looks up.

    target_logits: [L, V], temperature, top-k and top-p applied; a request's rows are one a draft
        and one for the bonus token.
    draft_logits: [M, S, V], or None where the draft is one-hot; the temperature is applied here.
        (Before 0.28 they come with it applied.) A V less than the target's cuts the target's.
    draft_sampled: [L] int32 or int64; a request's first entry is no draft, entry i + 1 is draft i.
    cu_num_logits: [R + 1] int32, where the requests' rows begin and end.
    pos: [L] int64, the positions of the tokens in their sequences.
    idx_mapping: [R], expanded_idx_mapping: [L]: the entry of the tables. expanded_local_pos: [L].
    temperature: [M] float32, 0 for greedy. seed: [M] int64.
    Returns sampled [R, S+1] int64 and num_sampled [R] int32: accepted drafts and one more token.

    Differs from vLLM:
    - sampled is padded with -1; vLLM leaves the rest of a row uninitialised.
    - A draft of -1 ends its row, whose last token comes from the target there. vLLM rejects it and
      recovers from the residual of a draft that was never made.
    - Uniform k of a request is draw pos * (S + 2) + k of the Philox stream of its seed, pos being
      that of its first row: no two steps share a number, and none is the draft's (vllm #47386).
      vLLM draws by (seed, position) and one Gumbel noise a vocabulary entry.
    - use_fp64 changes nothing. synthetic_conditional_rates, fly_window_size and contexts, which
      watermark the last token, are a NotImplementedError.
    - Softmax is a pass of its own over all rows here: this is for trying the operator in an
      engine, not the way to measure it.
    Raises TypeError and ValueError as contract.validate_flattened does, SamplerUnavailable without
    the extension.
    """
    if synthetic_conditional_rates is not None:
        raise NotImplementedError("synthetic_conditional_rates do not sample; wanted None")
    if contexts is not None:
        raise NotImplementedError("contexts ask for a watermark, which is not here; wanted None")
    _refuse_fly(fly_window_size)
    ends, steps = cu_num_logits[1:], num_speculative_steps
    if draft_logits is not None:
        target_logits = target_logits[:, : draft_logits.shape[-1]]  # the rest is padding
    num_logits, vocab_size = target_logits.shape
    if draft_sampled.shape != (num_logits,):
        raise ValueError(
            f"draft_sampled has shape {list(draft_sampled.shape)}; wanted [{num_logits}]"
        )
    greedy = temperature[idx_mapping.long()] <= 0
    target_probs = _probs(target_logits, greedy, ends)
    draft_probs = None
    if draft_logits is not None:
        step = expanded_local_pos.long().clamp(0, max(steps - 1, 0))
        draft_probs = draft_logits[expanded_idx_mapping.long(), step]
        # A greedy request's draft may have any temperature: its target row is one-hot.
        scale = torch.where(temperature > 0, temperature, 1.0)[expanded_idx_mapping.long()]
        draft_probs = draft_probs.float().div_(scale[:, None]).softmax(-1)
    # Draft i stands one place after its row. The bonus row gets the draft -1, which ends the
    # request there and draws from that row alone: the flattened layout with nothing copied.
    ids = torch.full_like(draft_sampled, PLACEHOLDER_TOKEN_ID)
    ids[:-1] = draft_sampled[1:]
    ids.index_fill_(0, ends.long() - 1, PLACEHOLDER_TOKEN_ID)  # by a scalar: no synchronisation
    first = cu_num_logits[:-1].long()
    output = fused_sampler.rejection_sample_flattened(
        ids.long(),
        ends.to(torch.int32),
        draft_probs,
        target_probs,
        target_probs.new_ones((1, vocab_size)).expand(len(ends), -1),  # no request reaches it
        steps + 1,
        seeds=seed[idx_mapping.long()].to(torch.int64),
        offsets=pos[first].long() * (steps + 2),
        verification="block" if use_block_verification else "token",
    )
    return output.token_ids[:, : steps + 1], output.num_accepted + 1


def sglang_chain_speculative_sampling(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
    *,
    block_verification: bool = False,
) -> None:
    """SGLang's chain_speculative_sampling_triton (signature of 0.5.23).

    predicts: int32, written: entry retrive_index[b, k] gets token k of row b.
    accept_index: [B, K+1] int32, written: retrive_index as far as tokens are emitted.
    accept_token_num: [B] int32, written: the accepted drafts.
    candidates: [B, K+1] int64 or int32; a row's first entry is no draft.
    retrive_index: [B, K+1] int64 or int32, no number twice.
    uniform_samples: [B, K] float32, or more columns, which are not read.
    uniform_samples_for_final_sampling: [B] float32.
    target_probs: [B, K+1, V]. draft_probs: [B, K, V], of the same dtype.
    block_verification: algorithm 2 of arXiv:2403.10444. The other arguments are not read, there
        neither.

    The same uniforms accept the same drafts, and give the same last token but for the rounding of
    sums. What else differs from SGLang:
    - A draft id of -1 ends its row, and other ids outside [0, V) are rejected; SGLang reads
      outside the row.
    - A draft that has p but no q is accepted, and one with q over 1 by its test; SGLang rejects
      both.
    - A zero residual gives a token of the target; SGLang gives token V - 1.
    Raises TypeError and ValueError as contract.validate does, SamplerUnavailable without the
    extension.
    """
    spec_length = candidates.shape[1] - 1
    last = uniform_samples_for_final_sampling[:, None]
    output = fused_sampler.rejection_sample(
        candidates[:, 1:],
        draft_probs,
        target_probs,
        uniforms=torch.cat([uniform_samples[:, :spec_length], last], dim=1),
        verification="block" if block_verification else "token",
    )
    emitted, places = output.token_ids != PLACEHOLDER_TOKEN_ID, retrive_index.long()
    predicts[places] = torch.where(emitted, output.token_ids.to(predicts.dtype), predicts[places])
    accept_index.copy_(torch.where(emitted, retrive_index.to(accept_index.dtype), accept_index))
    accept_token_num.copy_(output.num_accepted)


def sglang_blockwise_rejection(
    *,
    candidates: torch.Tensor,
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    target_temperatures: torch.Tensor,
    draft_temperatures: torch.Tensor,
    noise,
    cutoff_verify_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SGLang's blockwise_rejection_triton (signature of 0.5.23).

    candidates: [B, K+1] int64 or int32; a row's first entry is no draft.
    target_logits: [B * (K+1), V]. draft_logits: [B, K or more, a V of its own], or None where the
        draft is one-hot. Any floating dtype; the temperatures, of B numbers above 0, are applied
        here.
    noise: has key, an int, and counter [1] int64, to which each call adds 1.
    cutoff_verify_lens: [B], 1 to K+1: at most so many tokens are emitted; None is K+1.
    Returns the accepted drafts [B] int32, the last tokens [B] int64, and the accepted drafts that
    the cutoff took away [B] int32.

    Differs from SGLang:
    - A draft of -1 ends its row, whose last token then comes from the target at that place; SGLang
      draws it from the residual. Both reject other ids outside the vocabulary.
    - Uniform k of row b is draw b * (K+1) + k of the Philox stream of key + counter; SGLang has a
      number a draft of (key, counter) and one Gumbel noise a vocabulary entry.
    - Softmax is a pass of its own over all rows here: this is for trying the operator in an
      engine, not the way to measure it.
    Raises TypeError and ValueError as contract.validate does, SamplerUnavailable without the
    extension.
    """
    (batch_size, rows), vocab_size = candidates.shape, target_logits.shape[-1]
    target_probs = _tempered(target_logits.view(batch_size, rows, -1), target_temperatures)
    draft_probs = None
    if draft_logits is not None:
        draft_probs = _tempered(draft_logits[:batch_size, : rows - 1], draft_temperatures)
        missing = vocab_size - draft_probs.shape[-1]  # below 0 cuts
        draft_probs = torch.nn.functional.pad(draft_probs, (0, missing))
    output = fused_sampler.rejection_sample(
        candidates[:, 1:],
        draft_probs,
        target_probs,
        seeds=(noise.counter + noise.key).expand(batch_size),
        offsets=torch.arange(batch_size, device=candidates.device) * rows,
    )
    noise.counter.add_(1)
    kept = output.num_accepted
    if cutoff_verify_lens is not None:
        kept = torch.minimum(kept, cutoff_verify_lens.to(kept) - 1)
    last = output.token_ids.gather(1, kept.long()[:, None])[:, 0]
    return kept, last.long(), output.num_accepted - kept


def _tempered(logits, temperatures) -> torch.Tensor:
    return logits.float().div(temperatures.reshape(-1, 1, 1)).softmax(-1)
