"""What the adapters share: from a peer's function to the contract, or to the reason why not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib import metadata

import torch

from src.contract import SamplerOutput, SamplerUnavailable, validate


class Adapter:
    """A peer's sampler as one of the contract: calling it samples, from the peer's own random
    numbers.

    prepare: (draft_token_ids, draft_probs, target_probs) -> call, where call() -> SamplerOutput.
        Brings the arguments into the peer's layout (flattened, logits, int32), so that a timed
        call() is the peer's work alone.
    """

    def __init__(self, prepare: Callable[..., Callable[[], SamplerOutput]]):
        self.prepare = prepare

    def __call__(
        self,
        draft_token_ids: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_probs: torch.Tensor,
    ) -> SamplerOutput:
        """Arguments and result as in the contract; raises TypeError and ValueError as
        contract.validate does, and ValueError for what the peer does not take."""
        validate(draft_token_ids, draft_probs, target_probs)
        return self.prepare(draft_token_ids, draft_probs, target_probs)()


class LogitsAdapter(Adapter):
    """An Adapter of a peer that reads logits.

    prepare_logits: (draft_token_ids, draft_logits, target_logits) -> call as of prepare, with
        draft_logits [B, K, V] (None: the draft is one-hot) and target_logits [B, K+1, V] of one
        dtype, float32, bfloat16 or float16. The peer is given them as they are, or in float32
        where its load says so.
    prepare: the same, of float32 logits whose softmax is the probabilities (normalised).
    """

    def __init__(self, prepare_logits: Callable[..., Callable[[], SamplerOutput]]):
        def prepare(draft_token_ids, draft_probs, target_probs):
            draft_logits = None if draft_probs is None else draft_probs.float().log()
            return prepare_logits(draft_token_ids, draft_logits, target_probs.float().log())

        super().__init__(prepare)
        self.prepare_logits = prepare_logits


def find(package: str, minimum: str, tested: str, module: str, name: str, parameters=()):
    """The function `name` of an installed peer.

    package: its name on the package index. minimum, tested: versions. parameters: those the
    function must have. Raises SamplerUnavailable where the package is missing, older than
    `minimum`, does not import, or has no such function.
    """
    command = f'pip install "{package}=={tested}"'
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise SamplerUnavailable(f"{package} is not installed", command) from None
    if _numbers(version) < _numbers(minimum):
        raise SamplerUnavailable(f"{package} is {version}; wanted {minimum} or later", command)
    try:
        function = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise SamplerUnavailable(f"{package} {version} has no {module}.{name}", command) from None
    except Exception as error:  # a peer's import runs its own start-up, which may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SamplerUnavailable(
            f"{package} {version} does not import here ({reason})", command
        ) from error
    missing = [p for p in parameters if p not in inspect.signature(function).parameters]
    if missing:
        raise SamplerUnavailable(
            f"{package} {version}'s {name} does not take {', '.join(missing)}", command
        )
    return function


def _numbers(version: str) -> tuple[int, ...]:
    # 0.7.2.post1+cu130 -> (0, 7, 2)
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def want_cuda(package: str, device: str) -> None:
    """Raises SamplerUnavailable for another device than "cuda"."""
    if device != "cuda":
        raise SamplerUnavailable(f"{package} runs on cuda, not on {device}")


def refuse_one_hot(draft: torch.Tensor | None, peer: str) -> None:
    """draft: the argument that is None where the draft is one-hot. Raises ValueError then."""
    if draft is None:
        raise ValueError(f"the draft is one-hot; {peer} wants its distribution")
