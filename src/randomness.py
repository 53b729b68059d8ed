"""Where the PyTorch samplers get uniforms: given, counter-based, or from a generator."""

from __future__ import annotations

import torch

from src.contract import Shape

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def row_uniforms(
    shape: Shape,
    device: torch.device,
    uniforms: torch.Tensor | None,
    seeds: torch.Tensor | None,
    offsets: torch.Tensor | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """[B, K+1] float32 in [0, 1): K accept uniforms and, last, the recovery's."""
    if uniforms is not None:
        return uniforms
    count = shape.spec_length + 1
    if seeds is not None:
        return philox_uniforms(seeds, offsets, count)
    return torch.rand((shape.batch_size, count), device=device, generator=generator)


def philox_uniforms(seeds: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """src.philox.uniforms on the tensors' own device, bit for bit, without a synchronisation."""
    position = offsets[:, None] + torch.arange(count, device=seeds.device)
    block = (position >> 2) & 0x3FFFFFFFFFFFFFFF  # a logical shift: offsets are read as unsigned
    c0, c1 = block & _MASK, block >> 32
    c2, c3 = torch.zeros_like(block), torch.zeros_like(block)
    k0, k1 = seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    words = torch.stack([c0, c1, c2, c3], dim=-1)
    word = words.gather(-1, (position & 3)[..., None]).squeeze(-1)
    return (word >> 8).to(torch.float32) * 2.0**-24


def _multiply(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # 32 x 32 -> 64 bits in halves: the full product would overflow a signed int64.
    low = (word & 0xFFFF) * multiplier
    high = (word >> 16) * multiplier + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
