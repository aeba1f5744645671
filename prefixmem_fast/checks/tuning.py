"""Block sizes and warps measured on a GPU: what `prefixmem tune` chooses from (`kernels/settings.py` is the table).

The kernels of one name in the table are measured in every combination of their candidates, with all others as chosen so
far. A combination replaces the defaults where it is faster by more than times vary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from .._launch import Launch
from ..addressing import AddressSpec
from ..kernels.settings import DEFAULTS, SETTINGS, Settings
from ..operation.backends import functions_of
from ..operation.rules import Hyper, RowUpdate

REPEATS = 15
GAIN = 0.03  # of the defaults' time, from which on a combination replaces them
COLD_BYTES = 1 << 28  # written before each call: more than the caches hold


class Trial(NamedTuple):
    """One combination of candidates.

    Attributes:
        of: the kernels, as the table names them.
        values: of their settings.
        microseconds: of the call that launches them, the median; None where it was not measured.
        note: why it was not.
    """

    of: str
    values: dict[str, int]
    microseconds: float | None
    note: str = ""


class Work(NamedTuple):
    """A call to measure, and what gives back the tensors that it adds to."""

    call: Callable[[], Any]
    reset: Callable[[], Any] = lambda: None


def combinations() -> dict[str, list[dict[str, int]]]:
    """By kernels, the combinations of their candidates, those with the most defaults first."""
    found = {}
    for of in dict.fromkeys(setting.of for setting in SETTINGS.values()):
        names = [name for name, setting in SETTINGS.items() if setting.of == of]
        grid = [dict(zip(names, values, strict=True)) for values in product(*(SETTINGS[n].candidates for n in names))]
        found[of] = sorted(grid, key=lambda values, names=names: sum(values[n] != SETTINGS[n].default for n in names))
    return found


def trials(
    works: dict[str, Work], seconds_of: Callable[[Work], float], seconds: float, chosen: Settings = DEFAULTS
) -> Iterator[tuple[Trial, Settings]]:
    """Measure, and give each trial with what is chosen so far.

    Args:
        works: what launches the kernels of each name in the table.
        seconds_of: the time of one call on the device, its tensors reset before it.
        seconds: start no further trial after so many.
        chosen: what was chosen before; it stays for kernels of which nothing is measured.
    """
    from ..kernels.tiles import trying

    began = time.monotonic()
    for of, grid in combinations().items():
        before, best = chosen, None
        for values in grid:
            if time.monotonic() - began > seconds:
                yield Trial(of, values, None, f"not measured: {seconds:g} seconds have passed"), chosen
                continue
            with trying(before._replace(**values)):
                problem = _problem_of(works[of])
                took = None if problem else median(seconds_of(works[of]) for _ in range(REPEATS))
            # The defaults come first: another combination has to be faster by more than times vary.
            if took is not None and (best is None or took < best):
                best, chosen = (1 - GAIN) * took if values == grid[0] else took, before._replace(**values)
            yield Trial(of, values, None if took is None else 1e6 * took, problem), chosen


def _problem_of(work: Work) -> str:
    """Why a combination cannot be taken, or an empty text. Compiles its kernels."""
    launched: list[Any] = []
    launch = Launch.__call__

    def recording(self, *args):
        launched.append((self.kernel.__name__, launch(self, *args)))
        return launched[-1][1]

    work.reset()
    try:
        with mock.patch.object(Launch, "__call__", recording):
            work.call()
    except Exception as error:  # of the compiler, the assembler or the driver
        return f"does not run: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    spilled = sorted({name for name, kernel in launched if getattr(kernel, "n_spills", 0)})
    return f"spills registers: {', '.join(spilled)}" if spilled else ""


class DeviceClock:
    """Times a call on the GPU by events, from caches that hold none of its data."""

    def __init__(self) -> None:
        self._cold = torch.zeros(COLD_BYTES // 4, device="cuda")

    def __call__(self, work: Work) -> float:
        work.reset()
        self._cold.zero_()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work.call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3


def works_on(
    device: str, sids: int = 65_536, sequences: int = 512, table_rows: int = 500_000, codebook: int = 2048
) -> dict[str, Work]:
    """The paper's shape in bfloat16, with codes of which a few are frequent; about 2 GB."""
    triton = functions_of("triton")
    spec = AddressSpec((codebook,) * 5, table_rows=table_rows, active_levels=(3, 4))
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    codes = (random(sids, 5) ** 3 * codebook).long()
    weight, dS = zeros(spec.total_rows, 64, dtype=torch.bfloat16), random(sids, 2, 256).to(torch.bfloat16)
    accumulated, step = zeros(spec.total_rows), torch.ones((), dtype=torch.int64, device=device)
    update = RowUpdate(weight, "row_adagrad", [accumulated], step, Hyper(0.01, 0.0, 1e-10), seed=0)

    def reset() -> None:
        weight.zero_(), accumulated.zero_()

    windows = torch.arange(5, device=device) * codebook + codes[:sequences]
    levels = torch.arange(5, dtype=torch.int32).repeat_interleave(codebook) + 1
    table = torch.stack([levels, torch.arange(codebook, dtype=torch.int32).repeat(5)], 1).to(device)
    last = zeros(sequences, spec.heads * 64, dtype=torch.bfloat16)

    step_of_table = Work(lambda: triton.fused_update(dS, codes, spec, update), reset)
    return {
        "forward": Work(lambda: triton.forward(codes, weight, spec)),
        "walk": step_of_table,
        "edges": step_of_table,
        "merge": step_of_table,
        "atomics": Work(lambda: triton.dense_gradient(dS, codes, spec)),  # into new zeros at each call
        "decoding": Work(lambda: triton.read_windows(windows[:, :4], table, weight, spec, last)),
    }
