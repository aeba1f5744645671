"""Two ranks save after half of the steps; three, two and one go on from there, in either layout."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prefixmem_fast import PrefixMem, attach, detach
from prefixmem_fast._weights import CheckpointError
from prefixmem_fast.distributed import load_tables, replicate, save_pretrained, save_tables, saving, shard
from prefixmem_fast.distributed.ranks import gathered
from tests.distributed.examples import RULES, alone, batches, encoder, loss_of, tables_of
from tests.distributed.processes import case
from tests.distributed.token_examples import build as build_model
from tests.helpers import models

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
    """Losses of the whole batch; the ranks' parts of it are equally large."""
    losses = []
    for (batch,) in batches((SIDS,), last)[first:]:
        loss = loss_of(model, batch.chunk(world)[rank], 1 / 8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(gathered(loss.item())) if world > 1 else loss.item())
    return losses


def whole_run(rule):
    model, optimizer = build("alone", rule)
    losses = steps(model, optimizer, 0, 2 * HALF, 0, 1)
    return model, optimizer, losses


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
            whole, state, losses = whole_run(rule)
            for layout in ("replicate", "shard") if world > 1 else ("alone",):
                model, optimizer = build(layout, rule, other=5)
                load_tables(model, folder(f"{saved}-{rule}"))
                assert steps(model, optimizer, HALF, 2 * HALF, rank, world) == pytest.approx(losses[HALF:], rel=1e-6)
                part = model.memory.division.part_of if layout == "shard" else lambda table: table
                assert torch.equal(model.memory.weight, part(whole.memory.weight.detach())), (saved, layout, rule)
                for name, value in state.state[whole.memory.weight].items():
                    own = optimizer.state[model.memory.weight][name]
                    assert torch.equal(own, part(value) if value.dim() else value), (saved, layout, rule, name)


@case(2, 3)
def save_whole_encoders(rank, world):
    """save_pretrained of divided tables is read by one process; a changed part is seen."""
    model, optimizer = build("shard", "adagrad")
    steps(model, optimizer, 0, HALF, rank, world)
    one, state = build("alone", "adagrad")
    steps(one, state, 0, HALF, 0, 1)
    for size in ("2GB", 3000):
        model.save_pretrained(folder(f"encoder-{world}"), max_shard_size=size)
        read = PrefixMem.from_pretrained(folder(f"encoder-{world}"))
        assert all(torch.equal(own, other) for own, other in zip(read.parameters(), one.parameters(), strict=True))
        dist.barrier()
    files = sorted(folder(f"encoder-{world}").glob("memory-*.safetensors"))
    assert len(files) > 10
    if rank == 0:
        damage_last_byte(files[3])
        with pytest.raises(CheckpointError, match=rf"{files[3].name} is damaged, or not the one"):
            PrefixMem.from_pretrained(folder(f"encoder-{world}"))
    dist.barrier()
    with pytest.raises(ValueError, match="belongs to something else"):
        model.save_pretrained(folder("theirs"))


@case(2)
def save_that_fails_late(rank, world):
    """Once config.json is new, its files stay, whatever comes after."""
    model, _keep = build("shard", "adagrad")

    def fail(_):
        raise RuntimeError("late")

    parts_of, saving.parts_of = saving.parts_of, fail
    try:
        with pytest.raises(RuntimeError, match="late"):
            model.save_pretrained(folder("late"))
    finally:
        saving.parts_of = parts_of
    read = PrefixMem.from_pretrained(folder("late"))
    assert torch.equal(model.memory.weight, model.memory.division.part_of(read.memory.weight.detach()))


@case(2)
def save_a_model_with_an_encoder(rank, world):
    """The model's own save_pretrained cannot save divided tables, and says what does."""
    encoder = models.encoder(grad="fused")
    whole = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model = shard(attach(models.tiny_model(), encoder, models.vocabulary()))
    assert not any("memory" in name for name in model.state_dict())
    out = folder("model")
    save_pretrained(model, out)
    copy = attach(models.tiny_model(), PrefixMem.from_pretrained(out), models.vocabulary())
    assert all(torch.equal(copy.prefixmem.state_dict()[name], whole[name]) for name in whole)
    missing, unexpected = model.load_state_dict(copy.state_dict())  # whole tables into parts
    assert missing == unexpected == []
    with pytest.warns(
        UserWarning, match=r"call prefixmem_fast\.distributed\.save_pretrained\(model, folder\) on every"
    ):
        model.save_pretrained(folder(f"alone-{rank}"))
    assert not (folder(f"alone-{rank}") / "prefixmem").exists()


@case(2)
def save_what_fsdp2_has_divided(rank, world):
    """save_pretrained on every rank puts the parts together; one rank alone does not wait for the others."""
    whole = build_model(models.encoder, "fused")
    for name, layout in {"replicate": replicate, "managed": partial(replicate, managed=True), "shard": shard}.items():
        model = layout(build_model(models.encoder, "fused"))
        ignored = {model.prefixmem.memory.weight} if name == "replicate" else None
        fully_shard(model.model.layers[0])
        fully_shard(model, ignored_params=ignored)
        assert isinstance(model.prefixmem.out_proj.weight, DTensor)
        if name != "shard":
            with pytest.raises(ValueError, match=r"weight is divided over processes, by FSDP2 or DeepSpeed; call"):
                model.prefixmem.save_pretrained(folder(f"part-{rank}"))
        out = folder(f"fsdp2-{name}")
        save_pretrained(model, out)
        save_pretrained(model.prefixmem, out / "encoder")
        again = type(whole).from_pretrained(out)
        assert again.config.architectures == [type(whole).__name__]
        for found in (out, out / "encoder"):
            attached = attach(again, PrefixMem.from_pretrained(found), models.vocabulary())
            same = dict(attached.named_parameters())
            assert all(torch.equal(same[name], parameter) for name, parameter in whole.named_parameters())
            detach(attached)


def damage_last_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


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


@case(1)
def saves_that_were_cut(rank, world):
    """Between its two renames a killed save has left the old folder under another name; the next one tidies up."""
    model, optimizer = build("alone", "adagrad")
    steps(model, optimizer, 0, 1, rank, world)
    saved, table = folder("cut"), model.memory.weight.detach().clone()
    save_tables(model, saved)
    saved.rename(folder(".cut.old-0123abcd"))
    folder(".cut.tmp-0123abcd").mkdir()
    steps(model, optimizer, 0, 1, rank, world)
    load_tables(model, saved)
    assert torch.equal(model.memory.weight, table)
    save_tables(model, saved)
    assert not [path for path in folder(".").iterdir() if path.name.startswith(".cut")]


@case(1)
def states_that_are_not_both_there(rank, world):
    model, optimizer = build("alone", "adagrad")
    save_tables(model, folder("unstarted"))
    steps(model, optimizer, 0, 1, rank, world)
    save_tables(model, folder("started"))
    load_tables(model, folder("unstarted"))
    assert not optimizer.state[model.memory.weight]
    other = LAYOUTS["alone"](encoder("fused"))
    with pytest.warns(UserWarning, match="build the optimizer before load_tables"):
        load_tables(other, folder("started"))


@case(1)
def files_that_were_not_verified(rank, world):
    """A cut file is found by torch, whose error is none of Python's Exceptions."""
    model, optimizer = build("alone", "adagrad")
    save_tables(model, folder("short"))
    (file,) = folder("short").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="could not be written or read whole"):
        load_tables(model, folder("short"), verify=False)
    (folder("short") / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        load_tables(model, folder("short"), verify=False)
    del optimizer


@case(3)
def damage(rank, world):
    """One rank finds a changed file, and all raise."""
    model, _keep = build("shard", "adagrad", other=5)
    before = model.memory.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"distcp is damaged: its SHA-256 is not the stored one"):
        load_tables(model, folder("damaged"))
    assert torch.equal(model.memory.weight, before)
