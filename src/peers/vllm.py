"""vLLM's rejection samplers: V1 (flattened requests, bonus token sampled elsewhere) and V2
(logits, requests found through index maps). CUDA only, Triton kernels."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch

from src.contract import PLACEHOLDER_TOKEN_ID, SamplerOutput
from src.peers.adapter import Adapter, LogitsAdapter, find, refuse_one_hot, want_cuda

_PACKAGE = ("vllm", "0.11", "0.33.0")
_V1_PARAMETERS = (
    "draft_token_ids",
    "num_draft_tokens",
    "max_spec_len",
    "cu_num_draft_tokens",
    "draft_probs",
    "bonus_token_ids",
    "sampling_metadata",
)
_V2_PARAMETERS = (
    "target_logits",
    "draft_logits",
    "draft_sampled",
    "cu_num_logits",
    "pos",
    "idx_mapping",
    "expanded_idx_mapping",
    "expanded_local_pos",
    "temperature",
    "seed",
    "num_speculative_steps",
)


def load_v1(device: str) -> Adapter:
    """V1. Versions whose function takes target_logits do their softmax inside the call, from
    logits of any dtype; earlier ones take target_probs. Its draft_probs, and the probabilities of
    the bonus token, are float32 and made before its time counts. The bonus token, which vLLM
    samples before the call, is drawn inside it here, by the same exponential race: without it the
    call would not do the operator's work. Raises SamplerUnavailable."""
    sample = find(*_PACKAGE, "vllm.v1.sample.rejection_sampler", "rejection_sample", _V1_PARAMETERS)
    want_cuda("vllm", device)
    reads_logits = "target_logits" in inspect.signature(sample).parameters

    def prepare(draft_token_ids, draft_logits, target_logits):
        batch_size, spec_length = draft_token_ids.shape
        vocab_size = target_logits.shape[-1]
        there = target_logits.device
        target = target_logits[:, :spec_length].reshape(-1, vocab_size)
        bonus_probs = _softmax(target_logits[:, spec_length])
        arguments = {
            "draft_token_ids": draft_token_ids.reshape(-1).int(),
            "num_draft_tokens": [spec_length] * batch_size,
            "max_spec_len": spec_length,
            "cu_num_draft_tokens": torch.arange(1, batch_size + 1, device=there).int()
            * spec_length,
            "draft_probs": None
            if draft_logits is None
            else _softmax(draft_logits.reshape(-1, vocab_size)),
            "sampling_metadata": SimpleNamespace(
                all_greedy=False,
                all_random=True,
                temperature=torch.ones(batch_size, device=there),
                generators={},
                top_k=None,
                top_p=None,
            ),
        }
        arguments["target_logits" if reads_logits else "target_probs"] = (
            target if reads_logits else _softmax(target)
        )
        dtype = draft_token_ids.dtype

        def call():
            noise = torch.empty_like(bonus_probs).exponential_()
            bonus = bonus_probs.div(noise).argmax(-1, keepdim=True).int()
            token_ids = sample(**arguments, bonus_token_ids=bonus)
            num_tokens = (token_ids != PLACEHOLDER_TOKEN_ID).sum(1, dtype=torch.int32)
            return SamplerOutput(token_ids.to(dtype), num_tokens - 1)

        return call

    return LogitsAdapter(prepare)


def load_v2(device: str) -> Adapter:
    """V2, on logits of any dtype. Raises SamplerUnavailable."""
    module = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
    sample = find(*_PACKAGE, module, "rejection_sample", _V2_PARAMETERS)
    want_cuda("vllm", device)

    def prepare(draft_token_ids, draft_logits, target_logits):
        refuse_one_hot(draft_logits, "this adapter of vLLM V2")
        batch_size, spec_length = draft_token_ids.shape
        rows, there = spec_length + 1, target_logits.device
        sampled = torch.zeros((batch_size, rows), dtype=torch.int64, device=there)
        sampled[:, 1:] = draft_token_ids
        requests = torch.arange(batch_size, device=there)
        steps = torch.arange(rows, device=there)
        pos = steps.repeat(batch_size)
        arguments = {
            "target_logits": target_logits.reshape(batch_size * rows, -1),
            "draft_logits": draft_logits,
            "draft_sampled": sampled.reshape(-1),
            "cu_num_logits": (torch.arange(batch_size + 1, device=there) * rows).int(),
            "pos": pos,
            "idx_mapping": requests.int(),
            "expanded_idx_mapping": requests.repeat_interleave(rows).int(),
            "expanded_local_pos": steps.repeat(batch_size).int(),
            "temperature": torch.ones(batch_size, device=there),
            "seed": torch.randint(2**62, (batch_size,), device=there),
            "num_speculative_steps": spec_length,
        }
        columns = torch.arange(rows, device=there)
        dtype = draft_token_ids.dtype

        def call():
            pos.add_(rows)  # its numbers are a function of seed and position
            token_ids, num_sampled = sample(**arguments)
            token_ids = torch.where(columns < num_sampled[:, None], token_ids, PLACEHOLDER_TOKEN_ID)
            return SamplerOutput(token_ids.to(dtype), (num_sampled - 1).to(torch.int32))

        return call

    return LogitsAdapter(prepare)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1, dtype=torch.float32)
