"""Ranks that die, leave a call out or evaluate alone: the other gets one line within the time-out, and lost nothing.

python -m tests.distributed.processes RANK 2 STORE tests.distributed.failure_cases SCENARIO
"""

import os
import sys
import time
from datetime import timedelta

import torch

from prefixmem_fast.distributed import ExchangeError, replicate, shard
from prefixmem_fast.distributed.exchange import Exchange
from tests.distributed.examples import RULES, batches, encoder, loss_of
from tests.distributed.processes import case

SECONDS = 4
LAYOUTS = {"replicate": replicate, "shard": shard}
SCENARIOS = ("killed before", "killed in", "killed after", "skips", "evaluates alone")


@case(2)
def scenario(rank, world):
    layout, _, what = sys.argv[5].partition(" ")
    model = LAYOUTS[layout](encoder("fused"), timeout=timedelta(seconds=SECONDS))
    optimizer = RULES["adagrad"]([model.memory.weight], lr=0.05)
    drawn = batches((8, 8), 3)

    def step(i):
        loss_of(model, drawn[i][rank], 1.0).backward()
        optimizer.step()

    step(0)
    if rank == 1:
        if what == "killed in":
            gather = Exchange.gather

            def die_at_the_codes(self, rows, *rest):
                if rows.dtype == torch.int16:
                    os._exit(9)
                return gather(self, rows, *rest)

            Exchange.gather = die_at_the_codes
        if what == "killed before":
            os._exit(9)
        if what in ("killed in", "killed after"):
            step(1)
            os._exit(9)
        time.sleep(2 * SECONDS)  # leaves the call out
        os._exit(0)
    if what == "killed after":
        step(1)
    before = model.memory.weight.detach().clone(), int(optimizer.state[model.memory.weight]["step"])
    begun = time.monotonic()
    try:
        if what == "evaluates alone":
            with torch.no_grad():
                model(drawn[0][0])
        else:
            step(2)
        print("went on")
    except ExchangeError as error:
        text = str(error)
        assert "\n" not in text
        assert "rank 0 got no answer from the other 1 of ranks [0, 1]" in text, text
        assert "restart all ranks from the last checkpoint" in text
        print("stopped")
    assert time.monotonic() - begun < SECONDS + 15  # the default of gloo is half an hour
    assert torch.equal(model.memory.weight, before[0])
    assert int(optimizer.state[model.memory.weight]["step"]) == before[1]
    sys.stdout.flush()
    os._exit(0)
