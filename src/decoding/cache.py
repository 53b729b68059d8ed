"""A transformers causal LM over a preallocated cache that the device alone addresses.

Every row writes its keys and values at its own positions and sees the slots up to its own query
position, so a rejected draft is rolled back by moving the row's start: what lies behind it is
masked and later overwritten. Nothing here reads a tensor on the host, so a forward can be captured
in a CUDA graph.
"""

from __future__ import annotations

import torch

from src.decoding.forwards import FusedForward, ModelForward

# SDPA's kernels want a mask whose rows are aligned.
_CAPACITY_MULTIPLE = 32


class CachedModel:
    """A causal LM with its own cache for `batch_size` rows of up to `capacity` tokens.

    fused: use forwards.FusedForward where the model is one of its kind; else transformers' own.
    compiled: run the forward under torch.compile.
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
        self.engine = self._forward = kind(model, batch_size, capacity)
        if compiled:
            # A code for each number of query tokens; past the limit it would run uncompiled.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self._forward = torch.compile(self._forward.__call__, dynamic=False)
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._columns = torch.arange(capacity, device=model.device)
        self._visible = torch.zeros((), dtype=model.dtype, device=model.device)
        self._hidden = torch.full_like(self._visible, float("-inf"))

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor) -> None:
        """Caches input_ids [B, Q] int64 at positions 0 to Q - 1; Q may be 0."""
        if input_ids.shape[1]:
            start = torch.zeros_like(input_ids[:, 0])
            # Every prompt has its own length: compiling would start over for each.
            self._run(self.engine, input_ids, start, 1)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, start: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Logits [B, Q, V] of input_ids [B, Q] int64, row b at positions start[b], start[b]+1, …

        start: [B] int64; start + Q must not exceed the capacity (a device assert past it). A
            position before 0 counts as 0.
        keep: logits of the last `keep` tokens only; 0 keeps all.
        """
        return self._run(self._forward, input_ids, start, keep)

    def _run(self, forward, input_ids, start, keep):
        steps = self._columns[: input_ids.shape[1]]
        positions = (start[:, None] + steps).clamp(min=0)
        # An additive mask in the model's dtype: SDPA would convert a boolean one in every layer.
        seen = self._columns <= positions.repeat(1, self._groups)[:, None, :, None]
        mask = torch.where(seen, self._visible, self._hidden)
        return forward(input_ids, positions, mask, keep)
