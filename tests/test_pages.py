"""Pages of tables, and of a training step."""

import re
import resource
from pathlib import Path

import pytest
import torch

from prefixmem_fast import AddressSpec, PrefixMemConfig, PrefixMemory, optim
from prefixmem_fast._pages import ask_for_huge_pages

CHOICES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SPEC = AddressSpec((64,) * 3, table_rows=40_000, heads=2, addressing="hash")


def huge_bytes(address: int) -> int:
    """Bytes on huge pages of the mapping that holds an address."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        low, high = (int(end, 16) for end in mapping.split(" ", 1)[0].split("-"))
        if low <= address < high:
            return int(re.search(r"AnonHugePages:\s+(\d+)", mapping)[1]) * 1024
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(not CHOICES.exists() or "[never]" in CHOICES.read_text(), reason="no huge pages are given here")
def test_a_table_lies_on_huge_pages():
    torch.use_deterministic_algorithms(False)  # which would write it before the pages are asked for
    memory = PrefixMemory(PrefixMemConfig(SPEC, memory_dim=128))
    table = memory.weight
    size = table.numel() * 4
    assert size > 50 << 20
    assert huge_bytes(table.data_ptr() + size // 2) > size * 3 // 4


def test_what_cannot_be_asked_for_is_left():
    assert not ask_for_huge_pages(torch.empty(10))
    assert not ask_for_huge_pages(torch.empty(1 << 22, device="meta"))


@pytest.mark.parametrize("grad", ["fused", "sparse"])
def test_a_step_takes_no_new_pages(grad):
    """After the first steps S, the gradient's sums and all temporary arrays lie where those of the step before lay."""
    torch.use_deterministic_algorithms(False)
    memory = PrefixMemory(PrefixMemConfig(SPEC, memory_dim=128), grad=grad, backend="native")
    optimizer = optim.RowWiseAdagrad(memory.parameters(), lr=0.1)
    batches = [torch.randint(0, 64, (6000, 3)) for _ in range(2)]
    gradient = torch.randn(6000, 3, 128)

    def step(codes):
        memory(codes).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    for codes in batches * 2:
        step(codes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for codes in batches * 2:
        step(codes)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    pages_of_S = gradient.numel() * 4 / resource.getpagesize()
    assert faults < 0.02 * 4 * pages_of_S, f"{faults} page faults in four steps, {pages_of_S:.0f} pages of S a step"
