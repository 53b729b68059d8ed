"""A transformers causal LM over a preallocated cache that the device alone addresses.

Every row writes its keys and values at its own positions and sees the slots up to its own query
position, so a rejected draft is rolled back by moving the row's start: what lies behind it is
masked and later overwritten. Nothing here reads a tensor on the host, so a forward can be captured
in a CUDA graph. What differs between versions of transformers is kept in this file.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

_ATTENTION = "grouped_sdpa"
# SDPA's kernels want a mask whose rows are aligned.
_CAPACITY_MULTIPLE = 32


class _Slots:
    """Where the forward in progress writes: one buffer shared by all layers."""

    positions: torch.Tensor  # [B, Q] int64


class _SlotLayer(StaticLayer):
    """Keys and values [B, H, capacity, D], written by row and position.

    transformers' own StaticLayer keeps a length for each layer (about five small kernels a layer)
    and one position for the whole batch; neither allows ragged acceptance.
    """

    def __init__(self, capacity: int, slots: _Slots):
        super().__init__(max_cache_len=capacity)
        self.slots = slots

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self._allocate(key_states, value_states)
        index = self.slots.positions[:, None, :, None]
        self.keys.scatter_(2, index.expand_as(key_states), key_states)
        self.values.scatter_(2, index.expand_as(value_states), value_states)
        return self.keys, self.values

    def _allocate(self, key_states, value_states):
        def zeros(like):
            batch_size, heads, _, size = like.shape
            return like.new_zeros(batch_size, heads, self.max_cache_len, size)

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.is_initialized = True

    def get_seq_length(self, *args) -> int:
        # Only used where no positions are given. A tensor here would be read on the host.
        return 0

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        return self.max_cache_len, 0


def _grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention with the query heads of a key/value head folded into its query rows.

    With any mask transformers repeats keys and values for each query head over the whole cache;
    here they are read where they lie. attention_mask is [B, 1, G*Q, capacity], already folded.
    """
    batch_size, heads, length, size = query.shape
    folded = query.reshape(batch_size, key.shape[1], -1, size)
    output = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch_size, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _grouped_sdpa)


class CachedModel:
    """A causal LM with its own cache for `batch_size` rows of up to `capacity` tokens.

    Raises ValueError for a model with layers that do not attend to all earlier tokens.
    """

    def __init__(self, model, batch_size: int, capacity: int, *, compiled: bool = False):
        config = model.config.get_text_config()
        capacity = -(-capacity // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"the model has layers of type {', '.join(sorted(kinds))}; "
                "wanted full_attention only"
            )
        self.model = model
        self.device = model.device
        self.batch_size = batch_size
        self.capacity = capacity
        self.vocab_size = config.vocab_size
        self._forward = model.forward
        if compiled:
            # A code for each number of query tokens; past the limit it would run uncompiled.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self._forward = torch.compile(model.forward, dynamic=False)
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._slots = _Slots()
        layers = [_SlotLayer(capacity, self._slots) for _ in range(config.num_hidden_layers)]
        self._cache = Cache(layers=layers)
        self._columns = torch.arange(capacity, device=model.device)
        self._visible = torch.zeros((), dtype=model.dtype, device=model.device)
        self._hidden = torch.full_like(self._visible, float("-inf"))

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor) -> None:
        """Caches input_ids [B, Q] int64 at positions 0 to Q - 1; Q may be 0."""
        if input_ids.shape[1]:
            start = torch.zeros_like(input_ids[:, 0])
            # Every prompt has its own length: compiling would start over for each.
            self._run(self.model.forward, input_ids, start, 1)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, start: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Logits [B, Q, V] of input_ids [B, Q] int64, row b at positions start[b], start[b]+1, …

        start: [B] int64; start + Q must not exceed the capacity (a device assert past it). A
            position before 0 counts as 0.
        keep: logits of the last `keep` tokens only; 0 keeps all.
        """
        return self._run(self._forward, input_ids, start, keep)

    def _run(self, forward, input_ids, start, keep):
        steps = torch.arange(input_ids.shape[1], device=start.device)
        positions = (start[:, None] + steps).clamp(min=0)
        # An additive mask in the model's dtype: SDPA would convert a boolean one in every layer.
        seen = self._columns <= positions.repeat(1, self._groups)[:, None, :, None]
        mask = torch.where(seen, self._visible, self._hidden)
        self._slots.positions = positions
        config = self.model.config
        previous = config._attn_implementation
        config._attn_implementation = _ATTENTION
        try:
            return forward(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        finally:
            config._attn_implementation = previous
