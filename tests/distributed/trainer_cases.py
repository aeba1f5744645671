"""transformers' Trainer and accelerate's FSDP2, as users start them, against one process."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from prefixmem_fast import optim
from prefixmem_fast.distributed import replicate, shard
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


def run(model, world, out, **options):
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=4 // world,
        max_steps=4,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        learning_rate=1e-2,
        warmup_steps=2,
        **options,
    )
    optimizer = optim.for_model(model, 1e-2, encoder_lr_multiple=2.0)
    dataset = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ROWS]
    trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, None))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@case(1)
def trainer_alone(rank, world):
    for name, (grad, options) in WAYS.items():
        model = replicate(build(models.encoder, grad))
        losses = run(model, 1, folder() / "out", **options)
        torch.save({"losses": losses, **tables_of(model)}, folder() / f"{name}.pt")


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
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected["losses"]), rtol=1e-3, atol=1e-3)
            memory = model.prefixmem.memory
            part = memory.division.part_of if memory.division else lambda table: table
            torch.testing.assert_close(memory.weight.detach(), part(expected["prefixmem.memory"]), rtol=1e-4, atol=1e-5)
    DistributedDataParallel.__init__ = init
    assert len(wrapped) == 7
    dist.barrier()
