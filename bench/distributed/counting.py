"""Bytes that leave a rank: counted at the collective operators of torch, and read from the loopback interface.

A collective ends in an operator of torch's, whoever calls it: a function of torch.distributed, a functional collective,
or the reducer of DistributedDataParallel in C++. Of a tensor of B bytes in a group of W ranks it is counted as

    all_gather     (W - 1) B          to every other rank
    all_to_all     B less the rank's own part
    broadcast      (W - 1) B          by the root, 0 by the others
    all_reduce     2 (W - 1) / W B    of a ring
    barrier        0

What a backend sends may differ from that, by the headers of its packets at the least: the loopback interface says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACES = ("c10d", "_c10d_functional")
WITHOUT_BYTES = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")
INTERFACES = Path("/proc/net/dev")


class SentBytes(TorchDispatchMode):
    """Counts while it is entered, on the thread that enters it.

    Attributes:
        calls: bytes of each kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, float] = {}

    @property
    def total(self) -> float:
        return sum(self.calls.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        kind = function.overloadpacket._qualified_op_name.split("::")[-1]
        if function.namespace in NAMESPACES and kind not in WITHOUT_BYTES:
            name, sent = _sent(kind, args)
            self.calls[name] = self.calls.get(name, 0) + sent
        return function(*args, **(kwargs or {}))


def _sent(kind: str, args: tuple) -> tuple[str, float]:
    """What an operator is, and its bytes; the group's place among the arguments is that of torch's schemas."""
    if kind == "_allgather_base_":
        return "all_gather", _gathered(args[1], _group(args[2]))
    if kind == "allgather_":
        return "all_gather", sum(_gathered(tensor, _group(args[2])) for tensor in args[1])
    if kind == "all_gather_into_tensor":
        return "all_gather", _gathered(args[0], _group(args[2]))
    if kind == "alltoall_base_":
        return "all_to_all", _swapped(args[1], args[4], _group(args[2]))
    if kind == "all_to_all_single":
        return "all_to_all", _swapped(args[0], args[2], _group(args[3]))
    if kind == "broadcast_":
        group = _group(args[1])
        return "broadcast", sum(map(_bytes, args[0])) * (group.size() - 1) * (group.rank() == args[2])
    if kind == "allreduce_":
        return "all_reduce", sum(_reduced(tensor, _group(args[1])) for tensor in args[0])
    if kind == "all_reduce":
        return "all_reduce", _reduced(args[0], _group(args[2]))
    raise NotImplementedError(f"the bytes of {kind} are not counted; add its rule to {__name__}")


def _group(given: Any) -> dist.ProcessGroup:
    if isinstance(given, str):
        return torch._C._distributed_c10d._resolve_process_group(given)
    return given if isinstance(given, dist.ProcessGroup) else dist.ProcessGroup.unbox(given)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> int:
    return _bytes(tensor) * (group.size() - 1)


def _reduced(tensor: Tensor, group: dist.ProcessGroup) -> float:
    return 2 * (group.size() - 1) / group.size() * _bytes(tensor)


def _swapped(tensor: Tensor, splits: list[int], group: dist.ProcessGroup) -> int:
    own = splits[group.rank()] if splits else len(tensor) // group.size()
    return _bytes(tensor) - _bytes(tensor[:1]) * own


def loopback_bytes() -> int | None:
    """Bytes that all processes of this machine have sent to one another so far; None where the system does not say."""
    if not INTERFACES.exists():
        return None
    lines = [line.split(":") for line in INTERFACES.read_text().splitlines() if ":" in line]
    return next((int(numbers.split()[8]) for name, numbers in lines if name.strip() == "lo"), None)
