"""Invariants over inputs that nobody would write down (tests/strategies.py), for every sampler, and
the CUDA kernels' own source run on the CPU."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src import oracle, philox, samplers
from src.contract import SamplerOutput
from src.cuda import fused_sampler
from tests import emulation
from tests.cases import flatten, on_every_device
from tests.strategies import INT_MAX, LAST_UNIFORM, RED_ZONE, bits, cases, place

POISON = -77


def assert_invariants(case, output):
    """What holds of any correct output, whatever the oracle says. Tensors on the CPU."""
    ids, p, u = case["draft_token_ids"].long(), case["target_probs"].double(), case["uniforms"]
    q = torch.ones_like(p) if case["draft_probs"] is None else case["draft_probs"].double()
    batch_size, spec_length = ids.shape
    vocab_size = p.shape[2]
    tokens, counts = output.token_ids, output.num_accepted
    assert tokens.shape == (batch_size, spec_length + 1) and counts.shape == (batch_size,)
    assert tokens.dtype == case["draft_token_ids"].dtype and counts.dtype == torch.int32
    for b in range(batch_size):
        accepted, row = int(counts[b]), tokens[b].tolist()
        assert 0 <= accepted <= spec_length
        assert row[:accepted] == ids[b, :accepted].tolist(), "the prefix is the drafts'"
        assert row[accepted + 1 :] == [-1] * (spec_length - accepted), "padding is a suffix"
        assert 0 <= row[accepted] < vocab_size
        for k, token in enumerate(row[: accepted + 1]):
            # p - q is positive where p = 0 and q < 0: the contract takes weights as they come.
            if (p[b, k] > 0).any() and not (k < spec_length and q[b, k, token] < 0):
                assert p[b, k, token] > 0, "a token that the target gives nothing"
        length = spec_length
        if case["num_draft_tokens"] is not None:
            length = min(max(int(case["num_draft_tokens"][b]), 0), spec_length)
        assert accepted <= length
        draft = int(ids[b, accepted]) if accepted < length else -1
        if 0 <= draft < vocab_size:
            p_x = p[b, accepted, draft]
            q_x = q[b, accepted, draft]
            assert not (p_x >= q_x > 0 and math.isfinite(q_x)), "rejected although p >= q"
            assert not (u[b, accepted] == 0 and p_x > 0 and math.isfinite(q_x)), "u = 0 rejected"


def run(sample, case, layouts, device):
    """Samples from poisoned surroundings; the inputs and their surroundings stay what they were."""
    arguments, buffers = place(case, layouts, device)
    before = {name: bits(buffer) for name, buffer in buffers.items()}
    output = sample(**arguments)
    for name, buffer in buffers.items():
        assert torch.equal(bits(buffer), before[name]), f"{name} was changed"
    return SamplerOutput(*(tensor.cpu() for tensor in output))


def expected_of(case):
    names = ("draft_token_ids", "draft_probs", "target_probs", "num_draft_tokens", "uniforms")
    with np.errstate(invalid="ignore"):  # 0 * inf
        return oracle.rejection_sample(**{name: case[name] for name in names})


@on_every_device()
@given(drawn=cases())
def test_every_sampler_keeps_the_invariants_and_emits_the_oracles_tokens(name, device, drawn):
    case, layouts = drawn
    output = run(samplers.get(name).load(device), case, layouts, device)
    assert_invariants(case, output)
    problems = oracle.disagreements(*output, expected_of(case))
    assert not problems, "\n".join(problems)


@on_every_device(cpu=["cpp"], cuda=["cuda"])
@given(drawn=cases())
def test_out_is_written_and_nothing_around_it(name, device, drawn):
    case, layouts = drawn
    arguments, _ = place(case, layouts, device)
    expected = samplers.get(name).load(device)(**arguments)
    buffers, out = [], []
    for tensor in expected:
        buffer = torch.full(
            (tensor.numel() + 2 * RED_ZONE,), POISON, dtype=tensor.dtype, device=device
        )
        buffers.append(buffer)
        out.append(buffer[RED_ZONE : RED_ZONE + tensor.numel()].view(tensor.shape))
    samplers.get(name).load(device)(**arguments, out=SamplerOutput(*out))
    for buffer, written, tensor in zip(buffers, out, expected, strict=True):
        assert torch.equal(written, tensor)
        assert (buffer[:RED_ZONE] == POISON).all() and (buffer[-RED_ZONE:] == POISON).all()


@on_every_device(cpu=["cpp"], cuda=["cuda"])
@given(drawn=cases())
def test_the_flattened_layout_gives_the_padded_ones_tokens(name, device, drawn):
    case, _ = drawn
    batch_size, spec_length = case["draft_token_ids"].shape
    if case["num_draft_tokens"] is None:
        case["num_draft_tokens"] = torch.full((batch_size,), spec_length, dtype=torch.int32)
    case["num_draft_tokens"] = case["num_draft_tokens"].clamp(0, spec_length)
    flat = flatten(case)
    arguments, _ = place(case, dict.fromkeys(case, "contiguous"), device)
    padded = samplers.get(name).load(device)(**arguments)
    tensors = {n: t for n, t in flat.items() if n != "max_spec_length"}
    tensors, _ = place(tensors, dict.fromkeys(tensors, "padded rows"), device)
    output = fused_sampler.rejection_sample_flattened(**tensors, max_spec_length=spec_length)
    if case.get("seeds") is not None:  # its uniforms are those of the seeds
        tensors.update(uniforms=None, seeds=arguments["seeds"], offsets=arguments["offsets"])
        again = fused_sampler.rejection_sample_flattened(**tensors, max_spec_length=spec_length)
        assert torch.equal(again.token_ids, output.token_ids)
    for ours, wanted in zip(output, padded, strict=True):
        assert torch.equal(ours, wanted)


@on_every_device(cpu=["cpp"], cuda=["cuda"])
@given(drawn=cases(), data=st.data())
def test_ends_that_are_wrong_read_nothing_outside_the_drafts(name, device, drawn, data):
    case, _ = drawn
    samplers.get(name).load(device)
    batch_size, spec_length = case["draft_token_ids"].shape
    vocab_size = case["target_probs"].shape[2]
    total = batch_size * spec_length
    most = data.draw(st.integers(0, spec_length))
    numbers = st.integers(-3, total + 6) | st.sampled_from((-(2**31), INT_MAX))
    ends = data.draw(st.lists(numbers, min_size=batch_size, max_size=batch_size))
    flat = {
        "draft_token_ids": case["draft_token_ids"].reshape(total),
        "cu_num_draft_tokens": torch.tensor(ends, dtype=torch.int32),
        "draft_probs": case["draft_probs"],
        "target_probs": case["target_probs"][:, :spec_length].reshape(total, vocab_size),
        "bonus_probs": case["target_probs"][:, spec_length],
        "uniforms": case["uniforms"][:, : most + 1],
    }
    if flat["draft_probs"] is not None:
        flat["draft_probs"] = flat["draft_probs"].reshape(total, vocab_size)
    padded = {**case, "num_draft_tokens": torch.zeros(batch_size, dtype=torch.int32)}
    padded["uniforms"] = flat["uniforms"]
    for field, extra in (("draft_token_ids", 0), ("draft_probs", 0), ("target_probs", 1)):
        padded[field] = None if case[field] is None else case[field][:, : most + extra].clone()
    for b, end in enumerate(ends):  # what docs and fused_rejection.h say such ends address
        begin = min(max(ends[b - 1] if b else 0, 0), total)
        given = max(min(end, total) - begin, 0)
        count = min(given, most)
        padded["num_draft_tokens"][b] = count
        extra = flat["bonus_probs"][b] if given == count else flat["target_probs"][begin + count]
        padded["target_probs"][b, count] = extra
        for field in ("draft_token_ids", "draft_probs", "target_probs"):
            if padded[field] is not None:
                padded[field][b, :count] = flat[field][begin : begin + count]
    arguments, _ = place(flat, dict.fromkeys(flat, "contiguous"), device)
    output = fused_sampler.rejection_sample_flattened(**arguments, max_spec_length=most)
    output = SamplerOutput(*(tensor.cpu() for tensor in output))
    problems = oracle.disagreements(*output, expected_of(padded))
    assert not problems, "\n".join(problems)


@on_every_device()
@given(drawn=cases(max_batch_size=6), order=st.randoms(use_true_random=False))
def test_a_row_depends_neither_on_its_batch_mates_nor_on_its_place(name, device, drawn, order):
    case, layouts = drawn
    batch_size = len(case["draft_token_ids"])
    if batch_size == 0:
        return
    sample = samplers.get(name).load(device)
    whole = run(sample, case, layouts, device)
    rows = [order.randrange(batch_size) for _ in range(order.randint(1, 7))]
    part = {key: None if value is None else value[rows] for key, value in case.items()}
    for ours, wanted in zip(run(sample, part, layouts, device), whole, strict=True):
        assert torch.equal(ours, wanted[rows])


@pytest.mark.parametrize("vocab_size", [4, 512, 2048])
@on_every_device()
def test_a_uniform_on_an_edge_of_the_cdf_draws_the_index_after_it(name, device, vocab_size):
    # Powers of two sum exactly, so nothing here is a matter of rounding.
    u = torch.arange(vocab_size) / vocab_size
    p = torch.full((1, 1, vocab_size), 1 / vocab_size).expand(vocab_size, -1, -1)
    ids = torch.zeros(vocab_size, 0, dtype=torch.int64)
    arguments = ids.to(device), None, p.to(device)
    output = samplers.get(name).load(device)(*arguments, uniforms=u[:, None].to(device))
    assert output.token_ids[:, 0].tolist() == list(range(vocab_size))


@on_every_device()
def test_rounding_never_draws_an_index_without_weight(name, device):
    # Float32 sums above the exact one leave the largest u beyond every edge in some of the rows.
    rows, weighted = 2000, 390  # in the middle of a span of 16
    p = torch.rand(rows, 1, 600, generator=torch.Generator().manual_seed(0))
    p[..., weighted:] = 0
    ids, u = torch.zeros(rows, 0, dtype=torch.int64), torch.full((rows, 1), LAST_UNIFORM)
    sample = samplers.get(name).load(device)
    tokens = sample(ids.to(device), None, p.to(device), uniforms=u.to(device)).token_ids.cpu()
    assert tokens.max() < weighted and (p[torch.arange(rows), 0, tokens[:, 0]] > 0).all()


def assert_draws_the_published_stream(sample, device):
    # With q = 1, p = u rejects and the next float of the 24-bit grid accepts: together they pin u.
    rows, count = 300, 4
    seeds, offsets = torch.arange(rows) * 2**31 - 77, torch.arange(rows) * 5 + 2**40
    u = torch.from_numpy(philox.uniforms(seeds.numpy(), offsets.numpy(), count + 1))
    ids = torch.zeros(rows, count, dtype=torch.int64, device=device)
    for step, accepted in ((0.0, 0), (2**-24, count)):
        p = torch.stack([u + step, torch.zeros_like(u)], dim=-1).to(device)
        output = sample(ids, None, p, seeds=seeds.to(device), offsets=offsets.to(device))
        assert (output.num_accepted == accepted).all()


@on_every_device()
def test_every_sampler_draws_the_published_stream_bit_for_bit(name, device):
    assert_draws_the_published_stream(samplers.get(name).load(device), device)


@pytest.mark.skipif(
    emulation.compiler() is None, reason="the emulation wants Linux and a C++ compiler"
)
@pytest.mark.parametrize("kernel", emulation.KERNELS)
def test_the_emulated_kernels_draw_the_published_stream_bit_for_bit(kernel):
    assert_draws_the_published_stream(emulation.sampler(kernel), "cpu")


@pytest.mark.skipif(
    emulation.compiler() is None, reason="the emulation wants Linux and a C++ compiler"
)
@pytest.mark.parametrize(
    "kernel, blocks", [("thread-per-row", 1), ("cluster", 2), ("cluster", 3), ("workspace", 2)]
)
@given(drawn=cases(vocab_sizes=(1, 17, 512, 513, 1100, 2050), max_batch_size=2))
@settings(max_examples=max(30, settings.default.max_examples // 5))
def test_the_emulated_kernels_emit_the_cpp_kernels_tokens_bit_for_bit(kernel, blocks, drawn):
    case, layouts = drawn
    layouts["draft_token_ids"] = layouts["uniforms"] = "contiguous"  # the operator sees to these
    expected = run(samplers.get("cpp").load(), case, layouts, "cpu")
    output = run(emulation.sampler(kernel, blocks), case, layouts, "cpu")
    assert_invariants(case, output)
    for ours, cpp in zip(output, expected, strict=True):
        assert torch.equal(ours, cpp)
