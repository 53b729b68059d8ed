"""A transformers causal LM over a preallocated cache that the device alone addresses.

Every row writes its keys and values at its own positions and sees the slots up to its own query
position, so a rejected draft is rolled back by moving the row's start: what lies behind it is
masked and later overwritten. Nothing here reads a tensor on the host, so a forward can be captured
in a CUDA graph.
"""

from __future__ import annotations

import torch

from src.decoding import graphs
from src.decoding.forwards import FusedForward, ModelForward

# SDPA's kernels want a mask whose rows are aligned.
_CAPACITY_MULTIPLE = 32
_PREFILL_MULTIPLE = 64


class CachedModel:
    """A causal LM with its own cache for `batch_size` rows of up to `capacity` tokens.

    fused: use forwards.FusedForward where the model is one of its kind; else transformers' own.
    compiled: run the forward under torch.compile, but for prefill.
    Raises ValueError for a model with layers that do not attend to all earlier tokens.
    """

    def __init__(
        self,
        model,
        batch_size: int,
        capacity: int,
        *,
        fused: bool = True,
        compiled: bool = False,
    ):
        config = model.config.get_text_config()
        capacity = -(-capacity // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"the model has layers of type {', '.join(sorted(kinds))}; "
                "wanted full_attention only"
            )
        self.device = model.device
        self.batch_size = batch_size
        self.capacity = capacity
        self.vocab_size = config.vocab_size
        kind = FusedForward if fused and FusedForward.fits(model) else ModelForward
        if compiled:
            # A code for each number of query tokens; past the limit it would run uncompiled.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.engine = kind(model, batch_size, capacity, compiled=compiled)
        self._prefills = {}
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._columns = torch.arange(capacity, device=model.device)
        self._visible = torch.zeros((), dtype=model.dtype, device=model.device)
        self._hidden = torch.full_like(self._visible, float("-inf"))

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor, *, graphed: bool = False) -> None:
        """Caches input_ids [B, Q] int64 at positions 0 to Q - 1; Q may be 0.

        graphed: by a CUDA graph, kept for each multiple of 64 tokens. What it writes behind the
            input is behind the mask until the row's own tokens overwrite it.
        """
        length = input_ids.shape[1]
        if not length:
            return
        if not graphed:
            self._prefill(input_ids)
            return
        padded = min(-(-length // _PREFILL_MULTIPLE) * _PREFILL_MULTIPLE, self.capacity)
        if padded not in self._prefills:
            ids = input_ids.new_zeros(len(input_ids), padded)
            [replay] = graphs.Capture()([lambda: self._prefill(ids)], lambda: None)
            self._prefills[padded] = ids, replay
        ids, replay = self._prefills[padded]
        ids[:, :length] = input_ids
        replay()

    def _prefill(self, input_ids: torch.Tensor) -> None:
        positions = self._positions(input_ids, torch.zeros_like(input_ids[:, 0]))
        self.engine.prefill(input_ids, positions, lambda: self._mask(positions))

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, start: torch.Tensor, keep: int = 0, ahead: int = 0
    ) -> torch.Tensor:
        """Logits [B, Q, V] of input_ids [B, Q] int64, row b's at positions start[b] + ahead, the
        next one, and so on.

        start: [B] int64; start + ahead + Q must not exceed the capacity (past it the device stops
            with an error). A position before 0 counts as 0.
        keep: logits of the last `keep` tokens only; 0 keeps all.
        """
        few = self.engine.few
        if few and input_ids.numel() <= few.most_tokens:
            return few(input_ids, start, keep, ahead)
        positions = self._positions(input_ids, start + ahead if ahead else start)
        return self.engine(input_ids, positions, lambda: self._mask(positions), keep)

    def _positions(self, input_ids, start):
        return (start[:, None] + self._columns[: input_ids.shape[1]]).clamp(min=0)

    def _mask(self, positions):
        # Additive, in the model's dtype: SDPA would convert a boolean one in every layer.
        seen = self._columns <= positions.repeat(1, self._groups)[:, None, :, None]
        return torch.where(seen, self._visible, self._hidden)
