"""Forwards of a causal LM over preallocated keys and values that the device alone addresses.

Both are called with (input_ids [B, Q] int64, positions [B, Q] int64, mask, keep) and return logits
[B, Q or keep, V]. mask() makes the mask [B, 1, G*Q, capacity], additive; G is the number of query
heads of a key/value head, whose queries are folded into the rows of one. prefill, of the same but
`keep`, makes keys and values only, and not by what was compiled: every prompt has its own length.
What differs between versions of transformers is kept in this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

from src.decoding import few_tokens

_ATTENTION = "grouped_sdpa"
# Rotations of a position alone; the others depend on the length of the text.
_FIXED_ROPE = ("default", "llama3", "linear", "yarn")


class FusedForward:
    """Llama's and Qwen2's forward in 14 launches a layer instead of 43, or in 5.

    A decoding step of such a model is a thousand small kernels around matrix products that only
    read the weights once, so fewer launches are most of what can be won: query, key and value in
    one product, gate and up in another, residuals added by the product's own accumulation,
    normalization in one kernel, the rotation in three, keys and values written by one. Weights are
    not copied: the model's own become views of the joined ones.

    few: few_tokens.FewTokenLayers, which CachedModel calls instead for a few query tokens, where
        the extension has CUDA and they fit the model; `few = None` turns them off.
    compiled: the other layers under torch.compile, which joins the small kernels. All layers share
        one code.
    """

    def __init__(self, model, batch_size: int, capacity: int, *, compiled: bool = False):
        config, base = model.config, model.model
        self.embed, self.norm, self.head = base.embed_tokens.weight, base.norm, model.lm_head.weight
        attention = base.layers[0].self_attn
        self.shape = _Shape(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            attention.scaling,
            self.norm.variance_epsilon,
        )
        size = (batch_size, capacity, 2 * self.shape.kv_heads, self.shape.head_dim)
        self.layers = [(_weights(layer), self.head.new_zeros(size)) for layer in base.layers]
        device = self.head.device
        self.first_rows = torch.arange(batch_size, device=device)[:, None] * capacity
        every = torch.arange(capacity, device=device)[None]
        cos, sin = base.rotary_emb(self.head[:1], every)
        # (a, b) becomes (a cos - b sin, b cos + a sin): the halves swapped, the sign in the sine.
        half = self.shape.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        self.rotation = torch.stack((cos[0], sin[0]), 1)  # [capacity, 2, D]
        self._compiled = torch.compile(_layer, dynamic=False) if compiled else _layer_in_place
        fits = few_tokens.fits(self.shape, self.layers, self.head)
        self.few = few_tokens.FewTokenLayers(self) if fits else None

    @staticmethod
    def fits(model) -> bool:
        """Whether it is such a model, with plain weights."""
        if type(model).__name__ not in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
            return False
        config, layers = model.config, model.model.layers
        linears = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
        return (
            getattr(model.model.rotary_emb, "rope_type", "default") in _FIXED_ROPE
            and config.hidden_act == "silu"
            and not getattr(config, "mlp_bias", False)
            and all(layer.self_attn.o_proj.bias is None for layer in layers)
            and len(linears) == 7 * len(layers)
            and all(type(m) is torch.nn.Linear for m in linears)
            and len({p.dtype for p in model.parameters()}) == 1
        )

    def __call__(self, input_ids, positions, mask, keep):
        x = self._through(self._compiled, self.layers, input_ids, positions, mask())
        x = x[:, -keep:] if keep else x
        return linear(_normalized(x, self.norm.weight, self.shape), self.head)

    def prefill(self, input_ids, positions, mask):
        *before, (last, cache) = self.layers
        x = self._through(_layer_in_place, before, input_ids, positions, mask())
        _heads(x.flatten(0, 1), last, cache, *self._places(positions), self.shape)

    def _through(self, layer, layers, input_ids, positions, mask):
        x = torch.nn.functional.embedding(input_ids, self.embed)
        flat, places = x.flatten(0, 1), self._places(positions)
        for weights, cache in layers:
            flat = layer(flat, weights, cache, *places, mask, self.shape)
        return flat.view_as(x)

    def _places(self, positions):
        """(rows of the cache, rotations), of the tokens at those positions."""
        rows = (positions + self.first_rows).flatten()
        return rows, self.rotation[positions.flatten()].unsqueeze(2)


class _Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    epsilon: float


class _Weights(NamedTuple):
    """A decoder layer's, those of one input joined; out and down transposed."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def _weights(layer) -> _Weights:
    attention, mlp = layer.self_attn, layer.mlp
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    has_bias = inputs[0].bias is not None
    return _Weights(
        layer.input_layernorm.weight,
        _joined([module.weight for module in inputs]),
        _joined([module.bias for module in inputs]) if has_bias else None,
        attention.o_proj.weight.t(),
        layer.post_attention_layernorm.weight,
        _joined([mlp.gate_proj.weight, mlp.up_proj.weight]),
        mlp.down_proj.weight.t(),
    )


def _layer_in_place(x, weights, cache, rows, rotation, mask, shape):
    """x [B*Q, hidden] through a layer, into x."""
    x.addmm_(_attended(x, weights, cache, rows, rotation, mask, shape), weights.out)
    return x.addmm_(_gated(x, weights, shape), weights.down)


def _layer(x, weights, cache, rows, rotation, mask, shape):
    """The same for a compiler, which joins an addition that is its own to the normalization."""
    x = x + _attended(x, weights, cache, rows, rotation, mask, shape) @ weights.out
    return x + _gated(x, weights, shape) @ weights.down


def _gated(x, weights, shape):
    gate, up = linear(_normalized(x, weights.post_norm, shape), weights.gate_up).chunk(2, -1)
    return silu(gate) * up


def _heads(x, weights, cache, rows, rotation, shape):
    """Query, key and value heads [B*Q, heads + 2 kv_heads, D] of x, keys and values cached."""
    joined = linear(_normalized(x, weights.input_norm, shape), weights.qkv, weights.qkv_bias)
    heads = joined.view(len(x), -1, shape.head_dim)
    rotated = heads[:, : shape.heads + shape.kv_heads]
    half, (cos, sin) = shape.head_dim // 2, rotation.unbind(1)
    swapped = torch.cat((rotated[..., half:], rotated[..., :half]), -1)
    rotated.mul_(cos).addcmul_(swapped, sin)
    cache.flatten(0, 1).index_copy_(0, rows, heads[:, shape.heads :])
    return heads


def _attended(x, weights, cache, rows, rotation, mask, shape):
    heads = _heads(x, weights, cache, rows, rotation, shape)
    # The query heads of a key/value head are folded into its query rows.
    batch_size, groups = len(cache), shape.heads // shape.kv_heads
    query = heads[:, : shape.heads].view(batch_size, -1, shape.kv_heads, groups, shape.head_dim)
    folded = query.permute(0, 2, 3, 1, 4).reshape(batch_size, shape.kv_heads, -1, shape.head_dim)
    key, value = cache.transpose(1, 2).chunk(2, 1)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=shape.scaling)
    output = output.view(batch_size, shape.kv_heads, groups, -1, shape.head_dim)
    return output.permute(0, 3, 1, 2, 4).reshape(len(x), -1)


def _normalized(x, weight, shape):
    return rms_norm(x, weight.shape, weight, shape.epsilon)


def _joined(parameters):
    """The parameters under one another as one tensor; each becomes a view of its part of it."""
    first, rows = parameters[0], sum(len(p) for p in parameters)
    end = first.data_ptr()
    adjacent = True
    for p in parameters:
        same = p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent &= same and p.data_ptr() == end and p.is_contiguous()
        end += p.numel() * p.element_size()
    if adjacent:  # joined before
        return first.data.as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        p.data = part
    return joined


class ModelForward:
    """transformers' own forward, for any model whose layers all attend to all earlier tokens."""

    few = None

    def __init__(self, model, batch_size: int, capacity: int, *, compiled: bool = False):
        self.model = model
        self._compiled = model.forward
        if compiled:
            self._compiled = torch.compile(model.forward, dynamic=False)
        self._slots = _Slots()
        count = model.config.get_text_config().num_hidden_layers
        self._cache = Cache(layers=[_SlotLayer(capacity, self._slots) for _ in range(count)])

    def __call__(self, input_ids, positions, mask, keep):
        return self._run(self._compiled, input_ids, positions, mask, keep)

    def prefill(self, input_ids, positions, mask):
        self._run(self.model.forward, input_ids, positions, mask, 1)  # one token's at least

    def _run(self, forward, input_ids, positions, mask, keep):
        self._slots.at(positions)
        config = self.model.config
        previous = config._attn_implementation
        config._attn_implementation = _ATTENTION
        try:
            return forward(
                input_ids=input_ids,
                attention_mask=mask(),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        finally:
            config._attn_implementation = previous


class _Slots:
    """Where the forward in progress writes: one index shared by all layers."""

    def at(self, positions: torch.Tensor) -> None:
        self._positions, self._index = positions[:, None, :, None], None

    def index_like(self, states: torch.Tensor) -> torch.Tensor:
        """The positions for states [B, H, Q, D]: one view for all layers of a shape."""
        if self._index is None or self._index.shape != states.shape:
            self._index = self._positions.expand_as(states)
        return self._index


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
        self.keys.scatter_(2, self.slots.index_like(key_states), key_states)
        self.values.scatter_(2, self.slots.index_like(value_states), value_states)
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
    output = scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch_size, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _grouped_sdpa)
