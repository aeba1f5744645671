"""The backends have the same functions, and nothing but `auto` decides which one runs."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefixmem_fast import AddressSpec, prefix_memory, prefix_rows, token_memory
from prefixmem_fast.operation import interface
from prefixmem_fast.operation.backends import BACKENDS, backend_problem, choose_backend, functions_of
from tests.helpers.cases import token_case

PACKAGE = Path(interface.__file__).parents[1]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_has_every_function(backend):
    for name in interface.FUNCTIONS:
        own = inspect.signature(getattr(functions_of(backend), name))
        of_reference = inspect.signature(getattr(functions_of("reference"), name))
        assert own == of_reference, name


def test_the_interface_names_every_function():
    """A function that one backend has alone would be called past the others."""
    for backend in BACKENDS[1:]:
        functions = functions_of(backend)
        public = {
            name
            for name, value in vars(functions).items()
            if inspect.isfunction(value) and value.__module__ == functions.__name__ and not name.startswith("_")
        }
        assert public <= set(interface.FUNCTIONS), backend
    documented = {line.strip().split("(")[0] for line in interface.__doc__.splitlines() if line.startswith("    ")}
    assert documented == set(interface.FUNCTIONS)


def test_one_file_imports_the_kernels():
    importers = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if "kernels import" in file.read_text() or "from .kernels" in file.read_text()
    }
    assert importers == {"operation/triton.py"}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_named_backend_runs(backend, deterministic, backend_calls):
    spec = AddressSpec((3, 3, 3), heads=2, table_rows=9)
    weight = torch.randn(spec.total_rows, 4, requires_grad=True)
    codes = torch.randint(0, 3, (4, 3))
    ids, table = token_case(spec, (2, 9))
    prefix_rows(codes, spec, backend=backend)
    prefix_memory(codes, weight, spec, backend=backend, deterministic=deterministic).sum().backward()
    token_memory(ids, table, weight, spec, backend=backend, deterministic=deterministic).sum().backward()
    functions = ["prefix_rows", "forward", "dense_gradient", "forward", "dense_gradient"]
    assert backend_calls == [(backend, function) for function in functions]


def test_auto_goes_by_the_device():
    assert choose_backend("auto", codes=torch.empty(0)) == "native"
    assert choose_backend("auto", codes=torch.empty(0, device="meta")) == "reference"
    assert backend_problem("cpu", torch.device("cuda")).startswith("it needs tensors on the CPU")
    assert backend_problem("reference", torch.device("cuda")) is None


def test_importing_the_package_changes_nothing_of_the_process():
    """No operator of torch is registered anew, no library of models is loaded, and no kernel is built."""
    code = """
import sys, torch
sparse = torch.zeros(3).to_sparse()
def norm():
    try:
        return torch.linalg.vector_norm(sparse)
    except NotImplementedError:
        return None
before = norm()
import prefixmem_fast, prefixmem_fast.optim
assert (norm() is None) == (before is None)
assert not {"transformers", "prefixmem_fast.kernels"} & set(sys.modules), sys.modules.keys()
weight = torch.nn.Parameter(torch.randn(18, 2))
spec = prefixmem_fast.AddressSpec((9,), heads=2, max_order=1, table_rows=9)
prefixmem_fast.prefix_memory(torch.tensor([[1], [1]]), weight, spec, grad="sparse").sum().backward()
torch.nn.utils.clip_grad_norm_([weight], 1.0)
assert abs(torch.linalg.vector_norm(weight.grad) - 1) < 1e-5
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
