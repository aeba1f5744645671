"""Cases that run in several processes over gloo: one start of the processes runs all cases of a number of them.

    python -m tests.distributed.processes RANK WORLD STORE MODULE

A case is a function of (rank, world), and raises where something is wrong. It leaves the processes in step.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

CASES = []  # (worlds, function) of the module that has been imported last
START = 120  # seconds


def case(*worlds):
    def register(function):
        CASES.append((worlds, function))
        return function

    return register


def start(world, tmp_path, module, *arguments, environment=None):
    """The processes, each with its pipe of errors."""
    store = tmp_path / f"store-{world}"
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                __name__,
                str(rank),
                str(world),
                str(store),
                module,
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **(environment or {})},
        )
        for rank in range(world)
    ]


def run_cases(world, tmp_path, module, seconds=600, **options):
    """All cases of a module for a number of processes: the names of those that passed.

    Raises:
        AssertionError: with the traceback of each that failed on a rank.
    """
    results = []
    running = start(world, tmp_path, module, **options)
    try:
        for rank, process in enumerate(running):
            out, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, f"rank {rank}: {errors[-3000:]}"
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
    failed = [
        f"rank {rank}, {name}:\n{text}" for rank, found in enumerate(results) for name, text in found.items() if text
    ]
    assert not failed, "\n".join(failed)
    return set(results[0])


def main(rank, world, store, module):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    importlib.import_module(module)
    found = {}
    for worlds, function in CASES:
        if world in worlds:
            torch.manual_seed(0)
            text = ""
            try:
                function(rank, world)
            except Exception:
                text = traceback.format_exc()[-3000:]
            found[function.__name__] = text
            dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.modules["tests.distributed.processes"] = sys.modules["__main__"]  # one list of cases
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
