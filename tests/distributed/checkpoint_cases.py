"""Two ranks save after half of the steps; three, two and one go on from there, in either layout."""

import os
from pathlib import Path

import pytest
import torch

from prefixmem_fast._weights import CheckpointError
from prefixmem_fast.distributed import load_tables, replicate, save_tables, shard
from tests.distributed.examples import RULES, alone, batches, encoder, loss_of, tables_of
from tests.distributed.processes import case

LAYOUTS = {"replicate": replicate, "shard": shard, "alone": lambda model, **_: alone(model)}
HALF, SIDS = 3, 12


def folder(name):
    return Path(os.environ["PREFIXMEM_TEST_FOLDER"]) / name


def build(layout, rule, other=0):
    model = encoder("fused")
    with torch.no_grad():
        model.memory.weight.add_(other)
    LAYOUTS[layout](model, reduce="sum")
    model.out_proj.requires_grad_(False)
    return model, RULES[rule]([model.memory.weight], lr=0.05)


def steps(model, optimizer, first, last, rank, world):
    """Losses of the whole batch; the ranks' parts of it are equal."""
    losses = []
    for (batch,) in batches((SIDS,), last)[first:]:
        loss = loss_of(model, batch.chunk(world)[rank], 1 / 8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole_run(rule):
    model, optimizer = build("alone", rule)
    steps(model, optimizer, 0, 2 * HALF, 0, 1)
    return model, optimizer


@case(2)
def save(rank, world):
    for layout in ("replicate", "shard"):
        for rule in ("adagrad", "lazy"):
            model, optimizer = build(layout, rule)
            steps(model, optimizer, 0, HALF, rank, world)
            save_tables(model, folder(f"{layout}-{rule}"))
            save_tables(model, folder(f"{layout}-{rule}"))  # in the place of the first


@case(1, 2, 3)
def go_on(rank, world):
    for saved in ("replicate", "shard"):
        for rule in ("adagrad", "lazy"):
            whole, state = whole_run(rule)
            for layout in ("replicate", "shard") if world > 1 else ("alone",):
                model, optimizer = build(layout, rule, other=5)
                load_tables(model, folder(f"{saved}-{rule}"))
                steps(model, optimizer, HALF, 2 * HALF, rank, world)
                part = model.memory.division.part_of if layout == "shard" else lambda table: table
                assert torch.equal(model.memory.weight, part(whole.memory.weight.detach())), (saved, layout, rule)
                for name, value in state.state[whole.memory.weight].items():
                    own = optimizer.state[model.memory.weight][name]
                    assert torch.equal(own, part(value) if value.dim() else value), (saved, layout, rule, name)


@case(1, 2)
def refuse(rank, world):
    layout = "shard" if world > 1 else "alone"
    model, _keep = build(layout, "adam", other=5)
    before = tables_of(model)["memory"].clone()
    with pytest.raises(CheckpointError, match=r"memory differs in rule: it has \{'rule': 'row_adagrad'\}, the model"):
        load_tables(model, folder("shard-adagrad"))
    with pytest.raises(FileNotFoundError, match=r"holds no tables: tables\.json is not there"):
        load_tables(model, folder("nowhere"))
    with pytest.raises(ValueError, match="holds something else than tables"):
        save_tables(model, folder("."))
    assert torch.equal(model.memory.weight, before)


@case(3)
def damage(rank, world):
    """One rank finds a changed file, and all raise."""
    model, _keep = build("shard", "adagrad", other=5)
    before = model.memory.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"distcp is damaged: its SHA-256 is not the stored one"):
        load_tables(model, folder("damaged"))
    assert torch.equal(model.memory.weight, before)
