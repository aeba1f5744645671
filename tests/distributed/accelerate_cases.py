"""accelerate's FSDP2, told on a CPU what it would find out on GPUs, against one process."""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from prefixmem_fast import optim
from prefixmem_fast.distributed import replicate, shard
from tests.distributed.examples import alone, tables_of
from tests.distributed.processes import case
from tests.distributed.token_examples import build, stream
from tests.helpers import models

LAYOUTS = {
    "replicate": replicate,
    "managed": lambda model: replicate(model, managed=True),
    "shard": shard,
}


def train(model, optimizer, drawn, rank, world, accelerator=None):
    for tokens in drawn:
        own = tokens if rank is None else tokens.chunk(world)[rank]
        loss = model(input_ids=own, labels=own, use_cache=False).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        model.zero_grad()  # as trainers do


@case(2)
def fsdp2(rank, world):
    for grad in ("fused", "sparse"):
        reference = alone(build(models.encoder, grad))
        train(reference, optim.for_model(reference, 1e-2), stream(world), None, world)
        for layout in LAYOUTS:
            for efficient in (False, True) if layout != "replicate" else (False,):
                plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2,
                    reshard_after_forward=True,
                    cpu_ram_efficient_loading=efficient,
                    ignored_modules=r".*memory" if layout == "replicate" else None,
                    auto_wrap_policy="transformer_based_wrap",
                )
                accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
                accelerator.state.distributed_type = DistributedType.FSDP
                accelerator.state.fsdp_plugin = plugin
                model = LAYOUTS[layout](build(models.encoder, grad))
                optimizer = optim.for_model(model, 1e-2)
                model, optimizer = accelerator.prepare(model, optimizer)
                assert isinstance(model, FSDPModule)
                train(model, optimizer, stream(world), rank, world, accelerator)
                memory = model.prefixmem.memory
                part = memory.division.part_of if memory.division else lambda table: table
                whole = tables_of(reference)["prefixmem.memory"]
                torch.testing.assert_close(memory.weight.detach(), part(whole), rtol=1e-5, atol=2e-6)
                head = model.lm_head.weight.full_tensor()
                torch.testing.assert_close(head, reference.lm_head.weight, rtol=1e-4, atol=2e-5)
                accelerator.state._reset_state(True)
