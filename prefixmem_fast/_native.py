"""The C++ kernels of the CPU as a shared library: compiled where it is first needed, found again after that.

The library knows neither Python nor PyTorch, so that one serves every release of both; it is called through ctypes. A
build makes one library for each instruction set of the architecture, and a process takes the widest that its
processor has. Builds of several processes, and one that was interrupted, are safe: a library gets its name when it is
complete.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from ._files import locked, write_text

FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
)
OF_GCC = ("-fvect-cost-model=dynamic",)  # clang, which is also the c++ of macOS, refuses it
# By the names of torch.backends.cpu.get_cpu_capability(), the widest first.
INSTRUCTION_SETS = {
    "AVX512": ("-mavx2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2",),
    "DEFAULT": (),
}
SECONDS = 300  # that a compiler gets
MOST_WAITS = 5  # for the build of another process, a minute each


class BuildError(Exception):
    """The library cannot be had; the message says why and what to do."""


@torch.compiler.assume_constant_result
def native_problem() -> str | None:
    """Why the C++ kernels cannot run here, or None; the first call may compile them."""
    return _loaded()[1]


def library() -> ctypes.CDLL:
    """The library.

    Raises:
        BuildError: it cannot be had.
    """
    loaded, problem = _loaded()
    if loaded is None:
        raise BuildError(problem)
    return loaded


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("PREFIXMEM_NATIVE", "").lower() in ("0", "off", "false", "no"):
        return None, "PREFIXMEM_NATIVE=off"
    if sys.platform == "win32":
        return None, "the C++ kernels are written for Linux and macOS"
    try:
        return ctypes.CDLL(str(find_or_build())), None
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled kernels cannot be loaded ({error}); delete {folder()} to have them compiled again"
    except Exception as error:  # whatever it is, the PyTorch path runs
        return None, f"the C++ kernels cannot be compiled or found ({type(error).__name__}: {error})"


def _after_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def openmp() -> int | None:
    """The address of GOMP_parallel in PyTorch's OpenMP, whose threads the kernels share; None where none is loaded.

    Intel's and LLVM's OpenMP have the function of that name too.
    """
    maps = Path("/proc/self/maps")
    if _forked or not maps.exists():  # OpenMP's threads are not copied by a fork, and it would wait for them
        return None
    paths = {
        line.split(None, 5)[5] for line in maps.read_text().splitlines() if re.search(r"/lib(g|i)?omp\d?[^/]*$", line)
    }
    of_torch = str(Path(torch.__file__).parent)
    for path in sorted(paths, key=lambda path: (not path.startswith(of_torch), path)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def sources() -> list[Path]:
    """The C++ files, headers among them."""
    kernels = find_spec("prefixmem_fast.kernels")
    places = list(kernels.submodule_search_locations or ()) if kernels else []
    found = sorted(
        path for place in places for path in Path(place, "native").glob("*") if path.suffix in (".h", ".cpp")
    )
    if not found:
        raise BuildError("the C++ files of prefixmem_fast.kernels are not installed; install the package again")
    return found


def instruction_sets() -> list[str]:
    """Those of this architecture, the widest first."""
    return list(INSTRUCTION_SETS) if platform.machine().lower() in ("x86_64", "amd64") else ["DEFAULT"]


def folder() -> Path:
    """Where the libraries of these sources lie, in the cache of torch.utils.cpp_extension."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache_home, "torch_extensions"))
    key = hashlib.sha256(
        repr((FLAGS, OF_GCC, INSTRUCTION_SETS, platform.system(), platform.machine(), platform.libc_ver())).encode()
    )
    for path in sources():
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return root / f"prefixmem_fast-{key.hexdigest()[:16]}"


def find_or_build() -> Path:
    """The library for this processor; compiled, with those for the others, if it is not there.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    sets = instruction_sets()
    usable = sets[sets.index(capability) :] if capability in sets else sets[-1:]
    target = folder()
    if found := _widest(target, usable):
        return found
    try:
        target.mkdir(parents=True, exist_ok=True)
        for _ in range(MOST_WAITS):
            try:
                with locked(target):
                    if not _widest(target, usable):
                        _build(target, sets)
                return _widest(target, usable)
            except TimeoutError as error:  # somebody else's build, on a machine that has much to do
                waited = error
        raise BuildError(str(waited))
    except OSError as error:
        raise BuildError(
            f"the cache of compiled kernels cannot be written ({error}); set TORCH_EXTENSIONS_DIR to a folder that can"
        ) from error


def _widest(target: Path, usable: list[str]) -> Path | None:
    """The first library of these instruction sets that is there; one that a compiler did not know is not."""
    libraries = [target / f"{name.lower()}.so" for name in usable]
    return next((library for library in libraries if library.exists()), None)


def compiler() -> list[str]:
    """The command of CXX, or the first of the usual compilers.

    Raises:
        BuildError: there is none.
    """
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX = {given[0]!r} is not there" if given else "there is no C++ compiler"
    raise BuildError(f"{missing}; install g++ or clang++ (Debian: apt install g++) for a faster CPU path")


def version_of(command: list[str]) -> str:
    """What a compiler says of itself.

    Raises:
        BuildError: it cannot be run.
    """
    try:
        return subprocess.run([*command, "--version"], capture_output=True, check=False).stdout.decode(errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error}); set CXX to a C++ compiler") from None


def flags_of(version: str) -> tuple[str, ...]:
    """The flags of every instruction set, for a compiler that says this of itself."""
    return FLAGS if "clang" in version else (*FLAGS, *OF_GCC)


def _build(target: Path, sets: list[str]) -> None:
    """Compile the libraries of all instruction sets; those that an old compiler does not know are left out."""
    command = compiler()
    version = version_of(command)
    failed = target / f"failed-{hashlib.sha256(repr((command, version)).encode()).hexdigest()[:16]}.log"
    if failed.exists():  # nobody waits for the same failure twice
        raise _failure(failed)
    _say(f"compiling its CPU kernels with {command[0]}, once on this machine ...")
    start = time.monotonic()
    files = [str(path) for path in sources() if path.suffix == ".cpp"]
    runs: dict[str, subprocess.Popen] = {}
    with tempfile.TemporaryDirectory(dir=target) as made:
        try:
            for name in sets:
                quick = ("-O1",) if name == "DEFAULT" and len(sets) > 1 else ()  # for processors that few still have
                arguments = [
                    *command,
                    *flags_of(version),
                    *quick,
                    *INSTRUCTION_SETS[name],
                    *files,
                    "-o",
                    f"{made}/{name.lower()}.so",
                ]
                runs[name] = subprocess.Popen(
                    arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
                )
            texts = [run.communicate(timeout=SECONDS)[0].decode(errors="replace") for run in runs.values()]
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]} took more than {SECONDS} s to compile the C++ kernels") from None
        except OSError as error:
            raise BuildError(f"{command[0]} cannot be run ({error}); set CXX to a C++ compiler") from None
        finally:
            for run in runs.values():
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)  # the compiler has processes of its own
        compiled = [name for name, run in runs.items() if run.returncode == 0]
        if sets[-1] not in compiled:
            log = "\n".join([shlex.join(command), version, *texts])
            passes = any(run.returncode < 0 for run in runs.values()) or "Killed" in log or "No space" in log
            if passes:
                raise BuildError(f"{command[0]} was stopped ({log.strip().splitlines()[-1][:200]}); it is tried again")
            write_text(failed, log)
            raise _failure(failed)
        for name in compiled:
            os.replace(f"{made}/{name.lower()}.so", target / f"{name.lower()}.so")
    _say(f"compiled in {time.monotonic() - start:.1f} s, kept in {target}")


def _say(text: str) -> None:
    print(f"prefixmem_fast: {text}", file=sys.stderr, flush=True)


def _failure(log: Path) -> BuildError:
    lines = [line for line in log.read_text().splitlines() if "error" in line.lower()]
    reason = f": {lines[0].strip()[:200]}" if lines else ""
    return BuildError(f"the C++ kernels do not compile here{reason} (all of it in {log}; delete it to try again)")
