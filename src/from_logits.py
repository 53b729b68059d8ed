"""The samplers that start from logits, by name. Each is a module with rejection_sample_from_logits
and sample_from_logits, as src/compiled/from_logits.py documents them."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from src.samplers import check_device


class LogitsSampler(NamedTuple):
    name: str
    label: str
    module: str
    devices: tuple[str, ...] = ("cpu", "cuda")

    def load(self, device: str = "cpu") -> ModuleType:
        """The module. Raises SamplerUnavailable as samplers.Sampler.load does."""
        check_device(self, device)
        module = importlib.import_module(self.module)
        if hasattr(module, "require"):
            module.require(device)
        return module


_SAMPLERS = [
    LogitsSampler("vectorized", "PyTorch Vectorized", "src.compiled.from_logits"),
    LogitsSampler("cuda", "CUDA C++ Kernel", "src.cuda.from_logits", ("cuda",)),
    LogitsSampler("cpp", "C++ Kernel (CPU)", "src.cuda.from_logits", ("cpu",)),
]
SAMPLERS = {sampler.name: sampler for sampler in _SAMPLERS}


def names(device: str) -> list[str]:
    """The names of the samplers that run on `device` ("cpu" or "cuda"), in table order."""
    return [sampler.name for sampler in _SAMPLERS if device in sampler.devices]


def get(name: str) -> LogitsSampler:
    """The sampler of that name. Raises ValueError naming the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not known; wanted one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
