"""Philox4x32-10 in NumPy: the random stream of seeds/offsets, as cuRAND's Philox4_32_10 draws it.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; cuRAND's
curand_init(seed, subsequence, offset) keys the cipher with the seed, puts the subsequence in the
counter's upper 64 bits and offset / 4 in its lower 64 bits.
"""

from __future__ import annotations

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """counter [..., 4] and key [..., 2], 32-bit words in any integer dtype -> [..., 4] uint32."""
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (np.asarray(key)[..., i].astype(np.uint64) for i in range(2))
    for _ in range(ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ k0,
            second & _MASK,
            (first >> _SHIFT) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _MASK, (k1 + np.uint64(_WEYL[1])) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(seeds: np.ndarray, offsets: np.ndarray, count: int) -> np.ndarray:
    """Uniform k of row b: draw offsets[b] + k of the stream seeds[b], subsequence 0.

    seeds, offsets: [B] int64 (read as unsigned). Returns [B, count] float32 in [0, 1), the upper
    24 bits of each word: (0, 1] as curand_uniform has it would reject where p == q.
    """
    seeds = np.asarray(seeds, dtype=np.int64).view(np.uint64)[:, None]
    offsets = np.asarray(offsets, dtype=np.int64).view(np.uint64)[:, None]
    position = offsets + np.arange(count, dtype=np.uint64)[None, :]
    block = position >> np.uint64(2)
    zero = np.zeros_like(block)
    counter = np.stack([block & _MASK, block >> _SHIFT, zero, zero], axis=-1)
    key = np.broadcast_to(np.stack([seeds & _MASK, seeds >> _SHIFT], axis=-1), (*position.shape, 2))
    words = philox4x32(counter, key)
    lane = (position & np.uint64(3)).astype(np.int64)[..., None]
    word = np.take_along_axis(words, lane, axis=-1)[..., 0]
    return ((word >> np.uint32(8)).astype(np.float32)) * np.float32(2.0**-24)
