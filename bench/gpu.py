"""The whole GPU suite in one call: parity on the device, the GPU tests, then the benchmarks.

    python bench/gpu.py [--out FOLDER]

Runs in a checkout without installing anything and without a network, with the torch and triton that are there. Each
part reports as it ends, so a run that is cut off keeps what it had. Without a GPU every part is skipped and says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for result rows")
    options = parser.parse_args()
    out = options.out.resolve()

    parts = [
        ("info", [sys.executable, "-m", "prefixmem_fast.cli", "info"]),
        ("parity", [sys.executable, "-m", "prefixmem_fast.cli", "verify", "--backend", "triton", "--cases", "300"]),
        ("tests", [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", str(ROOT / "tests" / "gpu")]),
        ("benchmarks", [sys.executable, "-m", "bench", "--out", str(out / "gpu.jsonl")]),
    ]
    reason = _no_gpu()
    if reason:
        for name, _ in parts:
            print(f"{name:<12}skipped: {reason}")
        return 0

    shutil.rmtree(BUILD, ignore_errors=True)
    # A plain copy of the two packages, laid out as an installation would lay them.
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(BUILD)], cwd=ROOT, check=True)
    paths = [str(BUILD), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    failed = []
    for name, command in parts:
        started = time.monotonic()
        print(f"== {name}", flush=True)
        # Started from the build folder: the checkout's own prefixmem_fast, which has no kernels/, must not come first.
        code = subprocess.run(command, cwd=BUILD, env=environment).returncode
        print(
            f"== {name}: {'ok' if code == 0 else f'exit code {code}'}, {time.monotonic() - started:.0f} s", flush=True
        )
        if code:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "every part passed")
    return 1 if failed else 0


def _no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    return None if torch.cuda.is_available() else "torch finds no GPU"


if __name__ == "__main__":
    sys.exit(main())
