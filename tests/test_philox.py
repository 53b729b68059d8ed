import ctypes

import numpy as np
import pytest
import torch

from src import philox
from src.randomness import philox_uniforms
from tests import emulation

F = 0xFFFFFFFF


# Known-answer vectors published with Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([F] * 4, [F] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert philox.philox4x32(np.array(counter), np.array(key)).tolist() == expected


def test_torch_and_numpy_streams_are_bit_identical():
    seeds = np.array([0, 1, -1, 2**40 + 3, -(2**62)])
    offsets = np.array([0, 3, 2**34 + 1, -6, 2**63 - 20])
    expected = philox.uniforms(seeds, offsets, 11)
    got = philox_uniforms(torch.from_numpy(seeds), torch.from_numpy(offsets), 11)
    assert np.array_equal(got.numpy(), expected)
    assert expected.min() >= 0 and expected.max() < 1


def test_offsets_shift_the_stream():
    long = philox.uniforms(np.array([5]), np.array([0]), 20)[0]
    for offset in range(9):
        assert np.array_equal(
            philox.uniforms(np.array([5]), np.array([offset]), 11)[0], long[offset : offset + 11]
        )


@pytest.mark.skipif(
    emulation.compiler() is None or emulation.curand_flags() is None,
    reason="wants a C++ compiler and the headers of CUDA and of the package nvidia-curand",
)
def test_the_stream_is_that_of_curands_own_headers():
    library = emulation.library("curand_words.cpp", *emulation.curand_flags())
    words = (ctypes.c_uint32 * 11)()
    for seed, offset in [(0, 0), (42, 3), (-5, 2**40 + 7), (2**62 + 11, 2**62 - 3)]:
        library.curand_words(*map(ctypes.c_uint64, (seed, 0, offset)), len(words), words)
        expected = (np.array(words, dtype=np.uint32) >> 8) * np.float32(2**-24)
        ours = philox.uniforms(np.array([seed]), np.array([offset]), len(words))[0]
        assert np.array_equal(ours, expected.astype(np.float32))
