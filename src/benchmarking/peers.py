"""The samplers of other packages as contestants, where this checkout and machine have them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from src.benchmarking import sweep
from src.contract import SamplerUnavailable

_REGISTRY = "src.peers"
_PROBABILITIES = ("draft_token_ids", "draft_probs", "target_probs")
_LOGITS = ("draft_token_ids", "draft_logits", "target_logits")


def contestants(device: str, reads: str = "probabilities") -> list[sweep.Contestant]:
    """The peers that read "probabilities" or "logits"; one that is not installed, too old, faulty
    or not for `device` says so. They draw their own random numbers, so none is held to the oracle's
    tokens. What they want otherwise laid out is laid out before their time counts. Those that read
    logits take inputs of logits, and of probabilities, as of checks.distribution, too.

    Raises SamplerUnavailable where there is no registry.
    """
    try:
        registry = importlib.import_module(_REGISTRY)
    except ModuleNotFoundError as error:
        if error.name != _REGISTRY:
            raise
        raise SamplerUnavailable("this checkout has no src/peers") from None
    peers = [registry.get(name) for name in registry.names()]
    found = [sweep.contestant(p, device, exact=False) for p in peers if p.reads == reads]
    return [_adapted(entrant) if entrant.function else entrant for entrant in found]


def _adapted(entrant: sweep.Contestant) -> sweep.Contestant:
    adapter = entrant.function

    def prepare(**inputs) -> Callable:
        if "target_logits" in inputs:
            return adapter.prepare_logits(*(inputs[name] for name in _LOGITS))
        return adapter.prepare(*(inputs[name] for name in _PROBABILITIES))

    def sample(**inputs):
        return prepare(**inputs)()

    return entrant._replace(function=sample, prepare=prepare)
