"""FlashInfer's own tests of chain_speculative_sampling, run against our operator behind its name.

    python -m tests.peers_own CHECKOUT [--device cpu] [-k EXPRESSION]

CHECKOUT: a clone of github.com/flashinfer-ai/flashinfer; FlashInfer itself need not be installed.
Its file of tests is read from there, with the device put in, and is not part of this repository.
Exit status of pytest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from src.peers import compat

FILE = Path("tests", "utils", "test_sampling.py")
DEVICE = "cuda:0"  # in that file
TESTS = "test_chain_speculative_sampling"


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
    source = args.checkout / FILE
    if not source.is_file():
        parser.error(
            f"{source} is not there; git clone https://github.com/flashinfer-ai/flashinfer"
        )
    sys.modules["flashinfer"] = stand_in()
    chosen = f"{TESTS} and ({args.k})" if args.k else TESTS
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, source.name)
        copy.write_text(source.read_text().replace(DEVICE, args.device))
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", folder, "-k", chosen]
        return int(pytest.main([str(copy), *options]))


if __name__ == "__main__":
    sys.exit(main())
