"""Inputs of every kind, and the bound that the sums of a backend are held to."""

import itertools
import random

import pytest
import torch

from prefixmem_fast.checks.cases import random_tokens
from prefixmem_fast.checks.report import exact_sums
from prefixmem_fast.operation import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = ["prefix", "suffix", "full"]
BACKENDS = ["reference", "cpu", "native", "triton"]


def dtype_name(value):
    return str(value).removeprefix("torch.")


def assert_exact_sums(sums, operation, values):
    """`sums` against the float64 sums, within the bound that the number and size of the summands give."""
    exact, bound = exact_sums(operation, values)
    assert sums.isfinite().all()
    error = (sums.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.3g} times the bound"


def assert_row_sums(backend, grad, source, spec):
    """The touched rows exactly, each once and ascending, their sums within the bound, and the dense gradient alike."""
    rows, sums, unique = backend.row_sums(grad, source, spec, grad.dtype)
    assert unique
    assert torch.equal(rows, reference.row_sums(grad, source, spec, grad.dtype).rows)
    assert_exact_sums(sums, lambda g: reference.row_sums(g, source, spec, g.dtype).sums, grad)
    dense = backend.dense_gradient(grad, source, spec)
    assert torch.equal(dense[rows], sums)
    assert dense.count_nonzero() == sums.count_nonzero()


def token_case(spec, shape, seed=0):
    """Token ids of `shape` and a token table, with whole and cut SIDs, text and noise."""
    ids, table = random_tokens(random.Random(seed), spec, shape)
    return torch.tensor(ids, dtype=torch.int64).reshape(shape), torch.tensor(table, dtype=torch.int32)


def slow(*values):
    """A set of parameters that `make test` leaves to `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(fast, *columns):
    """Every combination of the columns; those for which `fast` does not hold are slow."""
    return [row if fast(*row) else slow(*row) for row in itertools.product(*columns)]
