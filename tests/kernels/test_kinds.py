"""What makes Triton compile a kernel anew: no size, slice, seed or number of a step. Every launcher knows what does.

The functions of the backend run in a process without the interpreter. Nothing is compiled and nothing launched: Triton
binds and classes the arguments, and a stand-in takes the place of each kernel that it would compile.
"""

import json
import os
import subprocess
import sys

import pytest

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

START = """
import json
from collections import Counter
from functools import partial
from itertools import product
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from prefixmem_fast import AddressSpec, optim
from prefixmem_fast._launch import Launch, forget
from prefixmem_fast.checks import machine_code
from prefixmem_fast.operation import backends
from prefixmem_fast.operation.interface import QuantizedTable
from prefixmem_fast.operation.rules import Hyper, RowUpdate

made, kernels, cumsum = [], set(), torch.cumsum

class Kernel:  # what Triton compiles
    function = packed_metadata = None
    run = launch_metadata = lambda self, *args: None
    def __getitem__(self, grid):
        return lambda *args: None

def compile_nothing(self, key, signature, device, *rest):
    kernel = self.device_caches[device][0][key] = Kernel()
    made.append(self.__name__), kernels.add(self)
    return kernel

def meta_cumsum(x, dim):  # torch's own makes a square of the sizes
    return torch.empty_like(x, dtype=torch.int64) if x.is_meta else cumsum(x, dim)

assert Launch.remembers
Launch.verifies = True
mock.patch.object(JITFunction, "_do_compile", compile_nothing).start()
mock.patch.object(torch, "cumsum", meta_cumsum).start()
triton = backends.functions_of("triton")
"""


def python(program):
    done = subprocess.run([sys.executable, "-c", START + program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


KINDS = """
specs = [
    AddressSpec((8,) * 5, table_rows=rows, active_levels=(3, 4), mode=mode, heads=3)
    for mode in ("prefix", "full", "suffix") for rows in (50, 5000)
]
large = AddressSpec((2048,) * 5, table_rows=1 << 27)
dtypes = torch.bfloat16, torch.float32, torch.float64

def of_every_size(spec):
    for dtype, sids, width in product(dtypes, (1, 16, 17, 40_000, 1 << 28), (64, 3)):
        for call in machine_code.launches(spec, dtype, width, sids).values():
            call()
    many = torch.empty(1 << 31, 5, dtype=torch.int16, device="meta")
    triton.forward(many, many.new_empty(spec.total_rows, 4, dtype=torch.float32), spec)
    grad = many.new_empty(len(many), len(spec.active_levels), 4 * spec.heads, dtype=torch.float32)
    triton.dense_gradient(grad, many, spec)

def moved(tensor):
    "The same, and not at a multiple of 16 bytes."
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)

def arguments(spec, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, codes = torch.zeros(spec.total_rows, 64, dtype=dtype), torch.zeros(40, 5, dtype=torch.int64)
    first, second = torch.zeros(weight.shape, dtype=wide), torch.zeros(len(weight), dtype=wide)
    usual = dict(
        weight=weight, codes=codes, grad=torch.zeros(40, 2, 192, dtype=dtype), first=first, second=second, lr=0.5,
        step=torch.ones((), dtype=torch.int64), rows=torch.zeros(1, 7, dtype=torch.int64),
        values=torch.zeros(7, 64, dtype=dtype),
    )
    yield usual
    scheduled = {**usual, "lr": torch.ones(1)}
    for given in usual, scheduled:
        yield from ({**given, name: moved(value)} for name, value in given.items() if torch.is_tensor(value))
    yield {**scheduled, "lr": torch.ones((), dtype=torch.float64)}
    yield from ({**usual, "codes": codes.to(kind)} for kind in (torch.int32, torch.int16))
    yield {**usual, "first": None}

def windows_of(spec, dtype):
    return torch.zeros(9, 11).long()[:, :6], torch.zeros(7, 2).int(), spec, torch.zeros(9, spec.heads * 64, dtype=dtype)

def of_every_alignment(spec, weight, codes, grad, first, second, lr, step, rows, values):
    dtype = weight.dtype
    triton.forward(codes, weight, spec)
    triton.prefix_rows(codes, spec)
    triton.dense_gradient(grad, codes, spec)
    triton.dense_gradient(grad, codes, spec, deterministic=True)
    triton.row_sums(grad, codes, spec, dtype)
    sparse = torch.sparse_coo_tensor(rows, values, weight.shape, check_invariants=False)
    full = torch.zeros_like(weight, dtype=second.dtype)
    states = {"sgd": [], "row_adagrad": [second], "row_adam": [first, second], "lazy_adam": [first, full]}
    for (rule, state), decay, squares in product(states.items(), (0.0, 0.5), (None, [])):
        hyper, seed = Hyper(lr, decay, 1e-8, 0.9, 0.999), 0 if dtype == torch.bfloat16 else None
        update = RowUpdate(weight, rule, state, step, hyper, seed, squares)
        triton.fused_update(grad, codes, spec, update)
        triton.sparse_update(sparse, update)

for target, chosen in (("sm_90", specs), ("sm_80", specs[:1])):
    with machine_code.stand_in_driver(target):
        for spec in (*chosen, large):
            of_every_size(spec)
        for spec, dtype in product(chosen, dtypes):
            for given in arguments(spec, dtype):
                of_every_alignment(spec, **given)
        for spec, values, dtype in product(chosen, (torch.int8, torch.float8_e4m3fn), dtypes[:2]):
            values, scales = torch.zeros(spec.total_rows, 64, dtype=values), torch.zeros(spec.total_rows)
            for table in (values, scales), (moved(values), scales), (values, moved(scales)):
                triton.quantized_forward(torch.zeros(40, 5, dtype=torch.int64), QuantizedTable(*table), spec, dtype)
                windows, entries, *rest = windows_of(spec, dtype)
                triton.read_windows(windows, entries, QuantizedTable(*table), *rest)
    forget()
print(json.dumps(Counter(made)))
"""


@pytest.mark.slow
def test_launches_of_a_kind_have_one_kernel():
    """Every launcher in every mode and dtype, with tensors that are not aligned and sizes beyond 2^31."""
    made = python(KINDS)
    assert len(made) == 15  # the kernels of the package
    assert made["sum_prefixes_kernel"] > 200


ONE = """
spec = AddressSpec((2048,) * 5, table_rows=100_000, active_levels=(3, 4))
weight = torch.zeros(spec.total_rows, 64, dtype=torch.bfloat16)

def compiled(calls):
    made.clear(), forget()
    for kernel in kernels:
        kernel.device_caches.clear()
    with machine_code.stand_in_driver("sm_90"):
        for call in calls:
            call()
    return Counter(made)

def of_every_size(name):
    sizes = (1, 2, 15, 16, 17, 64, 4096, 65_536, 1_000_000)
    return [machine_code.launches(spec, torch.bfloat16, 64, sids)[name] for sids in sizes]

def step(codes, optimizer=optim.RowWiseAdagrad, **options):
    table = torch.nn.Parameter(weight)
    grad, optimizer = torch.zeros(len(codes), 2, 256, dtype=torch.bfloat16), optimizer([table], **options)
    return lambda: triton.fused_update(grad, codes, spec, optimizer.begin(table))

codes = torch.zeros(1001, 5, dtype=torch.int64)
slices = [codes, codes[1:], codes[2:], codes[3:17], codes[7:8]]
assert codes[1:].data_ptr() % 16 == 8
names = machine_code.launches(spec, torch.bfloat16, 64, 1)
found = {name: compiled(of_every_size(name)) for name in names}
found["slices, forward"] = compiled(partial(triton.forward, part, weight, spec) for part in slices)
found["slices, step"] = compiled(step(part) for part in slices)
numbers = [{"seed": seed} for seed in (0, 1, 16, 1 << 40)] + [{"lr": lr} for lr in (1, 1.0, 16, 0.1)]
numbers += [{"eps": eps} for eps in (0, 1, 1e-8)]
found["numbers"] = compiled(step(codes, **given) for given in numbers)
found["betas"] = compiled(step(codes, optim.RowWiseAdam, betas=(0.5, beta)) for beta in (0, 0.0, 0.5, 0.999))
found["schedule"] = compiled(step(codes, lr=torch.tensor(lr)) for lr in (1.0, 0.5))
found["decay"] = compiled(step(codes, weight_decay=decay) for decay in (1, 16, 0.5))
found["decay or none"] = compiled(step(codes, weight_decay=decay) for decay in (0.5, 0))
forget()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    return python(ONE)


# Two binaries: of many SIDs the rows are sorted and not claimed; sums of a list have leaves and inner nodes.
TWO = ("prefixes_kernel", "sum_rows_kernel")
LAUNCHERS = ("fwd", "bwd", "rows", "window_memory", "update")


def test_a_new_batch_size_compiles_nothing(compiled):
    """From 1 to 1,000,000 SIDs or tokens."""
    of_launchers = {name: made for name, made in compiled.items() if name.endswith(LAUNCHERS)}
    assert len(of_launchers) == 20
    for name, made in of_launchers.items():
        two = {"sum_rows_kernel", "mark_sorted_kernel"} if name == "sparse_bwd" else TWO
        assert made == {kernel: 2 if kernel in two else 1 for kernel in made}, name


def test_a_slice_that_is_not_aligned_compiles_nothing(compiled):
    assert compiled["slices, forward"] == {"prefix_memory_fwd_kernel": 1}
    assert set(compiled["slices, step"].values()) == {1}


@pytest.mark.parametrize("what", ["numbers", "betas", "schedule", "decay"])
def test_the_numbers_of_a_step_compile_nothing(compiled, what):
    """Seeds, lr, eps, betas and decay of any value and type; a tensor lr and a decay of 0 have kernels of their own."""
    assert set(compiled[what].values()) == {1}
    assert {"sum_prefixes_kernel", "merge_rows_kernel"} <= set(compiled[what])
    writes = {"sum_prefixes_kernel", "merge_rows_kernel", "sum_edges_kernel"}
    assert {kernel for kernel, count in compiled["decay or none"].items() if count == 2} == writes


FIRST_STEP = """
import resource, sys
from bench import host

def seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)

def compile():
    step = host.calls()["step, fused row-wise Adagrad"]
    began = seconds()
    step()
    return seconds() - began

with host.kernels_that_return_at_once():
    took = compile()
print(took)
"""


@pytest.mark.slow
def test_the_first_step_compiles_in_seconds(tmp_path):
    """Forward and a fused step of row-wise Adagrad, bfloat16, sm_90, an empty cache: 4 s of CPU time on an AMD EPYC."""
    environment = {**ENVIRONMENT, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.5 < float(done.stdout) < 10
