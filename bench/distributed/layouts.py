"""The layouts of the tables over processes, and the formula of what each sends.

All read the same rows of hashed tables, get the same gradient of S, and train by the mean over ranks. A layout holds
its tables, or its part of them, and a step is forward, backward and update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prefixmem_fast import PrefixMem, PrefixMemConfig, optim
from prefixmem_fast.distributed import from_torchrec, plan, replicate, shard, to_torchrec
from prefixmem_fast.distributed.capacity import CatalogueSize
from prefixmem_fast.distributed.replicated import ReplicatedTable
from prefixmem_fast.distributed.torchrec import require_torchrec
from prefixmem_fast.encoder import PrefixMemory
from prefixmem_fast.operation.table_state import table_state
from prefixmem_fast.optim.rows import RowOptimizer

from ..benchmarks.providers import LR
from ..benchmarks.workloads import BATCHES, HEADS, WIDTH, Workload, touched

EPS = 1e-10
INDEX_BYTES = 8
SUMMED_OTHERWISE = 1e-6  # float32 sums of the same terms in another order
ROUNDED = 0.05 * LR  # dS with 8 bits of mantissa: 2^-9 of a step whose largest numbers are 8 times its mean square
PART = 1 << 18  # rows compared at a time
SHAPE = CatalogueSize(1)  # the sizes of a SID; how many items there are does not count


@dataclass(frozen=True)
class Task:
    """What all layouts do: `ranks` processes with `sids` Semantic IDs each, in float32."""

    ranks: int
    sids: int
    codes: str
    table_rows: int

    @cached_property
    def workload(self) -> Workload:
        """The batch of all ranks."""
        return Workload(self.sids * self.ranks, self.codes, self.table_rows, "float32")

    def named(self) -> dict[str, int | str]:
        """The workload of a row."""
        names = ("ranks", "sids", "codes", "table_rows")
        return {**{name: getattr(self, name) for name in names}, "dtype": "float32"}

    def encoder(self, grad: str = "dense") -> PrefixMem:
        """With the same tables at every call; W_out is not used."""
        config = PrefixMemConfig(self.workload.spec, memory_dim=HEADS * WIDTH, hidden_size=1)
        encoder = nn.utils.skip_init(PrefixMem, config, grad=grad)
        encoder.memory.weight.data = self.workload.weight("cpu")
        nn.init.zeros_(encoder.out_proj.weight)
        return encoder


@dataclass(frozen=True)
class Batches:
    """Codes ``[M, L]`` in turn and dS ``[M, A, H * w]``, of all ranks or of one."""

    codes: list[Tensor]
    dS: Tensor

    @classmethod
    def of_all(cls, task: Task) -> Batches:
        return cls(task.workload.batches("cpu"), task.workload.gradient("cpu"))

    def of_rank(self, task: Task, rank: int) -> Batches:
        own = slice(rank * task.sids, (rank + 1) * task.sids)
        return Batches([codes[own].clone() for codes in self.codes], self.dS[own].clone())

    def mean(self, task: Task) -> Batches:
        """For one process, whose gradient no exchange divides by the number of ranks."""
        return Batches(self.codes, self.dS / task.ranks)


class Layout:
    """One line of the table.

    Attributes:
        name: as rows have it; this package's own begin with its name.
        rule: the optimizer, in words.
        trains_as: the optimizer of the one process that it is held to.
        tolerance: how far a number of the tables may be from that of one process after two steps; None for none where
            dividing by the number of ranks is exact.
        alone: the first rank steps with the batch of all, and the others wait.
    """

    name: str
    rule = "row-wise Adagrad, fused"
    trains_as: type[RowOptimizer] = optim.RowWiseAdagrad
    tolerance: float | None = SUMMED_OTHERWISE
    alone = False
    memory: PrefixMemory
    optimizer: torch.optim.Optimizer

    def __init__(self, task: Task) -> None:
        raise NotImplementedError

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here, or None."""
        return None

    @classmethod
    def tolerance_of(cls, ranks: int) -> float:
        if cls.tolerance is None:
            return SUMMED_OTHERWISE if ranks & (ranks - 1) else 0.0
        return cls.tolerance

    @classmethod
    def formula(cls, task: Task, batches: Batches) -> float:
        """Bytes that leave a rank, a SID of its own; `batches` are those of all ranks."""
        return 0.0

    @classmethod
    def copies(cls, ranks: int) -> float:
        """Bytes of tables and gradients of all ranks, as a multiple of those of the tables."""
        return ranks

    def step(self, codes: Tensor, dS: Tensor) -> None:
        self.memory(codes).backward(dS)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def off_by(self, expected: Tensor) -> float:
        """The largest difference from the tables ``[R, w]``; NaN where one is."""
        return largest_difference(self.memory.weight.detach(), expected)


def largest_difference(table: Tensor, expected: Tensor) -> float:
    pairs = zip(table.split(PART), expected.split(PART), strict=True)
    return max((float((mine - theirs).abs().max()) for mine, theirs in pairs), key=lambda off: (math.isnan(off), off))


def by_itself(memory: PrefixMemory) -> PrefixMemory:
    """Allow row gradients of this process alone in one of several."""
    table_state(memory.weight).exchange = ReplicatedTable("the table", memory, None, False)
    return memory


def adagrad(memory: PrefixMemory) -> RowOptimizer:
    return optim.RowWiseAdagrad([memory.weight], lr=LR, eps=EPS)


class OneProcess(Layout):
    name = "prefixmem_fast, one process"
    tolerance = None
    alone = True

    def __init__(self, task: Task) -> None:
        self.memory = by_itself(task.encoder("fused").memory)
        self.optimizer = adagrad(self.memory)

    @classmethod
    def copies(cls, ranks: int) -> float:
        return 1


class Replicate(Layout):
    name = "prefixmem_fast, replicate"
    tolerance = None
    comm_dtype: torch.dtype | None = None

    def __init__(self, task: Task) -> None:
        encoder = replicate(task.encoder("fused"), comm_dtype=self.comm_dtype)
        self.memory, self.optimizer = encoder.memory, adagrad(encoder.memory)

    @classmethod
    def formula(cls, task: Task, batches: Batches) -> float:
        return plan.replicate_sent(SHAPE, task.ranks, (cls.comm_dtype or torch.float32).itemsize)


class ReplicateBfloat16(Replicate):
    name = "prefixmem_fast, replicate, bfloat16"
    tolerance = ROUNDED
    comm_dtype = torch.bfloat16


class Shard(Layout):
    name = "prefixmem_fast, shard"
    tolerance = None
    comm_dtype: torch.dtype | None = None

    def __init__(self, task: Task) -> None:
        encoder = shard(task.encoder("fused"), comm_dtype=self.comm_dtype)
        self.memory, self.optimizer = encoder.memory, adagrad(encoder.memory)

    @classmethod
    def formula(cls, task: Task, batches: Batches) -> float:
        """S crosses in float32, whatever dS crosses in."""
        size = (cls.comm_dtype or torch.float32).itemsize
        shards = plan.shard_ranks(HEADS, task.ranks)
        return plan.shard_sent(SHAPE, shards, task.ranks // shards, size, 4)

    @classmethod
    def copies(cls, ranks: int) -> float:
        return ranks / plan.shard_ranks(HEADS, ranks)

    def off_by(self, expected: Tensor) -> float:
        return largest_difference(self.memory.weight.detach(), self.memory.division.part_of(expected))


class ShardBfloat16(Shard):
    name = "prefixmem_fast, shard, bfloat16"
    tolerance = ROUNDED
    comm_dtype = torch.bfloat16


class TorchRec(Layout):
    name = "TorchRec, row-wise"
    rule = "row-wise Adagrad of FBGEMM"

    def __init__(self, task: Task) -> None:
        from torchrec.distributed import DistributedModelParallel
        from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
        from torchrec.distributed.sharding_plan import get_default_sharders

        module = to_torchrec(task.encoder(), optimizer="row_adagrad", lr=LR, eps=EPS)
        constraints = module.constraints(sharding_types=["row_wise"])
        topology = Topology(task.ranks, compute_device="cpu")
        planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
        planned = planner.collective_plan(module, get_default_sharders(), dist.group.WORLD)
        self.model = DistributedModelParallel(module, device=torch.device("cpu"), plan=planned)

    @classmethod
    def missing(cls) -> str | None:
        try:
            require_torchrec()
        except ImportError as error:
            return f"not installed, or does not load: {str(error).splitlines()[0]}"
        return None

    @classmethod
    def formula(cls, task: Task, batches: Batches) -> float:
        """Of rows that are spread evenly over ranks."""
        return plan.torchrec_sent(SHAPE, task.ranks, 4)

    @classmethod
    def copies(cls, ranks: int) -> float:
        return 1

    def step(self, codes: Tensor, dS: Tensor) -> None:
        """The backward pass updates."""
        self.model.module.memory(codes).backward(dS)

    def off_by(self, expected: Tensor) -> float:
        return largest_difference(from_torchrec(self.model).memory.weight.detach(), expected)


class GatheredRows(Layout):
    """What an all-reduce of coalesced sparse gradients moves: every rank gets the touched rows and sums of all."""

    name = "gathered rows"
    rule = "row-wise Adagrad, sparse gradient"

    def __init__(self, task: Task) -> None:
        self.memory = by_itself(task.encoder("sparse").memory)
        self.optimizer = adagrad(self.memory)

    @classmethod
    def formula(cls, task: Task, batches: Batches) -> float:
        """Of the second batch, at its rank with the most rows: the others are filled up."""
        rows = max(touched(part, task.workload.spec)[0] for part in batches.codes[1].split(task.sids))
        return rows * (INDEX_BYTES + 4 * WIDTH) * (task.ranks - 1) / task.sids

    @classmethod
    def copies(cls, ranks: int) -> float:
        return ranks

    def step(self, codes: Tensor, dS: Tensor) -> None:
        self.memory(codes).backward(dS)
        weight = self.memory.weight
        gradient = weight.grad.coalesce()
        rows, sums = (gathered(part) for part in (gradient.indices()[0], gradient.values()))
        sums /= dist.get_world_size()
        weight.grad = torch.sparse_coo_tensor(rows[None], sums, weight.shape, check_invariants=False).coalesce()
        self.optimizer.step()
        self.optimizer.zero_grad()


def gathered(part: Tensor) -> Tensor:
    """Those of all ranks, one after another; shorter ones travel filled up to the longest."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(part)]))
    most = int(max(counts))
    filled = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
    found = [torch.empty_like(filled) for _ in counts]
    dist.all_gather(found, filled)
    return torch.cat([other[: int(count)] for other, count in zip(found, counts, strict=True)])


class DenseDDP(Layout):
    name = "DistributedDataParallel, dense gradient"
    rule = "SGD of torch"
    trains_as = optim.SGD

    def __init__(self, task: Task) -> None:
        self.memory = task.encoder().memory
        self.model = DistributedDataParallel(self.memory, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)

    @classmethod
    def formula(cls, task: Task, batches: Batches) -> float:
        return plan.dense_sent(task.workload.table_bytes, task.ranks) / task.sids

    @classmethod
    def copies(cls, ranks: int) -> float:
        return 2 * ranks  # the gradient lies in the buffer that it is reduced in

    def step(self, codes: Tensor, dS: Tensor) -> None:
        self.model(codes).backward(dS)
        self.optimizer.step()
        self.optimizer.zero_grad()


LAYOUTS: dict[str, type[Layout]] = {
    "one-process": OneProcess,
    "replicate": Replicate,
    "replicate-bfloat16": ReplicateBfloat16,
    "shard": Shard,
    "shard-bfloat16": ShardBfloat16,
    "torchrec": TorchRec,
    "gathered-rows": GatheredRows,
    "dense": DenseDDP,
}


def expected_tables(task: Task, mean: Batches, rule: type[RowOptimizer], steps: int) -> Tensor:
    """What one process makes of the tables by the batches of all ranks, `Batches.mean`."""
    memory = by_itself(task.encoder("fused").memory)
    optimizer = adagrad(memory) if rule is optim.RowWiseAdagrad else rule([memory.weight], lr=LR)
    for turn in range(steps):
        memory(mean.codes[turn % BATCHES]).backward(mean.dS)
        optimizer.step()
        optimizer.zero_grad()
    return memory.weight.detach()
