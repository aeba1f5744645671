"""transformers' Trainer with DDP and with FSDP2, as users start it, against one process."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from prefixmem_fast import PrefixMem, optim
from prefixmem_fast.distributed import replicate, shard
from prefixmem_fast.huggingface.table_checkpoints import TableCheckpoints
from prefixmem_fast.recommender.training.trainer import StopAt
from tests.distributed.examples import tables_of
from tests.distributed.processes import case
from tests.distributed.token_examples import build, stream
from tests.helpers import models

ROWS = torch.cat(stream(4, steps=4)).tolist()  # 32, a quarter of them text alone
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


def run(model, world, out, steps=4, resume=None, trainer_class=Trainer, **options):
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=4 // world,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        learning_rate=1e-2,
        warmup_steps=2,
        **{"save_strategy": "no", **options},
    )
    optimizer = optim.for_model(model, 1e-2, encoder_lr_multiple=2.0)
    dataset = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ROWS]
    callbacks = [TableCheckpoints(), StopAt(steps)]
    trainer = trainer_class(model, arguments, train_dataset=dataset, optimizers=(optimizer, None), callbacks=callbacks)
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
    options = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}
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
    """One process goes on from the checkpoint of two, whose tables were divided."""
    out = folder() / "resumed-shard"
    if out.is_dir():
        expected = torch.load(folder() / "fused.pt")
        model = shard(build(models.encoder, "fused"))
        options = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}
        run(model, world, out, resume=str(out / "checkpoint-2"), **options)
        table = model.prefixmem.memory.weight.detach()
        torch.testing.assert_close(table, expected["prefixmem.memory"], rtol=1e-4, atol=1e-5)


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
            saving = {"save_strategy": "steps", "save_steps": 2} if name == "fused" else {}
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
