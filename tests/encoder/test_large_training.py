"""The paper's tables, 2M rows x 16 in bfloat16, take training steps in little more memory than they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cases import slow

SCRIPT = """
import json, resource, sys
import torch
from bench.machine import peak_bytes, reset_peak
from prefixmem_fast import AddressSpec, optim, prefix_memory, prefix_rows

spec = AddressSpec((2048,) * 5, table_rows=2_000_000, addressing="hash", active_levels=(3, 4))
grad, make = sys.argv[1], getattr(optim, sys.argv[2])

def steps(spec, weight, sids, count):
    weight = torch.nn.Parameter(weight)
    optimizer = make([weight], lr=0.1)
    codes = torch.randint(0, 2048, (sids, 5))
    for _ in range(count):
        prefix_memory(codes, weight, spec, grad=grad).backward(given[:sids])
        optimizer.step()
        optimizer.zero_grad()
    return codes, sum(s.numel() * s.element_size() for s in optimizer.state[weight].values())

given = torch.randn(16_384, 2, 256).bfloat16()
small = AddressSpec((2048,) * 5, table_rows=500, active_levels=(3, 4))
steps(small, torch.randn(small.total_rows, 64).bfloat16(), 4096, 2)  # loads every library before memory is counted
before = reset_peak()
table = spec.total_rows * 64 * 2
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + table + (2 << 30), -1))  # no room for a dense gradient, mapped or not
weight = torch.empty(spec.total_rows, 64, dtype=torch.bfloat16)
block = torch.randn(1 << 18, 64).bfloat16()
for part in weight.split(len(block)):
    part.copy_(block[: len(part)])
del block, part
codes, state = steps(spec, weight, 16_384, 3)
touched = prefix_rows(codes, spec)[:, 3].unique()
assert not torch.equal(weight[touched[:1000]], weight[(touched[:1000] + (1 << 18)) % len(weight)])
print(json.dumps({"peak": peak_bytes() - before, "table": table, "state": state, "touched": len(touched) * 64 * 4}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize(
    ("grad", "make"), [slow("fused", "RowWiseAdagrad"), slow("fused", "SGD"), slow("sparse", "RowWiseAdagrad")]
)
def test_no_dense_allocation(grad, make):
    """Peak memory is at most tables, optimizer state and three times the touched rows."""
    command = [sys.executable, "-c", SCRIPT, grad, make]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["table"] == 4_096_000_000
    beside = found["peak"] - found["table"] - found["state"]
    assert beside <= 3 * found["touched"], f"{beside / found['touched']:.2f} times the touched rows"


@pytest.mark.slow
def test_a_dense_gradient_would_not_fit():
    """The limit that the test sets would stop one."""
    dense = SCRIPT.replace("getattr(optim, sys.argv[2])", "torch.optim.SGD")
    done = subprocess.run(
        [sys.executable, "-c", dense, "dense", ""], cwd=Path(__file__).parents[2], capture_output=True
    )
    assert done.returncode != 0
    assert b"allocate memory" in done.stderr or b"not enough memory" in done.stderr
