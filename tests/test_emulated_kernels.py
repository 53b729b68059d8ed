"""The CUDA kernels' own source on the CPU: their logic, barriers and summation order. What a GPU
adds (memory model, launches, instructions) is tested by `-m gpu`."""

import numpy as np
import pytest
import torch

from src import oracle, samplers
from tests import emulation
from tests.cases import degenerate_case, flatten, make_case, more_drafts_than_most, ragged

pytestmark = pytest.mark.skipif(
    emulation.compiler() is None, reason="the emulation wants Linux and a C++ compiler"
)
LAUNCHES = [
    ("thread-per-row", 1),
    ("cluster", 1),
    ("cluster", 2),
    ("cluster", 9),
    ("workspace", 1),
    ("workspace", 3),
]


def check(case, launches=LAUNCHES):
    expected = samplers.get("cpp").load()(**case)
    problems = []
    if case.get("uniforms") is not None:
        epsilon = 1e-5 if case.get("verification") == "block" else None
        problems = oracle.disagreements(*expected, oracle.rejection_sample(**case), epsilon)
    assert not problems, "\n".join(problems)
    for schedule, (kernel, blocks) in enumerate(launches):
        output = emulation.sampler(kernel, blocks, schedule)(**case)
        for ours, cpp in zip(output, expected, strict=True):
            assert ours.dtype == cpp.dtype
            assert torch.equal(ours, cpp), (kernel, blocks)


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 128, 512, 1000, 4096, 32003])
@pytest.mark.parametrize("batch_size, spec_length", [(1, 1), (3, 5), (2, 8), (2, 0), (2, 40)])
def test_the_kernels_emit_the_cpp_kernels_tokens_bit_for_bit(batch_size, spec_length, vocab_size):
    if vocab_size == 32003 and spec_length == 40:
        vocab_size = 1537
    check(make_case(batch_size, spec_length, vocab_size))


def test_a_search_through_spans_longer_than_what_is_kept_of_them():
    """Beyond 262,144 tokens, to a tile that is not among the first eight of its span."""
    case = make_case(1, 0, 263_000)
    tiles = case["target_probs"][0, 0].cumsum(0)[511::512]
    tile = 12 * 17 + 11  # of spans of 17 tiles
    case["uniforms"][0, 0] = (tiles[tile - 1] + tiles[tile]) / 2
    check(case, [("cluster", 9)])
    assert int(samplers.get("cpp").load()(**case)[0][0, 0]) // 512 == tile


@pytest.mark.parametrize("dtype", emulation.DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_every_dtype_ragged_one_hot_and_strided(dtype, ids_dtype):
    case = make_case(7, 5, 1024, dtype=dtype)
    case["draft_token_ids"] = case["draft_token_ids"].to(ids_dtype)
    case["num_draft_tokens"] = torch.tensor([0, 1, 2, 3, 4, 5, 9], dtype=torch.int32)
    case["draft_token_ids"][5, 1] = -1
    case["draft_token_ids"][4, 0] = 1024
    case["draft_token_ids"][3, 1] = -7
    check(case)
    check({**case, "draft_probs": None})
    for name in ("draft_probs", "target_probs"):  # rows that no 16-byte load can start at
        probs = case[name]
        wide = torch.full((*probs.shape[:2], probs.shape[2] + 1), 0.5, dtype=dtype)
        wide[..., 1:] = probs
        case[name] = wide[..., 1:]
        check(case)


@pytest.mark.parametrize("one_hot", [False, True])
def test_degenerate_rows(one_hot):
    case = degenerate_case(vocab_size=1100)
    check({**case, "draft_probs": None} if one_hot else case)


def test_seeds_give_the_cpp_kernels_tokens():
    case = make_case(6, 5, 1000)
    del case["uniforms"]
    seeds = torch.tensor([0, 1, -1, 2**62, 7, 7])
    offsets = torch.tensor([0, 5, 2**40 + 3, -2, 1, 2])
    check({**case, "seeds": seeds, "offsets": offsets})


@pytest.mark.parametrize("schedule", range(5))
def test_tokens_do_not_depend_on_the_order_of_threads(schedule):
    case = make_case(2, 3, 5000)
    first = emulation.sampler("cluster", 4, 0)(**case)
    again = emulation.sampler("cluster", 4, 1000 + schedule)(**case)
    assert torch.equal(first.token_ids, again.token_ids)


@pytest.mark.parametrize("vocab_size", [512, 1000, 5120])
def test_tile_sums_follow_the_documented_order(vocab_size):
    case = make_case(1, 1, vocab_size, scale=1.0)
    p, q = case["target_probs"][0, 0], case["draft_probs"][0, 0]
    weights = np.maximum(p.numpy() - q.numpy(), np.float32(0))
    tiles = np.pad(weights, (0, -vocab_size % 512)).reshape(-1, 512)
    sums = tiles[:, :256] + tiles[:, 256:]
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    serial, by_warp = emulation.tile_sums(p, q)
    assert np.array_equal(serial.numpy(), sums[:, 0])
    assert np.array_equal(by_warp.numpy(), sums[:, 0])
    unaligned = torch.cat([p[:1], p])[1:]
    assert np.array_equal(emulation.tile_sums(unaligned, q)[1].numpy(), sums[:, 0])


def test_the_flattened_layout_gives_the_padded_ones_tokens():
    case = ragged(make_case(7, 5, 1000))
    expected = samplers.get("cpp").load()(**case)
    flat = flatten(case)
    for kernel, blocks in LAUNCHES:
        output = emulation.flattened_sampler(kernel, blocks)(**flat)
        for ours, cpp in zip(output, expected, strict=True):
            assert torch.equal(ours, cpp), (kernel, blocks)
        output = emulation.flattened_sampler(kernel, blocks)(**more_drafts_than_most())
        assert output.token_ids.tolist() == [[0, 1], [3, 2]], (kernel, blocks)


@pytest.mark.parametrize("vocab_size", [2, 600, 4096])
@pytest.mark.parametrize("batch_size, spec_length", [(6, 1), (5, 5), (3, 0), (2, 40)])
def test_block_verification_gives_the_cpp_kernels_tokens(batch_size, spec_length, vocab_size):
    case = {**make_case(batch_size, spec_length, vocab_size), "verification": "block"}
    check(case, LAUNCHES[1:])
    check({**case, "draft_probs": None}, LAUNCHES[1:])


@pytest.mark.parametrize("dtype", emulation.DTYPES, ids=str)
def test_block_verification_of_every_dtype_ragged_and_degenerate(dtype):
    case = {**ragged(make_case(7, 5, 1000, dtype=dtype)), "verification": "block"}
    check(case, LAUNCHES[1:])
    check({**degenerate_case(vocab_size=1100), "verification": "block"}, LAUNCHES[1:])
