"""The machine code of the kernels that decide speed keeps its loads in flight. Compiled without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from .schedules import Limits, broken, unreached
from .test_machine_code import clean

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

# Of the first kernel of each name that a launcher has, bfloat16 on sm_90. What is compiled today meets them with little
# to spare: a change that puts loads one after another breaks one. Tighten them where a kernel becomes better.
LIMITS = {
    ("prefix_memory_fwd", "prefix_memory_fwd"): Limits(
        least_rows_at_first_wait=8,
        least_row_bytes_in_flight=150_000,
        least_resident_warps=40,
        most_program_rounds=2,
        most_barriers_in_loops=0,
        most_shared_accesses_in_loops=0,
        most_instructions_a_sid=230,
    ),
    # Of 8 bits a row is half as many loads, and its scale one more; S goes through shared memory to leave in 16 bytes.
    ("int8_prefix_memory_fwd", "prefix_memory_fwd"): Limits(
        least_rows_at_first_wait=7,
        least_row_bytes_in_flight=60_000,
        least_resident_warps=32,
        most_program_rounds=3,
        most_instructions_a_sid=350,
    ),
    ("fp8_prefix_memory_fwd", "prefix_memory_fwd"): Limits(
        least_rows_at_first_wait=8,
        least_row_bytes_in_flight=75_000,
        least_resident_warps=32,
        most_program_rounds=2,
        most_instructions_a_sid=330,
    ),
    ("token_memory_fwd", "token_memory_fwd"): Limits(
        least_rows_at_first_wait=8,
        least_row_bytes_in_flight=140_000,
        least_resident_warps=36,
        most_program_rounds=4,
        most_barriers_in_loops=0,
        most_instructions=680,
        most_instructions_a_sid=1_650,
    ),
    ("row_adagrad_bwd", "sum_prefixes"): Limits(
        least_rows_at_first_wait=8,
        least_row_bytes_in_flight=32_000,
        least_resident_warps=12,
        most_rounds=1,
        most_rows_waited_for_at_once=0,
        most_barriers_in_loops=0,
        most_shared_accesses_in_loops=0,
        most_instructions_a_sid=720,
    ),
}
# Launches of one call at 65,536 SIDs.
MOST_LAUNCHES = {
    "prefix_memory_fwd": 1,
    "int8_prefix_memory_fwd": 1,
    "fp8_prefix_memory_fwd": 1,
    "token_memory_fwd": 1,
    "row_adagrad_bwd": 6,
}

# Other releases of triton, in folders of their own, from `make triton-releases`; other machine code, other limits.
_FORWARD = Limits(least_rows_at_first_wait=8, most_program_rounds=2)
_TOKENS = Limits(least_rows_at_first_wait=8, most_program_rounds=3, most_instructions=550)
RELEASES = {
    "3.4.0": {
        ("prefix_memory_fwd", "prefix_memory_fwd"): _FORWARD,
        ("token_memory_fwd", "token_memory_fwd"): _TOKENS,
        ("row_adagrad_bwd", "sum_prefixes"): Limits(
            least_rows_at_first_wait=5, most_rounds=1, most_rows_waited_for_at_once=3, most_instructions_a_sid=780
        ),
    },
    "3.6.0": {
        ("prefix_memory_fwd", "prefix_memory_fwd"): _FORWARD,
        ("token_memory_fwd", "token_memory_fwd"): _TOKENS,
        ("row_adagrad_bwd", "sum_prefixes"): Limits(
            least_rows_at_first_wait=4, most_rounds=1, most_rows_waited_for_at_once=4, most_instructions_a_sid=720
        ),
    },
    "3.8.0": {
        **LIMITS,
        ("row_adagrad_bwd", "sum_prefixes"): replace(
            LIMITS["row_adagrad_bwd", "sum_prefixes"],
            least_rows_at_first_wait=3,
            least_row_bytes_in_flight=4_600,
            most_rounds=2,
            most_rows_waited_for_at_once=5,
        ),
    },
}
# Eight bytes a thread go to memory there.
SPILLED = [("3.8.0", "sm_100", "fp8_prefix_memory_fwd", "prefix_memory_fwd", "float32")]
# What cannot be compiled: release and target.
UNBUILT = {
    ("3.4.0", "gfx942"): "triton 3.4 links with ROCm's own ld.lld",
}


def report(*arguments):
    command = [sys.executable, "-m", "prefixmem_fast.cli", "verify", "--compile", "--json", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("{"), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def held(rows, table):
    """What of a table of limits is broken; a kernel that is not there breaks it too."""
    words = []
    for (launcher, kernel), limits in table.items():
        row = next((r for r in rows if (r["launcher"], r["kernel"]) == (launcher, kernel)), None)
        words += [f"{launcher} has no kernel {kernel}"] if row is None else broken(row, limits)
    return words


def spilled(rows, release):
    """Kernels with spills or local memory."""
    dirty = [row for row in rows if not clean(row)]
    return [(release, row["target"], row["launcher"], row["kernel"], row["dtype"]) for row in dirty]


ROW = {
    "kernel": "some",
    "resident_warps": 40,
    "row_bytes_in_flight": 60_000,
    "instructions_a_sid": 200.0,
    "schedule": {"rows_at_first_wait": 8, "program_rounds": 2, "rows_waited_for_at_once": 0, "turn_instructions": None},
}


@pytest.mark.parametrize(
    ("name", "met", "missed"),
    [
        ("least_rows_at_first_wait", 8, 9),
        ("least_row_bytes_in_flight", 60_000, 60_001),
        ("least_resident_warps", 40, 44),
        ("most_program_rounds", 2, 1),
        ("most_rows_waited_for_at_once", 0, -1),
        ("most_instructions_a_sid", 200, 199),
    ],
)
def test_limits_tell_what_is_broken(name, met, missed):
    assert broken(ROW, Limits(**{name: met})) == []
    (words,) = broken(ROW, Limits(**{name: missed}))
    assert words.startswith("some: ")


@pytest.mark.slow
def test_loads_stay_in_flight():
    """The kernels that decide speed, by the command that users run."""
    found = report("--targets", "sm_90", "--dtypes", "bfloat16", "--launchers", ",".join(MOST_LAUNCHES))
    assert held(found["kernels"], RELEASES.get(found["versions"]["triton"], LIMITS)) == []
    assert unreached(found["kernels"]) == []
    assert [row["kernel"] for row in found["kernels"] if row["schedule"]["unknown_pointers"]] == []
    launched = {row["launcher"]: len(row["kernels"]) for row in found["launches"] if row["sids"] == 65_536}
    assert {launcher: n for launcher, n in launched.items() if n > MOST_LAUNCHES[launcher]} == {}
    assert {(p["operation"], p["card"]) for p in found["predictions"]} == {
        (operation, card)
        for operation in ("forward", "token forward", "backward + update")
        for card in ("H100", "H200")
    }
    assert all(0 < p["share_of_copy"] < 1 for p in found["predictions"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("release", RELEASES)
def test_other_releases_of_triton(release, target):
    """Every kernel in bfloat16 and float32 without spills, and on sm_90 within the limits of the release."""
    folder = ROOT / ".venv-triton" / release
    if not (folder / "triton").is_dir():
        pytest.skip(f"no triton in {folder}: make triton-releases")
    if (release, target) in UNBUILT:
        pytest.skip(UNBUILT[release, target])
    found = report("--targets", target, "--dtypes", "bfloat16,float32", "--triton", str(folder))
    assert found["versions"]["triton"] == release
    assert {row["dtype"] for row in found["kernels"]} == {"bfloat16", "float32"}
    assert [kernel for kernel in spilled(found["kernels"], release) if kernel not in SPILLED] == []
    assert unreached(found["kernels"]) == []
    assert (target == "sm_90") == bool(found["predictions"])
    if target == "sm_90":
        assert held([row for row in found["kernels"] if row["dtype"] == "bfloat16"], RELEASES[release]) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_bfloat16_elsewhere(target):
    """With the installed triton, what `test_machine_code.py` does not compile; and one warp's way through all of it."""
    found = report("--targets", target, "--dtypes", "bfloat16")["kernels"]
    assert spilled(found, "") == []
    assert unreached(found) == []
    assert all((row["schedule"] is None) == (target == "gfx942") for row in found)
