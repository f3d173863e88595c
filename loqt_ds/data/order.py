"""A permutation of range(n) that is a formula: position -> row, with nothing stored.

A Feistel network on 2h bits is a bijection of [0, 4^h); walking its cycles until the value falls below n makes it one
of [0, n). So the order of an epoch is a function of (seed, epoch), needs no memory however many rows there are, can be
entered at any position, and does not change with the version of numpy.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the finalizer of splitmix64


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return value ^ (value >> np.uint64(31))


def permuted(positions: NDArray[np.int64], num_rows: int, *key: int) -> NDArray[np.int64]:
    """The rows at `positions` (each in [0, num_rows)) of the permutation of range(num_rows) that `key` names."""
    half = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    digest = blake2b(repr((num_rows, *key)).encode(), digest_size=8 * _NUM_ROUNDS).digest()
    rounds = np.frombuffer(digest, dtype="<u8")
    value = np.asarray(positions).astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for round_key in rounds:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= np.uint64(num_rows)
    return value.astype(np.int64)
