"""The samplers of other packages as contestants, where this checkout and machine have them."""

from __future__ import annotations

import importlib

from src.benchmarking import sweep
from src.contract import SamplerUnavailable

_REGISTRY = "src.peers"


def contestants(device: str) -> list[sweep.Contestant]:
    """Every peer of the registry that runs on `device`; one that is not installed, too old or
    faulty says so. They draw their own random numbers, so none is held to the oracle's tokens.

    Raises SamplerUnavailable where there is no registry.
    """
    try:
        registry = importlib.import_module(_REGISTRY)
    except ModuleNotFoundError as error:
        if error.name != _REGISTRY:
            raise
        raise SamplerUnavailable("this checkout has no src/peers") from None
    peers = [registry.get(name) for name in registry.names(device)]
    return [sweep.contestant(peer, device, exact=False) for peer in peers]
