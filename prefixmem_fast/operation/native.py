"""PrefixMem on a CPU by the C++ kernels of kernels/native/: each function is one call, or two where sizes are asked."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_double, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._dtypes import accumulator
from ..addressing import AddressSpec, TokenStream
from . import cpu
from .interface import QuantizedTable, RowSums
from .rounding import mix_seed, mix_word
from .rules import RULES, RowUpdate

_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.float8_e4m3fn: 5,
}
_DLPACK = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.int64: (0, 64),
}
_MODES = {"prefix": 0, "suffix": 1, "full": 2}
_RULES = {"sgd": 0, "row_adagrad": 1, "row_adam": 2, "lazy_adam": 3}
_MOST_ENTRIES = 1 << 32  # of one sort
_NO_SUCH_ROW, _FAILED = -2, -3
_MOST_SPECS = 64  # held in the library
# From here on, results come in memory that the kernels keep: new pages would cost more than the work.
_KEPT_BYTES = 1 << 20


class _Source(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("code_bytes", c_int64),
        ("sids", c_int64),
        ("ids", c_void_p),
        ("id_bytes", c_int64),
        ("segments", c_void_p),
        ("segment_bytes", c_int64),
        ("token_table", c_void_p),
        ("vocabulary", c_int64),
        ("rows", c_int64),
        ("length", c_int64),
        ("is_stream", c_int64),
    ]


class _Update(ctypes.Structure):
    _fields_ = [
        ("table", c_void_p),
        ("first_moment", c_void_p),
        ("second_moment", c_void_p),
        ("width", c_int64),
        ("dtype", c_int32),
        ("rule", c_int32),
        ("stochastic", c_int32),
        ("key", c_uint32),
        *((name, c_double) for name in ("lr", "decay", "eps", "beta1", "beta2", "correction1", "correction2")),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("levels", "orders", "heads", "mode", "narrow", "actives", "item_levels", "gap")),
        *((name, c_void_p) for name in ("codebooks", "multipliers", "rows", "offsets", "exact", "active")),
    ]


class _Functions:
    """The functions of the library, with the types of their arguments."""

    def __init__(self) -> None:
        library = _native.library()
        p, i = c_void_p, c_int64
        for name, result, arguments in (
            ("spec", p, [p]),
            ("free_spec", None, [p]),
            ("rows", i, [p, p, i, i, p, i]),
            ("forward", i, [p, p, p, p, i, i, p, i, i]),
            ("last_tokens", i, [p, p, i, p, i, i, i, i, p, p, i, i, p, i, i]),
            ("plan", p, [p, p, i]),
            ("free_plan", None, [p]),
            ("number", i, [p, p]),
            ("sum", i, [p, p, i, i, p, i, p, p]),
            ("sum_sparse", i, [p, i, i, i, p, i, p, p, i]),
            ("output", p, [p, i, i, i]),
            ("use_openmp", None, [p]),
            ("keep_at_most", i, [i]),
            ("bytes_kept", i, []),
        ):
            function = getattr(library, f"prefixmem_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.use_openmp(_native.openmp())


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]


@cache
def _library() -> _Functions:
    return _Functions()


class _Spec:
    """A spec in the memory of the library, for as long as this object is held; functions of the library take it."""

    def __init__(self, spec: AddressSpec) -> None:
        flat = {
            "codebooks": spec.window_sizes,
            "multipliers": [prime for primes in spec.multipliers for prime in primes],
            "rows": spec.rows_per_order,
            "offsets": [offset for offsets in spec.offsets for offset in offsets],
            "exact": [order in spec.exact_orders for order in range(1, spec.max_order + 1)],
            "active": spec.active_levels,
        }
        arrays = {name: (c_int64 * len(values))(*values) for name, values in flat.items()}
        sizes = _Sizes(
            spec.levels,
            spec.max_order,
            spec.heads,
            _MODES[spec.mode],
            spec.product_bits == 31,
            len(spec.active_levels),
            spec.item_levels,
            spec.gap,
            **{name: ctypes.addressof(array) for name, array in arrays.items()},
        )
        self._as_parameter_ = _library().spec(ctypes.addressof(sizes))
        if not self._as_parameter_:
            raise MemoryError("there is no memory for an address spec")
        weakref.finalize(self, _library().free_spec, self._as_parameter_).atexit = False


_specs: dict[str, _Spec] = {}


def _given(spec: AddressSpec) -> _Spec:
    held = _specs.get(spec.key)
    if held is None:
        if len(_specs) >= _MOST_SPECS:
            _specs.pop(next(iter(tuple(_specs))), None)  # a copy: another thread may add one
        held = _specs[spec.key] = _Spec(spec)
    return held


def _at(tensor: Tensor) -> int:
    """The address of a tensor that the library may read or write.

    Raises:
        RuntimeError: it is elsewhere than in the host's memory, or has none.
    """
    if not tensor.is_cpu:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}, and the table was read on the CPU before; "
            "move the table, its optimizer's state and what is read to one device, and make a DecodingState anew"
        )
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} has no memory, as those of FakeTensorMode have not; "
            'backend="cpu" works without'
        )
    return address


def _checked(result: int) -> int:
    if result == _NO_SUCH_ROW:
        raise IndexError("a sparse gradient has a row that the table has not; build it of the table's shape")
    if result == _FAILED:
        raise RuntimeError("the CPU kernels have failed in the C++ library; backend='cpu' does the same in PyTorch")
    if result < 0:
        raise MemoryError("there is no memory for the temporary arrays of the CPU kernels; take a smaller batch")
    return result


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is not initialized; large ones in kept memory."""
    size = dtype.itemsize
    for side in shape:
        size *= side
    filled = torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    if size < _KEPT_BYTES or filled:
        return torch.empty(shape, dtype=dtype, device="cpu")
    made = _library().output((c_int64 * len(shape))(*shape), len(shape), *_DLPACK[dtype])
    if not made:
        raise MemoryError(f"there is no memory for a result of {size} bytes")
    return torch.from_dlpack(_new_capsule(made, b"dltensor", None))


def _source(source: Tensor | TokenStream) -> tuple[_Source, Any]:
    """The source as the library takes it, and what must live as long."""
    if not isinstance(source, TokenStream):
        codes = source.contiguous()
        return _Source(_at(codes), codes.element_size(), len(codes)), codes
    ids, table = source.input_ids.contiguous(), source.token_table.contiguous()
    segments = None if source.segment_ids is None else source.segment_ids.contiguous()
    given = _Source(
        ids=_at(ids),
        id_bytes=ids.element_size(),
        segments=None if segments is None else _at(segments),
        segment_bytes=8 if segments is None else segments.element_size(),
        token_table=_at(table),
        vocabulary=len(table),
        rows=ids.shape[0],
        length=ids.shape[1],
        is_stream=True,
    )
    return given, (ids, table, segments)


# Forward


def prefix_rows(codes: Tensor, spec: AddressSpec) -> Tensor:
    codes = codes.contiguous()
    rows = _empty((len(codes), spec.levels, spec.max_order, spec.heads), torch.int64)
    threads = torch.get_num_threads()
    given = _at(codes), codes.element_size(), len(codes)
    _checked(_library().rows(_given(spec), *given, _at(rows), threads))
    return rows


def forward(source: Tensor | TokenStream, weight: Tensor, spec: AddressSpec) -> Tensor:
    """S; see `reference.forward`."""
    return _forward(source, weight, None, spec, weight.dtype)


def quantized_forward(
    source: Tensor | TokenStream, table: QuantizedTable, spec: AddressSpec, dtype: torch.dtype
) -> Tensor:
    """S of a quantized table; see `reference.quantized_forward`."""
    return _forward(source, *table, spec, dtype)


def _forward(
    source: Tensor | TokenStream, rows: Tensor, scales: Tensor | None, spec: AddressSpec, dtype: torch.dtype
) -> Tensor:
    given, _alive = _source(source)
    table, _held = _table(rows, scales)
    shape = source.input_ids.shape if isinstance(source, TokenStream) else (len(source), len(spec.active_levels))
    out = _empty((*shape, spec.heads * rows.shape[1]), dtype)
    to = _at(out), _DTYPES[dtype]
    _checked(_library().forward(_given(spec), ctypes.addressof(given), *table, *to, torch.get_num_threads()))
    return out


def _table(rows: Tensor, scales: Tensor | None) -> tuple[tuple[int | None, ...], Any]:
    """Rows, scales or none, dtype and width as the library takes them, and what must live as long."""
    rows = rows.contiguous()
    scales = None if scales is None else scales.contiguous()
    place = None if scales is None else _at(scales)
    return (_at(rows), place, _DTYPES[rows.dtype], rows.shape[1]), (rows, scales)


# Gradient


@contextmanager
def _plan(source: Tensor | TokenStream, spec: AddressSpec) -> Iterator[int]:
    """The rows that a batch touches."""
    given, _alive = _source(source)
    held = _given(spec)
    plan = _library().plan(held, ctypes.addressof(given), torch.get_num_threads())
    if not plan:
        _checked(-1)
    try:
        yield plan
    finally:
        _library().free_plan(plan)


def _sum(plan: int, grad: Tensor, sums: Tensor | None, update: _Update | None) -> float:
    squares = c_double()
    to = (None, 0) if sums is None else (_at(sums), _DTYPES[sums.dtype])
    update_address = None if update is None else ctypes.addressof(update)
    given = _at(grad), _DTYPES[grad.dtype], grad.shape[-1]
    _checked(_library().sum(plan, *given, *to, update_address, ctypes.addressof(squares)))
    return squares.value


def _too_many(grad: Tensor, spec: AddressSpec) -> bool:
    return grad.numel() // max(grad.shape[-1], 1) * len(spec.active_levels) >= _MOST_ENTRIES


def dense_gradient(
    grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, deterministic: bool = False
) -> Tensor:
    """``[R, w]`` of the dtype of `grad`, the same bits run after run."""
    if _too_many(grad, spec):
        return cpu.dense_gradient(grad, source, spec, deterministic)
    total = torch.zeros((spec.total_rows, grad.shape[-1] // spec.heads), dtype=grad.dtype, device="cpu")
    with _plan(source, spec) as plan:
        _sum(plan, grad.contiguous(), total, None)
    return total


def row_sums(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, dtype: torch.dtype) -> RowSums:
    """The touched rows, ascending and each once, and their sums in `dtype`."""
    half_of_double = grad.dtype == torch.float64 and dtype.itemsize == 2
    if _too_many(grad, spec) or half_of_double:
        return cpu.row_sums(grad, source, spec, dtype)
    with _plan(source, spec) as plan:
        rows = _empty((_checked(_library().number(plan, None)),), torch.int64)
        sums = _empty((len(rows), grad.shape[-1] // spec.heads), dtype)
        _checked(_library().number(plan, _at(rows)))
        _sum(plan, grad.contiguous(), sums, None)
    return RowSums(rows, sums, True)


def fused_update(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, update: RowUpdate) -> None:
    """Update the touched rows of the update's table, each once."""
    if _too_many(grad, spec) or not _fits(update, (spec.total_rows, grad.shape[-1] // spec.heads)):
        return cpu.fused_update(grad, source, spec, update)
    with _plan(source, spec) as plan:
        _count(update, _sum(plan, grad.contiguous(), None, _numbers(update)))


def sparse_update(grad: Tensor, update: RowUpdate) -> None:
    """Update the rows of a sparse gradient ``[R, w]``; entries of one row are summed first, in float32."""
    rows, values = grad._indices()[0].contiguous(), grad._values().contiguous()
    if len(rows) >= _MOST_ENTRIES or not _fits(update, tuple(grad.shape)):
        return cpu.sparse_update(grad, update)
    squares, numbers = c_double(), _numbers(update)
    given = _at(rows), len(rows), grad.shape[0], values.shape[1], _at(values), _DTYPES[values.dtype]
    to = ctypes.addressof(numbers), ctypes.addressof(squares)
    _checked(_library().sum_sparse(*given, *to, torch.get_num_threads()))
    _count(update, squares.value)


def _fits(update: RowUpdate, shape: tuple[int, int]) -> bool:
    """Whether the kernels can write a table of this shape and its state where they lie; PyTorch says what is wrong."""
    sums, kinds = accumulator(update.weight.dtype), RULES[update.rule].state.values()
    state = [
        s is None or (s.dtype == sums and s.is_contiguous() and s.shape == (shape if kind == "element" else shape[:1]))
        for s, kind in zip(update.state, kinds, strict=True)
    ]
    return update.weight.shape == shape and update.weight.is_contiguous() and all(state)


def _numbers(update: RowUpdate) -> _Update:
    hyper, weight = update.hyper, update.weight
    first_moment, second_moment = [None, None, *update.state][-2:]
    lr, t = float(hyper.lr), int(update.step)
    return _Update(
        _at(weight),
        None if first_moment is None else _at(first_moment),
        None if second_moment is None else _at(second_moment),
        weight.shape[1],
        _DTYPES[weight.dtype],
        _RULES[update.rule],
        update.seed is not None,
        0 if update.seed is None else mix_word(t & 0xFFFFFFFF ^ mix_seed(update.seed)),
        lr,
        1 - lr * float(hyper.weight_decay),
        float(hyper.eps),
        float(hyper.beta1),
        float(hyper.beta2),
        1 - float(hyper.beta1) ** t,
        1 - float(hyper.beta2) ** t,
    )


def _count(update: RowUpdate, squares: float) -> None:
    if update.squares is not None:
        update.squares.append(torch.tensor([squares], dtype=accumulator(update.weight.dtype), device="cpu"))


# Windows


def read_windows(
    windows: Tensor, token_table: Tensor, table: Tensor | QuantizedTable, spec: AddressSpec, out: Tensor
) -> None:
    """S of the last token of each window; see `reference.read_windows`."""
    windows = windows if windows.stride(1) == 1 else windows.contiguous()
    given, _held = _table(*(table if isinstance(table, QuantizedTable) else (table, None)))
    token_table = token_table.contiguous()
    ids = _at(windows), windows.element_size(), *windows.shape, windows.stride(0)
    to = _at(out), _DTYPES[out.dtype], torch.get_num_threads()
    _checked(_library().last_tokens(_given(spec), _at(token_table), len(token_table), *ids, *given, *to))
