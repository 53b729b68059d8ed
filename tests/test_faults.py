"""Faults around the samplers: a missing, stale or broken extension, no card, fork, threads."""

import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from src import oracle, samplers
from src.cuda import fused_sampler
from src.peers import compat
from tests.cases import make_case, ragged

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = "src.cuda.csrc.fused_rejection_C"
THREADS = 8


def python(code, **environment):
    """Runs `code` in a new interpreter at the root; a hang fails."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def one_line(done):
    """The run failed with one clear line: the last of stderr."""
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


LOAD = "from src import samplers; samplers.get('cpp').load('cpu')"


def without_extension(replacement):
    """Code that puts `replacement` (an expression of a module or a finder) in the way first."""
    return f"import sys, types\n{replacement}\n{LOAD}"


def test_a_missing_extension_is_one_line_with_the_command_that_builds_it():
    hide = f"""
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == {EXTENSION!r}:
            raise ModuleNotFoundError("hidden", name=name)
sys.meta_path.insert(0, Hide())
"""
    line = one_line(python(without_extension(hide)))
    assert "the C++ extension is not built for this Python; run: " in line
    assert fused_sampler.BUILD_COMMAND in line


def test_an_extension_built_for_another_torch_names_both_versions():
    stale = f"""
module = types.ModuleType({EXTENSION!r})
module.torch_version, module.with_cuda = "1.2.3", 0
sys.modules[{EXTENSION!r}] = module
"""
    here = torch.__version__.partition("+")[0]
    line = one_line(python(without_extension(stale)))
    assert f"the C++ extension was built for torch 1.2.3, this is {here}; run: " in line


@pytest.mark.parametrize(
    "version, loads",
    [
        ("2.8.0", True),
        ("2.8.0+cu126", True),
        ("2.8.0a0+git1234567", True),
        ("2.8.0.dev20260101", True),
        ("2.8.0rc2", True),
        ("2.8.1", False),
        ("2.80.0", False),
        ("2.9.0a0+git1234567", False),
    ],
)
def test_an_extension_serves_every_build_of_its_torch_release(version, loads, monkeypatch):
    module = types.SimpleNamespace(torch_version="2.8.0")
    monkeypatch.setitem(sys.modules, EXTENSION, module)
    monkeypatch.setattr(torch, "__version__", version)
    loaded, reason = fused_sampler._load()
    assert loaded is (module if loads else None)
    assert loads or "the C++ extension was built for torch 2.8.0, this is 2." in reason


def test_an_extension_that_does_not_link_says_so():
    broken = f"""
class Break:
    def find_spec(self, name, path=None, target=None):
        if name == {EXTENSION!r}:
            raise ImportError("/somewhere/fused_rejection_C.so: undefined symbol: _ZN2at")
sys.meta_path.insert(0, Break())
"""
    line = one_line(python(without_extension(broken)))
    assert "does not load with torch" in line and "undefined symbol: _ZN2at" in line
    assert "/somewhere" not in line


@pytest.mark.parametrize(
    "error, command",
    [
        (
            RuntimeError(
                "CUDA error: no kernel image is available for execution on the device\nTo"
            ),
            fused_sampler.BUILD_COMMAND,
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nIf"), "nvidia-smi"),
    ],
    ids=["another architecture", "no memory"],
)
def test_a_card_that_cannot_run_the_kernels_says_why_in_one_line(error, command, monkeypatch):
    """On the CPU: what the card would raise is raised in its place."""

    def refused(*arguments, **options):
        raise error

    ones = torch.ones
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda shape, device: ones(shape))
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: ones(shape, dtype=dtype))
    monkeypatch.setattr(fused_sampler, "_MODULE", types.SimpleNamespace(with_cuda=True))
    monkeypatch.setattr(fused_sampler, "rejection_sample", refused)
    with pytest.raises(samplers.SamplerUnavailable) as raised:
        samplers.get("cuda").load("cuda")
    assert raised.value.reason == str(error).splitlines()[0]
    assert raised.value.command == command


def test_the_other_samplers_and_calls_without_an_extension():
    code = f"""
import sys, types, torch
sys.modules[{EXTENSION!r}] = types.SimpleNamespace(torch_version="0", with_cuda=0)
from src import samplers
from src.contract import SamplerUnavailable
from src.cuda import fused_sampler
from src.peers import compat
p = torch.ones(1, 2, 3)
ids = torch.zeros(1, 1, dtype=torch.int64)
for name in ("baseline", "vectorized"):
    assert samplers.get(name).load()(ids, p[:, :1], p).token_ids.shape == (1, 2)
for call in (
    lambda: fused_sampler.rejection_sample(ids, None, p),
    lambda: compat.chain_speculative_sampling(p[:, :1], ids, p),
):
    try:
        call()
    except SamplerUnavailable as error:
        assert error.command == fused_sampler.BUILD_COMMAND
    else:
        raise AssertionError("a sampler ran without its extension")
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["cuda", "cuda-thread-per-row"])
def test_without_a_visible_card_cuda_samplers_say_so_and_the_others_work(name):
    code = f"""
from src import samplers
from tests.cases import ON_CPU, check, make_case
for name in ON_CPU:
    check(name, "cpu", make_case(2, 2, 10))
samplers.get({name!r}).load("cuda")
"""
    line = one_line(python(code, CUDA_VISIBLE_DEVICES=""))
    if torch.version.cuda is None:
        assert "is a build without CUDA; run: pip install torch" in line
    else:
        assert line.endswith("torch finds no CUDA device; run: nvidia-smi")


def test_importing_the_package_never_initialises_cuda():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "src").rglob("*.py")
        if path.name != "setup.py" and path.name != "compile_check.py"
    )
    code = "import importlib, torch\n"
    code += f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    code += "assert not torch.cuda.is_initialized()"
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="wants fork")
@pytest.mark.parametrize("used_before", [False, True], ids=["after import", "after a call"])
def test_a_forked_child_samples_and_does_not_hang(used_before):
    # A child forked after a thread pool started has none of its workers. Inputs are small enough
    # for PyTorch's own operators to stay serial: those hang in such a child.
    code = f"""
import os, sys, time, torch
from src import samplers
sample = samplers.get("cpp").load()
def call():
    for batch_size, vocab_size in ((4, 1000), (1, 12_000)):
        p = torch.ones(batch_size, 2, vocab_size)
        ids, zero = torch.zeros(batch_size, 1, dtype=torch.int64), torch.zeros(batch_size).long()
        tokens = sample(ids, p[:, :1], p, seeds=zero, offsets=zero).token_ids
        assert 0 <= tokens.min() and tokens.max() < vocab_size
if {used_before}:
    call()
child = os.fork()
if child == 0:
    call()
    os._exit(0)
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the forked child hangs")
"""
    done = python(code, OMP_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_a_child_forked_after_cuda_started_fails_with_torchs_sentence():
    code = """
import os, sys, torch
from src import samplers
from tests.cases import make_case, to_device
case = to_device(make_case(2, 2, 100), "cuda")
sample = samplers.get("cuda").load("cuda")
sample(**case)
child = os.fork()
if child == 0:
    try:
        torch.ones(1, device="cuda")  # not a CPU kernel, whose threads stayed with the parent
    except RuntimeError as error:
        os._exit(7 if "forked subprocess" in str(error) else 3)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code).returncode == 7


def thread_calls(thread, calls):
    """One thread's share: its own shapes, dtypes and layouts, each call held to the oracle."""
    sample = samplers.get("cpp").load()
    cases, wanted = [], []
    for i in range(6):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[(thread + i) % 3]
        if i == 0:
            case = ragged(make_case(7, 5, 100 + thread, dtype=dtype, seed=thread))
        else:
            shape = (1 + (thread + i) % 4, i, 64 * 2**i + thread)
            case = make_case(*shape, dtype=dtype, seed=thread)
        cases.append(case)
        wanted.append(oracle.rejection_sample(**case))
    problems = []
    for call in range(calls):
        i = call % len(cases)
        problems += oracle.disagreements(*sample(**cases[i]), wanted[i])
    return problems


def test_eight_threads_with_shapes_of_their_own_get_the_oracles_tokens():
    with ThreadPoolExecutor(THREADS) as pool:
        shares = [pool.submit(thread_calls, thread, 300) for thread in range(THREADS)]
        problems = [problem for share in shares for problem in share.result()]
    assert not problems, "\n".join(problems[:10])


def test_threads_that_share_one_generator_never_share_its_numbers():
    # u is its own token: p flat over V tokens, no drafts, so token = floor(u * V).
    generator = torch.Generator().manual_seed(3)
    sample = samplers.get("cpp").load()
    ids, p = torch.zeros(64, 0, dtype=torch.int64), torch.ones(64, 1, 50_000)

    def draw(_):
        return sample(ids, None, p, generator=generator).token_ids.flatten().tolist()

    with ThreadPoolExecutor(THREADS) as pool:
        drawn = [tuple(tokens) for tokens in pool.map(draw, range(64))]
    assert len(set(drawn)) == len(drawn)


def test_tensors_freed_right_after_the_call_leave_its_result_alone():
    sample = samplers.get("cpp").load()
    for seed in range(50):
        case = make_case(3, 4, 5000, seed=seed)
        expected = oracle.rejection_sample(**case)
        output = sample(**case)
        del case
        torch.full((3, 5, 5000), float("nan"))  # likely the memory that was freed
        assert not oracle.disagreements(*output, expected)


def test_an_interrupt_between_calls_ends_the_process_with_the_signals_status():
    code = """
import os, signal, threading
from src import samplers
from tests.cases import make_case
case, sample = make_case(4, 4, 30_000), samplers.get("cpp").load()
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
while True:
    sample(**case)
"""
    if sys.platform == "win32":
        pytest.skip("wants POSIX signals")
    assert one_line(python(code)) == "KeyboardInterrupt"


def test_compat_needs_no_more_than_its_arguments():
    # The adapters keep no state between calls: eight threads through one of them agree.
    case = make_case(4, 3, 500)
    arguments = case["draft_probs"], case["draft_token_ids"], case["target_probs"]

    def tokens(seed):
        return compat.chain_speculative_sampling(*arguments, seed=seed % 4, offset=0)[0]

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(tokens, range(200)))
    for seed, result in enumerate(results):
        assert torch.equal(result, results[seed % 4])
