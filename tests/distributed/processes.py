"""Cases that run in several processes over gloo: one start of the processes runs all cases of a number of them.

    python -m tests.distributed.processes RANK WORLD STORE MODULE

A case is a function of (rank, world), and raises where something is wrong. It leaves the processes in step.
"""

import importlib
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
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def _of_torchrun(rank, world):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


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
            env={**os.environ, **ENVIRONMENT, **_of_torchrun(rank, world), **(environment or {})},
        )
        for rank in range(world)
    ]


def run_cases(world, tmp_path, module, seconds=600, **options):
    """All cases of a module for a number of processes: the names of those that passed.

    Raises:
        AssertionError: with the traceback of each that failed on a rank.
    """
    running = start(world, tmp_path, module, **options)
    try:
        said = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [
        f"rank {rank}, exit code {process.returncode}: {errors[-4000:]}"
        for rank, (process, (_, errors)) in enumerate(zip(running, said, strict=True))
        if process.returncode
    ]
    assert not failed, "\n\n".join(failed)
    return {line.split()[1] for line in said[0][0].splitlines() if line.startswith("passed: ")}


def main(rank, world, store, module):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    importlib.import_module(module)
    for worlds, function in CASES:
        if world in worlds:
            torch.manual_seed(0)
            try:
                function(rank, world)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)  # without waiting for the others, who fail soon after
            print("passed:", function.__name__)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["tests.distributed.processes"] = sys.modules["__main__"]  # one list of cases
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
