"""Damaged and hostile index, history and text files: an error of one line, in bounded time and memory, and no more.

FUZZ_SECONDS says for how long (default: 20), FUZZ_SEED with which try to begin (default: 0); a failure prints its own.
"""

import hashlib
import io
import json
import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
ALLOWED = ("read", "ValueError", "FileNotFoundError")
LONGEST, SECONDS = 1000, 30

CODES = {"10": [0, 1], "11": [1, 0], "x": [1, 1]}
INDEX = {"10": ["<a_0>", "<b_1>"], "11": ["<a_1>", "<b_0>"], "x": ["<a_1>", "<b_1>"]}
HISTORIES = {"u": [10, "11", "x"], "v": ["13"], "w": []}
TEXT = {"10": {"title": "red"}, "11": "blue", "x": {"title": "green", "brand": "b"}}
ROWS = "user_id,item_id,timestamp\nu,10,3\nu,11,1\nv,x,2024-01-01\nw,13,5.5\n"
TARGETS = 'user_id,history_item_title,history_item_id,item_id\n1,"[\'a, b\']","[10, 11]",x\n1,"[]","[\'x\']",13\n'
STRANGE = (
    *("", " ", "nan", "inf", "-1", "1e999", "\x00", "\ud800", "é電", "\u2028", "'", '"', "[10", "__import__('os')"),
    *(
        "long" * 20_000,
        "9" * 5_000,
        "2024-02-30",
        "2024-01-01T00:00:00+99:00",
        "99999-01-01",
        "<a_99999999999999999999>",
    ),
    *(None, True, -1, 2**63, 10**400, 1.5, float("nan"), float("inf"), [], {}, [[10]], {"title": []}, ["<a_1>"] * 9),
)


class Touch:
    """A pickle that writes beside the folder when it is loaded."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Bytes turned, cut, left out, repeated or put in."""
    out = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at, size = dice.randrange(len(out) + 1), dice.choice((1, 4, 50))
        what = dice.randrange(6)
        if what == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif what == 1:
            del out[at:]
        elif what == 2:
            del out[at : at + size]
        elif what == 3:
            out[at:at] = out[at : at + size] * dice.choice((1, 100))
        elif what == 4:
            out[at:at] = dice.randbytes(size)
        else:
            out[at : at + 4] = dice.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(4, "little")
    return bytes(out)


def changed(value, dice: random.Random):
    """A JSON value with one part replaced."""
    if isinstance(value, (list, dict)) and value and dice.random() < 0.8:
        copy = list(value) if isinstance(value, list) else dict(value)
        key = dice.randrange(len(copy)) if isinstance(copy, list) else dice.choice(list(copy))
        if isinstance(copy, dict) and dice.random() < 0.2:
            copy[str(dice.choice(STRANGE))] = copy.pop(key)
        else:
            copy[key] = changed(copy[key], dice)
        return copy
    return dice.choice(STRANGE)


def as_json(value, dice: random.Random, _canary: Path) -> bytes:
    for _ in range(dice.choice((0, 1, 2, 4))):
        value = changed(value, dice)
    text = json.dumps(value)
    if dice.random() < 0.1:
        depth = dice.choice((500, 5_000, 200_000))
        text = text.replace("[", "[" * depth, 1).replace("{", '{"a":' * dice.choice((1, depth)), 1)
    if dice.random() < 0.1:
        text = text[:1] + text[1:-1] + "," + text[1:]
    content = text.encode()
    return damaged(content, dice) if dice.random() < 0.3 else content


def as_csv(text, dice: random.Random, _canary: Path) -> bytes:
    cells = [line.split(",") for line in text.splitlines()]
    for _ in range(dice.choice((0, 1, 1, 3))):
        row = dice.choice(cells)
        row[dice.randrange(len(row))] = str(
            dice.choice((*STRANGE, "time", "Date", "item_id", "[" * 300 + "10", "[1," * 90))
        )
        if dice.random() < 0.2:
            row.insert(dice.randrange(len(row)), "7")
        if dice.random() < 0.1:
            cells.append(list(dice.choice(cells)))
    content = "\n".join(map(",".join, cells)).encode(dice.choice(("utf-8", "utf-8-sig", "utf-16")), "surrogatepass")
    return damaged(content, dice) if dice.random() < 0.4 else content


def as_npy(_value, dice: random.Random, canary: Path) -> bytes:
    out = io.BytesIO()
    if dice.random() < 0.1:
        np.save(out, np.array([Touch(canary / "touched")], dtype=object), allow_pickle=True)
    elif dice.random() < 0.5:
        header = {
            "descr": dice.choice(
                ("<i8", ">i4", "|u1", "<f8", "|b1", "|O", "<c16", "<U9", "|V0", "<M8[s]", [("a", "<i8")])
            ),
            "fortran_order": dice.choice((True, False)),
            "shape": tuple(dice.choice((0, 1, 2, 5, 10**4, 10**12, 2**62, -1)) for _ in range(dice.randrange(4))),
        }
        np.lib.format.write_array_header_1_0(out, header)
        out.write(dice.randbytes(dice.choice((0, 8, 400))))
    else:
        shape = [dice.choice((0, 1, 3, 30)) for _ in range(dice.choice((1, 2, 2, 2, 3)))]
        np.save(out, np.zeros(shape, dice.choice((np.int64, np.uint8, np.uint64, np.int16, np.float32, np.bool_))))
    return damaged(out.getvalue(), dice) if dice.random() < 0.5 else out.getvalue()


def as_pt(_value, dice: random.Random, canary: Path) -> bytes:
    codes = torch.randint(-1, 9, (5, 2), generator=torch.Generator().manual_seed(dice.randrange(99)))
    content = dice.choice(
        (
            lambda: codes.abs(),
            lambda: codes.abs().to(dice.choice((torch.int8, torch.int16, torch.uint8, torch.bool, torch.complex64))),
            lambda: codes.expand(10 ** dice.choice((3, 7, 12)), 5, 2)[:, 0],
            lambda: codes.to_sparse(),
            lambda: torch.zeros(5, 2, device="meta", dtype=torch.int64),
            lambda: torch.full((2, 2), dice.choice((2**62, -(2**63), 2**31))),
            lambda: torch.zeros((0, 2), dtype=torch.int64),
            lambda: torch.nn.Parameter(codes.float()),
            lambda: torch.quantize_per_tensor(codes.float(), 1.0, 0, torch.quint8),
            lambda: {"a": ["<a_1>"], "b": codes},
            lambda: INDEX,
            lambda: CODES,
            lambda: [codes],
            lambda: Touch(canary / "touched"),
            lambda: "text",
        )
    )()
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=dice.random() < 0.8)
    return damaged(out.getvalue(), dice) if dice.random() < 0.5 else out.getvalue()


def as_parquet(_value, dice: random.Random, _canary: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    count = dice.choice((0, 1, 3, 40))
    users = dice.choice((["u"], [1], [1.0, None], [float("nan")], [1.5], [b"u"], [True], [["u"]], ["u", None]))
    items = dice.choice(([10], ["x"], [11.0], [None], [99], ["long" * 20_000], [{"a": 1}], [b"x"]))
    lists = dice.choice(([[10]], [["x", "11"]], [[]], [None], [[None]], ["[10]"], ["[" * 200], [[[10]]]))
    times = dice.choice(
        (
            [5, 3],
            [1.5, None],
            [float("nan")],
            ["2024-01-01", "7"],
            pyarrow.array([1, 2 ** dice.choice((40, 52))], pyarrow.timestamp(dice.choice(("s", "ms", "us", "ns")))),
            pyarrow.array([1, 2], pyarrow.timestamp("us", "Europe/Berlin")),
            pyarrow.array([1, 2**31 - 1], pyarrow.date32()),
            pyarrow.array([1, 2], pyarrow.time64("ns")),
            pyarrow.array([1, 2], pyarrow.duration("s")),
            pyarrow.array([True, False]),
        )
    )

    def column(values):
        if isinstance(values, pyarrow.Array):
            return values.take(pyarrow.array([i % len(values) for i in range(count)], pyarrow.int64()))
        return pyarrow.array([values[i % len(values)] for i in range(count)])

    columns = {dice.choice(("user_id", "user")): column(users)}
    if dice.random() < 0.8:
        columns["item_id"] = column(items)
    if dice.random() < 0.4:
        columns[dice.choice(("history", "items", "history_item_id"))] = column(lists)
    if dice.random() < 0.7:
        columns[dice.choice(("timestamp", "time", "Date", "ts"))] = column(times)
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table(columns), out, compression=dice.choice(("snappy", "gzip", "zstd", "none")), row_group_size=7
    )
    return damaged(out.getvalue(), dice) if dice.random() < 0.6 else out.getvalue()


def as_index_parquet(_value, dice: random.Random, _canary: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    items = dice.choice(([10, 11], ["x", "y"], [1.0, None], [True, False], [b"x", b"y"], [[1], [2]], [10, 10]))
    lists = [[[0, 1], [1, 0]], [[0], [1, 2]], [[], []], [None, [1]], [[2**62, 1], [0, 1]], [[0.5], [1.0]]]
    tokens = [["<a_0><b_1>", "<a_1><b_0>"], [["<a_0>"], ["<a_1>"]], ["long" * 20_000, "<"], [{"a": 1}, {"a": 2}]]
    columns = {
        dice.choice(("pid", "item_id")): pyarrow.array(items),
        dice.choice(("sid", "codes")): pyarrow.array(dice.choice((*lists, *tokens))),
    }
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, compression=dice.choice(("snappy", "zstd", "none")))
    return damaged(out.getvalue(), dice) if dice.random() < 0.6 else out.getvalue()


FILES = (
    ("index", ".json", as_json, INDEX),
    ("index", ".json", as_json, CODES),
    ("index", ".npy", as_npy, None),
    ("index", ".pt", as_pt, None),
    ("index", ".parquet", as_index_parquet, None),
    ("histories", ".json", as_json, HISTORIES),
    ("histories", ".csv", as_csv, ROWS),
    ("histories", ".csv", as_csv, TARGETS),
    ("histories", ".tsv", as_csv, ROWS.replace(",", "\t")),
    ("histories", ".parquet", as_parquet, None),
    ("text", ".json", as_json, TEXT),
)


class Child:
    """`reader.py`, started again after it has died."""

    def __init__(self):
        self.process = None

    def read(self, reader, path):
        if self.process is None:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            # Others reserve a GiB of addresses at a time.
            environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
            command = [sys.executable, "-m", "tests.fuzz.reader"]
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        self.process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], SECONDS + 60)[0]:
            self.end()
            return "hang", ""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.process = None
            return "death", f"exit code {code}"
        return json.loads(line)

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture
def child():
    made = Child()
    yield made
    made.end()


def contents(folder):
    """Every file under a folder, with the digest of what it holds."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        for file in sorted(folder.rglob("*"))
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_only_errors_of_one_line_come_out(child, tmp_path):
    folder, canary = tmp_path / "files", tmp_path / "canary"
    folder.mkdir()
    canary.mkdir()
    (canary / "thesis.txt").write_text("not to be touched")
    untouched, first = contents(canary), int(os.environ.get("FUZZ_SEED", "0"))
    ends = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "20"))
    seen, seed, found = {}, first, []
    while time.monotonic() < ends and len(found) < 10:
        dice = random.Random(seed)
        reader, suffix, make, value = dice.choice(FILES)
        content = make(value, dice, canary)
        path = folder / f"try{suffix}"
        path.write_bytes(content)
        kind, message = child.read(reader, path)
        seen[reader, suffix, kind] = seen.get((reader, suffix, kind), 0) + 1
        case = f"FUZZ_SEED={seed} ({reader}{suffix}): {kind}: {message[:300]!r}"
        if kind not in ALLOWED or len(message) > LONGEST + len(str(path)) or "\n" in message:
            found.append(case)
        if contents(canary) != untouched or contents(folder) != {path.name: hashlib.sha256(content).hexdigest()}:
            found.append(f"{case}; files outside it have changed")
            break
        path.unlink()
        seed += 1
    print(f"{seed - first} tries:", *(f"{count} {' '.join(key)}" for key, count in sorted(seen.items())), sep="\n  ")
    assert not found, "\n".join(found)
    assert seed - first > 20
