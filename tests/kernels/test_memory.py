"""What a step allocates beside the table, its state and dS, counted on meta tensors at the paper's shape."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.host import kernels_that_return_at_once
from prefixmem_fast.checks import launches

SIDS = 65_536
# Bytes a SID. Of an update nearly all is room for sums put aside, 4 rows of H x w in float32, as if all were shared;
# the list of a sparse gradient has as many rows again, in float32 and in the table's dtype.
MOST = {"prefix_memory_fwd": 1024, "row_adagrad_bwd": 5_800, "lazy_adam_bwd": 5_800, "sparse_bwd": 14_000}


class Allocations(TorchDispatchMode):
    """Adds up what operators return in memory of its own."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:
                    self.bytes += tensor.nbytes
        return result


@pytest.mark.parametrize("launcher", MOST)
def test_memory_of_a_call(launcher):
    spec = launches.paper_spec()
    with kernels_that_return_at_once(), Allocations() as allocations:
        call = launches.launches(spec, torch.bfloat16, 64, SIDS)[launcher]
        before = allocations.bytes
        call()
    used = (allocations.bytes - before) / SIDS
    assert MOST[launcher] / 2 < used <= MOST[launcher]
