"""What every kernel asks of memory, counted in Triton's interpreter against the floor of its workload.

Bytes of all lanes that a mask lets through, distinct 32-byte sectors of each launch, launches: the same on every
machine. What a program loads twice is counted once, since it comes from the first-level cache the second time. Sorts
and other operators of torch between the kernels are not counted, nor is the zeroing of a dense gradient or of claims.
Triton must be imported with TRITON_INTERPRET=1 set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .. import optim
from ..addressing import AddressSpec, TokenStream, window_codes
from ..operation import prefix_memory, prefix_rows, token_memory, window_memory
from ..operation import triton as backend
from ..operation.quantization import quantize
from ..operation.quantized import quantized_prefix_memory
from .watching import Watcher, watched

SECTOR = 32  # bytes
L, N, H, W, CODES = 5, 4, 4, 64, 2048  # the paper's shape
ACTIVE = (3, 4)
A = len(ACTIVE)
READ, TRAINED = 128, 256  # SIDs of a batch
BLOCK = 32  # SIDs a block of the sorting kernels, as in batches of 128 K and more
REPEATS = 32  # SIDs of a trained batch for each first code, as in a batch of 64 K

READING, STREAM, UPDATE = 1.05, 1.3, 1.3  # limits, times the floor
SUFFIX = 1.4  # of its update: nothing nests, so every term reads its slice of dS by itself
FORWARD_LAUNCHES = 2


class Traffic(Watcher):
    """Bytes of one `counted` block, by tensor name; `other` is what no named tensor holds."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.launches = self.sectors = 0
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.added: Counter[str] = Counter()  # by atomics
        self._ranges = {
            name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
            for name, tensor in tensors.items()
        }
        self._touched: dict[int, list[np.ndarray]] = {}
        self._program: dict[int, list[np.ndarray]] = {}  # what the running program has loaded, by size

    @property
    def total(self) -> int:
        return sum(sum(where.values()) for where in (self.loaded, self.stored, self.added))

    def load(self, addresses: np.ndarray, size: int) -> None:
        self._program.setdefault(size, []).append(addresses)
        self._touch(self.loaded, addresses)

    def store(self, addresses: np.ndarray, size: int) -> None:
        self._add(self.stored, addresses, size)
        self._touch(self.stored, addresses)

    def atomic(self, addresses: np.ndarray, size: int) -> None:
        self._add(self.added, addresses, size)
        self._touch(self.added, addresses)

    def begin_program(self) -> None:
        for size, parts in self._program.items():
            self._add(self.loaded, np.unique(np.concatenate(parts)), size)
        self._program.clear()

    def end_launch(self) -> None:
        """Loads and stores of one sector are two; those of a sector that a launch loads twice, one."""
        self.begin_program()
        self.launches += 1
        self.sectors += sum(len(np.unique(np.concatenate(parts))) for parts in self._touched.values())
        self._touched.clear()

    def _add(self, where: Counter[str], addresses: np.ndarray, size: int) -> None:
        left = addresses.size
        for name, (low, high) in self._ranges.items():
            inside = int(np.count_nonzero((addresses >= low) & (addresses < high)))
            where[name] += inside * size
            left -= inside
        where["other"] += left * size

    def _touch(self, where: Counter[str], addresses: np.ndarray) -> None:
        self._touched.setdefault(id(where), []).append(np.unique(addresses // SECTOR))


@contextmanager
def counted(**tensors: Tensor) -> Iterator[Traffic]:
    """Count the traffic of every launch inside; tensors are named by keyword."""
    traffic = Traffic(tensors)
    with watched(traffic):
        yield traffic


class Count(NamedTuple):
    """One workload's traffic.

    Attributes:
        floor: the fewest bytes of the workload, without sorts.
        limit: how many times that is allowed.
        sids: of the batch.
        most_launches: None where the batch decides.
    """

    name: str
    traffic: Traffic
    floor: int
    limit: float
    sids: int
    most_launches: int | None = None

    @property
    def ratio(self) -> float:
        return self.traffic.total / self.floor

    @property
    def excess(self) -> str:
        """Which limit is exceeded and by how much; empty where none is."""
        if self.ratio > self.limit:
            return f"EXCEEDS its limit by {self.ratio / self.limit - 1:.1%}"
        if self.most_launches is not None and self.traffic.launches > self.most_launches:
            return f"EXCEEDS its limit of {self.most_launches} launches"
        return ""

    def as_row(self) -> dict[str, Any]:
        return {
            "kernel": self.name,
            "bytes": self.traffic.total,
            "sectors": self.traffic.sectors,
            "launches": self.traffic.launches,
            "floor_bytes": self.floor,
            "ratio": round(self.ratio, 4),
            "limit": self.limit,
            "within_limit": not self.excess,
        }


def spec_of(mode: str = "prefix", table_rows: int = 200_000) -> AddressSpec:
    return AddressSpec((CODES,) * L, N, H, table_rows, mode=mode, active_levels=ACTIVE, addressing="hash")


def codes_of(sids: int, kind: str = "uniform") -> Tensor:
    """Codes int64 ``[M, L]``: uniform, by Zipf's law, half of them one SID, or ended after two codes."""
    generator = torch.Generator().manual_seed(0)
    if kind == "zipf 1.05":
        chance = torch.arange(1, CODES + 1, dtype=torch.float64) ** -1.05
        return torch.multinomial(chance, sids * L, replacement=True, generator=generator).view(sids, L)
    codes = torch.randint(0, CODES, (sids, L), generator=generator)
    if kind == "hot":
        codes[::2] = codes[0]
    if kind == "ended":
        codes[:, 2] = -1
    return codes


def forward(kind: str = "uniform", dtype: torch.dtype = torch.bfloat16, mode: str = "prefix") -> Count:
    """Codes in, each row once a SID (in suffix mode once a level), S out."""
    spec, codes = spec_of(mode, 3000), codes_of(READ, kind)
    weight = torch.randn(spec.total_rows, W).to(dtype)
    rows = prefix_rows(codes, spec, backend="reference")
    reads = rows[:, ACTIVE[-1] - 1] if mode == "prefix" else rows[:, [level - 1 for level in ACTIVE]]
    with counted(codes=codes, weight=weight) as traffic:
        out = prefix_memory(codes, weight, spec, backend="triton")
    floor = codes.numel() * 8 + int((reads >= 0).sum()) * W * dtype.itemsize + out.numel() * dtype.itemsize
    return Count(f"forward, {mode}, {kind}, {_short(dtype)}", traffic, floor, READING, READ, FORWARD_LAUNCHES)


def quantized(kind: str) -> Count:
    """Codes in, each row and its scale once a SID, S in bfloat16 out. Of a scale, a sector of 32 bytes moves 4."""
    spec, codes = spec_of(table_rows=3000), codes_of(READ)
    table = quantize(torch.randn(spec.total_rows, W), kind)
    with counted(codes=codes, **table._asdict()) as traffic:
        out = quantized_prefix_memory(codes, table, spec, dtype=torch.bfloat16, backend="triton")
    floor = codes.numel() * 8 + READ * N * H * (W + 4) + out.numel() * 2
    return Count(f"forward, prefix, uniform, {kind}", traffic, floor, READING, READ, FORWARD_LAUNCHES)


def tokens(text: int = 3, sids: int = 48) -> Count:
    """Ids in, each row once a SID, S of every token out."""
    spec, codes = spec_of(table_rows=3000), codes_of(sids)
    weight = torch.randn(spec.total_rows, W).bfloat16()
    ids, table = _stream(codes, text)
    with counted(weight=weight) as traffic:
        out = token_memory(ids, table, weight, spec, backend="triton")
    floor = ids.numel() * 8 + sids * N * H * W * 2 + out.numel() * 2
    return Count(f"forward over tokens, {text} of text a SID", traffic, floor, STREAM, sids, FORWARD_LAUNCHES)


def cross_item(training: bool = False, items: int = 48) -> Count:
    """Ids of whole items in, H rows of each token that has an item before it, S of every token out; in training dS in,
    and each touched row and its state in and out."""
    spec = AddressSpec.cross_item((CODES,) * L, heads=H, table_rows=3000)
    ids, table = _stream(codes_of(items), 0)
    source = TokenStream(ids, table)
    codes, level = window_codes(source, spec)
    found = prefix_rows(codes[level > 0], spec, backend="reference")
    found = found[torch.arange(len(found)), level[level > 0] - 1]
    found, size = found[found >= 0], ids.numel() * (8 + H * W * 2)
    if not training:
        weight = torch.randn(spec.total_rows, W).bfloat16()
        with counted(weight=weight) as traffic:
            token_memory(ids, table, weight, spec, backend="triton")
        floor = size + len(found) * W * 2
        return Count("forward over tokens, cross-item orders", traffic, floor, STREAM, items, FORWARD_LAUNCHES)
    weight = torch.nn.Parameter(torch.zeros(spec.total_rows, W, dtype=torch.bfloat16))
    step = optim.RowWiseAdagrad([weight], lr=0.1).begin(weight)
    grad = torch.randn(*ids.shape, H * W).bfloat16()
    with (
        mock.patch("prefixmem_fast.kernels.sorted_prefixes.block_of", return_value=BLOCK),
        counted(grad=grad) as traffic,
    ):
        backend.fused_update(grad, source, spec, step)
    floor = size + len(found.unique()) * 2 * (W * 2 + 4)
    return Count("fused update, RowWiseAdagrad, cross-item orders over tokens", traffic, floor, UPDATE, items)


def rows() -> Count:
    """Codes in, int64 rows of every level out."""
    spec, codes = spec_of(), codes_of(READ)
    with counted() as traffic:
        table_rows = prefix_rows(codes, spec, backend="triton")
    return Count("rows", traffic, codes.numel() * 8 + table_rows.numel() * 8, READING, READ, FORWARD_LAUNCHES)


def decoding(level: int, sequences: int = READ) -> Count:
    """The last tokens of each sequence and their entries in, the rows of the newest one's orders, S of it out."""
    spec = spec_of(table_rows=3000)
    codes, last = codes_of(sequences), spec.active_levels[-1]
    ids = torch.arange(L) * CODES + codes
    table = torch.stack([torch.arange(L * CODES) // CODES + 1, torch.arange(L * CODES) % CODES], 1).int()
    windows = torch.cat([ids[:, level:], ids[:, :level]], 1)  # the end of an item before, and one under way
    weight = torch.randn(spec.total_rows, W).bfloat16()
    with counted(weight=weight) as traffic:
        window_memory(windows, table, weight, spec, backend="triton")
    rows = level if level in spec.active_levels else 0
    floor = sequences * (last * (8 + 8) + rows * H * W * 2 + H * W * 2)
    return Count(f"decoding step, level {level}", traffic, floor, STREAM, sequences, FORWARD_LAUNCHES)


def backward(text: int | None = None, sids: int = READ) -> Count:
    """The dense gradient by atomics: codes and dS in, each row of each SID added in float32."""
    spec, codes = spec_of(table_rows=3000), codes_of(sids)
    weight = torch.randn(spec.total_rows, W).bfloat16().requires_grad_()
    if text is None:
        input_bytes, out = codes.numel() * 8, prefix_memory(codes, weight, spec, backend="triton")
    else:
        ids, table = _stream(codes, text)
        input_bytes, out = ids.numel() * 8, token_memory(ids, table, weight, spec, backend="triton")
    grad = torch.randn(out.shape).to(out)
    with counted(grad=grad) as traffic:
        out.backward(grad)
    floor = input_bytes + len(codes) * (A * H * W * 2 + N * H * W * 4)
    return Count("gradient by atomics" + _over(text), traffic, floor, UPDATE, len(codes))


def dense(kind: str = "uniform", sids: int = TRAINED) -> Count:
    """The dense gradient by sorting: codes and dS in, each touched row out."""
    return _trained(f"dense gradient by sorting, {kind}", kind, _dense, W * 2, sids=sids)


def sparse(kind: str = "uniform", sids: int = TRAINED) -> Count:
    """The touched rows and their float32 sums: codes and dS in, each touched row and its number out."""
    return _trained(f"sparse gradient, {kind}", kind, _sparse, W * 4 + 8, sids=sids)


_dense = partial(backend.dense_gradient, deterministic=True)
_sparse = partial(backend.row_sums, dtype=torch.float32)


def update(
    kind: str = "uniform",
    make: Callable[..., optim.RowOptimizer] = optim.SGD,
    mode: str = "prefix",
    dtype: torch.dtype = torch.bfloat16,
    text: int | None = None,
    sids: int = TRAINED,
) -> Count:
    """The fused update: codes and dS in, each touched row and its state in and out."""
    states = {optim.SGD: 0, optim.RowWiseAdagrad: 4, optim.RowWiseAdam: 4 + 4 * W, optim.LazyAdam: 8 * W}[make]
    spec = spec_of(mode)
    weight = torch.nn.Parameter(torch.zeros(spec.total_rows, W, dtype=dtype))
    step = make([weight], lr=0.1).begin(weight)
    run = partial(backend.fused_update, update=step)
    name = f"fused update, {make.__name__}, {mode}, {kind}, {_short(dtype)}{_over(text)}"
    return _trained(name, kind, run, 2 * (W * dtype.itemsize + states), mode, dtype, text, sids)


def _trained(
    name: str,
    kind: str,
    run: Callable,
    row_bytes: int,
    mode: str = "prefix",
    dtype: torch.dtype = torch.bfloat16,
    text: int | None = None,
    sids: int = TRAINED,
) -> Count:
    """`run` over a batch; each touched row costs `row_bytes`."""
    spec, codes = spec_of(mode), codes_of(sids, kind)
    codes[:, 0] %= sids // REPEATS
    source, input_bytes, shape = codes, codes.numel() * 8, (sids, A, H * W)
    if text is not None:
        source = TokenStream(*_stream(codes, text))
        input_bytes, shape = source.input_ids.numel() * 8, (*source.input_ids.shape, H * W)
    grad = torch.randn(shape).to(dtype)
    rows = prefix_rows(codes, spec, backend="reference")[:, [level - 1 for level in ACTIVE]]
    touched = len(rows[rows >= 0].unique())
    with (
        mock.patch("prefixmem_fast.kernels.sorted_prefixes.block_of", return_value=BLOCK),
        counted(grad=grad) as traffic,
    ):
        run(grad, source, spec)
    vectors = sids * A * H * W * dtype.itemsize  # dS where a level is active
    floor = input_bytes + vectors + touched * row_bytes
    return Count(name, traffic, floor, SUFFIX if mode == "suffix" else UPDATE, sids)


def _stream(codes: Tensor, text: int) -> tuple[Tensor, Tensor]:
    """SIDs as ids ``[2, T]``, each with tokens of text behind it, and the table of the vocabulary."""
    table = torch.zeros(1 + L * CODES, 2, dtype=torch.int32)
    table[1:, 0] = torch.arange(L).repeat_interleave(CODES) + 1
    table[1:, 1] = torch.arange(CODES).repeat(L)
    ids = torch.zeros(len(codes), L + text, dtype=torch.int64)
    ids[:, :L] = 1 + codes + CODES * torch.arange(L)
    return ids.view(2, -1), table


def _over(text: int | None) -> str:
    return "" if text is None else f", over tokens, {text} of text a SID"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


COUNTS: tuple[Callable[[], Count], ...] = (
    forward,
    lambda: forward("zipf 1.05"),
    lambda: forward("ended"),
    lambda: forward(dtype=torch.float32),
    lambda: quantized("int8"),
    lambda: quantized("fp8"),
    lambda: forward(mode="suffix"),
    lambda: forward(mode="full"),
    lambda: tokens(0),
    lambda: tokens(3),
    cross_item,
    lambda: cross_item(training=True),
    rows,
    lambda: decoding(1),
    lambda: decoding(3),
    lambda: backward(),
    lambda: backward(3, sids=48),
    lambda: dense(),
    lambda: dense("zipf 1.05"),
    lambda: sparse(),
    lambda: sparse("zipf 1.05"),
    lambda: update(),
    lambda: update("zipf 1.05"),
    lambda: update("hot"),
    lambda: update(make=optim.RowWiseAdagrad),
    lambda: update("zipf 1.05", optim.RowWiseAdagrad),
    lambda: update(make=optim.RowWiseAdagrad, dtype=torch.float32),
    lambda: update(make=optim.RowWiseAdam),
    lambda: update(make=optim.LazyAdam),
    lambda: update(make=optim.RowWiseAdagrad, text=3),
    lambda: update(make=optim.RowWiseAdagrad, mode="full"),
    lambda: update(make=optim.RowWiseAdagrad, mode="suffix"),
)


def table(counts: Iterable[Count]) -> str:
    """A line for each count, in columns of text."""
    form = "{:<66}{:>11}{:>9}{:>10}{:>11}{:>9}{:>7}  {}"
    lines = [form.format("kernel", "bytes", "sectors", "launches", "floor", "x floor", "limit", "")]
    for count in counts:
        traffic = count.traffic
        figures = (f"{traffic.total:,}", f"{traffic.sectors:,}", traffic.launches, f"{count.floor:,}")
        lines.append(form.format(count.name, *figures, f"{count.ratio:.3f}", f"{count.limit:.2f}", count.excess))
    return "\n".join(map(str.rstrip, lines))
