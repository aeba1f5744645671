"""`replicate`: whole tables on every rank.

The forward pass reads this rank's copy, and nothing crosses. The backward pass gathers what the update of rows needs,
the codes of every rank's SIDs and the gradient of their S, and each rank updates its copy by all of it: the same update
of the same batch, so the copies stay equal to the bit, and equal to those of one process that sees the whole batch.

    bytes that leave a rank, a SID of its own:   (W - 1) * (2 L + A * d_mem * b)       W ranks, b bytes a number of dS
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks
from ..addressing import AddressSpec, TokenStream
from ..encoder import PrefixMemory
from ..operation.table_state import table_state
from .exchange import Exchange, SIDs
from .ranks import on_all
from .tables import hide_from_ddp, process_group_is_needed, trained_by_rows

REDUCTIONS = ("mean", "sum")
_COMM_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_MOST_SAMPLED = 256  # rows of a table whose copies are compared


def replicate(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    comm_dtype: torch.dtype | None = None,
    managed: bool = False,
    reduce: str = "mean",
    timeout: timedelta | None = None,
) -> nn.Module:
    """Train the tables of a model on several processes, each of which holds all of them. In place, on every rank.

    Call it before DistributedDataParallel, FSDP2, accelerate or DeepSpeed wrap the model. The first rank's tables are
    copied to all. One process trains as before. The optimizer takes gradients of the whole batch, so accumulation and
    clipping by the global norm act on those too.

    Args:
        model: holds a `PrefixMem` with grad="sparse" or "fused" somewhere, or is one.
        group: of the ranks; None for all.
        comm_dtype: the gradient of S travels in it, such as torch.bfloat16; None for its own dtype, which alone gives
            the bits of one process.
        managed: the table is none of the model's parameters, so that what wraps the model does not see it: needed with
            DeepSpeed, and with FSDP2 where it is not told to ignore the table. `optim.for_model` finds it all the same.
            What goes through the model's parameters does not reach it: clipping (`optim.clip_grad_norm_` of the model
            does, a Trainer's max_grad_norm does not), model.zero_grad(), weight averaging (EMA, SWA), GradScaler.
        reduce: "mean" over ranks, as DistributedDataParallel and FSDP2 do with all other gradients, or "sum".
        timeout: how long a rank waits for another one; None for torch's default.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: an argument is not as stated, or a table is not trained by rows.
        ExchangeError: the ranks' tables are not of one spec and dtype, or a rank is missing.
    """
    check_options(comm_dtype, reduce)
    _checks.boolean("managed", managed)
    memories = tables_to_train(model, group)
    exchanges = exchanges_for(memories, group, timeout) if process_group_is_needed() else {}
    for name, memory in memories.items():
        exchange = exchanges.get(memory.tables != "device")
        table = ReplicatedTable(name or "the table", memory, exchange, reduce == "mean", comm_dtype)
        table.begin_with(memory.weight)
        table_state(memory.weight).exchange = table
        hide_from_ddp(model, name)  # which wraps one process of torchrun too
        if managed:
            memory.hide_table()
    return model


def tables_to_train(model: nn.Module, group: object = None, *, meta: bool = False) -> dict[str, PrefixMemory]:
    """`trained_by_rows`; what one rank refuses, all refuse, where all of them call it."""
    found: dict[str, PrefixMemory] = {}

    def check() -> None:
        found.update(trained_by_rows(model, meta=meta))

    if group is None:
        on_all(check)
    else:
        check()
    return found


def check_options(comm_dtype: torch.dtype | None, reduce: str) -> None:
    _checks.choice("reduce", reduce, REDUCTIONS)
    if comm_dtype not in (None, *_COMM_DTYPES):
        raise ValueError(
            f"comm_dtype = {comm_dtype}; give one of {', '.join(map(str, _COMM_DTYPES))}, or None (float16 would "
            "overflow)"
        )


def exchanges_for(
    memories: dict[str, PrefixMemory], group: dist.ProcessGroup | None, timeout: timedelta | None
) -> dict[bool, Exchange]:
    """One for tables on the device and one for those in the host's memory, where there are such."""
    places = sorted({memory.tables != "device" for memory in memories.values()})
    return {on_host: Exchange(group, backend="gloo" if on_host else None, timeout=timeout) for on_host in places}


class ReplicatedTable:
    """The `operation.table_state.Exchange` of a table that its ranks hold alike.

    Args:
        name: for messages.
        memory: whose table it is.
        exchange: None where this rank alone holds it.
        mean: divide the gradient by the number of ranks.
    """

    def __init__(
        self,
        name: str,
        memory: PrefixMemory,
        exchange: Exchange | None,
        mean: bool,
        comm_dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.exchange, self.mean, self.comm_dtype = name, exchange, mean, comm_dtype
        self._checked: Callable[[], Any] = lambda: None  # the DistributedDataParallel that has been looked at
        self._compared = False
        self._key = memory.config.spec.key

    def begin_with(self, weight: Tensor) -> None:
        """Copy the first rank's table to all."""
        if self.exchange is not None:
            call = f"replicating {self.name}"
            same = {"spec": self._key, "dtype": weight.dtype, "shape": tuple(weight.shape)}
            self.exchange.header(0, same, weight.device, call)
            self.exchange.broadcast(weight.detach(), call)

    def check(self, weight: Tensor) -> None:
        ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)  # whose forward pass this is in
        if ddp is None or ddp is self._checked():
            return
        ignored = getattr(ddp, "parameters_to_ignore", ())
        if any(parameter is weight for name, parameter in ddp.module.named_parameters() if name not in ignored):
            raise RuntimeError(
                f"DistributedDataParallel would reduce the gradient of {self.name} too: call replicate before it wraps "
                f"the model, with the module that it wraps (a {type(ddp.module).__name__}), or with managed=True"
            )
        self._checked = weakref.ref(ddp)

    def gather(
        self, weight: Tensor, dS: Tensor, source: Tensor | TokenStream, spec: AddressSpec, grad: str
    ) -> tuple[Tensor, Tensor | TokenStream]:
        if self.exchange is None:
            return dS, source
        call = f"gathering the gradient of {self.name}"
        sids = SIDs(source, spec)
        dS = sids.take(dS)
        sent = dS / self.exchange.size if self.mean else dS
        same = {
            "spec": self._key,
            "dtype": weight.dtype,
            "grad": grad,
            "mean": self.mean,
            "comm_dtype": self.comm_dtype,
            **described(weight),
        }
        if not self._compared:  # ranks may have loaded their own since
            same["a sample of the rows and their state"] = fingerprint(weight)
        counts = self.exchange.header(len(sids.codes), same, dS.device, call)
        self._compared = True
        codes = self.exchange.gather(sids.codes, counts, call)
        return self.exchange.gather(sent.to(self.comm_dtype or dS.dtype), counts, call).to(dS.dtype), codes


def described(weight: Tensor) -> dict[str, Any]:
    """What ranks have to agree in of the optimizer that holds a table."""
    optimizer = table_state(weight).optimizer
    return {"optimizer": None} if optimizer is None else optimizer.described(weight)


def fingerprint(weight: Tensor) -> int:
    """A checksum of some rows and of their optimizer's state."""
    optimizer = table_state(weight).optimizer
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    step = max(len(weight) // _MOST_SAMPLED, 1)
    sampled = [tensor.detach()[::step] if tensor.dim() else tensor for tensor in (weight.detach(), *state.values())]
    return zlib.crc32(b"".join(bytes(t.contiguous().cpu().view(-1).view(torch.uint8).numpy()) for t in sampled))
