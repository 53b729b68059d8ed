"""The peers' own tests of rejection sampling, run against our operator behind their names.

    python -m tests.peers_own CHECKOUT [--device cpu] [-k EXPRESSION]

CHECKOUT is one of
- a clone of github.com/flashinfer-ai/flashinfer, which need not be installed;
- a clone of github.com/vllm-project/vllm, or its source archive unpacked. vLLM of that version is
  installed, or on the CPU only what it requires: its Python is then imported from there.
Their files of tests are read from there, with the device put in, and are not part of this
repository. A test that our operator cannot pass is named with the reason in tests/vllm_own.py, and
the summary repeats the reasons. Exit status of pytest.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from src.peers import compat
from tests import vllm_own


class Peer(NamedTuple):
    url: str
    files: tuple[str, ...]  # the first tells whose checkout it is


FLASHINFER = Peer(
    "https://github.com/flashinfer-ai/flashinfer",
    ("tests/utils/test_sampling.py",),
)
VLLM = Peer("https://github.com/vllm-project/vllm", vllm_own.FILES)
PEERS = (FLASHINFER, VLLM)
TESTS = "test_chain_speculative_sampling"  # of FlashInfer's


class Marks:
    """Gives a test the first mark whose key is a part of its name."""

    def __init__(self, by_part: dict[str, pytest.MarkDecorator]):
        self.by_part = by_part

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for mark in [mark for part, mark in self.by_part.items() if part in item.name][:1]:
                item.add_marker(mark)

    def pytest_runtest_logfinish(self):
        gc.collect()  # the traceback of a test that failed as expected holds gigabytes


def stand_in() -> ModuleType:
    """A module `flashinfer` that has our operator, and of the rest only names."""
    flashinfer = ModuleType("flashinfer")
    flashinfer.sampling = ModuleType("flashinfer.sampling")
    flashinfer.sampling.chain_speculative_sampling = compat.chain_speculative_sampling
    return flashinfer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="of these tests, pytest's -k")
    args = parser.parse_args(argv)
    checkout = args.checkout.resolve()
    peer = next((peer for peer in PEERS if (checkout / peer.files[0]).is_file()), None)
    if peer is None:
        clones = " or ".join(f"git clone {peer.url}" for peer in PEERS)
        parser.error(f"{checkout} has no tests of theirs; {clones}")
    if peer is FLASHINFER:
        sys.modules["flashinfer"] = stand_in()
        replacements, marks = {"cuda:0": args.device}, {}
        chosen = f"{TESTS} and ({args.k})" if args.k else TESTS
    else:
        try:
            vllm_own.put_ours(checkout, args.device)
        except ModuleNotFoundError as error:
            parser.error(f"{error}; wanted vLLM, or on the CPU the packages it requires")
        replacements, marks = vllm_own.replacements(args.device), vllm_own.marks(args.device)
        chosen = args.k
    with tempfile.TemporaryDirectory() as folder:
        for source in (checkout / file for file in peer.files):
            if source.is_file():
                text = source.read_text()
                for old, new in replacements.items():
                    text = text.replace(old, new)
                Path(folder, source.name).write_text(text)
        options = ["-q", "-rxs", "-p", "no:cacheprovider", "--rootdir", folder, "-k", chosen]
        return int(pytest.main([folder, *options], plugins=[Marks(marks)]))


if __name__ == "__main__":
    sys.exit(main())
