"""Addresses of one launch that are written while something else reads or writes them: an audit in the interpreter.

The warps of a program run at their own pace, and so do programs. The interpreter runs both in turn, so no result shows
a missing barrier; the addresses do. Three things are hazards:

    a program of several warps loads an address and then stores it, with no barrier in between: a late warp may load
        what another has stored
    two programs store one address
    one program loads an address and another one stores it

Atomics of several programs on one address are none; a plain load of such an address is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from .watching import Watcher, watched


class Hazard(NamedTuple):
    kernel: str
    what: str
    addresses: int  # how many


class _Audit(Watcher):
    def __init__(self) -> None:
        self.hazards: list[Hazard] = []
        self.kernels: set[str] = set()

    def begin_launch(self, kernel: str, warps: int) -> None:
        self._kernel, self._warps = kernel, warps
        self.kernels.add(kernel)
        self._programs = -1
        self._loaded: list[np.ndarray] = []  # since the last barrier
        self._loads: list[tuple[int, np.ndarray]] = []
        self._stores: list[tuple[int, np.ndarray]] = []
        self._atomics: list[tuple[int, np.ndarray]] = []

    def begin_program(self) -> None:
        self._programs += 1
        self._loaded.clear()

    def barrier(self) -> None:
        self._loaded.clear()

    def load(self, addresses: np.ndarray, size: int) -> None:
        self._loaded.append(addresses)
        self._loads.append((self._programs, addresses))

    def store(self, addresses: np.ndarray, size: int) -> None:
        if self._warps > 1 and self._loaded:
            late = np.intersect1d(np.concatenate(self._loaded), addresses)
            self._note("loads and then stores with no barrier in between", late)
        self._stores.append((self._programs, addresses))

    def atomic(self, addresses: np.ndarray, size: int) -> None:
        self._atomics.append((self._programs, addresses))

    def end_launch(self) -> None:
        loads, stores, atomics = map(_pairs, (self._loads, self._stores, self._atomics))
        written = _pairs(self._stores + self._atomics)
        self._note("has two programs store", _by_several(stores))
        loaded_too = np.intersect1d(loads[:, 1], written[:, 1])
        both = np.concatenate([loads, written])
        self._note("has one program load and another store", np.intersect1d(_by_several(both), loaded_too))
        self._note("has atomics on what is also stored plainly", np.intersect1d(atomics[:, 1], stores[:, 1]))

    def _note(self, what: str, addresses: np.ndarray) -> None:
        if addresses.size:
            self.hazards.append(Hazard(self._kernel, what, addresses.size))


def _pairs(parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Distinct (program, address)."""
    rows = [np.stack([np.full(a.size, program, np.uint64), a.astype(np.uint64)], 1) for program, a in parts if a.size]
    return np.unique(np.concatenate(rows), axis=0) if rows else np.empty((0, 2), np.uint64)


def _by_several(pairs: np.ndarray) -> np.ndarray:
    """Addresses of more than one program."""
    addresses, programs = np.unique(np.unique(pairs, axis=0)[:, 1], return_counts=True)
    return addresses[programs > 1]


@contextmanager
def audited() -> Iterator[_Audit]:
    """Audit every launch inside; `hazards` and `kernels`, the names of those that ran, are filled as it goes."""
    audit = _Audit()
    with watched(audit):
        yield audit
