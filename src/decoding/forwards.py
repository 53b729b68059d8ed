"""Forwards of a causal LM over preallocated keys and values that the device alone addresses.

Both are called with (input_ids [B, Q] int64, positions [B, Q] int64, mask [B, 1, G*Q, capacity]
additive, keep) and return logits [B, Q or keep, V]; G is the number of query heads of a key/value
head, whose queries are folded into the rows of one. What differs between versions of transformers
is kept in this file.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

_ATTENTION = "grouped_sdpa"
# Rotations of a position alone; the others depend on the length of the text.
_FIXED_ROPE = ("default", "llama3", "linear", "yarn")


class FusedForward:
    """Llama's and Qwen2's forward in 14 launches a layer instead of 43.

    A decoding step of such a model is a thousand small kernels around matrix products that only
    read the weights once, so fewer launches are most of what can be won without a compiler: query,
    key and value in one product, gate and up in another, residuals added by the product's own
    accumulation, normalization in one kernel, the rotation in three, keys and values written by
    one. Weights are not copied: the model's own become views of the joined ones.
    """

    def __init__(self, model, batch_size: int, capacity: int):
        config = model.config
        base = model.model
        self.embed, self.norm, self.head = base.embed_tokens.weight, base.norm, model.lm_head.weight
        attention = base.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.kv_heads, self.heads = config.num_key_value_heads, config.num_attention_heads
        self.layers = [_Layer(layer) for layer in base.layers]
        total = 2 * self.kv_heads
        self.cache = self.head.new_zeros(
            len(self.layers), batch_size, capacity, total, self.head_dim
        )
        device = self.head.device
        self.first_rows = torch.arange(batch_size, device=device)[:, None] * capacity
        every = torch.arange(capacity, device=device)[None]
        cos, sin = base.rotary_emb(self.head[:1], every)
        # (a, b) becomes (a cos - b sin, b cos + a sin): the halves swapped, the sign in the sine.
        half = self.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        self.rotation = torch.stack((cos[0], sin[0]), 1)  # [capacity, 2, D]

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
        batch_size, length = input_ids.shape
        x = torch.nn.functional.embedding(input_ids, self.embed)
        flat = x.view(batch_size * length, -1)
        rows = (positions + self.first_rows).view(-1)
        cos, sin = self.rotation[positions.view(-1)].unsqueeze(2).unbind(1)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            heads = linear(layer.input_norm(flat), layer.qkv, layer.qkv_bias)
            heads = heads.view(len(flat), -1, self.head_dim)
            self._rotate(heads[:, : self.heads + self.kv_heads], cos, sin)
            cache.flatten(0, 1).index_copy_(0, rows, heads[:, self.heads :])
            attended = self._attend(heads[:, : self.heads], cache, mask, batch_size)
            flat.addmm_(attended, layer.out)
            gate, up = linear(layer.post_norm(flat), layer.gate_up).chunk(2, -1)
            flat.addmm_(silu(gate, inplace=True).mul_(up), layer.down)
        x = x[:, -keep:] if keep else x
        return linear(_norm(self.norm)(x), self.head)

    def _rotate(self, heads, cos, sin) -> None:
        half = self.head_dim // 2
        swapped = torch.cat((heads[..., half:], heads[..., :half]), -1)
        heads.mul_(cos).addcmul_(swapped, sin)

    def _attend(self, query, cache, mask, batch_size):
        groups, size = self.heads // self.kv_heads, self.head_dim
        query = query.view(batch_size, -1, self.kv_heads, groups, size).permute(0, 2, 3, 1, 4)
        key, value = cache.transpose(1, 2).chunk(2, 1)
        folded = query.reshape(batch_size, self.kv_heads, -1, size)
        output = scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=self.scaling
        )
        output = output.view(batch_size, self.kv_heads, groups, -1, size).permute(0, 3, 1, 2, 4)
        return output.reshape(-1, self.heads * size)


class _Layer:
    """A decoder layer's weights, those of one input joined; out and down transposed."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.input_norm, self.post_norm = (
            _norm(layer.input_layernorm),
            _norm(layer.post_attention_layernorm),
        )
        self.qkv = _joined([module.weight for module in inputs])
        self.qkv_bias = None
        if inputs[0].bias is not None:
            self.qkv_bias = _joined([module.bias for module in inputs])
        self.out = attention.o_proj.weight.t()
        self.gate_up = _joined([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.down = mlp.down_proj.weight.t()


def _norm(module):
    return lambda x: rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


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

    def __init__(self, model, batch_size: int, capacity: int):
        self.model = model
        self._slots = _Slots()
        count = model.config.get_text_config().num_hidden_layers
        self._cache = Cache(layers=[_SlotLayer(capacity, self._slots) for _ in range(count)])

    def __call__(self, input_ids, positions, mask, keep):
        self._slots.positions = positions
        config = self.model.config
        previous = config._attn_implementation
        config._attn_implementation = _ATTENTION
        try:
            return self.model.forward(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        finally:
            config._attn_implementation = previous


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
    output = scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch_size, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _grouped_sdpa)
