import os
import tempfile

# Before anything imports triton: the kernels run on CPU tensors. The GPU suite sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "prefixmem",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("prefixmem")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """torch.empty is filled with NaN (integers with their largest value), so an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def temporary_folder(monkeypatch, tmp_path):
    """Where tempfile makes its folders: the documents' mkdtemp() leave theirs behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def backend_calls(monkeypatch):
    """(backend, function) of every call of a backend's function, in their order."""
    from prefixmem_fast.operation.backends import BACKENDS, functions_of
    from prefixmem_fast.operation.interface import FUNCTIONS

    calls = []
    for backend in BACKENDS[1:]:
        functions = functions_of(backend)
        for name in FUNCTIONS:
            monkeypatch.setattr(functions, name, _spy(getattr(functions, name), (backend, name), calls))
    return calls


_RUNNING: list[tuple[str, str]] = []  # the call from outside that is under way, if one is


def _spy(function, call, calls):
    """Notes calls from outside; a backend's functions also call one another."""

    def spy(*arguments, **options):
        if _RUNNING:
            return function(*arguments, **options)
        calls.append(call)
        _RUNNING.append(call)
        try:
            return function(*arguments, **options)
        finally:
            _RUNNING.clear()

    return spy
