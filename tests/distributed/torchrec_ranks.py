"""What the processes of the TorchRec tests do: each runs every case and writes what it found.

They run here and not in the test file, so that a new process imports no more than it needs.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, optim
from prefixmem_fast.distributed import torchrec as ours
from prefixmem_fast.distributed.torchrec import from_torchrec, to_torchrec

SIZES = (7, 6, 9, 6, 5)  # order 1 is exact, the others collide
HIDDEN, OUT_RATE = 12, 1e-3
OPTIONS = {"row_adagrad": {"lr": 0.05, "eps": 1e-2}, "sgd": {"lr": 1e-3}}
SAVED_AT = 3  # steps before the checkpoint


@dataclass(frozen=True)
class Case:
    """Training: what is trained, how it is sharded, and who has which Semantic IDs."""

    encoder: str = "prefix"
    sharding: str = "row_wise"
    optimizer: str = "row_adagrad"
    shares: str = "ragged"
    steps: int = 10

    def __str__(self) -> str:
        return f"{self.encoder}-{self.sharding}-{self.optimizer}-{self.shares}-{self.steps}"


CASES = (
    *(Case(e, s, steps=50) for e in ("prefix", "suffix", "full", "cross_item") for s in ("row_wise", "table_wise")),
    *(Case(sharding=s, optimizer="sgd", steps=50) for s in ("row_wise", "table_wise")),
    *(Case(sharding=s, shares=k) for s in ("row_wise", "table_wise") for k in ("even", "invalid", "empty")),
    Case("cross_item", shares="empty"),
)


def encoder_of(kind: str, *, seed: int = 0, **options) -> PrefixMem:
    """`seed` is the spec's; weights are the same in every process."""
    torch.manual_seed(0)
    start = {"hidden_size": HIDDEN, "output_init_std": 0.3, "memory_init_std": 0.1}
    mode = "prefix" if kind == "cross_item" else kind
    levels = (3, 4) if mode == "prefix" else (2, 3, 4)
    spec = AddressSpec(SIZES, heads=4, table_rows=(97, 97, 89, 101), mode=mode, active_levels=levels, seed=seed)
    cross_item = None
    if kind == "cross_item":
        cross = AddressSpec.cross_item(SIZES, heads=2, table_rows=61)
        cross_item = PrefixMemConfig(cross, memory_dim=16, **start)
    config = PrefixMemConfig(spec, memory_dim=32, **start, cross_item=cross_item)
    return PrefixMem(config, **options)


def shares_of(case: Case, step: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """(codes, targets) of each rank, from a batch that is the same for every number of ranks."""
    generator = torch.Generator().manual_seed(step)
    items = (3,) if case.encoder == "cross_item" else ()
    codes = torch.stack([torch.randint(-1, k, (24, *items), generator=generator) for k in SIZES], -1)
    targets = torch.randn(*codes.shape, HIDDEN, generator=generator)
    cuts = [24 * rank // world for rank in range(1, world)]
    if case.shares == "ragged":
        cuts = sorted(torch.randint(1, 24, (world - 1,), generator=generator).tolist())
    shares = list(zip(codes.tensor_split(cuts), targets.tensor_split(cuts), strict=True))
    someone = step % world
    if case.shares == "invalid":
        shares[someone] = (torch.full_like(shares[someone][0], -1), shares[someone][1])
    if case.shares == "empty":
        shares[someone] = tuple(part[:0] for part in shares[someone])
    return shares


def loss_of(model, codes: Tensor, targets: Tensor) -> Tensor:
    return (model(codes) - targets).square().sum()


def reference(case: Case, world: int) -> PrefixMem:
    """The encoder that one process trains on the batches of all ranks."""
    encoder = encoder_of(case.encoder, grad="fused")
    tables = [one.memory.weight for one in (encoder, encoder.cross_item) if one is not None]
    kind = {"row_adagrad": optim.RowWiseAdagrad, "sgd": optim.SGD}[case.optimizer]
    optimizers = [kind(tables, **OPTIONS[case.optimizer]), torch.optim.SGD(projections(encoder), OUT_RATE)]
    for step in range(case.steps):
        codes, targets = (torch.cat(parts) for parts in zip(*shares_of(case, step, world), strict=True))
        loss_of(encoder, codes, targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return encoder


def projections(encoder: PrefixMem) -> list[Tensor]:
    return [one.out_proj.weight for one in (encoder, encoder.cross_item) if one is not None]


def plan_of(module, constraints):
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.sharding_plan import get_default_sharders

    topology = Topology(dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    return planner.collective_plan(module, get_default_sharders(), dist.group.WORLD)


def sharded(module, sharding: str):
    from torchrec.distributed import DistributedModelParallel

    plan = plan_of(module, module.constraints(sharding_types=[sharding]))
    return DistributedModelParallel(module, device=torch.device("cpu"), plan=plan)


def model_of(case: Case):
    module = to_torchrec(encoder_of(case.encoder), optimizer=case.optimizer, **OPTIONS[case.optimizer])
    return sharded(module, case.sharding)


def train(model, case: Case, begin: int, end: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(projections(model.module.encoder), OUT_RATE)
    for step in range(begin, end):
        (world * loss_of(model, *shares_of(case, step, world)[rank])).backward()  # gradients are averaged over ranks
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in from_torchrec(model).named_parameters()}


def trained(case: Case) -> dict[str, Tensor]:
    model = model_of(case)
    train(model, case, 0, case.steps)
    return weights_of(model)


def round_trip(kind: str, sharding: str) -> bool:
    """Bits of a new encoder, and of one that is given."""
    encoder, model = encoder_of(kind), sharded(to_torchrec(encoder_of(kind)), sharding)
    given = encoder_of(kind)
    with torch.no_grad():
        for weight in given.parameters():
            weight.zero_()
    ours._ROWS_AT_ONCE = 10  # several broadcasts a shard, the last one shorter
    found = [from_torchrec(model), from_torchrec(model, given)]
    return found[1] is given and all(
        torch.equal(value, one.state_dict()[name]) for one in found for name, value in encoder.state_dict().items()
    )


def from_meta(sharding: str) -> dict[str, Tensor]:
    """Tables that no process ever holds whole: what the shards and W_out start from, with ranks seeded alike."""
    with torch.device("meta"):
        encoder = encoder_of("prefix")
    torch.manual_seed(0)
    return weights_of(sharded(to_torchrec(encoder), sharding))


def planned() -> dict[str, tuple[str, str]]:
    module = to_torchrec(encoder_of("cross_item"))
    plans = plan_of(module, module.constraints()).plan
    return {
        name: (table.sharding_type, table.compute_kernel) for tables in plans.values() for name, table in tables.items()
    }


def sharded_otherwise(sharding: str) -> str:
    """What is raised where the planner was not given the constraints."""
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.planner import ParameterConstraints

    module = to_torchrec(encoder_of("prefix"))
    constraints = {name: ParameterConstraints(sharding_types=[sharding]) for name in module.constraints()}
    model = DistributedModelParallel(module, plan=plan_of(module, constraints))
    messages = []
    for call in (lambda: model(torch.zeros(2, 5, dtype=torch.int64)), lambda: from_torchrec(model)):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) == 2
    assert messages[0] == messages[1]
    return messages[0]


def rate_of_zero() -> dict[str, float]:
    """How far the tables move after the rate is set to 0, before and after fused_optimizer.step()."""
    case = Case(shares="even")
    model, moved = model_of(case), {}
    train(model, case, 0, 2)
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.0
    for name in ("set", "stepped"):
        if name == "stepped":
            model.fused_optimizer.step()
        before = weights_of(model)["memory.weight"]
        train(model, case, 2, 3)
        moved[name] = (weights_of(model)["memory.weight"] - before).abs().max().item()
    return moved


def state_of(model) -> dict[str, dict]:
    return {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}


def saved(folder: Path, case: Case) -> None:
    import torch.distributed.checkpoint as dcp

    model = model_of(case)
    train(model, case, 0, SAVED_AT)
    dcp.save(state_of(model), checkpoint_id=str(folder / str(case)))


def resumed(folder: Path, case: Case, sharding: str) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    model = model_of(Case(case.encoder, sharding, case.optimizer, case.shares, case.steps))
    train(model, case, 40, 42)  # what a checkpoint has to overwrite, state of the optimizer too
    state = state_of(model)
    dcp.load(state, checkpoint_id=str(folder / str(case)))
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["optimizer"])
    train(model, case, SAVED_AT, case.steps)
    return weights_of(model)


def loaded_into_another_spec() -> str:
    state = sharded(to_torchrec(encoder_of("prefix")), "row_wise").state_dict()
    other = sharded(to_torchrec(encoder_of("prefix", seed=1)), "row_wise")
    try:
        other.load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    return ""


def quantized_from_shards() -> str:
    try:
        sharded(to_torchrec(encoder_of("prefix")), "row_wise").module.quantized()
    except ValueError as error:
        return str(error)
    return ""


def bytes_of_a_step(sids: int = 64) -> dict[str, int]:
    """Bytes that leave this rank by each collective, in one forward and one backward pass at the paper's shape."""
    spec = AddressSpec((2048,) * 5, table_rows=2000, active_levels=(3, 4))
    config = PrefixMemConfig(spec, memory_dim=256, hidden_size=8)
    model = sharded(to_torchrec(PrefixMem(config)), "row_wise")
    memory, rank = model.module.memory, dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    codes = torch.randint(0, 2048, (sids, 5), generator=generator)
    memory(codes).sum().backward()  # the first pass exchanges more
    counted: dict[str, int] = {}
    originals = {
        name: getattr(dist, name)
        for name in dir(dist)
        if name.startswith(("all_", "reduce", "broadcast", "scatter", "gather", "send", "isend", "batch_isend"))
        and callable(getattr(dist, name))
    }

    def counting(name, function):
        def call(*arguments, **options):
            if name == "all_to_all_single":
                given = options.get("input", arguments[1] if len(arguments) > 1 else None)
                splits = options.get("input_split_sizes", arguments[3] if len(arguments) > 3 else None)
                own = splits[rank] if splits else len(given) // dist.get_world_size()
                leaving = given[: len(given) - own].numel() * given.element_size()
            else:
                leaving = sum(t.numel() * t.element_size() for t in arguments if isinstance(t, Tensor))
            kind = f"{name} {given.dtype}" if name == "all_to_all_single" else name
            counted[kind] = counted.get(kind, 0) + leaving
            return function(*arguments, **options)

        return call

    for name, function in originals.items():
        setattr(dist, name, counting(name, function))
    try:
        memory(codes).sum().backward()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    return counted


def jobs_of(world: int, folder: Path):
    """(name, function) of all that is run by `world` processes, in order; the checkpoint goes from two to three."""
    if world == 4:
        yield str(CASES[0]), lambda: trained(CASES[0])
        yield "bytes", bytes_of_a_step
        return
    for case in CASES:
        yield str(case), lambda case=case: trained(case)
    for sharding in ("row_wise", "table_wise"):
        for kind in ("prefix", "cross_item"):
            yield f"round_trip-{kind}-{sharding}", lambda k=kind, s=sharding: round_trip(k, s)
        yield f"from_meta-{sharding}", lambda s=sharding: from_meta(s)
    yield "planned", planned
    yield "rate_of_zero", rate_of_zero
    yield "quantize", quantized_from_shards
    yield "another_spec", loaded_into_another_spec
    if world == 2:
        yield "column_wise", lambda: sharded_otherwise("column_wise")
        yield "data_parallel", lambda: sharded_otherwise("data_parallel")
        yield "bytes", bytes_of_a_step
        yield "saved", lambda: saved(folder, SAVED)
    if world == 3:
        for sharding in ("row_wise", "table_wise"):
            yield f"resumed-{sharding}", lambda s=sharding: resumed(folder, SAVED, s)


SAVED = Case(steps=2 * SAVED_AT)


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, object] = {}
    try:
        for name, job in jobs_of(world, folder):
            results[name] = {"failed": "it did not end"}
            results[name] = job()
    except Exception:  # the other ranks wait for this one: nothing more can be run
        results[name] = {"failed": traceback.format_exc()}
    torch.save(results, folder / f"world{world}_rank{rank}.pt")
    os._exit(0)  # ranks that failed leave collectives under way
