"""Several hosts on one machine: network namespaces that see one another over a virtual cable.

torchrun ... -m tests.distributed.hosts MODULE        runs the cases of a module on all ranks of torchrun
"""

import importlib
import os
import shutil
import subprocess
import sys
import uuid
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tests.distributed import processes


def problem():
    """Why this machine cannot have namespaces, or None."""
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not there"
    name = f"pm-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this user may not make network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextmanager
def two_hosts():
    """Names of two namespaces with the addresses 10.77.0.1 and 10.77.0.2 on their eth0."""
    token = uuid.uuid4().hex[:6]
    names = [f"pm-{token}-{i}" for i in (1, 2)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ends = [f"v{token}{i}" for i in (1, 2)]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "eth0")
            ip("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun(host, node, *arguments, each=2):
    """A node of two of torchrun, with `each` processes, on a host."""
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        + ["--nproc-per-node", str(each), "--node-rank", str(node), "--master-addr", "10.77.0.1"]
        + ["--master-port", "29517", "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "GLOO_SOCKET_IFNAME": "eth0"},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    importlib.import_module(sys.argv[1])
    rank, world = dist.get_rank(), dist.get_world_size()
    for worlds, function in processes.CASES:
        if world in worlds:
            torch.manual_seed(0)
            function(rank, world)
            os.write(1, f"passed: {rank} {function.__name__}\n".encode())  # whole lines, as ranks share the pipe
    dist.destroy_process_group()
