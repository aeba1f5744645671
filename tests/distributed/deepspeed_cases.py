"""DeepSpeed's ZeRO stages around managed and divided tables, against one process."""

import os
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from prefixmem_fast import PrefixMem, attach, optim
from prefixmem_fast.distributed import replicate, save_pretrained, shard
from tests.distributed.examples import alone, tables_of
from tests.distributed.processes import case
from tests.distributed.token_examples import build, stream
from tests.helpers import models

deepspeed.comm.torch.build_shm_op = lambda: None  # it would be compiled for minutes
LAYOUTS = {"managed": lambda model: replicate(model, managed=True), "shard": shard}


def engine_of(model, optimizer, stage):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def rest_of(model):
    """What DeepSpeed trains; the tables have an optimizer of their own."""
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)


@case(2)
def hidden_tables(rank, world):
    for grad in ("fused", "sparse"):
        reference = alone(build(models.encoder, grad))
        table = reference.prefixmem.memory.weight
        rows, rest = optim.RowWiseAdagrad([table], lr=0.05), rest_of_others(reference, table)
        for tokens in stream(world):
            reference(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            rest.step()
            rows.step()
            rest.zero_grad()
            rows.zero_grad()
        for stage in (0, 2, 3):
            for layout in LAYOUTS.values():
                model = layout(build(models.encoder, grad))
                memory = model.prefixmem.memory
                rows = optim.RowWiseAdagrad([memory.weight], lr=0.05)
                engine = engine_of(model, rest_of(model), stage)
                for tokens in stream(world):
                    own = tokens.chunk(world)[rank]
                    engine.backward(engine(input_ids=own, labels=own, use_cache=False).loss)
                    engine.step()
                    rows.step()
                    rows.zero_grad()
                part = memory.division.part_of if memory.division else lambda table: table
                whole = tables_of(reference)["prefixmem.memory"]
                torch.testing.assert_close(memory.weight.detach(), part(whole), rtol=1e-4, atol=1e-5)


@case(2)
def save(rank, world):
    """Of whole tables and of divided ones, with what ZeRO 3 has divided put together."""
    trained = build(models.encoder, "fused")
    for name, layout in LAYOUTS.items():
        model = layout(build(models.encoder, "fused"))
        engine = engine_of(model, rest_of(model), 3)
        own = model.prefixmem.out_proj.weight
        assert own.shape != trained.prefixmem.out_proj.weight.shape
        out = Path(os.environ["PREFIXMEM_TEST_FOLDER"]) / name
        save_pretrained(model, out)
        if name == "managed":
            with pytest.raises(ValueError, match=r"weight is divided over processes, by FSDP2 or DeepSpeed; call"):
                model.prefixmem.save_pretrained(out / str(rank))
            state = engine._zero3_consolidated_16bit_state_dict()  # accelerate's get_state_dict
            if rank == 0:
                model.save_pretrained(out / "one", state_dict=state)
            dist.barrier()
        for folder in (out, out / "one") if name == "managed" else (out,):
            again = attach(
                type(trained).from_pretrained(folder), PrefixMem.from_pretrained(folder), models.vocabulary()
            )
            saved = dict(again.named_parameters())
            assert all(torch.equal(saved[key], parameter) for key, parameter in trained.named_parameters())


def rest_of_others(model, table):
    return torch.optim.AdamW([p for p in model.parameters() if p is not table], 1e-2, weight_decay=0.0)


@case(2)
def tables_that_would_not_train(rank, world):
    """Both trained nothing, and said nothing."""
    tokens = stream(world)[0].chunk(world)[rank]
    model = replicate(build(models.encoder, "fused"))
    rows = optim.RowWiseAdagrad([model.prefixmem.memory.weight], lr=0.05)
    engine = engine_of(model, rest_of(model), 3)
    with pytest.raises(RuntimeError, match=r"weight is divided by DeepSpeed ZeRO.*managed=True\) before deepspeed"):
        engine(input_ids=tokens, labels=tokens, use_cache=False)
    del rows
    model = replicate(build(models.encoder, "sparse"))
    rows = optim.RowWiseAdagrad([model.prefixmem.memory.weight], lr=0.05)
    engine = engine_of(model, rest_of_others(model, model.prefixmem.memory.weight), 0)
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()
    with pytest.raises(RuntimeError, match=r"the gradient of the table of shape .* is gone.*managed=True"):
        rows.step()
