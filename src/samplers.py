"""The samplers by name. To add one: its module, and one entry in _SAMPLERS."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from src.contract import SamplerUnavailable

__all__ = ["SAMPLERS", "Sampler", "SamplerUnavailable", "get", "names"]

_EVERY_DEVICE = ("cpu", "cuda")


def check_device(sampler, device: str) -> None:
    """Raises SamplerUnavailable where `device` is not one of the sampler's."""
    if device not in sampler.devices:
        where = " or ".join(sampler.devices)
        raise SamplerUnavailable(f"{sampler.name} runs on {where}, not on {device}")


class Sampler(NamedTuple):
    name: str
    label: str
    module: str
    function: str = "rejection_sample"
    devices: tuple[str, ...] = _EVERY_DEVICE

    def load(self, device: str = "cpu") -> Callable:
        """The function, for tensors on `device` ("cpu" or "cuda").

        Raises SamplerUnavailable, never returning another sampler in its place, where the device
        is not one of `devices`, is not there, or the extension is not built for it.
        """
        check_device(self, device)
        module = importlib.import_module(self.module)
        if hasattr(module, "require"):
            module.require(device)
        return getattr(module, self.function)

    def is_available(self, device: str = "cpu") -> bool:
        """Whether `load` finds it there."""
        try:
            self.load(device)
        except SamplerUnavailable:
            return False
        return True


_SAMPLERS = [
    Sampler("baseline", "Baseline (Python loop)", "src.baseline.rejection_sampler"),
    Sampler("vectorized", "PyTorch Vectorized", "src.compiled.rejection_sampler"),
    Sampler(
        "vectorized-compiled",
        "PyTorch Vectorized (torch.compile)",
        "src.compiled.rejection_sampler",
        "rejection_sample_compiled",
    ),
    Sampler(
        "cuda-thread-per-row",
        "CUDA C++ (thread per row)",
        "src.cuda.fused_sampler",
        "rejection_sample_thread_per_row",
        devices=("cuda",),
    ),
    Sampler("cuda", "CUDA C++ Kernel", "src.cuda.fused_sampler", devices=("cuda",)),
    Sampler("cpp", "C++ Kernel (CPU)", "src.cuda.fused_sampler", devices=("cpu",)),
]
SAMPLERS = {sampler.name: sampler for sampler in _SAMPLERS}


def names(device: str) -> list[str]:
    """The names of the samplers that run on `device` ("cpu" or "cuda"), in table order."""
    return [sampler.name for sampler in _SAMPLERS if device in sampler.devices]


def get(name: str) -> Sampler:
    """The sampler of that name. Raises ValueError naming the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not known; wanted one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
