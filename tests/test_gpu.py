"""What only a CUDA card can show: launches, streams, graphs, large tensors, and the C++ kernel's
tokens bit for bit."""

import subprocess
from pathlib import Path

import pytest
import torch

from src import from_logits, oracle, philox, samplers
from src.contract import SamplerOutput
from src.cuda import floor
from src.cuda.csrc.compile_check import find_nvcc, include_folders
from tests import emulation
from tests.cases import make_case, make_logits_case, poison_allocator, ragged, to_device
from tests.test_from_logits import PARAMETERS, parameters

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
KERNELS = ["cuda", "cuda-thread-per-row"]


def planned(exchange, blocks_per_row):
    def sample(draft_token_ids, draft_probs, target_probs, **options):
        names = ("num_draft_tokens", "uniforms", "seeds", "offsets", "generator")
        return SamplerOutput(
            *torch.ops.fused_rejection.rejection_sample_planned(
                draft_token_ids,
                draft_probs,
                target_probs,
                *(options.get(name) for name in names),
                exchange,
                blocks_per_row,
                options.get("block", False),
            )
        )

    return sample


def plans():
    result = [("workspace", blocks) for blocks in (1, 2, 5, 32)]
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability[0] >= 9:
        result += [("cluster", blocks) for blocks in (1, 2, 4, 8)]
    if capability == (9, 0):  # clusters beyond the portable size
        result += [("cluster", blocks) for blocks in (9, 16)]
    return result


@pytest.mark.parametrize("vocab_size", [1, 100, 512, 1000, 32003, 50257, 128256, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_launch_emits_the_cpp_kernels_tokens_bit_for_bit(vocab_size, dtype):
    case = make_case(3, 4, vocab_size, dtype=dtype)
    expected = samplers.get("cpp").load("cpu")(**case)
    there = to_device(case, "cuda")
    launches = [samplers.get(name).load("cuda") for name in KERNELS]
    launches += [planned(*plan) for plan in plans()]
    for sample in launches:
        poison_allocator("cuda", (3, 5), (3,))
        for ours, cpp in zip(sample(**there), expected, strict=True):
            assert torch.equal(ours.cpu(), cpp)


@pytest.mark.parametrize("vocab_size", [1, 1000, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_verification_emits_the_cpp_kernels_tokens_bit_for_bit(vocab_size, dtype):
    case = make_case(5, 6, vocab_size, dtype=dtype)
    expected = samplers.get("cpp").load("cpu")(**case, verification="block")
    there = to_device(case, "cuda")
    for plan in plans():
        poison_allocator("cuda", (5, 7), (5,))
        for ours, cpp in zip(planned(*plan)(**there, block=True), expected, strict=True):
            assert torch.equal(ours.cpu(), cpp), plan


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("which", PARAMETERS)
@pytest.mark.parametrize("vocab_size", [7, 50257, 128256])
def test_from_logits_emits_the_cpp_kernels_tokens_bit_for_bit(vocab_size, which, verification):
    case = make_logits_case(4, 5, vocab_size, dtype=torch.bfloat16) | parameters(which)
    case["verification"] = verification
    expected = from_logits.get("cpp").load("cpu").rejection_sample_from_logits(**case)
    there = to_device(case, "cuda")
    poison_allocator("cuda", (4, 6), (4,))
    output = from_logits.get("cuda").load("cuda").rejection_sample_from_logits(**there)
    for ours, cpp in zip(output, expected, strict=True):
        assert torch.equal(ours.cpu(), cpp)


# Batches from few blocks that all run at once to more than do, and to more than a grid's second
# dimension has; with top-p a cluster of 8, 4 or 2 blocks walks through a request's positions, and
# reads a draft's row where it has to, if its logsumexp is known.
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("which", ["plain", "top-k", "top-p", "min-p", "all"])
@pytest.mark.parametrize(
    "batch_size, vocab_size, dtype",
    [
        (1, 128256, torch.bfloat16),
        (12, 128256, torch.bfloat16),
        (24, 128256, torch.bfloat16),
        (90, 20000, torch.bfloat16),
        (90, 20000, torch.float32),
        (70_000, 5, torch.bfloat16),
    ],
)
def test_from_logits_every_way_of_sharing_positions(batch_size, vocab_size, dtype, which, kept):
    case = make_logits_case(batch_size, 5, vocab_size, dtype=dtype)
    case["draft_logits"][::3] = case["target_logits"][::3, :5]  # accepted to the end
    cpp = from_logits.get("cpp").load("cpu")
    filters = {
        name: values.repeat(-(-batch_size // 4))[:batch_size]
        for name, values in parameters(which).items()
    }
    case |= filters
    if kept:
        drawn = cpp.sample_from_logits(
            case["draft_logits"].flatten(0, 1),
            uniforms=torch.rand(5 * batch_size),
            **{name: values.repeat_interleave(5) for name, values in filters.items()},
        )
        case["draft_logsumexp"] = drawn.logsumexp.view(batch_size, 5)
    expected = cpp.rejection_sample_from_logits(**case)
    output = (
        from_logits.get("cuda").load("cuda").rejection_sample_from_logits(**to_device(case, "cuda"))
    )
    for ours, cpp in zip(output, expected, strict=True):
        assert torch.equal(ours.cpu(), cpp)


@pytest.mark.parametrize("which", PARAMETERS)
def test_sampling_gives_the_cpp_kernels_tokens_and_logsumexp_bit_for_bit(which):
    logits = make_logits_case(4, 0, 128256, dtype=torch.bfloat16)["target_logits"][:, 0]
    case = {"logits": logits, "uniforms": torch.rand(4), **parameters(which)}
    expected = from_logits.get("cpp").load("cpu").sample_from_logits(**case)
    output = from_logits.get("cuda").load("cuda").sample_from_logits(**to_device(case, "cuda"))
    for ours, cpp in zip(output, expected, strict=True):
        assert torch.equal(ours.cpu(), cpp)


@pytest.mark.parametrize("name", KERNELS)
def test_the_device_draws_curands_stream_bit_for_bit(name):
    # With q = 1, p = u rejects and the next float of the 24-bit grid accepts: together they pin u.
    rows, count = 4096, 4
    seeds, offsets = torch.arange(rows) * 2**31 - 77, torch.arange(rows) * 5 + 2**40
    u = torch.from_numpy(philox.uniforms(seeds.numpy(), offsets.numpy(), count + 1))
    sample = samplers.get(name).load("cuda")
    ids = torch.zeros(rows, count, dtype=torch.int64, device="cuda")
    q = torch.ones(rows, count, 2, device="cuda")
    for step, accepted in ((0.0, 0), (2**-24, count)):
        p = torch.stack([u + step, torch.zeros_like(u)], dim=-1).cuda()
        output = sample(ids, q, p, seeds=seeds.cuda(), offsets=offsets.cuda())
        assert (output.num_accepted == accepted).all()


@pytest.mark.parametrize("name", KERNELS)
def test_graph_replays_draw_fresh_numbers_and_match_eager(name):
    case = to_device(make_case(16, 4, 5000), "cuda")
    del case["uniforms"]
    sample = samplers.get(name).load("cuda")
    sample(**case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sample(**case)
    replayed = []
    torch.manual_seed(3)
    for _ in range(3):
        graph.replay()
        replayed.append(output.token_ids.clone())
    torch.manual_seed(3)
    eager = [sample(**case).token_ids for _ in range(3)]
    for ours, theirs in zip(replayed, eager, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(replayed[0], replayed[1])


@pytest.mark.parametrize("name", ["vectorized", *KERNELS])
def test_no_call_synchronises_with_the_host(name):
    case = to_device(ragged(make_case(7, 5, 1000)), "cuda")
    sample = samplers.get(name).load("cuda")
    sample(**case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(**case)
        sample(**{**case, "draft_probs": None})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("exchange", ["auto", "workspace"])
def test_interleaved_streams_each_get_their_own_tokens(exchange):
    shapes = [(1, 8, 128256), (16, 4, 32000), (5, 2, 1000), (64, 1, 512)]
    cases = [make_case(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = [samplers.get("cpp").load("cpu")(**case).token_ids for case in cases]
    there = [to_device(case, "cuda") for case in cases]
    sample = planned(exchange, 0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    for call in range(400):
        which = (call * 7 + call // 5) % len(cases)
        with torch.cuda.stream(streams[call % 2]):
            outputs.append((which, sample(**there[which]).token_ids))
    torch.cuda.synchronize()
    for which, tokens in outputs:
        assert torch.equal(tokens.cpu(), expected[which])


def test_more_than_two_to_the_31_elements():
    batch_size, spec_length, vocab_size = 160, 8, 1_500_032
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("wants 12 GB of free device memory")
    p = torch.zeros((batch_size, spec_length + 1, vocab_size), dtype=torch.bfloat16, device="cuda")
    assert p.numel() > 2**31
    last = vocab_size - 1 - torch.arange(batch_size, device="cuda")
    p[torch.arange(batch_size), :, last] = 1.0
    ids = last[:, None].expand(batch_size, spec_length)
    uniforms = torch.rand(batch_size, spec_length + 1, device="cuda")
    for name in KERNELS:
        output = samplers.get(name).load("cuda")(ids, None, p, uniforms=uniforms)
        assert (output.token_ids == last[:, None]).all(), name


def test_a_second_device_is_used_where_the_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("wants two CUDA devices")
    case = make_case(3, 4, 1000)
    output = samplers.get("cuda").load("cuda")(**to_device(case, "cuda:1"))
    assert output.token_ids.device == torch.device("cuda:1")
    tokens = (tensor.cpu() for tensor in output)
    assert not oracle.disagreements(*tokens, oracle.rejection_sample(**case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_floor_reads_the_rows_that_a_verification_needs(dtype):
    case = to_device(make_case(6, 3, 4096, dtype=dtype), "cuda")
    output = samplers.get("cuda").load("cuda")(**case)
    rejected = output.num_accepted < 3
    q, p = case["draft_probs"], case["target_probs"]
    rows = floor.needed_rows(q, p, output.num_accepted, rejected)
    q = q.view(torch.float32) if dtype != torch.float32 else q
    words = p.view(torch.float32) if dtype != torch.float32 else p
    for blocks in (1, 3, 16):
        sums = floor.read_rows(case["draft_probs"], p, rows, blocks).view(6, -1).double().sum(1)
        for b, k in enumerate(output.num_accepted.tolist()):
            expected = words[b, k].double().sum()
            if rejected[b]:
                expected = expected + q[b, k].double().sum()
            assert torch.allclose(sums[b], expected, rtol=1e-4, equal_nan=True)


def test_the_example_without_python_runs(tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("wants nvcc")
    csrc = emulation.CSRC
    sources = [ROOT / "examples" / "cpp" / "verify.cu", csrc / "fused_rejection_kernel.cu"]
    program = tmp_path / "verify"
    command = [nvcc, "-std=c++20", "--fmad=false", "-arch=native", f"-I{csrc}", *map(str, sources)]
    includes = [f"-I{folder}" for folder in include_folders(nvcc)]
    subprocess.run([*command, *includes, "-o", str(program)], check=True)
    assert subprocess.check_output([str(program)], text=True) == "3 4 5 6\n3 7 -1 -1\n"
