"""CUDA graphs: a sequence of functions without arguments, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_WARMUPS = 3


def require(device: torch.device) -> None:
    """Raises ValueError where there are no CUDA graphs."""
    if torch.device(device).type != "cuda":
        raise ValueError(f"graphed mode wants a CUDA device and this is {device}; use eager mode")


class Capture:
    """Captures functions in CUDA graphs, which share memory: no two may run at once."""

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, functions: Sequence[Callable[[], object]], reset: Callable[[], object]
    ) -> list[Callable[[], object]]:
        """Replay functions of `functions`, each captured in a graph.

        They run in order first, a few times and on the capture stream, so that kernels are loaded
        and buffers allocated; `reset` is called before each of these rounds to put the state back.
        Tensors that one function leaves for the next must be kept referenced by the caller.
        """
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                reset()
                for function in functions:
                    function()
            reset()
        stream.synchronize()
        replays = []
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                function()
            replays.append(graph.replay)
        torch.cuda.current_stream().wait_stream(stream)
        return replays
