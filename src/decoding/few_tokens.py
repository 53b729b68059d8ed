"""Decoder layers of Llama and Qwen2 for a few query tokens, in five CUDA kernels each.

The kernels, and why they are cut as they are: src/cuda/csrc/decoder_layer_kernel.cu.
M = batch size times query tokens. Activations are [M, width], weights [rows, width], bfloat16.
"""

from __future__ import annotations

import torch

from src import samplers

_ALIGNMENT = 64  # of widths and rows
_HEAD_DIMS = (64, 128)
_CAPABILITY = (8, 0)  # tensor cores that multiply bfloat16
# Of the down weights, brought to L2 by the launch before theirs. It gains 0.3 to 1.5 % of a forward
# where all of them are less than this; the 50 MB of Llama-3.2-3B lose by it as often.
_LATER_BYTES, _MOST_DOWN_BYTES = 2 << 20, 40 << 20


class FewTokenLayers:
    """Layers and head of a forwards.FusedForward that `fits`, over its weights and caches."""

    most_tokens = 16  # M; with more, the products are a library's work

    def __init__(self, forward):
        self.shape, self.layers, self.rotation = forward.shape, forward.layers, forward.rotation
        self.embed, self.norm, self.head = forward.embed, forward.norm.weight, forward.head
        down = self.layers[0][0].down
        self._later_bytes = _LATER_BYTES if down.nbytes <= _MOST_DOWN_BYTES else 0

    def __call__(
        self, input_ids: torch.Tensor, start: torch.Tensor, keep: int, ahead: int
    ) -> torch.Tensor:
        """Logits [B, Q or keep, V] of input_ids [B, Q] int64, of which row b's first stands at
        position start[b] + ahead, or 0 where that is less. start: [B] int64."""
        ops, shape, new = torch.ops.decoder_layer, self.shape, self.head.new_empty
        count = input_ids.numel()
        x, rotated = new(count, self.embed.shape[1]), new(count, 2, shape.head_dim)
        positions = torch.empty_like(input_ids, memory_format=torch.contiguous_format)
        ops.embed(input_ids, start, ahead, self.embed, self.rotation, x, positions, rotated)
        query = new(count, shape.heads * shape.head_dim)
        attended = torch.empty_like(query)
        for weights, cache in self.layers:
            ops.qkv(
                *(x, weights.input_norm, shape.epsilon, weights.qkv, weights.qkv_bias),
                *(rotated, positions, query, cache),
            )
            ops.attention(query, cache, positions, shape.scaling, attended)
            ops.add(attended, weights.out.t(), x)
            gated = new(count, len(weights.gate_up) // 2)
            ops.gated(
                *(x, weights.post_norm, shape.epsilon, weights.gate_up, gated),
                *(weights.down.t(), self._later_bytes),
            )
            ops.add(gated, weights.down.t(), x)
        x = x.unflatten(0, input_ids.shape)
        if keep and keep < x.shape[1]:
            x = x[:, -keep:].contiguous()
        logits = new(x.shape[0] * x.shape[1], len(self.head))
        ops.logits(x.flatten(0, 1), self.norm, shape.epsilon, self.head, logits)
        return logits.unflatten(0, x.shape[:2])


def fits(shape, layers, head) -> bool:
    """Whether the kernels take layers of that forwards._Shape and those weights, and are there."""
    weights = layers[0][0]
    sizes = [weights.gate_up.shape[1], *weights.down.shape, len(weights.qkv), len(head)]
    if (
        not head.is_cuda
        or head.dtype != torch.bfloat16
        or torch.cuda.get_device_capability(head.device) < _CAPABILITY
        or shape.head_dim not in _HEAD_DIMS
        or any(size % _ALIGNMENT for size in sizes)
    ):
        return False
    return samplers.get("cuda").is_available("cuda")  # the same extension has them
