"""What wraps a model, around replicated, managed and divided tables: each trains to what one process trains to."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from prefixmem_fast import optim
from prefixmem_fast.distributed import replicate, shard
from tests.distributed.examples import alone, tables_of
from tests.distributed.processes import case
from tests.distributed.token_examples import build, stream
from tests.helpers import models

LAYOUTS = {
    "replicate": replicate,
    "managed": partial(replicate, managed=True),
    "shard": shard,
}


def optimizer_of(model, rows=optim.RowWiseAdagrad):
    return optim.for_model(model, 1e-2, rows=rows, encoder_lr_multiple=2.0)


def train(model, optimizer, drawn, rank, world, clip=None, wrapped=None):
    """The mean loss over all tokens; ranks have equally many."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for tokens in drawn:
        own = tokens if rank is None else tokens.chunk(world)[rank]
        (wrapped or model)(input_ids=own, labels=own, use_cache=False).loss.backward()
        if clip is not None:
            optim.clip_grad_norm_(model, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def close(model, reference):
    whole = tables_of(reference)
    for name, module in model.named_modules():
        if hasattr(module, "read_own"):
            part = module.division.part_of if module.division else lambda table: table
            torch.testing.assert_close(module.weight.detach(), part(whole[name]), rtol=1e-5, atol=2e-6)
    mine, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    for name in sorted(mine.keys() & theirs.keys()):
        value = mine[name].full_tensor() if hasattr(mine[name], "full_tensor") else mine[name]
        if value.shape == theirs[name].shape:
            torch.testing.assert_close(
                value, theirs[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def one_process(make, grad, world, clip=None):
    reference = alone(build(make, grad))
    before = {name: table.clone() for name, table in tables_of(reference).items()}
    train(reference, optimizer_of(reference), stream(world), None, world, clip)
    assert all(not torch.equal(table, before[name]) for name, table in tables_of(reference).items())
    return reference


MAKES = {"within": models.encoder, "across": models.cross_item_encoder, "lags": models.lagged_encoder}


@case(2, 3)
def ddp(rank, world):
    """With text alone on the last rank."""
    for make in MAKES.values():
        for grad in ("fused", "sparse"):
            reference = one_process(make, grad, world)
            for layout in LAYOUTS.values():
                model = layout(build(make, grad))
                parallel = DistributedDataParallel(model)
                train(model, optimizer_of(model), stream(world), rank, world, wrapped=parallel)
                close(model, reference)


@case(2)
def ddp_around_more_than_it_was_told_of(rank, world):
    class Larger(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    for grad in ("fused", "sparse"):
        model = replicate(build(models.encoder, grad))
        optimizer = optimizer_of(model)
        with pytest.raises(RuntimeError, match=r"with the module that it wraps \(a Larger\), or with managed=True"):
            train(model, optimizer, stream(world), rank, world, wrapped=DistributedDataParallel(Larger(model)))
        larger = replicate(Larger(build(models.encoder, grad)))
        train(larger, optimizer_of(larger), stream(world), rank, world, wrapped=DistributedDataParallel(larger))
        close(larger.model, one_process(models.encoder, grad, world))
        inner = replicate(Larger(build(models.encoder, grad))).model  # a wrapper of a part of it is told as well
        train(inner, optimizer_of(inner), stream(world), rank, world, wrapped=DistributedDataParallel(inner))
        close(inner, one_process(models.encoder, grad, world))


@case(2)
def clipping_by_the_global_norm(rank, world):
    for name in ("within", "lags"):
        reference = one_process(MAKES[name], "sparse", world, clip=0.5)
        for layout in LAYOUTS.values():
            model = layout(build(MAKES[name], "sparse"))
            parallel = DistributedDataParallel(model)
            train(model, optimizer_of(model), stream(world), rank, world, clip=0.5, wrapped=parallel)
            close(model, reference)


@case(2)
def clipping_under_fsdp2(rank, world):
    from torch.distributed.fsdp import fully_shard

    reference = one_process(models.encoder, "sparse", world, clip=0.5)
    for name, layout in LAYOUTS.items():
        model = layout(build(models.encoder, "sparse"))
        fully_shard(model, ignored_params={model.prefixmem.memory.weight} if name == "replicate" else set())
        train(model, optimizer_of(model), stream(world), rank, world, clip=0.5)
        close(model, reference)
        fused = layout(build(models.encoder, "fused"))
        fully_shard(fused, ignored_params={fused.prefixmem.memory.weight} if name == "replicate" else set())
        with pytest.raises(RuntimeError, match='grad="fused" spends the gradient'):
            train(fused, optimizer_of(fused), stream(world), rank, world, clip=0.5)


@case(2)
def accumulation_without_synchronisation(rank, world):
    """Each backward pass of a table is global already; DDP adds up at the last one."""
    reference = alone(build(models.encoder, "sparse"))
    optimizer, (first, second) = optimizer_of(reference), stream(world, 2)
    for tokens in (first, second):
        reference(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model = replicate(build(models.encoder, "sparse"))
    parallel, optimizer = DistributedDataParallel(model), optimizer_of(model)
    with parallel.no_sync():
        own = first.chunk(world)[rank]
        parallel(input_ids=own, labels=own).loss.backward()
    own = second.chunk(world)[rank]
    parallel(input_ids=own, labels=own).loss.backward()
    optimizer.step()
    close(model, reference)


@case(2)
def fsdp2(rank, world):
    from torch.distributed.fsdp import fully_shard

    for grad in ("fused", "sparse"):
        reference = one_process(models.encoder, grad, world)
        for name, layout in LAYOUTS.items():
            model = layout(build(models.encoder, grad))
            optimizer = None
            ignored = {model.prefixmem.memory.weight} if name == "replicate" else set()
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model, ignored_params=ignored)
            optimizer = optimizer_of(model)
            train(model, optimizer, stream(world), rank, world)
            close(model, reference)
            state = model.state_dict()
            plain = {name for name, value in state.items() if not hasattr(value, "device_mesh")}
            memory = {"prefixmem.memory.weight", "prefixmem.memory._extra_state"}
            assert plain == (memory if name == "replicate" else set())
            model.load_state_dict(state)


@case(2)
def fsdp2_that_was_not_told_of_the_table(rank, world):
    from torch.distributed.fsdp import fully_shard

    for grad in ("fused", "sparse"):
        for layout in (lambda model: model, replicate):
            model = layout(build(models.encoder, grad))
            fully_shard(model)
            tokens = stream(world)[0].chunk(world)[rank]
            with pytest.raises(RuntimeError, match=r"have FSDP2 ignore the table: ignored_params=\{encoder\.memory"):
                model(input_ids=tokens, labels=tokens)


@case(2)
def a_schedule_moves_managed_tables(rank, world):
    model = replicate(build(models.encoder, "fused"), managed=True)
    optimizer = optimizer_of(model)
    assert optimizer.apart.param_groups[0]["params"][0] is model.prefixmem.memory.weight
    before = model.prefixmem.memory.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    tokens = stream(world)[0].chunk(world)[rank]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert torch.equal(model.prefixmem.memory.weight, before)
    state = optimizer.state_dict()
    assert state["apart"]["state"][0]["step"] == 1
    other = optim.for_model(replicate(build(models.encoder, "fused"), managed=True), 5e-3)
    other.load_state_dict(state)
    assert int(next(iter(other.apart.state.values()))["step"]) == 1
    other.param_groups[0]["lr"] = 1e-3
    assert other.apart.follows() == pytest.approx(1e-3 / 2e-2)  # of the rate that the saved one began with


@case(2)
def a_managed_table_is_in_the_models_file(rank, world):
    model = replicate(build(models.encoder, "fused"), managed=True)
    assert "prefixmem.memory.weight" not in dict(model.named_parameters())
    out = Path(os.environ["PREFIXMEM_TEST_FOLDER"]) / f"model-{rank}"
    with torch.no_grad():
        model.prefixmem.memory.weight.add_(1)
    model.save_pretrained(out)
    from prefixmem_fast import PrefixMem

    read = PrefixMem.from_pretrained(out)
    assert torch.equal(read.memory.weight, model.prefixmem.memory.weight)
    model.to(torch.bfloat16)
    assert model.prefixmem.memory.weight.dtype == torch.bfloat16
    model.load_state_dict(build(models.encoder, "fused").state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*prefixmem\.memory\.weight"):
        model.load_state_dict({n: t for n, t in model.state_dict().items() if not n.endswith("memory.weight")})
