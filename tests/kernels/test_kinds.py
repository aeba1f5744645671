"""What makes Triton compile a kernel anew: no size, slice, seed or number of a step; and every launcher knows what does.

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
import json, torch
from collections import Counter
from unittest import mock
from triton.runtime.jit import JITFunction
from prefixmem_fast import AddressSpec, optim
from prefixmem_fast._launch import Launch, forget
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.checks import machine_code
from prefixmem_fast.operation import backends
from prefixmem_fast.operation.rules import Hyper, RowUpdate

made = []

class Kernel:  # what Triton compiles
    function = packed_metadata = None
    run = launch_metadata = lambda self, *args: None
    def __getitem__(self, grid):
        return lambda *args: None

def compile_nothing(self, key, signature, device, *rest):
    kernel = self.device_caches[device][0][key] = Kernel()
    made.append(self.__name__)
    return kernel

assert Launch.remembers
Launch.verifies = True
mock.patch.object(JITFunction, "_do_compile", compile_nothing).start()
triton = backends.functions_of("triton")
"""


def python(program):
    done = subprocess.run([sys.executable, "-c", START + program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


KINDS = """
def moved(tensor):  # the same, not at a multiple of 16 bytes
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype).zero_()[1:].view(tensor.shape) if tensor.numel() else tensor

specs = [AddressSpec((8,) * 5, table_rows=rows, active_levels=(3, 4), mode=mode, heads=3)
         for mode in ("prefix", "full", "suffix") for rows in (50, 5000)]
specs += [AddressSpec((2048,) * 5, table_rows=1 << 27)]
n_calls = 0
for target in ("sm_90", "sm_80"):
    with machine_code.stand_in_driver(target):
        for spec in specs:
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                for sids in (1, 16, 17, 40_000, 1 << 31):
                    for width in (64, 3):
                        for call in machine_code.launches(spec, dtype, width, sids).values():
                            call()
                            n_calls += 1
        for spec in specs[:-1]:
            codes = torch.zeros(40, 5, dtype=torch.int64)
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                weight, wide = torch.zeros(spec.total_rows, 64, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
                grad = torch.zeros(40, 2, 3 * 64, dtype=dtype)
                first, second, step = torch.zeros(weight.shape, dtype=wide), torch.zeros(len(weight), dtype=wide), torch.ones((), dtype=torch.int64)
                values = torch.zeros(7, 64, dtype=dtype)
                for lr in (0.5, torch.ones((1,)), torch.ones((1,), dtype=torch.float64)):
                    usual = [weight, grad, codes, first, second, step, lr, values]
                    cases = [usual, *([*usual[:i], moved(usual[i]) , *usual[i + 1:]] for i in range(8) if torch.is_tensor(usual[i]))]
                    cases += [[*usual[:2], given, *usual[3:]] for given in (codes.int(), codes.short())]
                    cases += [[*usual[:3], None, *usual[4:]]]
                    for weight_, grad_, codes_, first_, second_, step_, lr_, values_ in cases:
                        triton.forward(codes_, weight_, spec)
                        triton.prefix_rows(codes_, spec)
                        for deterministic in (False, True):
                            triton.dense_gradient(grad_, codes_, spec, deterministic)
                        triton.row_sums(grad_, codes_, spec, dtype)
                        for rule, state in (("sgd", []), ("row_adagrad", [second_]), ("row_adam", [first_, second_]), ("lazy_adam", [first_, first])):
                            for decay in (0.0, 0.5):
                                for squares in (None, []):
                                    hyper = Hyper(lr_, decay, 1e-8, 0.9, 0.999)
                                    update = RowUpdate(weight_, rule, state, step_, hyper, 0 if dtype == torch.bfloat16 else None, squares)
                                    triton.fused_update(grad_, codes_, spec, update)
                                    sparse = torch.sparse_coo_tensor(torch.zeros(1, 7, dtype=torch.int64), values_, weight.shape, check_invariants=False)
                                    triton.sparse_update(sparse, update)
                                    n_calls += 1
    forget()
print(json.dumps([n_calls, Counter(made)]))
"""


def test_launches_of_a_kind_have_one_kernel():
    """Every launcher in every mode and dtype, with tensors that are not aligned, with sizes beyond 2^31."""
    n_calls, made = python(KINDS)
    assert n_calls > 2000
    assert len(made) == 14  # every kernel of the package


ONE = """
spec = AddressSpec((2048,) * 5, table_rows=100_000, active_levels=(3, 4))
meta = torch.device("meta")
weight = torch.zeros(spec.total_rows, 64, dtype=torch.bfloat16)
n_calls = 0

def compiled(calls):
    made.clear()
    with machine_code.stand_in_driver("sm_90"):
        for call in calls:
            call()
    return Counter(made)

def forward(codes, weight):
    return lambda: triton.forward(codes, weight, spec)

def step(optimizer_class, codes, **options):
    def run():
        table = torch.nn.Parameter(weight)
        update = optimizer_class([table], **options).begin(table)
        triton.fused_update(torch.zeros(len(codes), 2, 256, dtype=torch.bfloat16), codes, spec, update)
    return run

def batches(function):
    return [lambda call=call: call() for sids in (1, 2, 15, 16, 17, 4096, 65_536, 1_000_000)
            for name, call in machine_code.launches(spec, torch.bfloat16, 64, sids).items() if name == function]

codes = torch.zeros(1001, 5, dtype=torch.int64)
slices = [codes, codes[1:], codes[2:], codes[3:17], codes[7:8]]
assert codes[1:].data_ptr() % 16 == 8
on_gpu = weight.to(meta)
found = {name: compiled(batches(name)) for name in (
    "prefix_memory_fwd", "token_memory_fwd", "prefix_memory_bwd", "token_memory_bwd", "prefix_rows", "token_step",
    "row_adagrad_bwd", "deterministic_bwd", "deterministic_token_bwd", "sparse_bwd", "sparse_update")}
found["slices"] = compiled([forward(part, weight) for part in slices] + [step(optim.SGD, part) for part in slices])
found["numbers"] = compiled(
    [step(optim.RowWiseAdagrad, codes, seed=seed) for seed in (0, 1, 16, 1 << 40)]
    + [step(optim.RowWiseAdagrad, codes, lr=lr) for lr in (1, 1.0, 16, 0.1)]
    + [step(optim.RowWiseAdagrad, codes, lr=lr, eps=eps) for lr in (1, 0.5) for eps in (0, 1, 1e-8)]
    + [step(optim.RowWiseAdagrad, codes, lr=torch.tensor(lr, dtype=dtype)) for lr in (1, 0.5) for dtype in (torch.float32,)])
found["decay"] = compiled(step(optim.RowWiseAdagrad, codes, weight_decay=decay) for decay in (1, 16, 0.5, 0.0))
forget()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    return python(ONE)


def test_a_new_batch_size_compiles_nothing(compiled):
    assert compiled == 0
