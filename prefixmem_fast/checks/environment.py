"""What this machine has: versions installed and tested, GPUs, and which backends run."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch

from .._choices import BACKENDS
from .._environment import TESTED, installed_version
from .._triton import interpreting
from .._version import __version__
from ..kernels.settings import DEFAULTS, file_of, off, settings_for
from ..operation.backends import backend_problem

_OPTIONAL = ("transformers", "accelerate", "peft")


def facts() -> dict[str, Any]:
    """Versions installed and tested, GPUs and the settings of kernels on them, and for each backend why it cannot run,
    or None."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "architecture": getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"),
                "driver": _driver(),
            }
        )
    device = torch.device("cuda" if gpus else "cpu")
    return {
        "versions": {
            "prefixmem_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": installed_version("triton") or "not installed",
            "numpy": installed_version("numpy"),
            **{package: installed for package in _OPTIONAL if (installed := installed_version(package)) is not None},
        },
        "tested": {package: list(versions) for package, versions in TESTED.items()},
        "gpus": gpus,
        "settings": {gpu["name"]: _settings_of(gpu["name"]) for gpu in gpus},
        "interpreter": interpreting(),
        "backends": {
            backend: backend_problem(backend, torch.device("cpu") if backend in ("native", "cpu") else device)
            for backend in BACKENDS[1:]
        },
    }


def _settings_of(gpu: str) -> dict[str, Any]:
    """Block sizes and warps in force on a GPU, and where they are from."""
    settings = settings_for(gpu)
    source = "PREFIXMEM_TUNE=off" if off() else "defaults" if settings == DEFAULTS else str(file_of(gpu))
    return {"from": source, **settings._asdict()}


def _driver() -> str:
    try:
        import pynvml
    except ImportError:
        return _told_by_nvidia_smi() or "unknown (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return f"unknown ({error})"


def _told_by_nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=10).split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return ""
