"""Measure the kernels on this machine beside plain PyTorch and other libraries, report and compare."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType


def add_arguments(parser: argparse.ArgumentParser) -> None:
    try:
        _benchmarks().add_arguments(parser)
    except ModuleNotFoundError:  # a checkout that is not installed; said when the command is given
        parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int:
    """Exit codes: 0 done, 1 a provider was wrong, a figure slower or a limit passed."""
    try:
        module = _benchmarks()
    except ModuleNotFoundError:
        raise ValueError("the benchmarks are not installed; in a checkout: pip install -e .") from None
    return module.run(options)


def _benchmarks() -> ModuleType:
    return importlib.import_module("prefixmem_fast.bench.cli")
