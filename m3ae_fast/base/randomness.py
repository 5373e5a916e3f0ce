"""Random numbers that depend only on integers such as (seed, epoch, sample), and not on earlier draws."""

from __future__ import annotations

from enum import IntEnum

import torch

_BITS = (1 << 64) - 1


def hash64(*parts: int) -> int:
    """Return a 64-bit hash of integers (splitmix64, Steele et al. 2014, chained)."""
    value = 0
    for part in parts:
        value = ((value ^ (part & _BITS)) + 0x9E3779B97F4A7C15) & _BITS
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
        value ^= value >> 31
    return value


def seed32(*parts: int) -> int:
    """Return a hash of integers as a seed for torch's generators, which use only 32 bits of it."""
    return hash64(*parts) & 0xFFFFFFFF


class Purpose(IntEnum):
    """Purposes of the random numbers of a sample. Each purpose has its own stream."""

    CROP = 0
    MASK = 1
    BATCH_MASK = 2
    TRANSFORM = 3
    FORWARD = 4
    PREDICTED_PATCHES = 5
    PREDICTED_TOKENS = 6


class RandomStreams:
    """Independent streams of random numbers derived from one seed, one for each purpose and key."""

    def __init__(self, seed: int) -> None:
        self._seed, self._generator = seed, torch.Generator()

    def seed(self, purpose: Purpose, *key: int) -> int:
        """Return the 64-bit seed of a stream."""
        return hash64(self._seed, purpose, *key)

    def generator(self, purpose: Purpose, *key: int) -> torch.Generator:
        """Return a generator at the beginning of a stream. All calls return the same generator, so the next call moves
        it to another stream."""
        return self._generator.manual_seed(self.seed(purpose, *key) & 0xFFFFFFFF)
