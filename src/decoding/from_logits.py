"""The loop's sampling from logits: no probability is ever written."""

from __future__ import annotations

from types import ModuleType

import torch

from src.contract import SamplerOutput
from src.decoding.speculative import Distribution

_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "seeds": torch.int64,
    "offsets": torch.int64,
}


class FromLogits(Distribution):
    """Hands logits on where a Distribution makes probabilities, to its own `sample`, which takes
    them instead.

    sampler: a module of src/from_logits.py. temperature 0 is greedy; top_k 0 and top_p 1 are off.
    """

    def __init__(
        self,
        sampler: ModuleType,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        verification: str = "token",
    ):
        super().__init__(greedy=temperature == 0)
        self._sampler, self._verification = sampler, verification
        self._filters = {"temperature": float(temperature)}
        if top_k and not self.greedy:
            self._filters["top_k"] = top_k
        if top_p < 1 and not self.greedy:
            self._filters["top_p"] = float(top_p)
        self._rows = {}

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def best(self, logits: torch.Tensor) -> torch.Tensor:
        rows = logits.flatten(0, 1)
        zeros = self._of_rows({"temperature": 0.0, "seeds": 0, "offsets": 0}, rows)
        return self._sampler.sample_from_logits(rows, **zeros).token_ids.view(logits.shape[:2])

    def sample(
        self, draft_token_ids, draft_logits, target_logits, *, seeds, offsets
    ) -> SamplerOutput:
        """A sampler of src/contract.py, but of logits; draft_logits None is a one-hot draft."""
        return self._sampler.rejection_sample_from_logits(
            draft_token_ids,
            target_logits,
            draft_logits=draft_logits,
            seeds=seeds,
            offsets=offsets,
            verification=self._verification,
            **self._of_rows(self._filters, target_logits),
        )

    def _of_rows(self, values: dict, logits: torch.Tensor) -> dict:
        """Each value for every row, as a tensor: made once, not in every round."""
        key = *values, len(logits)
        if key not in self._rows:
            self._rows[key] = {
                name: torch.full((len(logits),), value, dtype=_DTYPES[name], device=logits.device)
                for name, value in values.items()
            }
        return self._rows[key]
