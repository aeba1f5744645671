"""transformers' Trainer with DDP and with FSDP2, as users start it, against one process."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers.trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from prefixmem_fast import PrefixMem, attach, optim
from prefixmem_fast.distributed import load_tables, replicate, shard
from prefixmem_fast.huggingface.table_checkpoints import TableCheckpoints
from prefixmem_fast.recommender.training.trainer import StopAt
from tests.distributed.examples import tables_of
from tests.distributed.processes import case
from tests.distributed.token_examples import build, stream
from tests.helpers import models

ROWS = torch.cat(stream(4, steps=4)).tolist()  # 32, a quarter of them text alone
SAVING = {"save_strategy": "steps", "save_steps": 2}
WAYS = {
    "fused": ("fused", {"max_grad_norm": 0.0}),
    "sparse, clipped": ("sparse", {"max_grad_norm": 0.1}),
    "sparse, accumulated": ("sparse", {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}),
}
LAYOUTS = {
    "replicate": replicate,
    "managed": lambda model: replicate(model, managed=True),
    "shard": shard,
}


def folder():
    return Path(os.environ["PREFIXMEM_TEST_FOLDER"])


def run(model, world, out, steps=4, resume=None, trainer_class=Trainer, tables=None, **options):
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=4 // world,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        warmup_steps=2,
        **{"seed": 1, "save_strategy": "no", **options},
    )
    optimizer = optim.for_model(model, 1e-2, encoder_lr_multiple=2.0)
    dataset = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ROWS]
    callbacks = [tables or TableCheckpoints(), StopAt(steps)]
    trainer = trainer_class(
        model,
        arguments,
        train_dataset=dataset,
        eval_dataset=dataset[:4],
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def same_as(model, losses, expected):
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected["losses"]), rtol=1e-3, atol=1e-3)
    memory = model.prefixmem.memory
    part = memory.division.part_of if memory.division else lambda table: table
    torch.testing.assert_close(memory.weight.detach(), part(expected["prefixmem.memory"]), rtol=1e-4, atol=1e-5)


@case(1)
def trainer_alone(rank, world):
    for name, (grad, options) in WAYS.items():
        model = replicate(build(models.encoder, grad))
        losses = run(model, 1, folder() / "out", **options)
        torch.save({"losses": losses, **tables_of(model)}, folder() / f"{name}.pt")


@case(2)
def resume(rank, world):
    """From the checkpoint of step 2, in the layout that it was saved in."""
    expected = torch.load(folder() / "fused.pt")
    options = {**SAVING, "max_grad_norm": 0.0}
    for name, layout in LAYOUTS.items():
        out = folder() / f"resumed-{name}"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*divided over processes")
            run(layout(build(models.encoder, "fused")), world, out, steps=2, **options)
        dist.barrier()
        model = layout(build(models.encoder, "fused"))
        with torch.no_grad():
            model.prefixmem.memory.weight.zero_()
        losses = run(model, world, out, resume=str(out / "checkpoint-2"), **options)
        same_as(model, losses, expected)


@case(1)
def resume_alone(rank, world):
    """One process goes on from the checkpoint of two, whose tables were divided; before that it makes one for two."""
    expected, options = torch.load(folder() / "fused.pt"), {**SAVING, "max_grad_norm": 0.0}
    if not (folder() / "resumed-shard").is_dir():
        run(shard(build(models.encoder, "fused")), world, folder() / "of-one", steps=2, **options)
        return
    model = shard(build(models.encoder, "fused"))
    run(model, world, folder() / "resumed-shard", resume=str(folder() / "resumed-shard" / "checkpoint-2"), **options)
    table = model.prefixmem.memory.weight.detach()
    torch.testing.assert_close(table, expected["prefixmem.memory"], rtol=1e-4, atol=1e-5)


@case(2)
def resume_otherwise(rank, world):
    """From one process, from the other layout of managed tables, and from a folder that is not the Trainer's own."""
    expected, options = torch.load(folder() / "fused.pt"), {**SAVING, "max_grad_norm": 0.0}
    for saved, name in (("of-one", "shard"), ("resumed-managed", "shard"), ("resumed-shard", "managed")):
        checkpoint, other = folder() / saved / "checkpoint-2", folder() / f"from-{saved}"
        for tables in (TableCheckpoints(), TableCheckpoints(resume_from=checkpoint)):
            model = LAYOUTS[name](build(models.encoder, "fused"))
            with torch.no_grad():
                model.prefixmem.memory.weight.zero_()
            again = {"resume": str(checkpoint), "tables": tables, **options}
            if tables.resume_from is None and name == "shard":
                with pytest.raises(FileNotFoundError, match=r"checkpoint-2 has no prefixmem_tables.*resume_from"):
                    run(model, world, other, **again)
            elif tables.resume_from is not None:
                same_as(model, run(model, world, other, **again), expected)
    other = folder() / "of-another-run"
    run(shard(build(models.encoder, "fused")), world, other, steps=2, **{**options, "seed": 2})
    with pytest.raises(ValueError, match=r"checkpoint-2 is of another run than the one that is resumed; give TableCh"):
        run(shard(build(models.encoder, "fused")), world, other, resume=str(checkpoint), **options)


@case(2)
def best_checkpoint(rank, world):
    """The tables that a Trainer ends with are those of the checkpoint whose model it loads."""
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    options = {**SAVING, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_grad_norm": 0.0, **worst}
    for name, layout in LAYOUTS.items():
        model, out = layout(build(models.encoder, "fused")), folder() / f"best-{name}"
        run(model, world, out, **options)
        read = layout(build(models.encoder, "fused"))
        load_tables(read, out / "checkpoint-1" / "prefixmem_tables")
        assert torch.equal(model.prefixmem.memory.weight, read.prefixmem.memory.weight), name
        load_tables(read, out / "checkpoint-4" / "prefixmem_tables")
        assert not torch.equal(model.prefixmem.memory.weight, read.prefixmem.memory.weight), name


@case(2)
def adapters(rank, world):
    """A PeftModel's checkpoints hold adapters alone: beside divided tables, the encoder's W_out is saved too."""

    def made():
        model = get_peft_model(models.tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
        return shard(attach(model, models.encoder(grad="fused"), models.vocabulary())).train()

    options, out = {**SAVING, "max_grad_norm": 0.0}, folder() / "adapters"
    torch.manual_seed(0)
    model = made()
    losses = run(model, world, out, **options)
    torch.manual_seed(0)
    again = made()
    with torch.no_grad():
        again.prefixmem.memory.weight.zero_()
        again.prefixmem.out_proj.weight.zero_()
    assert run(again, world, out, resume=str(out / "checkpoint-2"), **options) == losses
    for own, other in zip(again.prefixmem.parameters(), model.prefixmem.parameters(), strict=True):
        assert torch.equal(own, other)
    with pytest.warns(UserWarning, match=r"final gets the model without the tables of its encoder"):
        model.save_pretrained(folder() / f"{rank}" / "final")


@case(2)
def trainer(rank, world):
    from torch.nn.parallel import DistributedDataParallel

    wrapped = []
    init = DistributedDataParallel.__init__

    def noted(self, *args, **options):
        wrapped.append(self)
        init(self, *args, **options)

    DistributedDataParallel.__init__ = noted
    for name, (grad, options) in WAYS.items():
        expected = torch.load(folder() / f"{name}.pt")
        for layout in LAYOUTS if "clipped" not in name else ("replicate",):
            model = LAYOUTS[layout](build(models.encoder, grad))
            losses = run(model, world, folder() / f"out-{rank}", **options)
            same_as(model, losses, expected)
    DistributedDataParallel.__init__ = init
    assert len(wrapped) == 7
    dist.barrier()


class OnAHost(Accelerator):
    """Told what it would find out on GPUs."""

    def __init__(self, *args, fsdp_plugin=None, **options):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **options)
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin


class WithOptimizer(Trainer):
    """With FSDP a Trainer refuses `optimizers`, and takes what its own method returns."""

    def __init__(self, *args, optimizers, **options):
        super().__init__(*args, **options)
        self.given = optimizers[0]

    def create_optimizer(self, model=None):
        self.optimizer = self.given
        return self.optimizer


@case(2)
def fsdp2(rank, world):
    transformers.trainer.Accelerator = OnAHost
    for name, (grad, options) in WAYS.items():
        expected = torch.load(folder() / f"{name}.pt")
        for layout in LAYOUTS if "clipped" not in name else ("replicate",):
            os.environ.pop("FSDP_IGNORED_MODULES", None)
            if layout == "replicate":
                os.environ["FSDP_IGNORED_MODULES"] = r".*memory"
            saving = SAVING if name == "fused" else {}
            options = {**options, **saving, "fsdp": True, "fsdp_config": {"version": 2}}
            model = LAYOUTS[layout](build(models.encoder, grad))
            out = folder() / f"fsdp2-{layout}"
            losses = run(model, world, out, trainer_class=WithOptimizer, **options)
            assert isinstance(model, FSDPModule)
            same_as(model, losses, expected)
            if saving:
                if layout != "shard":
                    read = PrefixMem.from_pretrained(out / "checkpoint-4").memory.weight
                    assert torch.equal(read, model.prefixmem.memory.weight)
                    dist.barrier()
                model = LAYOUTS[layout](build(models.encoder, grad))
                with torch.no_grad():
                    model.prefixmem.memory.weight.zero_()
                resume = str(out / "checkpoint-2")
                losses = run(model, world, out, resume=resume, trainer_class=WithOptimizer, **options)
                same_as(model, losses, expected)
    os.environ.pop("FSDP_IGNORED_MODULES", None)
    transformers.trainer.Accelerator = Accelerator
    AcceleratorState._reset_state(True)
