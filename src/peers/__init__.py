"""Other people's rejection samplers, to measure ours against, and (compat) ours behind their
signatures. To add a peer: its module, and one entry in _PEERS."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from src.peers.adapter import Adapter

__all__ = ["PEERS", "Peer", "get", "names"]


class Peer(NamedTuple):
    """reads: "probabilities" or "logits", what the peer is given (a table each). Where it depends
    on the installed version, the adapter's module says so."""

    name: str
    label: str
    module: str
    reads: str
    function: str = "load"

    def load(self, device: str = "cpu") -> Adapter:
        """The peer's sampler for tensors on `device` ("cpu" or "cuda").

        Raises SamplerUnavailable, with the command that installs the tested version, where the
        peer is missing, too old, without its function, or does not run on `device`.
        """
        return getattr(importlib.import_module(self.module), self.function)(device)


_PEERS = [
    Peer("transformers", "transformers (row at a time)", "src.peers.transformers", "logits"),
    Peer("flashinfer", "FlashInfer chain", "src.peers.flashinfer", "probabilities"),
    Peer(
        "flashinfer-preallocated",
        "FlashInfer chain (preallocated)",
        "src.peers.flashinfer",
        "probabilities",
        "load_preallocated",
    ),
    Peer("sglang", "SGLang chain", "src.peers.sglang", "probabilities", "load_chain"),
    Peer("sglang-blockwise", "SGLang block-wise", "src.peers.sglang", "logits", "load_blockwise"),
    Peer("vllm-v1", "vLLM V1", "src.peers.vllm", "logits", "load_v1"),
    Peer("vllm-v2", "vLLM V2", "src.peers.vllm", "logits", "load_v2"),
]
PEERS = {peer.name: peer for peer in _PEERS}


def names() -> list[str]:
    """The peers' names, in table order."""
    return list(PEERS)


def get(name: str) -> Peer:
    """The peer of that name. Raises ValueError naming the known ones."""
    if name not in PEERS:
        raise ValueError(f"peer {name!r} is not known; wanted one of {', '.join(PEERS)}")
    return PEERS[name]
