"""Seeded primes for the prefix hashes, reproducible in any language from 64-bit integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

_MASK64 = (1 << 64) - 1
# These bases make Miller-Rabin exact below 3.3e24, hence for every 64-bit integer (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def splitmix64(seed: int) -> Iterator[int]:
    """Yield the 64-bit outputs of SplitMix64 (Steele, Lea and Flood, 2014) started at `seed`."""
    state = seed & _MASK64
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        yield z ^ (z >> 31)


def is_prime(n: int) -> bool:
    """Deterministic Miller-Rabin test, exact for n < 2^64."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for a in _WITNESSES:
        x = pow(a, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def draw_primes(count: int, low: int, high: int, seed: int) -> list[int]:
    """Draw distinct primes of [low, high): outputs of SplitMix64 reduced to the range, made odd and tested in turn."""
    primes: list[int] = []
    seen: set[int] = set()
    for value in splitmix64(seed):
        if len(primes) == count:
            return primes
        candidate = (low + value % (high - low)) | 1
        if candidate < high and candidate not in seen and is_prime(candidate):
            seen.add(candidate)
            primes.append(candidate)
    raise AssertionError("splitmix64 never ends")
