"""Which test examples an arm hits, a bit each in a row of results, and how arms differ example by example."""

from __future__ import annotations

import base64
import zlib

import numpy as np


def packed(hits: np.ndarray) -> str:
    """bool ``[N]`` as text."""
    return base64.b64encode(zlib.compress(np.packbits(hits).tobytes(), 9)).decode()


def unpacked(text: str, examples: int) -> np.ndarray:
    """What `packed` was given.

    Raises:
        ValueError: that were not as many.
    """
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    if len(bits) != -(-examples // 8):
        raise ValueError(f"{len(bits)} bytes of hits, and {examples} examples have {-(-examples // 8)}")
    return np.unpackbits(bits, count=examples).astype(bool)


def bootstrap_interval(differences: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the means of resampled differences ``[N]``, one a user: a paired bootstrap."""
    random, count = np.random.default_rng(seed), len(differences)
    means = [differences[random.integers(count, size=count)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
