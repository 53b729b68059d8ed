"""Many calls at once on CUDA cards: host threads, streams, graphs, tensors freed while a call is
queued. Outputs are compared on the device, with tokens that the oracle has accepted."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from src import from_logits, oracle, samplers
from src.cuda.fused_sampler import rejection_sample_flattened
from tests.cases import flatten, make_case, make_logits_case, ragged, to_device

pytestmark = pytest.mark.gpu
THREADS, CALLS = 8, 10_000
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILONS = {"logits": oracle.LOGITS_EPSILON, "block": 1e-5}
KINDS = ("padded", "ragged", "flattened", "logits", "block")


def make(kind, shape, *, dtype=torch.float32, seed=0):
    """(arguments on the CPU, token_ids): the C++ kernel's tokens, which the CUDA kernels emit bit
    for bit, held to the oracle."""
    cpp, define = samplers.get("cpp").load("cpu"), oracle.rejection_sample
    if kind == "logits":
        case = make_logits_case(*shape, dtype=dtype, seed=seed)
        case["temperature"] = torch.linspace(0.6, 1.4, shape[0])
        cpp = from_logits.get("cpp").load("cpu").rejection_sample_from_logits
        define = oracle.rejection_sample_from_logits
    elif kind in ("ragged", "flattened"):
        case = make_case(7, 5, shape[2], dtype=dtype, seed=seed)
        case["num_draft_tokens"] = torch.tensor([0, 1, 2, 3, 4, 5, 5], dtype=torch.int32)
        case = ragged(case) if kind == "ragged" else case
    else:
        case = make_case(*shape, dtype=dtype, seed=seed)
        if kind == "block":
            case["verification"] = "block"
    output = cpp(**case)
    problems = oracle.disagreements(*output, define(**case), EPSILONS.get(kind))
    assert not problems, "\n".join(problems)
    return (flatten(case) if kind == "flattened" else case), output.token_ids


def caller(kind, device="cuda"):
    if kind == "flattened":
        return rejection_sample_flattened
    if kind == "logits":
        return from_logits.get("cuda").load(device).rejection_sample_from_logits
    return samplers.get("cuda").load(device)


class Calls:
    """Cases on a device, for calls on one stream, and how many of their tokens were wrong."""

    def __init__(self, made, device):
        self.calls = []
        for kind, case, wanted in made:
            wanted = wanted.to(device)
            wrong = torch.zeros_like(wanted, dtype=torch.int64)
            self.calls.append((caller(kind), to_device(case, device), wanted, wrong))

    def __call__(self, which):
        sample, inputs, wanted, wrong = self.calls[which % len(self.calls)]
        wrong.add_(sample(**inputs).token_ids != wanted)

    def wrong(self):
        return sum(int(wrong.sum()) for *_, wrong in self.calls)


def mixed(thread):
    """Cases of shapes and dtypes that no other thread has, one of each kind."""
    shape = (1 + thread % 4, 1 + thread, 300 * 2 ** (thread % 6) + thread)
    made = []
    for i, kind in enumerate(KINDS):
        dtype = DTYPES[(thread + i) % len(DTYPES)]
        made.append((kind, *make(kind, shape, dtype=dtype, seed=10 * thread + i)))
    return made


def test_eight_threads_with_streams_and_shapes_of_their_own_get_the_oracles_tokens():
    # On several devices where there are several.
    shares = [mixed(thread) for thread in range(THREADS)]
    together = threading.Barrier(THREADS)

    def work(thread):
        device = torch.device("cuda", thread % torch.cuda.device_count())
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            calls = Calls(shares[thread], device)
            together.wait(60)
            for call in range(CALLS):
                calls(call)
            return calls.wrong()

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [0] * THREADS


def test_two_streams_with_interleaved_calls_of_different_shapes_get_the_oracles_tokens():
    shapes = [(1, 8, 128256), (16, 4, 32000), (5, 2, 1000), (64, 1, 512), (2, 3, 50257)]
    made = [
        (kind, *make(kind, shape, dtype=DTYPES[i % 3], seed=i))
        for i, (kind, shape) in enumerate(zip(KINDS, shapes, strict=True))
    ]
    choose = random.Random(0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    calls = []
    for stream in streams:
        with torch.cuda.stream(stream):
            calls.append(Calls(made, "cuda"))
    torch.cuda.synchronize()
    for _ in range(5000):
        side = choose.randrange(2)
        with torch.cuda.stream(streams[side]):
            calls[side](choose.randrange(len(made)))
            if choose.random() < 0.2:  # workspaces and outputs then come from other places
                torch.full((choose.randrange(1, 200_000),), -77, device="cuda")
    torch.cuda.synchronize()
    assert [each.wrong() for each in calls] == [0, 0]


@pytest.mark.parametrize("kind", ["padded", "logits", "block"])
def test_a_graph_captured_on_one_stream_replays_on_others(kind):
    made = [make(kind, (4, 5, 32000), seed=seed) for seed in range(6)]
    static = to_device(make(kind, (4, 5, 32000), seed=99)[0], "cuda")
    capture, *others = (torch.cuda.Stream() for _ in range(3))
    sample = caller(kind)
    with torch.cuda.stream(capture):
        sample(**static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture):
        output = sample(**static)
    with torch.cuda.stream(capture):
        eager = Calls([(kind, *made[0])], "cuda")
    cases = [(to_device(case, "cuda"), tokens.cuda()) for case, tokens in made]
    wrong = torch.zeros_like(cases[0][1])
    torch.cuda.synchronize()
    for replay in range(60):
        stream, before = others[replay % 2], others[(replay + 1) % 2]
        case, wanted = cases[replay % len(cases)]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for name, tensor in static.items():
                if isinstance(tensor, torch.Tensor):
                    tensor.copy_(case[name])
            graph.replay()
            wrong.add_(output.token_ids != wanted)
        with torch.cuda.stream(capture):  # where it was captured, something else goes on
            eager(0)
    torch.cuda.synchronize()
    assert int(wrong.sum()) == 0 and eager.wrong() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_freed_right_after_the_call_leave_its_result_alone(kind):
    made = [make(kind, (3, 4, 20_000), seed=seed) for seed in range(4)]
    sample = caller(kind)
    with torch.cuda.stream(torch.cuda.Stream()):
        cases = [(to_device(case, "cuda"), tokens.cuda()) for case, tokens in made]
        wrong = torch.zeros_like(cases[0][1])
        late = torch.zeros((), dtype=torch.int64, device="cuda")
        for call in range(200):
            case, wanted = cases[call % len(cases)]
            torch.cuda._sleep(100_000)  # the call is still queued when its inputs are freed
            inputs = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in case.items()
            }
            sizes = [(v.shape, v.dtype) for v in inputs.values() if isinstance(v, torch.Tensor)]
            output = sample(**inputs)
            del inputs
            junk = [torch.full(shape, -77, dtype=dtype, device="cuda") for shape, dtype in sizes]
            wrong.add_(output.token_ids != wanted)
            # The same for outputs that nobody keeps: what gets their memory stays as it is.
            sample(**case)
            taken = torch.full(wanted.shape, -77, dtype=wanted.dtype, device="cuda")
            late.add_((taken != -77).sum())
            del junk, taken, output
        assert int(wrong.sum()) == 0 and int(late) == 0
