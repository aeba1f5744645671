"""What the compiler makes of every kernel for GPUs that are not here. Runs in processes of its own: no interpreter."""

import json
import os
import subprocess
import sys

import pytest

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def of(compiled, kernel, mode="prefix", dtype="float16"):
    return next(k for k in compiled if (k["kernel"], k["mode"], k["dtype"]) == (kernel, mode, dtype))


def widths(counts):
    return {int(size): count for size, count in counts.items()}


@pytest.mark.parametrize(
    ("target", "dtypes"),
    [
        ("sm_90", ("float16",)),
        pytest.param("sm_90", ("bfloat16", "float16", "float32", "float64"), marks=pytest.mark.slow),
        pytest.param("sm_80", ("float16", "float32"), marks=pytest.mark.slow),
        pytest.param("sm_100", ("float16", "float32"), marks=pytest.mark.slow),
        pytest.param("gfx942", ("float16", "float32"), marks=pytest.mark.slow),
    ],
)
def test_every_kernel(target, dtypes):
    """Every kernel for one architecture, by the command that users run; once in every dtype and mode.

    The other architectures in two dtypes: the rest takes minutes, and bench/results/ holds it.
    """
    chosen = ("--targets", target, "--dtypes", ",".join(dtypes))
    compiled = json.loads(python("-m", "prefixmem_fast.cli", "verify", "--compile", "--json", *chosen))["kernels"]
    assert {k["dtype"] for k in compiled} == set(dtypes)
    modes = {"prefix", "suffix", "full", "cross-item"} if "bfloat16" in dtypes else {"prefix"}
    assert {k["mode"] for k in compiled} == modes
    neither_spills_nor_local_memory(compiled)
    rows_of_64_halves_load_16_bytes_at_once(compiled)
    gradients_leave_in_vector_reductions(compiled)
    forward_registers_leave_room_for_many_warps(compiled)


def neither_spills_nor_local_memory(compiled):
    kernels = {
        "prefix_memory_fwd",
        "token_memory_fwd",
        "prefix_memory_bwd",
        "token_memory_bwd",
        "prefix_rows",
        "token_codes",
        "pack_codes",
        "prefixes",
        "mark_claims",
        "mark_sorted",
        "sum_prefixes",
        "sum_edges",
        "merge_rows",
        "sum_rows",
        "window_memory",
    }
    if "bfloat16" not in {k["dtype"] for k in compiled}:
        kernels -= {"token_codes", "mark_sorted"}  # go with gradients in bfloat16
    assert {k["kernel"] for k in compiled} == kernels
    assert [(k["kernel"], k["mode"], k["dtype"]) for k in compiled if not clean(k)] == []


def clean(kernel):
    """ptxas may set a few bytes of stack aside that no instruction touches."""
    return not kernel["spills"] and (kernel["target"] != "gfx942" or not kernel["local_bytes"])


def rows_of_64_halves_load_16_bytes_at_once(compiled):
    """What is not a 16-byte row load is an 8-byte code; outputs leave in 16-byte stores."""
    kernel = of(compiled, "prefix_memory_fwd")
    loads = widths(kernel["loads"])
    threads = 256 if kernel["target"] == "gfx942" else 128
    rows_a_thread = 8 * 4 * 4 * 64 * 2 // threads // 16  # BM x N x H x w x bytes
    assert loads.pop(16) == rows_a_thread
    assert set(loads) == {8}
    assert set(widths(kernel["stores"])) == {16}


def gradients_leave_in_vector_reductions(compiled):
    kernel = of(compiled, "prefix_memory_bwd")
    # Vector reductions exist from sm_90 on; sm_80 and CDNA 3 add one float32 at a time.
    expected = {16} if kernel["target"] in ("sm_90", "sm_100") else {4}
    assert set(widths(kernel["reductions"])) == expected
    if kernel["target"] == "sm_90" and "float32" in {k["dtype"] for k in compiled}:
        assert set(widths(of(compiled, "prefix_memory_bwd", dtype="float32")["reductions"])) == expected


def forward_registers_leave_room_for_many_warps(compiled):
    """Two SIDs a warp in at most 48 registers: 40 or more warps a multiprocessor."""
    assert of(compiled, "prefix_memory_fwd")["registers"] <= 48


ATOMICS = """
import torch
from prefixmem_fast.checks import launches, machine_code
for name, call in launches.launches(machine_code.paper_spec(), torch.float32, 64).items():
    if name in ("sparse_bwd", "sgd_bwd", "row_adam_bwd", "lazy_adam_bwd"):
        continue  # the same kernels with other endings, seconds each
    for kernel in launches.compiled_by(call, "sm_90"):
        ptx = kernel.asm["ptx"]
        assert "acq_rel" not in ptx and "membar" not in ptx and "fence" not in ptx, name
        print(name, ptx.count(".relaxed."))
"""


@pytest.mark.slow
def test_atomics_are_relaxed():
    """No fence around an atomic, which the default order would add. The fast gradient and claims of rows have some."""
    found = {name for name, count in map(str.split, python("-c", ATOMICS).splitlines()) if int(count)}
    claims = {"deterministic_bwd", "deterministic_token_bwd", "row_adagrad_bwd"}
    assert found == {"prefix_memory_bwd", "token_memory_bwd"} | claims


QUANTIZED = """
import json, re, torch
from prefixmem_fast.checks import launches, machine_code
calls = launches.launches(machine_code.paper_spec(), torch.bfloat16, 64)
for target in ("sm_90", "gfx942"):
    for name in ("int8_prefix_memory_fwd", "fp8_prefix_memory_fwd"):
        (kernel,) = launches.compiled_by(calls[name], target)
        found = machine_code.inspect(kernel, name, "prefix", "bfloat16", target)
        fused = re.findall(r"fma\\S*f32|v_fmac?_f32|v_mad_f32", kernel.asm["ptx" if target == "sm_90" else "amdgcn"])
        print(json.dumps([target, found.clean, found.loads, len(fused)]))
"""


@pytest.mark.slow
def test_kernels_over_quantized_tables():
    """Of 64 numbers 16 are loaded at once, or 8 by a program of 256 lanes, and no product is fused with its sum: the
    bits are the reference's."""
    for line in python("-c", QUANTIZED).splitlines():
        target, clean, loads, fused = json.loads(line)
        assert clean
        assert not fused
        rows_in_bytes = 8 * 4 * 4 * 64  # BM x N x H x w
        of_rows = {"sm_90": 16, "gfx942": 8}[target]
        codes = {"sm_90": 0, "gfx942": 4}[target]  # loads of 8 bytes too
        assert widths(loads)[of_rows] - codes == rows_in_bytes // (128 if target == "sm_90" else 256) // of_rows


ODD_SHAPES = """
import torch
from prefixmem_fast import AddressSpec
from prefixmem_fast.checks import launches, machine_code
shapes = (
    ((1 << 20,) * 5, 3, 20, torch.bfloat16), ((256,) * 4, 4, 1, torch.float32), ((2048,) * 5, 1, 256, torch.float16)
)
for target, count in (("sm_90", 3), ("gfx942", 1)):
    for sizes, heads, width, dtype in shapes[:count]:
        for name, call in launches.launches(AddressSpec(sizes, heads=heads), dtype, width).items():
            sorts = name.endswith("_bwd") and name not in ("prefix_memory_bwd", "token_memory_bwd")
            if sorts and (name != "row_adagrad_bwd" or target != "sm_90"):
                continue
            for kernel in launches.compiled_by(call, target):
                found = machine_code.inspect(kernel, "", "prefix", str(dtype), target)
                if not found.clean:
                    print(sizes, heads, width, found)
"""


@pytest.mark.slow
def test_odd_shapes_without_spills():
    """One column a row, 63-bit products, three heads of 20, one head of 256: what the paper's shape does not show."""
    assert python("-c", ODD_SHAPES) == ""


WIDE = """
import json, torch
from prefixmem_fast import AddressSpec
from prefixmem_fast.checks import launches, machine_code
found = {}
for size in (2_048, 70_000):
    calls = launches.launches(AddressSpec((size,) * 5, active_levels=(3, 4)), torch.bfloat16, 64)
    for name in ("prefix_memory_fwd", "row_adagrad_bwd"):
        for kernel in launches.compiled_by(calls[name], "sm_90"):
            program = machine_code.analysed(kernel).program
            calls_of_functions = sum(i.name in ("CALL", "RET") for i in program.instructions)
            name = kernel.metadata.name
            found.setdefault(name, []).append((len(program.instructions), calls_of_functions))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_products_of_63_bits_cost_some_instructions_and_no_division():
    """A codebook of 70,000 codes needs them. A modulus known to the compiler is a product, not a call of a function."""
    found = json.loads(python("-c", WIDE))
    for name in ("prefix_memory_fwd_kernel", "prefixes_kernel", "sum_prefixes_kernel"):
        (narrow, _), (wide, calls) = found[name]
        assert narrow < wide <= 1.5 * narrow, name
        assert calls == 0, name


ROWS_ON_CDNA = """
import json, torch
from prefixmem_fast.checks import launches, machine_code
calls = launches.launches(machine_code.paper_spec(), torch.bfloat16, 64)
for kernel in launches.compiled_by(calls["row_adagrad_bwd"], "gfx942"):
    row = machine_code.inspect(kernel, "", "prefix", "bfloat16", "gfx942")
    if row.kernel == "sum_prefixes":
        print(json.dumps([row.loads, row.stores]))
"""


@pytest.mark.slow
def test_the_walk_moves_rows_16_bytes_at_a_time_on_gfx942():
    loads, stores = map(widths, json.loads(python("-c", ROWS_ON_CDNA)))
    assert loads[16] == 2 * (3 + 2)  # before the loop and in it: rows of three orders, dS of two levels
    assert 8 not in loads
    assert set(stores) <= {4, 16}
