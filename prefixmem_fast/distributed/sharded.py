"""`shard`: tables divided over ranks by heads, in whole rows.

Each rank of a group holds some of the heads. All gather one another's codes, each reads its heads' columns of S for all
of them, and an all-to-all brings every SID's columns together. The gradient of S goes the same way back, and each rank
updates its own rows. Rows stay whole, so row-wise optimizers are what they are in one process, to the bit.

    bytes that leave a rank, a SID of its own:   2 L (W - 1) + 2 A * d_mem * b * (W - 1) / W         W ranks

With more ranks than heads the mesh has two dimensions. Groups of `shard` ranks hold the tables once each, and the ranks
that hold the same heads gather the gradient of S from one another, as those of `replicate` do.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .._pages import ask_for_huge_pages
from ..addressing import TokenStream
from ..encoder import PrefixMem, PrefixMemConfig, PrefixMemory
from ..encoder.prefixmem import first_lag_weights
from ..operation.table_state import table_state
from .exchange import Exchange, SIDs
from .plan import shard_ranks
from .replicated import ReplicatedTable, check_options, described, replicate, tables_to_train
from .saving import save_pretrained
from .tables import blocks_within, process_group_is_needed

DIMENSIONS = ("replicate", "shard")


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    comm_dtype: torch.dtype | None = None,
    reduce: str = "mean",
    timeout: timedelta | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Divide the tables of a model over processes by heads, in place, on every rank; each keeps only its heads.

    Call it as `replicate`, and before the optimizer is built. The forward pass is collective too: every rank has to
    read the encoder equally often, in evaluation and generation as well. The tables are managed (see `replicate`) and
    in no state_dict: `optim.for_model` finds them, `save_tables` and the encoder's `save_pretrained` write them, on
    every rank.

    Args:
        model: holds a `PrefixMem` with grad="sparse" or "fused" somewhere, or is one. The first rank's tables count. A
            `PrefixMem(config, device="meta")`, whose tables nobody has to hold whole, gets parts that start from the
            config's normal distribution, and the rest of it as at its making.
        mesh: of one dimension, with at most as many ranks as the spec has heads, or of two, named "replicate" and
            "shard". None takes all ranks, in the largest groups that divide a host's ranks and give each a head.
        comm_dtype, reduce, timeout: as for `replicate`.
        device: of what comes from the meta device; None for the default one.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: an argument is not as stated, or a table is not trained by rows.
        ExchangeError: the ranks' tables are not of one spec and dtype, or a rank is missing.
    """
    check_options(comm_dtype, reduce)
    memories = tables_to_train(model, mesh, meta=True)
    for name, memory in memories.items():
        if table_state(memory.weight).optimizer is not None:
            raise ValueError(
                f"an optimizer holds the whole table of {name or 'the encoder'}, and would go on with it; build the "
                "optimizer after shard"
            )
    if not process_group_is_needed():
        if mesh is not None:
            raise ValueError("mesh is given, and there is one process; start the script with torchrun")
        return replicate(model, managed=True)  # refuses the meta device
    heads = min(memory.config.spec.heads for memory in memories.values())
    inner, outer = _ranks_of(mesh, heads)
    across = Exchange(inner, timeout=timeout)
    alike: dict[bool, Exchange] = {}
    for name, memory in memories.items():
        name, on_host = name or "the table", memory.tables != "device"
        if len(outer) > 1 and on_host not in alike:
            alike[on_host] = Exchange(outer, backend="gloo" if on_host else None, timeout=timeout)
        exchange = alike.get(on_host)
        division = DividedTable(name, memory.config, across, len(outer) if reduce == "mean" else 0, comm_dtype)
        division.is_first_copy = outer[0] == dist.get_rank()
        if memory.weight.is_meta:
            division.make_part(memory, device)
        else:
            ReplicatedTable(name, memory, across, False).begin_with(memory.weight)
            division.take_part(memory)
        # Of the ranks with the same heads; dS has been divided by the number of all ranks before it comes here.
        own = ReplicatedTable(name, memory, exchange, False, comm_dtype)
        own.begin_with(memory.weight)
        table_state(memory.weight).exchange = own
    _make_rest(model, across, device)
    return model


def _make_rest(model: nn.Module, exchange: Exchange, device: torch.device | str | None) -> None:
    """W_out, W_head and weights of lags that are on the meta device, the same on all ranks of a group."""
    for encoder in model.modules():
        if isinstance(encoder, PrefixMem) and encoder.out_proj.weight.is_meta:
            for projection in filter(None, (encoder.out_proj, encoder.head_proj)):
                projection.to_empty(device=device or torch.get_default_device())
                projection.reset_parameters()
                exchange.broadcast(projection.weight.detach(), "making W_out")
            if encoder.lag_weights is not None:
                out = encoder.out_proj.weight
                encoder.lag_weights = first_lag_weights(encoder.config.lags, out.device, out.dtype)


def _ranks_of(mesh: DeviceMesh | None, heads: int) -> tuple[list[int], list[int]]:
    """The ranks that hold other heads than this one, and those that hold the same ones; this one is in both."""
    if mesh is None:
        world, rank = dist.get_world_size(), dist.get_rank()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # of this host: the forward pass waits for no other one
        size = shard_ranks(heads, world, local)
        if size == 1:
            warnings.warn(
                f"{local} ranks a host have no divisor from 2 to {heads}, the heads of a spec, so each holds whole "
                "tables; give a mesh, or another number of ranks",
                stacklevel=3,
            )
        first = rank - rank % size
        return list(range(first, first + size)), list(range(rank % size, world, size))
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is a {type(mesh).__name__}; give a DeviceMesh of init_device_mesh, or None")
    names = mesh.mesh_dim_names
    if (mesh.ndim == 2 and names != DIMENSIONS) or mesh.ndim > 2:
        raise ValueError(
            f'mesh has the dimensions {names or mesh.ndim}; give one, or two with mesh_dim_names=("replicate", "shard")'
        )
    inner = dist.get_process_group_ranks(mesh.get_group(mesh.ndim - 1))
    if len(inner) > heads:
        raise ValueError(
            f"mesh divides the tables over {len(inner)} ranks, and a spec has {heads} heads, one a rank at most; give "
            f'a mesh of two dimensions, mesh_dim_names=("replicate", "shard"), with at most {heads} ranks in the second'
        )
    return inner, dist.get_process_group_ranks(mesh.get_group(0)) if mesh.ndim == 2 else [dist.get_rank()]


class DividedTable:
    """The `encoder.memory.Division` of a table: this rank's heads, and how S of all heads comes together.

    Attributes:
        config: of the whole tables.
        start, stop: this rank's heads.
        exchange: with the ranks that hold the others.
        copies: how many ranks hold the same ones; 0 where the gradient is summed over ranks, and not averaged.
    """

    def __init__(
        self, name: str, config: PrefixMemConfig, exchange: Exchange, copies: int, comm_dtype: torch.dtype | None
    ) -> None:
        self.name, self.config, self.exchange, self.copies = name, config, exchange, copies
        self.bounds = [i * config.spec.heads // exchange.size for i in range(exchange.size + 1)]
        self.start, self.stop = self.bounds[exchange.rank : exchange.rank + 2]
        self.comm_dtype = comm_dtype
        self.is_first_copy, self.saved_apart = True, False
        self._device = torch.device("cpu")  # where codes come from

    def norm(self, gradient: Tensor | None, order: float) -> Tensor:
        own = 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient, order))
        own, call = torch.tensor([own], device=self._device), f"clipping {self.name}"
        self.exchange.header(0, {"norm of order": order}, self._device, call)
        norms = self.exchange.gather(own, [1] * self.exchange.size, call)
        return torch.linalg.vector_norm(norms, order)

    def save(self, encoder: nn.Module, path: Path, vocabulary: Any, max_shard_size: int | str) -> None:
        save_pretrained(encoder, path, vocabulary, max_shard_size=max_shard_size)

    def take_part(self, memory: PrefixMemory) -> None:
        """Put this rank's rows in the place of the whole table."""
        self._put(memory, self.part_of(memory.weight.detach()))

    def make_part(self, memory: PrefixMemory, device: torch.device | str | None) -> None:
        """Rows of this rank's heads, as `reset_parameters` draws them; no two ranks draw the same."""
        rows, device = (
            self.config.spec.for_heads(self.start, self.stop).total_rows,
            device or torch.get_default_device(),
        )
        if memory.tables != "device":
            device = "cpu"
        part = torch.empty(rows, self.config.row_width, dtype=memory.weight.dtype, device=device)
        drawn = torch.randint(1 << 62, (1,), device=device if torch.device(device).type == "cuda" else None)
        self.exchange.broadcast(drawn, f"making {self.name}")
        generator = torch.Generator(device).manual_seed((int(drawn) + 0x9E3779B97F4A7C15 * self.start) % (1 << 63))
        part.normal_(std=self.config.memory_init_std, generator=generator)
        self._put(memory, part)

    def _put(self, memory: PrefixMemory, part: Tensor) -> None:
        ask_for_huge_pages(part)
        spec, width = self.config.spec.for_heads(self.start, self.stop), self.config.row_width
        memory.before_write()
        memory.hide_table()
        memory.division = self
        memory.config = dataclasses.replace(self.config, spec=spec, memory_dim=spec.heads * width, cross_item=None)
        memory.__dict__["weight"] = nn.Parameter(part, memory.weight.requires_grad)
        memory._keep_table()
        state = table_state(memory.weight)
        state.managed, state.part = True, self.start

    def widths(self) -> list[int]:
        """Columns of S that each rank holds."""
        return [(stop - start) * self.config.row_width for start, stop in pairwise(self.bounds)]

    def part_of(self, table: Tensor) -> Tensor:
        own = self.config.spec.for_heads(self.start, self.stop)
        return torch.cat([table[rows] for *_, rows in blocks_within(self.config.spec, own)])

    def read(self, memory: PrefixMemory, source: Tensor | TokenStream) -> Tensor:
        spec, call = self.config.spec, f"reading {self.name}"
        sids = SIDs(source, spec)
        self._device, same = sids.codes.device, {"call": "reading", "spec": spec.key, "dtype": memory.weight.dtype}
        counts = self.exchange.header(len(sids.codes), same, self._device, call)
        codes = self.exchange.gather(sids.codes, counts, call)
        return sids.put(_Columns.apply(memory.read_own(codes), counts, self, memory))


class _Columns(torch.autograd.Function):
    """This rank's columns of S for the SIDs of all ranks ``[sum M, A, h * w]``, to all columns of its own
    ``[M, A, H * w]``, and of the gradient the other way."""

    @staticmethod
    def forward(ctx, S: Tensor, counts: list[int], table: DividedTable, memory: PrefixMemory) -> Tensor:
        ctx.counts, ctx.table, ctx.memory = counts, table, memory
        own, (_, A, columns) = counts[table.exchange.rank], S.shape
        widths = table.widths()
        sent = [count * A * columns for count in counts]
        received = [own * A * width for width in widths]
        parts = table.exchange.swap(S.flatten(), sent, received, f"reading {table.name}").split(received)
        return torch.cat([part.view(own, A, width) for part, width in zip(parts, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx, dS: Tensor) -> tuple[Tensor | None, ...]:
        counts, table, memory = ctx.counts, ctx.table, ctx.memory
        exchange, dtype, widths, A = table.exchange, dS.dtype, table.widths(), dS.shape[1]
        if table.copies:
            dS = dS / (exchange.size * table.copies)
        dS = dS.to(table.comm_dtype or dtype)
        columns = widths[exchange.rank]
        parts = torch.cat([part.flatten() for part in dS.split(widths, -1)])
        sent = [len(dS) * A * width for width in widths]
        received = [count * A * columns for count in counts]
        call = f"returning the gradient of {table.name}"
        same = {"call": "gradient", "spec": table.config.spec.key, "copies": table.copies, "grad": memory.grad}
        same |= {"comm_dtype": table.comm_dtype, **described(memory.weight)}
        exchange.header(len(dS), same, dS.device, call)
        return exchange.swap(parts, sent, received, call).view(-1, A, columns).to(dtype), None, None, None
