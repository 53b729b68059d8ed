"""The runner of the peers' own tests, on files of our own in their place."""

import os
import subprocess
import sys

import pytest

from tests import peers_own, vllm_own

FLASHINFER = """
import flashinfer
import torch

def test_chain_speculative_sampling():
    p = torch.full((1, 2, 4), 0.25, device="cuda:0")
    ids = torch.tensor([[2]], device="cuda:0")
    tokens, accepted, emitted = flashinfer.sampling.chain_speculative_sampling(p[:, :1], ids, p)
    assert tokens[0, 0] == {token} and emitted.tolist() == [1]

def test_another_function():
    assert False
"""

VLLM = """
from types import SimpleNamespace
import pytest
import torch
from tests.v1.sample.utils import DRAFT
from vllm.v1.sample import rejection_sampler as v1
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as v2

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("", allow_module_level=True)

def of(*values):
    return torch.tensor(values, device="cuda")

def sample_v1(**options):
    greedy = SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={{}})
    logits = of([0.0, 0.0, 9.0, 0.0])
    draft = of(DRAFT), [1], 1, of(1).int(), None
    return v1.rejection_sample(*draft, logits, of(3), greedy, **options)

def test_v1():
    assert sample_v1().tolist() == [[2, 3]]
    assert v1.expand_batch_to_tokens(of(5, 0, 7), of(2, 3, 3), 3, 0, 1).tolist() == [5, 5, 1]

def test_v2():
    logits, ones = of([0.0, 0.0, 9.0, 0.0], [0.0, 9.0, 0.0, 0.0]), of(0, 0)
    places = of(0, 2).int(), of(0, 1), of(0), of(0, 0), of(0, 1)
    sampled, counts = v2.rejection_sample(logits, None, of(0, DRAFT), *places, of(0.0), of(0), 1)
    assert sampled.tolist() == [[2, 1]] and counts.tolist() == [2]

def test_synthetic_rates():
    sample_v1(synthetic_mode={synthetic})

def test_sample_recovered_tokens():
    assert False
"""

UTILS = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
VLLM_TREE = {
    "vllm/__init__.py": "",
    "vllm/v1/sample/rejection_sampler.py": "def rejection_sample(target_logits): assert False",
    "vllm/v1/worker/gpu/spec_decode/rejection_sampler.py": f"from {UTILS} import rejection_sample",
    UTILS.replace(".", "/") + ".py": "def rejection_sample(target_logits): assert False",
    "tests/v1/sample/utils.py": "DRAFT = 2",
}


def run(folder, texts):
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    command = [sys.executable, "-m", "tests.peers_own", str(folder), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(folder)}  # before a vLLM that is installed
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("token, status", [(2, 0), (3, 1)])
def test_the_named_tests_of_a_checkout_run_against_our_operator(token, status, tmp_path):
    done = run(tmp_path, {peers_own.FLASHINFER.files[0]: FLASHINFER.format(token=token)})
    assert done.returncode == status, done.stdout + done.stderr
    assert "1 deselected" in done.stdout


@pytest.mark.parametrize("synthetic, status", [(True, 0), (False, 1)])
def test_vllms_run_against_both_functions_and_the_refused_ones_must_fail(
    synthetic, status, tmp_path
):
    texts = {**VLLM_TREE, vllm_own.FILES[0]: VLLM.format(synthetic=synthetic)}
    done = run(tmp_path, texts)
    assert done.returncode == status, done.stdout + done.stderr
    assert "2 passed, 1 skipped, 1 xfailed" in done.stdout or not synthetic
    assert "of another function than rejection_sample" in done.stdout
    assert "accepts at a set rate" in done.stdout


def test_a_vllm_whose_python_does_not_import_is_said(tmp_path):
    done = run(tmp_path, {"vllm/__init__.py": "import no_such", vllm_own.FILES[0]: ""})
    assert done.returncode == 2
    assert "No module named 'no_such'; wanted vLLM" in done.stderr


def test_a_folder_without_the_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers_own.main([str(tmp_path)])
    assert "git clone https://github.com/flashinfer-ai/flashinfer" in capsys.readouterr().err
