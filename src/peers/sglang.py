"""SGLang's rejection samplers: the chain (probabilities, uniforms given) and the block-wise one
(logits, which draws its own). CUDA only, Triton kernels.

Their modules want no more than torch, Triton and msgspec, but to import one is to import `sglang`,
whose start-up imports the server's utilities and transformers.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import pad

from src.contract import PLACEHOLDER_TOKEN_ID, SamplerOutput
from src.peers.adapter import Adapter, LogitsAdapter, find, refuse_one_hot, want_cuda

_PACKAGE = ("sglang", "0.5.23", "0.5.23")
_MODULES = "sglang.kernels.ops.speculative"
_CHAIN_PARAMETERS = (
    "predicts",
    "accept_index",
    "accept_token_num",
    "candidates",
    "retrive_index",
    "retrive_next_token",
    "retrive_next_sibling",
    "uniform_samples",
    "uniform_samples_for_final_sampling",
    "target_probs",
    "draft_probs",
    "threshold_single",
    "threshold_acc",
    "deterministic",
)
_BLOCKWISE_PARAMETERS = (
    "candidates",
    "target_logits",
    "draft_logits",
    "target_temperatures",
    "draft_temperatures",
    "noise",
)


def load_chain(device: str) -> Adapter:
    """chain_speculative_sampling_triton, on float32 probabilities, as its workers without trees
    call it: what it fills is allocated once, but for the counts, which are returned; its uniforms
    are drawn at each call, by two torch.rand. Raises SamplerUnavailable."""
    module = f"{_MODULES}.reject_sampling"
    name = "chain_speculative_sampling_triton"
    sample = find(*_PACKAGE, module, name, _CHAIN_PARAMETERS)
    want_cuda("sglang", device)

    def prepare(draft_token_ids, draft_probs, target_probs):
        refuse_one_hot(draft_probs, "SGLang's chain")
        batch_size, spec_length = draft_token_ids.shape
        rows, there, dtype = spec_length + 1, draft_token_ids.device, draft_token_ids.dtype
        columns = torch.arange(rows, device=there)
        # Where a candidate's successor is written: row by row, so that it reads as token_ids.
        places = torch.arange(batch_size * rows, device=there).view(batch_size, rows)
        predicts = torch.empty(batch_size * rows, dtype=torch.int32, device=there)
        arguments = {
            "predicts": predicts,
            "accept_index": torch.empty((batch_size, rows), dtype=torch.int32, device=there),
            "candidates": _after_a_root(draft_token_ids),
            "retrive_index": places,
            # A tree's links, its thresholds and `deterministic` are not read on a chain.
            "retrive_next_token": pad(columns[1:], (0, 1), value=-1).repeat(batch_size, 1),
            "retrive_next_sibling": torch.full_like(places, -1),
            "target_probs": target_probs.float(),
            "draft_probs": draft_probs.float(),
            "threshold_single": 1.0,
            "threshold_acc": 1.0,
            "deterministic": True,
        }

        def call():
            num_accepted = torch.empty(batch_size, dtype=torch.int32, device=there)
            sample(
                **arguments,
                accept_token_num=num_accepted,
                uniform_samples=torch.rand((batch_size, spec_length), device=there),
                uniform_samples_for_final_sampling=torch.rand(batch_size, device=there),
            )
            emitted = columns <= num_accepted[:, None]
            token_ids = torch.where(emitted, predicts.view(batch_size, rows), PLACEHOLDER_TOKEN_ID)
            return SamplerOutput(token_ids.to(dtype), num_accepted)

        return call

    return Adapter(prepare)


def load_blockwise(device: str) -> Adapter:
    """blockwise_rejection_triton, on logits of any dtype, at temperature 1. "Block-wise" is how it
    goes through the vocabulary: drafts are verified one by one. Its numbers are a function of a key
    and of a counter on the device that each call advances; as in its server there is one of each.
    It returns counts and last tokens; the call puts them behind the drafts. Raises
    SamplerUnavailable."""
    module = f"{_MODULES}.dspark.blockwise_rejection"
    sample = find(*_PACKAGE, module, "blockwise_rejection_triton", _BLOCKWISE_PARAMETERS)
    make_noise = find(*_PACKAGE, module, "make_rejection_noise", ("random_seed", "device"))
    want_cuda("sglang", device)
    seed = int(torch.randint(2**62, ()))

    @functools.cache
    def noise_on(where: torch.device):
        return make_noise(seed, where)

    def prepare(draft_token_ids, draft_logits, target_logits):
        batch_size, spec_length = draft_token_ids.shape
        there, dtype = draft_token_ids.device, draft_token_ids.dtype
        temperatures = torch.ones(batch_size, device=there)
        arguments = {
            "candidates": _after_a_root(draft_token_ids),
            "target_logits": target_logits.flatten(0, 1),
            "draft_logits": draft_logits,
            "target_temperatures": temperatures,
            "draft_temperatures": temperatures,
            "noise": noise_on(there),
        }
        columns = torch.arange(spec_length + 1, device=there)
        drafts = pad(draft_token_ids.long(), (0, 1), value=PLACEHOLDER_TOKEN_ID)

        def call():
            num_accepted, last, _ = sample(**arguments)
            end = num_accepted[:, None]
            token_ids = torch.where(columns < end, drafts, PLACEHOLDER_TOKEN_ID)
            token_ids = torch.where(columns == end, last[:, None], token_ids)
            return SamplerOutput(token_ids.to(dtype), num_accepted)

        return call

    return LogitsAdapter(prepare)


def _after_a_root(draft_token_ids: torch.Tensor) -> torch.Tensor:
    """[B, K+1] int64: a row's first candidate is the token before its drafts, which is not read."""
    return pad(draft_token_ids.long(), (1, 0))
