"""Tables that stay in the host's memory, for a model on a GPU: codes go to the host, S comes back, and dS goes again.

    codes [.., L] -> host,   S = gather on the host,   S -> the codes' device        forward
    dS -> host,   dense, sparse or fused on the host                                 backward

Nothing else crosses. With CUDA each crossing goes through pinned memory; the table never crosses, so it is not pinned
(torch would hold a copy meanwhile, and round its size up to a power of two).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _checks
from .._choices import TABLES
from ..addressing import AddressSpec, TokenStream
from ..operation import operators, prefix_memory, token_memory
from ..operation.backends import choose_backend, functions_of
from ..operation.functions import as_given, check_codes, check_stream, check_weight, two_dimensional
from ..operation.row_gradients import Gathered, check_unscaled, read_memory
from ..operation.table_state import count_change, table_state
from .config import PrefixMemConfig
from .table_worker import Worker, unguarded

HOST = torch.device("cpu")
_MOST_GATHERS = 4  # that wait to be taken; older ones are dropped


class Memory(Protocol):
    """What is read of a `PrefixMemory`."""

    weight: Tensor
    config: PrefixMemConfig
    tables: str
    overlap: bool
    backend: str
    grad: str
    deterministic: bool

    def options(self) -> dict[str, Any]:
        """Those of `prefix_memory`."""


def check_tables(tables: str, overlap: bool, grad: str) -> None:
    """Refuse unknown places of tables, and `overlap` where nothing can overlap."""
    _checks.choice("tables", tables, TABLES)
    _checks.boolean("overlap", overlap)
    if overlap and (tables != "host" or grad != "fused"):
        raise ValueError(
            f'overlap = True with tables = {tables!r} and grad = {grad!r}; it has the updates of grad="fused" run '
            "beside the model where tables are in the host's memory; give these two, or leave overlap out"
        )


def device_of_table(device: torch.device | str | None) -> torch.device:
    """The host, or meta where a module is made without memory."""
    return torch.device("meta") if torch.device(device or torch.get_default_device()).type == "meta" else HOST


def copy_across(x: Tensor, device: torch.device, *, own: bool = False) -> Tensor:
    """`x` on a device: the one way that codes, S and dS take. It is ready for the device's current stream.

    Args:
        own: a copy also where `x` is there already.
    """
    if x.device == device:
        return x.clone() if own else x
    if x.is_cuda and device == HOST:
        held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        held.copy_(x, non_blocking=True)
        torch.cuda.current_stream(x.device).synchronize()
        return held
    if device.type == "cuda" and x.device == HOST:
        # The allocator of pinned memory hands a block out again once the copies from it have ended.
        return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)
    return x.to(device)


class _Crossing(torch.autograd.Function):
    """`copy_across` there, and of the gradient back."""

    @staticmethod
    def forward(ctx, x, device, own):
        ctx.back = x.device, own
        return copy_across(x, device)

    @staticmethod
    def backward(ctx, grad):
        device, own = ctx.back
        if grad.device == device:
            return grad.clone() if own else grad, None, None
        return _Crossing.apply(grad, device, False), None, None


class _Gathered(torch.autograd.Function):
    """S that has been gathered before: its gradient is that of `prefix_memory` or `token_memory`."""

    @staticmethod
    def forward(ctx, weight, gathered, is_stream, options, *tensors):
        ctx.is_stream, ctx.options = is_stream, options
        ctx.save_for_backward(*tensors)
        return gathered.S

    @staticmethod
    def backward(ctx, grad):
        backward = operators.token_memory_backward if ctx.is_stream else operators.prefix_memory_backward
        tensors = ctx.saved_tensors
        return backward(grad, *tensors, *ctx.options), *[None] * (3 + len(tensors))


class _Gather(NamedTuple):
    """A gather in the thread, and how often the table had changed when it was asked for.

    The rows that it reads are kept, so that no other table gets their address meanwhile.
    """

    source: Tensor | TokenStream
    changes: int
    stale: bool
    rows: Tensor
    S: Future[Tensor]

    def reads(self, rows: Tensor) -> bool:
        """Whether they are those of this table, and not of another one or in another dtype."""
        mine = self.rows
        return (mine.data_ptr(), mine.dtype, mine.shape) == (rows.data_ptr(), rows.dtype, rows.shape)


class HostReader:
    """Reads the table of one `PrefixMemory` on the host. Copies and pickles start with nothing under way."""

    def __init__(self) -> None:
        self.worker = Worker()
        self._gathers: list[_Gather] = []
        self._changes, self._table = 0, None

    def __reduce__(self) -> Any:
        self.worker.finish()
        return HostReader, ()

    def forget(self) -> None:
        """Drop what was gathered, and wait for what the thread does: the table gets other numbers or another place."""
        self._gathers.clear()
        self.worker.wait()

    @torch.compiler.disable
    def read(self, memory: Memory, source: Tensor | TokenStream) -> Tensor:
        """S of codes ``[..., L]`` or of a token stream, on their device.

        Raises:
            TypeError, ValueError: `source` is not as `prefix_memory` or `token_memory` take it.
            RuntimeError: a mapped table would be trained, or a fused gradient would be one that GradScaler scaled.
            Exception: what the thread has raised since the last call.
        """
        weight, is_stream = memory.weight, isinstance(source, TokenStream)
        _check(source, memory)
        device = source.input_ids.device if is_stream else source.device
        trains = weight.requires_grad and torch.is_grad_enabled()
        if trains:
            _check_trainable(memory, device)
        if weight.is_meta:
            return _operation(source._replace(token_table=source[1].to(device)) if is_stream else source, memory)
        overlaps = trains and memory.overlap and memory.grad == "fused"
        source = _on_host(source, own=overlaps)  # the caller may write into its own before the update has ended
        S, lacks_update = self._take(source, weight)
        self.worker.raise_failed() if lacks_update else self.worker.finish()
        if S is None and not overlaps:
            S = _operation(source, memory)
        elif trains:
            S = _differentiated(source, S, memory, self.worker if overlaps else None)
        elif not is_stream:
            S = as_given(S, source)
        return _Crossing.apply(S, device, overlaps) if S.device != device or overlaps else S

    @torch.compiler.disable
    def prefetch(self, memory: Memory, source: Tensor | TokenStream, stale: bool) -> None:
        """See `PrefixMem.prefetch` and `PrefixMem.prefetch_tokens`."""
        spec, weight = memory.config.spec, memory.weight
        _check(source, memory)
        _checks.boolean("stale", stale)
        check_weight(weight, spec)
        _watch_fused_optimizers()
        table_state(weight).read_ahead = True
        source = _on_host(source, own=True)
        backend = choose_backend(memory.backend, weight=weight)
        rows = unguarded(weight)
        changes = self._changes_of(rows)
        S = self.worker.submit(_gather, source, rows, spec, backend)
        self._gathers.append(_Gather(source, changes, stale, rows, S))
        del self._gathers[:-_MOST_GATHERS]

    def _take(self, source: Tensor | TokenStream, weight: Tensor) -> tuple[Tensor | None, bool]:
        """S that has been gathered for this source, if one may be used, and whether an update is not in it."""
        rows = unguarded(weight)
        now = self._changes_of(rows) if self._gathers else 0
        for i, gather in enumerate(self._gathers):
            if _same(gather.source, source):
                del self._gathers[: i + 1]
                age = now - gather.changes
                if gather.reads(rows) and age <= int(gather.stale):
                    return gather.S.result(), age > 0
                gather.S.cancel()
                break
        return None, False

    def _changes_of(self, rows: Tensor) -> int:
        """How often the table has been found to differ from what it was at the call before."""
        table = object() if rows.is_inference() else (rows.data_ptr(), rows._version)  # the former have no version
        if table != self._table:
            self._table = table
            self._changes += 1
        return self._changes


@cache
def _watch_fused_optimizers() -> None:
    """Those of torch change a table without a new version of it, and are transformers' default."""

    def count_changes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group.get("fused") else ():
                count_change(parameter)

    register_optimizer_step_post_hook(count_changes)


def _check(source: Tensor | TokenStream, memory: Memory) -> None:
    if isinstance(source, TokenStream):
        check_stream(source)
    else:
        check_codes(source, memory.config.spec.levels)


def _same(source: Tensor | TokenStream, other: Tensor | TokenStream) -> bool:
    """Whether two sources have the same S; segments may be numbered otherwise."""
    if isinstance(source, TokenStream) and isinstance(other, TokenStream):
        tables = source.token_table is other.token_table or _equal(source.token_table, other.token_table)
        return tables and _equal(source.input_ids, other.input_ids) and torch.equal(_edges(source), _edges(other))
    return isinstance(source, Tensor) and isinstance(other, Tensor) and _equal(source, other)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)


def _edges(stream: TokenStream) -> Tensor:
    """Between which neighbours one packed sequence ends and another begins: bool ``[B, T - 1]``."""
    segments = torch.zeros_like(stream.input_ids) if stream.segment_ids is None else stream.segment_ids
    return segments[:, 1:] != segments[:, :-1]


def _check_trainable(memory: Memory, device: torch.device) -> None:
    if memory.tables == "mapped":
        raise RuntimeError(
            'tables = "mapped" cannot be trained, and the table requires a gradient; load the encoder with '
            'tables="host", or freeze it: encoder.memory.requires_grad_(False)'
        )
    if memory.grad == "fused":
        check_unscaled(device.type)


def _on_host(source: Tensor | TokenStream, *, own: bool) -> Tensor | TokenStream:
    if not isinstance(source, TokenStream):
        return copy_across(source, HOST, own=own)
    tokens, table, segments = source  # the table is the vocabulary's own
    segments = None if segments is None else copy_across(segments, HOST, own=own)
    return TokenStream(copy_across(tokens, HOST, own=own), table, segments)


def _gather(source: Tensor | TokenStream, weight: Tensor, spec: AddressSpec, backend: str) -> Tensor:
    """S of codes, ``[M, A, D]`` whatever their shape, or of a token stream; in memory from where it crosses fast."""
    source = source if isinstance(source, TokenStream) else two_dimensional(source)
    S = functions_of(backend).forward(source, weight, spec)
    return S.pin_memory() if torch.cuda.is_initialized() else S


def _operation(source: Tensor | TokenStream, memory: Memory) -> Tensor:
    weight, spec, options = memory.weight, memory.config.spec, memory.options()
    if isinstance(source, TokenStream):
        tokens, table, segments = source
        return token_memory(tokens, table, weight, spec, segment_ids=segments, **options)
    return prefix_memory(source, weight, spec, **options)


def _differentiated(source: Tensor | TokenStream, S: Tensor | None, memory: Memory, updates: Worker | None) -> Tensor:
    """S, gathered or not, with its derivative in the table."""
    weight, spec = memory.weight, memory.config.spec
    check_weight(weight, spec)
    backend = choose_backend(memory.backend, weight=weight)
    is_stream = isinstance(source, TokenStream)
    given = source if is_stream else two_dimensional(source)
    gathered = None if S is None else Gathered(S)
    if memory.grad == "dense":
        options = spec.key, backend, memory.deterministic
        S = _Gathered.apply(weight, gathered, is_stream, options, *(source if is_stream else (given,)))
    else:
        S = read_memory(weight, given, spec, backend, memory.grad, gathered=gathered, updates=updates)
    return S if is_stream else as_given(S, source)


class MappedTable(nn.Parameter):
    """A table that is a map of its file. Nothing is written into it, so one map serves all deep copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedTable:
        return self


def staying_on_host(fn: Callable[[Tensor], Tensor], mapped: bool) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` is to do to a table: the change of dtype of `fn`, and not that of device.

    `fn` itself would copy the table to the GPU first, so it is asked on a tensor without elements.
    """

    def apply(table: Tensor) -> Tensor:
        wanted = fn(torch.empty(0, dtype=table.dtype, device=table.device))
        if mapped:
            if wanted.dtype != table.dtype:
                raise RuntimeError(
                    f'tables = "mapped" is read from its file in {table.dtype} and cannot become {wanted.dtype}; load '
                    f'the encoder with tables="host", dtype={wanted.dtype}'
                )
            return table
        if wanted.device == table.device or wanted.device.type == "meta":
            return fn(table)
        if table.is_meta:
            return torch.empty_like(table, device=HOST, dtype=wanted.dtype)
        return table.to(wanted.dtype)

    return apply
