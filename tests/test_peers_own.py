"""The runner of FlashInfer's own tests, on files of our own in their place."""

import subprocess
import sys

import pytest

from tests import peers_own

TEMPLATE = """
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


@pytest.mark.parametrize("token, status", [(2, 0), (3, 1)])
def test_the_named_tests_of_a_checkout_run_against_our_operator(token, status, tmp_path):
    file = tmp_path / peers_own.FILE
    file.parent.mkdir(parents=True)
    file.write_text(TEMPLATE.format(token=token))
    command = [sys.executable, "-m", "tests.peers_own", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "1 deselected" in done.stdout


def test_a_folder_without_the_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers_own.main([str(tmp_path)])
    assert "git clone https://github.com/flashinfer-ai/flashinfer" in capsys.readouterr().err
