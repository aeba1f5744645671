"""Host time of a call: what the Python and the dispatcher before the kernels take. No GPU is needed.

The triton backend runs on CPU tensors. A stand-in for Triton's driver compiles the kernels and launches nothing, and
torch.sort gives its last result again. What is left is the host's work; a real launch adds 3 to 5 us in the driver,
a real sort about 20 kernels in torch. Times are CPU time of the thread, and all calls take turns.

    launches         the call's kernel[grid](...), recorded once and run again by themselves
    torch operators  functions of torch that reach its dispatcher, recorded once and run again by themselves
    the rest         checks, the operator, autograd, and Python in between
    Python calls     of and from this package's functions, counted by a profile hook

With TRITON_INTERPRET=1 nothing is compiled and parts can be counted, not timed: `tests/operation/test_host_work.py`
holds the counts to limits.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from .report import markdown
from .rows import OURS, Row, append_rows, check_out

TARGET = "sm_90"
LOADED = "loaded by the stand-in for a driver"
# Large enough for the usual number of launches, small enough that memory comes from the heap without a system call.
SIDS, SPARSE_SIDS = 1024, 64  # grad="sparse" fills its list of rows, which would hide the rest


class Parts(NamedTuple):
    """What one call consists of: launches and functions of torch, ready to be run again, and a count."""

    launches: list[Callable[[], Any]]
    operators: list[Callable[[], Any]]
    python_calls: int


def add_arguments(option: Callable) -> None:
    option("--seconds", type=float, default=1.0, help="for each call and each of its parts (default: %(default)s)")
    option("--out", type=Path, help="append a row for each figure to this file")
    option("--commit", help="name of the library's revision, where it is not a checkout's")


def run(options: argparse.Namespace) -> int:
    from prefixmem_fast.checks.machine_code import problem

    from .machine import run_record

    if not options.seconds > 0:
        raise ValueError(f"--seconds {options.seconds} is not above 0; give a number of seconds, such as 1")
    if options.out is not None:
        check_out(options.out)
    if problem() is not None:
        raise ValueError(f"host time cannot be taken: {problem()}")
    record = run_record(options.commit)
    with kernels_that_return_at_once():
        rows = _measure_all(options.seconds)
    if options.out is not None:
        append_rows(options.out, record, rows)
    print("\n".join(json.dumps({**record, **row}) for row in rows) if options.json else table(rows))
    return 0


def _measure_all(seconds: float) -> list[Row]:
    """In a function of its own, since no kernel may outlive the driver that loaded it."""
    whole = calls()
    return list(measure({**whole, **single_launches(whole)}, seconds))


@contextmanager
def kernels_that_return_at_once(target: str = TARGET) -> Iterator[None]:
    """The triton backend on CPU tensors, without the work of kernels and sorts."""
    import torch

    from prefixmem_fast._triton import interpreting
    from prefixmem_fast.checks.machine_code import stand_in_driver
    from prefixmem_fast.operation import backends

    sort, results = torch.sort, {}

    def sort_once(values, *args, **kwargs):
        key = values.shape, values.dtype
        if key not in results:
            results[key] = sort(values, *args, **kwargs)
        return results[key]

    with ExitStack() as stack:
        if interpreting():
            stack.enter_context(mock.patch.object(_kernel_class(), "run", return_value=None))
        else:
            stack.enter_context(stand_in_driver(target, module=LOADED))
            stack.callback(_drop_kernels)
        stack.enter_context(mock.patch.object(torch, "sort", sort_once))
        stack.enter_context(mock.patch.dict(backends._PROBLEMS, triton=lambda device: None))
        yield


def _kernel_class() -> type:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from prefixmem_fast._triton import interpreting

    return InterpretedFunction if interpreting() else JITFunction


def _drop_kernels() -> None:
    """Drop what was compiled, while the driver that it was loaded by is there.

    The frames of an exception, such as Ctrl-C, hold kernels for longer: Triton is to unload none of those.
    """
    from triton.compiler.compiler import CompiledKernel

    from prefixmem_fast._launch import forget

    forget()
    for module in [module for name, module in sys.modules.items() if name.startswith("prefixmem_fast.kernels.")]:
        for value in vars(module).values():
            if isinstance(value, _kernel_class()):
                value.device_caches.clear()
    for kernel in [held for held in gc.get_objects() if type(held) is CompiledKernel]:
        if kernel.module == LOADED:
            kernel.module = None


def calls() -> dict[str, Callable[[], Any]]:
    """What is measured, at the paper's shape in bfloat16, memory read at levels 3 and 4; tables are small."""
    import torch

    from prefixmem_fast import AddressSpec, optim, prefix_memory
    from prefixmem_fast.operation import operators
    from prefixmem_fast.operation.backends import functions_of

    spec = AddressSpec((2048,) * 5, table_rows=10_000, active_levels=(3, 4))
    codes = {sids: torch.randint(0, 2048, (sids, 5)) for sids in (SIDS, SPARSE_SIDS)}

    def table_() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(spec.total_rows, 64, dtype=torch.bfloat16))

    def read(weight, sids=SIDS, grad="dense"):
        return prefix_memory(codes[sids], weight, spec, backend="triton", grad=grad)

    def step_of(optimizer_class, grad, sids) -> Callable[[], None]:
        weight = table_()
        optimizer = optimizer_class([weight], lr=0.01)
        dS = torch.zeros(sids, 2, 256, dtype=torch.bfloat16)

        def step() -> None:
            torch.autograd.backward(read(weight, sids, grad), dS)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def update_of(optimizer_class) -> Callable[[], None]:
        weight = table_()
        update = optimizer_class([weight], lr=0.01).begin(weight)
        dS = torch.zeros(SIDS, 2, 256, dtype=torch.bfloat16)

        def run() -> None:
            update.squares = []
            functions_of("triton").fused_update(dS, codes[SIDS], spec, update)

        return run

    frozen, trained = table_().detach(), table_()
    steps = {"SGD": optim.SGD, "row-wise Adagrad": optim.RowWiseAdagrad, "row-wise Adam": optim.RowWiseAdam}
    return {
        "forward, of it the backend": lambda: functions_of("triton").forward(codes[SIDS], frozen, spec),
        "forward, of it the operator": lambda: operators.prefix_memory(codes[SIDS], frozen, spec.key, "triton", False),
        "forward, no gradient": lambda: read(frozen),
        "forward, gradient": lambda: read(trained),
        "step, of it the backend": update_of(optim.RowWiseAdagrad),
        **{f"step, fused {name}": step_of(rule, "fused", SIDS) for name, rule in steps.items()},
        "step, sparse row-wise Adagrad": step_of(optim.RowWiseAdagrad, "sparse", SPARSE_SIDS),
    }


def single_launches(calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The launch of forward, and that of a step with the most arguments: Triton's way and that of a `Launch`."""
    from prefixmem_fast._launch import Launch

    kernel_class, found = _kernel_class(), {}
    run = kernel_class.run
    for part in ("forward", "step"):
        launches = []

        def recording_run(self, *args, grid, warmup, launches=launches, **kwargs):
            launches.append((self, grid, args, kwargs))
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        with mock.patch.object(kernel_class, "run", recording_run), mock.patch.object(Launch, "remembers", False):
            calls[f"{part}, of it the backend"]()
        kernel, grid, args, options = max(launches, key=lambda launch: len(launch[2]))
        launch, name = Launch(kernel, **options), f"launch of {part}, {len(args)} arguments"
        found |= {
            name: partial(kernel[grid], *args, **options),
            f"{name}, of a known kind": partial(launch, grid, *args),
        }
    return found


def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> Iterator[Row]:
    """Rows of each call: its times, and the number of its parts."""
    timed: dict[tuple[str, str], Callable[[], Any]] = {}
    counts: dict[tuple[str, str], int] = {}
    for name, call in calls.items():
        call()  # compiles
        parts = parts_of(call)
        timed[name, "call"] = call
        timed[name, "launches"] = _in_turn(parts.launches)
        timed[name, "torch operators"] = _in_turn(parts.operators)
        counts[name, "launches"], counts[name, "torch operators"] = len(parts.launches), len(parts.operators)
        counts[name, "Python calls"] = parts.python_calls
    for (name, metric), batches in take_turns(timed, seconds).items():
        yield _row(name, metric, "us", batches)
    for (name, metric), count in counts.items():
        yield _row(name, f"number of {metric}", "", [count])


def parts_of(call: Callable[[], Any]) -> Parts:
    from torch import autograd
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    import prefixmem_fast
    from prefixmem_fast import kernels
    from prefixmem_fast._launch import Launch
    from prefixmem_fast.operation.backends import functions_of
    from prefixmem_fast.operation.interface import FUNCTIONS
    from prefixmem_fast.operation.row_gradients import _RowGradient

    launches, operators, python_calls = [], [], 0
    kernel_class, backend = _kernel_class(), functions_of("triton")
    run, launch = kernel_class.run, Launch.__call__
    folders = prefixmem_fast.__path__[0], kernels.__path__[0]
    dispatched = hidden = in_launch = False

    def recording_run(self, *args, grid, warmup=False, **kwargs):
        if not in_launch:
            launches.append(lambda: self[grid](*args, **kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def recording_launch(self, *args, **kwargs):
        nonlocal in_launch
        launches.append(lambda: self(*args, **kwargs))
        in_launch = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            in_launch = False

    class Noticing(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal dispatched
            dispatched = True
            return operator(*args, **(kwargs or {}))

    class Recording(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal dispatched, hidden
            dispatched, hidden = False, True
            with Noticing():
                result = function(*args, **(kwargs or {}))
            hidden = False
            if dispatched and function is not autograd.backward and getattr(function, "namespace", "") != OURS:
                operators.append(lambda: function(*args, **(kwargs or {})))
            return result

    def seen(function):
        """Of a function that an operator or autograd calls, out of the mode's sight."""

        def wrapped(*args, **kwargs):
            nonlocal hidden
            was_hidden, hidden = hidden, False
            with Recording() if was_hidden else nullcontext():
                return function(*args, **kwargs)

        return wrapped

    def count(frame, event, argument):
        nonlocal python_calls
        python_calls += event in ("call", "c_call") and frame.f_code.co_filename.startswith(folders)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernel_class, "run", recording_run))
        stack.enter_context(mock.patch.object(Launch, "__call__", recording_launch))
        for name in FUNCTIONS:
            stack.enter_context(mock.patch.object(backend, name, seen(getattr(backend, name))))
        backward = staticmethod(seen(_RowGradient.backward))
        stack.enter_context(mock.patch.object(_RowGradient, "backward", backward))
        stack.enter_context(Recording())
        call()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Parts(launches, operators, python_calls)


def _in_turn(parts: list[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for part in parts:
            part()

    return run


def take_turns(calls: dict[Any, Callable[[], Any]], seconds: float, batch_seconds: float = 0.01) -> dict[Any, list]:
    """Microseconds of CPU time a run of each call, of batches in turns."""
    import torch

    batches: dict[Any, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    sizes = dict.fromkeys(calls, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while min(spent.values()) < seconds or not all(batches.values()):
            for name, call in calls.items():
                began = time.thread_time()
                for _ in range(sizes[name]):
                    call()
                took = time.thread_time() - began
                spent[name] += max(took, 1e-4)
                if took < batch_seconds / 2:  # not counted: still looking for the size of a batch
                    sizes[name] *= 2
                    if sizes[name] < 1 << 14:
                        continue
                batches[name].append(1e6 * took / sizes[name])
    finally:
        torch.set_num_threads(threads)
    return batches


def _row(name: str, metric: str, unit: str, values: list[float]) -> Row:
    from .run import quantiles

    workload = {"call": name, "sids": SPARSE_SIDS if "sparse" in name else SIDS, "dtype": "bfloat16"}
    return {
        "benchmark": "host",
        "workload": workload,
        "provider": OURS,
        "metric": metric,
        "unit": unit,
        "repeats": len(values),
        "least": min(values),
        **quantiles(values),
    }


def table(rows: list[Row]) -> str:
    """A line a call: microseconds, the least of all batches, and in brackets how many parts there are."""
    figures = {(row["workload"]["call"], row["metric"]): row for row in rows}
    names = list(dict.fromkeys(row["workload"]["call"] for row in rows))
    head = ["us of CPU time", "least", "median", "launches", "torch operators", "the rest", "Python calls"]
    lines = []
    for name in names:
        least = {metric: figures[name, metric]["least"] for metric in ("call", "launches", "torch operators")}
        number = {part: figures[name, f"number of {part}"]["p50"] for part in (*head[3:5], head[6])}
        parts = [f"{least[part]:.1f} ({number[part]})" for part in head[3:5]]
        rest = least["call"] - least["launches"] - least["torch operators"]
        median = figures[name, "call"]["p50"]
        lines.append([name, f"{least['call']:.1f}", f"{median:.1f}", *parts, f"{rest:.1f}", str(number[head[6]])])
    return markdown(head, lines)
