"""The C++ kernels built with the sanitizers of addresses and of undefined behaviour, over random specs and batches."""

import os
import subprocess
import sys

import pytest

from prefixmem_fast import _native

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

SCRIPT = """
import random, torch
from prefixmem_fast import AddressSpec, optim
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.operation import native
from tests.helpers.cases import FLOATS, token_case

draw = random.Random(0)
for i in range(CASES):
    levels = draw.randint(1, 6)
    spec = AddressSpec(
        [draw.choice((1, 2, 5, 300, 70_000, 3_000_000_000)) for _ in range(levels)],
        max_order=draw.randint(1, 6),
        heads=draw.randint(1, 9),
        table_rows=draw.choice((1, 2, 7, 64, 500)),
        mode=draw.choice(("prefix", "suffix", "full")),
        active_levels=sorted(draw.sample(range(1, levels + 1), draw.randint(1, levels))),
    )
    dtype, width, sids = FLOATS[i % 4], draw.choice((1, 3, 8, 64, 300)), draw.choice((0, 1, 5, 300, 2600))
    torch.set_num_threads(1 + i % 3)
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, width).to(dtype))
    codes = torch.stack([torch.randint(-1, min(size, 2**62) + 1, (sids,)) for size in spec.codebook_sizes], 1)
    codes[::2] = codes[:1].clone()
    ids, table = token_case(spec, (3, 50), i)
    segments = torch.randint(0, 2, ids.shape) if i % 2 else None
    optimizer = (optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam)[i // 4 % 4]([weight], lr=0.1)
    native.prefix_rows(codes, spec)
    for source in (codes, codes.int().to(torch.int16), TokenStream(ids, table, segments)):
        with torch.no_grad():
            grad = torch.randn(native.forward(source, weight, spec).shape).to(dtype)
            native.dense_gradient(grad, source, spec)
            rows, sums, _ = native.row_sums(grad, source, spec, dtype)
            native.fused_update(grad, source, spec, optimizer.begin(weight))
            sparse = torch.sparse_coo_tensor(torch.cat([rows, rows])[None], torch.cat([sums, sums]), weight.shape)
            native.sparse_update(sparse, optimizer.begin(weight))
    out = torch.empty(3, spec.heads * width, dtype=dtype)
    for end in range(1, 20):
        native.read_windows(ids[:, max(end - 6, 0) : end], table, weight.detach(), spec, out)
print("done")
"""


@pytest.mark.slow
def test_clean(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiler = _native.compiler()
    runtimes = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(runtime) for runtime in runtimes):
        pytest.skip(f"{compiler[0]} has no libraries of the sanitizers here")
    _native.folder().mkdir(parents=True)
    first = _native.instruction_sets()[0]
    vectors = _native.INSTRUCTION_SETS["AVX2" if first != "DEFAULT" else "DEFAULT"]
    flags = [flag if flag != "-O2" else "-O1" for flag in _native.FLAGS]
    files = [str(path) for path in _native.sources() if path.suffix == ".cpp"]
    library = _native.folder() / "sanitized.so"
    subprocess.run([*compiler, *flags, *vectors, *SANITIZERS, *files, "-o", str(library)], check=True)
    for name in _native.instruction_sets():
        (_native.folder() / f"{name.lower()}.so").symlink_to(library)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python itself
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    script = SCRIPT.replace("CASES", "64")
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert run.stdout.endswith("done\n"), run.stderr[-4000:]
