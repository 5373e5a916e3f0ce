"""Detection of duplicate images among the samples of a source."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PIECE = 4096  # number of bytes in the middle of a file that are compared first; if they differ, the rest is not read


def sketch(size: int, read: Callable[[int, int], bytes | memoryview]) -> tuple[int, int]:
    """Return the features of a file that are compared first: its size in bytes, and a checksum of its middle. `read`:
    function that returns a piece of the file, given its length and its offset in bytes."""
    return size, zlib.crc32(read(min(size, PIECE), max(0, (size - PIECE) // 2)))


def number_same(count: int, features: Sequence[Callable[[int], Any]]) -> np.ndarray:
    """Return group numbers, int64 [count]: two items have the same number if and only if all their features are equal.
    Each feature is a function from an item to a hashable value. Cheap features come first, because a feature is
    computed only for items with equal values of all earlier features."""
    numbers_N = np.zeros(count, dtype=np.int64)
    for feature in features:
        _, inverse_N, counts = np.unique(numbers_N, return_inverse=True, return_counts=True)
        seen: dict[Any, int] = {}
        for item in np.flatnonzero(counts[inverse_N] > 1).tolist():
            found = (int(numbers_N[item]), feature(item))
            # new numbers start at `count`, because all earlier numbers are below it
            numbers_N[item] = seen.setdefault(found, count + len(seen))
        numbers_N = np.unique(numbers_N, return_inverse=True)[1].reshape(-1)
    return numbers_N


def join(first_N: np.ndarray, second_N: np.ndarray) -> np.ndarray:
    """Merge two groupings and return the result, int64 [N]: items that share a number in `first_N` or in `second_N`,
    directly or transitively, receive the same number."""
    numbers_N, before_N = first_N, None
    while before_N is None or (numbers_N != before_N).any():
        before_N = numbers_N
        for groups_N in (second_N, first_N):
            lowest = np.full(groups_N.max() + 1, len(groups_N))
            np.minimum.at(lowest, groups_N, numbers_N)
            numbers_N = lowest[groups_N]
    return numbers_N
