"""Which layout of the tables fits a number of GPUs, and the bytes that it sends, by formulas.

Bytes that leave a rank for one Semantic ID (SID) of its own batch, forward and backward. Codes are int16. There are W
ranks, and the numbers of dS, the gradient of S, take b bytes. S and the rows of TorchRec travel in the dtype of the
tables; here they take b too.

    dense DDP      2 (W - 1) / W * bytes of the tables / M        ring all_reduce of a step of M SIDs a rank
    replicate      (2 L + A H w b) (W - 1)                        backward: all_gather of codes and dS
    shard          2 L (S - 1) + A w b (H + h (S - 2))            all_gather of codes, all_to_all of S and dS; W = S
                   = 2 L (S - 1) + 2 A H w b (S - 1) / S          where S divides H
    shard, R x S   the same + S (2 L + A h w b) (R - 1)           a rank holds the codes and dS of S M SIDs; W = R S
    to_torchrec    (8 N H + 2 N H w b) (W - 1) / W + 4 N (W - 1)  ids and rows to one rank of W, lengths to all

h = ceil(H / S) is the number of heads of the busiest rank. Tables with optimizer state of B bytes take, on a rank:

    replicate      B             host memory, replicate   B, of the host's memory, for each of its ranks
    shard          B h / H       dense DDP                tables, as much of gradient, twice as much of AdamW's state
    to_torchrec    B / W

Codes, S and dS of the global batch, which the exchanges gather, are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .capacity import GPU_ROOM, HOST_BYTES, HOST_GPUS, HOST_ROOM, CatalogueSize, size_text

NUMBER_BYTES = {"bfloat16": 2, "float32": 4}
MODEL_MICROSECONDS = 51  # a SID of five tokens in a language model of 1.7 B parameters at 10^15 operations a second


@dataclass(frozen=True)
class Cluster:
    """The machines of a training run.

    Attributes:
        gpus: W, one rank on each.
        gpus_per_host: a host has so many, or all of `gpus` where these are fewer.
        gpu_bytes: memory of a GPU.
        host_bytes: memory of a host.
        room: share of a GPU's memory that tables may take.
        link: bytes a second that a rank sends.

    Raises:
        ValueError: a number is not positive, `room` is above 1, or `gpus` leaves a host partly filled.
    """

    gpus: int
    gpus_per_host: int = HOST_GPUS
    gpu_bytes: float = 80e9
    host_bytes: float = HOST_BYTES
    room: float = GPU_ROOM
    link: float = 50e9

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} is not a finite number above 0")
        if self.room > 1:
            raise ValueError(f"room = {self.room} is above 1; give a share of a GPU's memory")
        if self.gpus % self.ranks_per_host:
            raise ValueError(
                f"gpus = {self.gpus} is no multiple of gpus_per_host = {self.gpus_per_host}; give the GPUs of each host"
            )

    @property
    def ranks_per_host(self) -> int:
        return min(self.gpus, self.gpus_per_host)

    @property
    def hosts(self) -> int:
        return self.gpus // self.ranks_per_host

    @property
    def gpu_room(self) -> float:
        """Bytes of a GPU that tables may take."""
        return self.room * self.gpu_bytes

    @property
    def host_room(self) -> float:
        """Bytes of a host's memory that tables may take."""
        return HOST_ROOM * self.host_bytes


@dataclass(frozen=True)
class Layout:
    """A way of placing the tables.

    Attributes:
        name: "one GPU", "dense DDP", "replicate", "shard", "to_torchrec", "host" or "to_torchrec, host".
        text: the name with the mesh or the place.
        fits: whether the memory that it takes is there.
        rank_bytes: tables, gradient if dense, and optimizer state of a rank.
        sent_bytes: what a rank sends for a SID of its own batch, forward and backward.
    """

    name: str
    text: str
    fits: bool
    rank_bytes: float
    sent_bytes: float


@dataclass(frozen=True)
class Choice:
    """The layout to take, or None where nothing fits, and one sentence that says why."""

    layout: Layout | None
    why: str


def state_bytes(optimizer: str, width: int) -> int:
    """Bytes of optimizer state, all float32, of a row of `width` numbers."""
    return {"sgd": 0, "row-adagrad": 4, "row-adam": 4 * width + 4, "lazy-adam": 8 * width}[optimizer]


def shard_ranks(heads: int, ranks: int, ranks_per_host: int | None = None) -> int:
    """S, the ranks that divide the heads: the largest divisor of W, and of a host's ranks, that is at most H."""
    within = math.gcd(ranks, ranks_per_host or ranks)
    return max(size for size in range(1, min(heads, within) + 1) if within % size == 0)


def dense_sent(table_bytes: float, ranks: int) -> float:
    """Bytes that a rank sends in a step of DistributedDataParallel with a dense gradient, by a ring."""
    return 2 * (ranks - 1) / ranks * table_bytes


def replicate_sent(catalogue: CatalogueSize, ranks: int, number_bytes: int) -> int:
    """Bytes a SID: its codes and dS go to every other rank."""
    sums = catalogue.active * catalogue.heads * catalogue.width * number_bytes
    return (2 * catalogue.levels + sums) * (ranks - 1)


def shard_sent(
    catalogue: CatalogueSize, shards: int, replicas: int, number_bytes: int, sum_bytes: int | None = None
) -> int:
    """Bytes a SID of the rank that holds the most heads, in a mesh of `replicas` x `shards` ranks.

    Args:
        number_bytes: of dS.
        sum_bytes: of the numbers of S, where they take another number.
    """
    codes, head = 2 * catalogue.levels, catalogue.active * catalogue.width * number_bytes
    held = math.ceil(catalogue.heads / shards)
    sums = head if sum_bytes is None else catalogue.active * catalogue.width * sum_bytes
    forward = codes * (shards - 1) + sums * held * (shards - 1)  # S of its heads to the SIDs of the other ranks
    backward = head * (catalogue.heads - held)  # dS of the other heads
    across = shards * (codes + head * held) * (replicas - 1)
    return forward + backward + across


def torchrec_sent(catalogue: CatalogueSize, ranks: int, number_bytes: int) -> float:
    """Bytes a SID, rows divided over all ranks: int64 ids, int32 lengths, rows forward and their gradient backward."""
    rows = catalogue.orders * catalogue.heads
    return rows * (8 + 2 * catalogue.width * number_bytes) * (ranks - 1) / ranks + 4 * catalogue.orders * (ranks - 1)


def layouts(catalogue: CatalogueSize, table_rows: int, cluster: Cluster, number_bytes: int, batch: int) -> list[Layout]:
    """Every layout for these GPUs.

    Args:
        table_rows: T.
        number_bytes: of the numbers of dS on their way between ranks; S and rows travel as the tables are.
        batch: M, SIDs a rank in a step; it shares out what dense DDP sends.
    """
    rows, ranks = catalogue.hashed_rows(table_rows), cluster.gpus
    size, tables = catalogue.bytes(rows), rows * catalogue.row_bytes
    room, in_hosts = cluster.gpu_room, size <= cluster.hosts * cluster.host_room
    if ranks == 1:
        return [
            Layout("one GPU", "one GPU", size <= room, size, 0),
            Layout("host", "host memory", in_hosts, size, 0),
        ]
    own_bytes = catalogue.row_bytes // catalogue.width
    gathered, divided = replicate_sent(catalogue, ranks, number_bytes), torchrec_sent(catalogue, ranks, own_bytes)
    found = [
        Layout("dense DDP", "dense DDP", 4 * tables <= room, 4 * tables, dense_sent(tables, ranks) / batch),
        Layout("replicate", "replicate", size <= room, size, gathered),
    ]
    shards = shard_ranks(catalogue.heads, ranks, cluster.ranks_per_host)
    if shards > 1:
        part = size * math.ceil(catalogue.heads / shards) / catalogue.heads
        mesh = f"{shards}" if shards == ranks else f"{ranks // shards} x {shards}"
        sent = shard_sent(catalogue, shards, ranks // shards, number_bytes, own_bytes)
        found.append(Layout("shard", f"shard, {mesh} ranks", part <= room, part, sent))
    copies = size * cluster.ranks_per_host <= cluster.host_room
    return [
        *found,
        Layout("to_torchrec", "to_torchrec, row-wise", size / ranks <= room, size / ranks, divided),
        Layout("host", "host memory, replicate", copies, size, gathered),
        Layout("to_torchrec, host", "to_torchrec, host memory", in_hosts, size / ranks, divided),
    ]


def recommend(found: list[Layout], cluster: Cluster, encoder_alone: bool = False) -> Choice:
    """The layout to take, of those of `layouts`.

    Args:
        encoder_alone: no language model trains beside the encoder.
    """
    named = {layout.name: layout for layout in found}
    fitting = {name for name, layout in named.items() if layout.fits}
    whole = named["one GPU" if cluster.gpus == 1 else "replicate"]
    size, room = size_text(whole.rank_bytes), size_text(cluster.gpu_room)
    if whole.name in fitting:
        if whole.name == "one GPU":
            return Choice(whole, f"the tables and their state take {size} of the {room} that a GPU has for them.")
        if encoder_alone and "shard" in named:
            shard = named["shard"]
            why = "without a language model the exchange and the update are most of a step, and a rank of shard "
            sent = f"sends {_count(shard.sent_bytes)} bytes a SID where one of replicate sends "
            return Choice(shard, f"{why}{sent}{_count(whole.sent_bytes)}, and updates its own heads alone.")
        fits = f"the tables and their state take {size} of the {room} that a GPU has for them, and "
        if encoder_alone:
            return Choice(whole, f"{fits}{cluster.gpus} ranks do not divide by a number of heads.")
        sent = f"sending takes {microseconds(whole, cluster):.3g} us a SID, where "
        return Choice(whole, f"{fits}{sent}a language model of 1.7 B parameters takes about {MODEL_MICROSECONDS} us.")
    more = f"the tables and their state take {size}, more than the {room} that a GPU has for them"
    if "shard" in fitting:
        held = size_text(named["shard"].rank_bytes)
        return Choice(named["shard"], f"{more}; divided by heads they take {held} a rank.")
    if "to_torchrec" in fitting:
        divided = size_text(named["to_torchrec"].rank_bytes)
        by_heads = f" by heads they take {size_text(named['shard'].rank_bytes)} a rank," if "shard" in named else ""
        return Choice(named["to_torchrec"], f"{more};{by_heads} by rows {divided}.")
    hosts = "the host's memory has" if cluster.hosts == 1 else f"the memory of {cluster.hosts} hosts has"
    place = f"{hosts} {size_text(cluster.hosts * cluster.host_room)} for them"
    gpus = "" if cluster.gpus == 1 else f", and more than {cluster.gpus} GPUs hold together"
    if "host" in fitting:
        copies = f", room for the {cluster.gpus} copies" if cluster.gpus > 1 else ""
        return Choice(named["host"], f"{more}{gpus}; {place}{copies}.")
    if "to_torchrec, host" in fitting:
        return Choice(named["to_torchrec, host"], f"{more}{gpus}; {place}, shared by all ranks.")
    return Choice(None, f"{more}{gpus}; {place}. Take smaller tables, more GPUs or more host memory.")


def microseconds(layout: Layout, cluster: Cluster) -> float:
    """Time of a SID's bytes at the link's bandwidth."""
    return layout.sent_bytes / cluster.link * 1e6


def how_to(
    layout: Layout, catalogue: CatalogueSize, cluster: Cluster, optimizer: str, cast: str | None = None
) -> list[str]:
    """Lines of Python that take a layout.

    Args:
        optimizer: of `ROW_OPTIMIZERS`.
        cast: the dtype in which dS travels where it is not that of the tables.
    """
    rule = {"sgd": "SGD", "row-adagrad": "RowWiseAdagrad", "row-adam": "RowWiseAdam", "lazy-adam": "LazyAdam"}[
        optimizer
    ]
    step = f"optimizer = optim.for_model(model, rows=optim.{rule})"
    if layout.name == "one GPU" or (layout.name == "host" and cluster.gpus == 1):
        place = 'device="cuda"' if layout.name == "one GPU" else 'tables="host"'
        built = f'encoder = PrefixMem(config, grad="fused", {place})  # of the model'
        return ["from prefixmem_fast import PrefixMem, optim", built, step]
    options = f", comm_dtype=torch.{cast}" if cast else ""
    if layout.name in ("replicate", "host"):
        built = 'grad="fused"' + (', tables="host"' if layout.name == "host" else "")
        replicated = f"model = distributed.replicate(model{options})  # built with PrefixMem(config, {built})"
        return ["from prefixmem_fast import distributed, optim", replicated, step]
    if layout.name == "shard":
        shards = shard_ranks(catalogue.heads, cluster.gpus, cluster.ranks_per_host)
        built = f'# built with PrefixMem(config, grad="fused"); in groups of {shards} ranks'
        return [
            "from prefixmem_fast import distributed, optim",
            f"model = distributed.shard(model{options})  {built}",
            step,
        ]
    rule, why = optimizer.replace("-", "_"), ""
    if rule not in ("row_adagrad", "sgd"):
        rule, why = "row_adagrad", f"  # it has no {optimizer} here"
    place = ", which puts rows into host memory" if layout.name == "to_torchrec, host" else ""
    return [
        "from prefixmem_fast import distributed",
        f'memory = distributed.to_torchrec(encoder, optimizer="{rule}", lr=1e-3){why}',
        f"constraints = memory.constraints()  # for TorchRec's EmbeddingShardingPlanner{place}",
    ]


def _count(number: float) -> str:
    return f"{number:,.0f}"
