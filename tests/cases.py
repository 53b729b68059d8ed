"""Inputs that look like decoding, from a seed."""

from __future__ import annotations

import pytest
import torch

from src import oracle, samplers

ON_CPU = ["baseline", "vectorized", "cpp"]
ON_CUDA = ["baseline", "vectorized", "cuda-thread-per-row", "cuda"]
COMPILED = "vectorized-compiled"


def on_every(cpu, cuda):
    """Parametrises a test by (name, device): names on the CPU and, under `-m gpu`, on CUDA."""
    cpu_cases = [pytest.param(name, "cpu", id=name) for name in cpu]
    gpu = pytest.mark.gpu
    cuda_cases = [pytest.param(name, "cuda", id=f"{name}-gpu", marks=gpu) for name in cuda]
    return pytest.mark.parametrize("name, device", cpu_cases + cuda_cases)


def on_every_device(*extra, cpu=ON_CPU, cuda=ON_CUDA):
    """on_every for the samplers of probabilities."""
    return on_every((*cpu, *extra), (*cuda, *extra))


def to_device(case, device):
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in case.items()
    }


def poison_allocator(device, *shapes):
    """Leaves garbage in the memory that the next outputs are likely to get."""
    for shape in shapes:
        for dtype in (torch.int32, torch.int64):
            torch.full(shape, -77, dtype=dtype, device=device)


def check(name, device, case):
    """Samples, holds the tokens to the oracle and the inputs to what they were."""
    before = {key: value.clone() for key, value in case.items() if value is not None}
    there = to_device(case, device)
    batch_size, spec_length = case["draft_token_ids"].shape
    poison_allocator(device, (batch_size, spec_length + 1), (batch_size,))
    output = samplers.get(name).load(device)(**there)
    assert output.token_ids.dtype == case["draft_token_ids"].dtype
    assert output.num_accepted.dtype == torch.int32
    assert output.token_ids.device.type == output.num_accepted.device.type == device
    output = type(output)(*(tensor.cpu() for tensor in output))
    problems = oracle.disagreements(*output, oracle.rejection_sample(**case))
    assert not problems, "\n".join(problems)
    for key, value in before.items():
        assert torch.equal(value, there[key].cpu()) or value.isnan().any(), f"{key} was changed"
    return output


def ragged(case):
    """The case with rows of every length, drafts that end early and ids outside the vocabulary.
    Wants batch size 7 and spec length 5."""
    ids = case["draft_token_ids"].clone()
    ids[5, 1] = -1
    ids[4, 0] = case["target_probs"].shape[2]
    ids[3, 1] = -7
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 9], dtype=torch.int32)
    return {**case, "draft_token_ids": ids, "num_draft_tokens": lengths}


def degenerate_case(vocab_size):
    case = make_case(8, 2, vocab_size)
    p, q = case["target_probs"], case["draft_probs"]
    half = vocab_size // 2
    p[0] = 0
    p[1] = float("nan")
    p[2] = float("inf")
    q[3] = float("nan")
    p[4, :2] = q[4]  # the residual is zero, and every draft is accepted
    p[5] *= 1e-38
    q[5] *= 1e-38  # denormals
    p[6, :, half:] = 0
    q[6, :, :half] = 0  # disjoint supports
    p[7] *= 1e20
    return case


def make_case(batch_size, spec_length, vocab_size, *, dtype=torch.float32, scale=4.0, seed=0):
    """Arguments of rejection_sample as a dict: peaked rows (scale 4) or nearly flat ones (0.1),
    drafts drawn from q, uniforms on the contract's 24-bit grid."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch_size, spec_length + 1, vocab_size, generator=g)
    noise = torch.randn(batch_size, spec_length, vocab_size, generator=g)
    target = logits.softmax(-1).to(dtype)
    draft = (logits[:, :spec_length] + noise).softmax(-1).to(dtype)
    ids = torch.zeros(batch_size, spec_length, dtype=torch.int64)
    if batch_size and spec_length:
        flat = draft.float().reshape(-1, vocab_size)
        ids = torch.multinomial(flat, 1, generator=g).reshape(batch_size, spec_length)
    return {
        "draft_token_ids": ids,
        "draft_probs": draft,
        "target_probs": target,
        "uniforms": torch.rand(batch_size, spec_length + 1, generator=g),
    }


def flatten(case):
    """A padded case with num_draft_tokens (each at most K) as rejection_sample_flattened's
    arguments: the same requests, the rows without a draft left out."""
    ids, q, p = case["draft_token_ids"], case["draft_probs"], case["target_probs"]
    batch_size, spec_length = ids.shape
    lengths = case["num_draft_tokens"].clamp(max=spec_length)
    kept = torch.arange(spec_length) < lengths[:, None]
    return {
        "draft_token_ids": ids[kept],
        "cu_num_draft_tokens": lengths.cumsum(0).int(),
        "draft_probs": None if q is None else q[kept],
        "target_probs": p[:, :spec_length][kept],
        "bonus_probs": p[torch.arange(batch_size), lengths.long()],
        "max_spec_length": spec_length,
        "uniforms": case["uniforms"],
    }


def more_drafts_than_most():
    """Flattened arguments: of two and one certain drafts only one counts. The first request's next
    token is then 1, its target's and not its bonus row's 2."""
    eye = torch.eye(4)
    return {
        "draft_token_ids": torch.tensor([0, 1, 3]),
        "cu_num_draft_tokens": torch.tensor([2, 3], dtype=torch.int32),
        "draft_probs": None,
        "target_probs": eye[[0, 1, 3]],
        "bonus_probs": eye[[2, 2]],
        "max_spec_length": 1,
        "uniforms": torch.full((2, 2), 0.5),
    }


def make_logits_case(batch_size, spec_length, vocab_size, *, dtype=torch.float32, seed=0):
    """Arguments of rejection_sample_from_logits as a dict, like make_case."""
    g = torch.Generator().manual_seed(seed)
    target = 4 * torch.randn(batch_size, spec_length + 1, vocab_size, generator=g)
    noise = torch.randn(batch_size, spec_length, vocab_size, generator=g)
    draft = (target[:, :spec_length] + noise).to(dtype)
    ids = torch.zeros(batch_size, spec_length, dtype=torch.int64)
    if spec_length:
        flat = draft.float().softmax(-1).reshape(-1, vocab_size)
        ids = torch.multinomial(flat, 1, generator=g).reshape(batch_size, spec_length)
    return {
        "draft_token_ids": ids,
        "target_logits": target.to(dtype),
        "draft_logits": draft,
        "uniforms": torch.rand(batch_size, spec_length + 1, generator=g),
    }
