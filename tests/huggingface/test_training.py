"""The Trainer that users have, and several processes."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from prefixmem_fast import attach, optim
from tests.helpers.models import TOKENS, encoder, tiny_model, vocabulary


def rows(count=16):
    generator = torch.Generator().manual_seed(0)
    table = vocabulary().table
    first = [token for token in range(len(table)) if table[token, 0] == 1]
    tokens = torch.randint(0, TOKENS, (count, 10), generator=generator)
    tokens[:, 4] = torch.tensor(first)[torch.randint(len(first), (count,), generator=generator)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(model, folder, steps=4, optimizer=None, **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0 if optimizer else 1.0,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, None))


def parameters(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def with_adapters():
    torch.manual_seed(5)
    return attach(get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"])), encoder(), vocabulary())


@pytest.mark.parametrize("make", [lambda: attach(tiny_model(), encoder(), vocabulary()), with_adapters])
def test_resumed_training_is_uninterrupted_training(make, tmp_path):
    whole = make()
    start = parameters(whole)
    trainer(whole, tmp_path / "whole").train()
    assert not torch.equal(parameters(whole)[_table(start)], start[_table(start)])
    trainer(make(), tmp_path / "cut", steps=2).train()
    resumed = make()
    trainer(resumed, tmp_path / "cut").train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, tensor in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], tensor), name


def _table(state):
    return next(name for name in state if name.endswith("prefixmem.memory.weight"))


@pytest.mark.parametrize("grad", ["sparse", "fused"])
def test_row_wise_optimizers(grad, tmp_path):
    model = attach(tiny_model(), encoder(grad=grad), vocabulary())
    table = model.prefixmem.memory.weight.detach().clone()
    one = trainer(model, tmp_path, optimizer=optim.for_model(model, lr=1e-3))
    one.train()
    assert not torch.equal(model.prefixmem.memory.weight, table)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in one.state.log_history if "loss" in entry)


def test_gradients_accumulate(tmp_path):
    """Two micro-batches of two rows are one batch of four."""
    once, twice = (attach(tiny_model(), encoder(), vocabulary()) for _ in range(2))
    trainer(once, tmp_path / "a", steps=2).train()
    arguments = {"gradient_accumulation_steps": 2}
    split = trainer(twice, tmp_path / "b", steps=2, **arguments)
    split.args.per_device_train_batch_size = 2
    split._train_batch_size = 2
    split.train()
    for name, tensor in parameters(once).items():
        torch.testing.assert_close(parameters(twice)[name], tensor, rtol=1e-3, atol=1e-4)


_DDP = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from prefixmem_fast import attach
from tests.helpers.models import encoder, prompts, sid, tiny_model, vocabulary

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
text = torch.randint(3, 20, (4, 8), generator=torch.Generator().manual_seed(0))
batches = [prompts()["input_ids"], text]  # the second process has no Semantic ID
model = attach(tiny_model(), encoder(), vocabulary())
parallel = DistributedDataParallel(model)
for _ in range(2):
    parallel(input_ids=batches[rank], labels=batches[rank]).loss.backward()
alone = attach(tiny_model(), encoder(), vocabulary())
for _ in range(2):
    sum(alone(input_ids=batch, labels=batch).loss / 2 for batch in batches).backward()
for name, p in alone.named_parameters():
    torch.testing.assert_close(dict(model.named_parameters())[name].grad, p.grad, rtol=1e-4, atol=1e-6)
assert alone.prefixmem.memory.weight.grad.any()
"""


@pytest.mark.slow
def test_two_processes_one_of_them_without_a_sid(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _DDP, str(rank), str(tmp_path / "meet")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
