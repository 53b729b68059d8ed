"""The samplers by name. To add one: its module, and one line in _SAMPLERS."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple


class Sampler(NamedTuple):
    name: str
    label: str
    module: str
    function: str

    def load(self) -> Callable:
        return getattr(importlib.import_module(self.module), self.function)


_SAMPLERS = [
    Sampler(
        "baseline", "Baseline (Python loop)", "src.baseline.rejection_sampler", "rejection_sample"
    ),
    Sampler(
        "vectorized", "PyTorch Vectorized", "src.compiled.rejection_sampler", "rejection_sample"
    ),
    Sampler(
        "vectorized-compiled",
        "PyTorch Vectorized (torch.compile)",
        "src.compiled.rejection_sampler",
        "rejection_sample_compiled",
    ),
    Sampler("cpp", "C++ Kernel (CPU)", "src.cuda.fused_sampler", "rejection_sample"),
]
SAMPLERS = {sampler.name: sampler for sampler in _SAMPLERS}


def get(name: str) -> Sampler:
    """The sampler of that name. Raises ValueError naming the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not known; wanted one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
