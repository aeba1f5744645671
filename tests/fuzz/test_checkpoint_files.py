"""Damaged and hostile checkpoints by the thousand: known errors alone, in little time and memory, nothing else touched.

A child process changes files of sound folders by a seeded generator and loads them. ``FUZZ_SECONDS`` says for how long
(20 s unless given); a failure prints the seed of its try, and ``FUZZ_SEED`` begins with that one.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))
MOST_SECONDS = 10  # of one try
MOST_BYTES = 1 << 30  # of address space beyond what the imports take

STRANGE = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 53, 1 << 60, (1 << 63) - 1, 1 << 63, 1 << 70, 10**400,
    0.5, -0.0, 1e308, float("inf"), float("nan"), "", "a", ".", "..", "/", "/etc/passwd", "../canary/x.safetensors",
    "memory-000000000000.safetensors", "a\0b", "\ud800", "é" * 300, "x" * 5000, "float32", "int8", "float8_e4m3fn",
    "prefixmem", "sid-transformer", [], {}, [[]], [0], [-1], [1 << 62, 1 << 62], [0] * 50, {"a": 1},
    {"file": "..", "key": "", "rows": 0},
]  # fmt: skip


def places(value, path=()):
    """Every place of a JSON value, as a path."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def mutate_json(values, rng: random.Random):
    """One change: a value replaced, removed, copied, exchanged, moved by one, or repeated."""
    path = rng.choice(list(places(values)))
    if not path:
        return rng.choice(STRANGE) if rng.random() < 0.2 else values
    parent, key, value = at(values, path[:-1]), path[-1], at(values, path)
    kind = rng.randrange(6)
    if kind == 0:
        parent[key] = rng.choice(STRANGE)
    elif kind == 1:
        del parent[key]
    elif kind == 2:
        parent[key] = json.loads(json.dumps(at(values, rng.choice(list(places(values))))))
    elif kind == 3 and isinstance(value, int):
        parent[key] = value + rng.choice([-1, 1, 1 << 20, -(1 << 20), 1 << 40])
    elif kind == 4 and isinstance(parent, list):
        parent.insert(key, json.loads(json.dumps(value)))
    elif kind == 5 and isinstance(value, list):
        parent[key] = (value * rng.choice([2, 3, 1000]))[:20_000]
    elif isinstance(parent, dict):
        parent[rng.choice([*map(str, parent), "new"])] = value
    return values


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        place = rng.randrange(max(len(content), 1))
        kind = rng.randrange(5)
        if kind == 0 and content:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = rng.randbytes(rng.choice([1, 8, 300]))
        elif kind == 3:
            del content[place : place + rng.choice([1, 8, 300])]
        else:
            content[place:place] = rng.choice([b"[" * 5000, b"{" * 100, b'"', b"NaN", b"\0", b"9" * 5000, b"1e999"])
    return bytes(content)


def mutate_text(file: Path, rng: random.Random, digest) -> None:
    if rng.random() < 0.15:
        file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        return
    values = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 2, 4])):
        values = mutate_json(values, rng)
        if not isinstance(values, dict):
            break
    if digest and isinstance(values, dict) and rng.random() < 0.9:
        values.pop("digest", None)
        values["digest"] = digest(values)
    text = json.dumps(values)
    if rng.random() < 0.03:
        text = text.replace("{", '{"format": "prefixmem", ', 1)
    file.write_text(text)


def mutate_safetensors(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    if rng.random() < 0.4:
        file.write_bytes(mutate_bytes(data, rng))
        return
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.choice([1, 1, 2])):
        header = mutate_json(header, rng)
    if rng.random() < 0.3 and isinstance(header, dict):
        for entry in header.values():
            if isinstance(entry, dict) and "dtype" in entry:
                entry["dtype"] = rng.choice(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "F4", "C64", "BOOL", "U16"])
    text = json.dumps(header).encode()
    size = len(text) if rng.random() < 0.9 else rng.choice([0, 1, 1 << 31, (1 << 64) - 1])
    file.write_bytes(size.to_bytes(8, "little") + text + body)


def mutate_kind(file: Path, rng: random.Random) -> None:
    """Another kind of file, or none."""
    target = file.read_bytes()
    file.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(rng.choice(["/dev/zero", "/dev/null", file.name, "/nowhere", "/etc/passwd", ".."]))
    elif kind == 3:
        file.write_bytes(b"")
        os.truncate(file, 1 << 40)
    elif kind == 4:
        file.write_bytes(target)
        file.rename(file.with_name("memory-00000000000a.safetensors"))


def snapshot(folder: Path):
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() and status.st_size < 1 << 20 else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, content)
    return found


FOREIGN = ("tokenizer.json", "memory-of-me.safetensors", "notes/memory-000000000000.safetensors", ".tmpA1b2C3")


def sound_folders(root: Path) -> None:
    """An encoder in shards, one in one file, a model with an encoder in shards and in one file, a transformer."""
    from prefixmem_fast import attach
    from prefixmem_fast.encoder import SIDTransformer, SIDTransformerConfig
    from tests.helpers.models import encoder, tiny_model, vocabulary

    encoder().save_pretrained(root / "shards", vocabulary(), max_shard_size=1000)
    encoder().save_pretrained(root / "single", vocabulary())
    vocabulary().save_pretrained(root / "single")
    config = SIDTransformerConfig((4, 5, 6), 32, width=8, layers=1, heads=2)
    SIDTransformer(config).save_pretrained(root / "transformer")
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(root / "model")
    model.save_pretrained(root / "model_in_shards", max_shard_size="20KB")


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def one_try(sound: Path, work: Path, rng: random.Random) -> str:
    """Damage a copy, load it, save into it; returns what came out of the loading."""
    from prefixmem_fast import CheckpointError, PrefixMem, SIDVocabulary, checkpoint
    from prefixmem_fast.encoder import SIDTransformer
    from prefixmem_fast.encoder.saving import kind_of_encoder, load_weights
    from tests.helpers.models import encoder

    folder, canary = work / "encoder", work / "canary"
    for path in (folder, canary):
        shutil.rmtree(path, ignore_errors=True)
    canary.mkdir(parents=True)
    shutil.copy(next((sound / "single").glob("*.safetensors")), canary / "x.safetensors")
    shutil.copytree(rng.choice(sorted(sound.iterdir())), folder)
    own = folder / "prefixmem" if (folder / "prefixmem").is_dir() else folder
    for name in FOREIGN:
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("of the user")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in [Path(f).name for f in FOREIGN]]
    for _ in range(rng.choice([1, 1, 2])):
        file = rng.choice(files)
        if file.is_symlink() or not file.is_file() or file.stat().st_size > 1 << 24:
            continue
        try:
            if rng.random() < 0.05:
                mutate_kind(file, rng)
            elif file.suffix == ".safetensors":
                mutate_safetensors(file, rng)
            else:
                ours = file.parent == own and file.name in ("config.json", "sid_vocabulary.json")
                mutate_text(file, rng, checkpoint._digest if ours else None)
        except (ValueError, RecursionError):
            continue  # changed twice, and no JSON any more
    before, canary_before = snapshot(folder), snapshot(canary)
    verify = rng.random() < 0.5
    one = encoder()
    outcome = []
    for load in (
        lambda: PrefixMem.from_pretrained(folder, verify=verify),
        lambda: SIDTransformer.from_pretrained(folder, verify=verify),
        lambda: SIDVocabulary.from_pretrained(folder),
        lambda: kind_of_encoder(folder),
        lambda: load_weights(one, folder),
    ):
        try:
            load()
            outcome.append("loaded")
        except (CheckpointError, FileNotFoundError) as error:
            expect(len(str(error)) < 20_000, f"a message of {len(str(error))} characters")
            str(error).encode()  # can be printed
            outcome.append(type(error).__name__)
        except OSError as error:
            expect(error.errno is not None, repr(error))
            outcome.append("OSError")
        except MemoryError as error:
            expect("cannot be mapped" in str(error), repr(error))
            outcome.append("MemoryError")
    assert snapshot(folder) == before, "loading changed the folder"
    try:
        one.save_pretrained(own)
        if own == folder:
            PrefixMem.from_pretrained(folder)
    except (ValueError, OSError) as error:
        expect(not isinstance(error, CheckpointError), repr(error))
    for name in FOREIGN:
        assert (own / name).read_text() == "of the user", name
    weights = {name for name in before if Path(name).name.startswith("memory-") and Path(name).parent == Path(".")}
    gone = set(before) - set(snapshot(folder)) - weights
    assert not {name for name in gone if not Path(name).name.startswith("memory-")}, gone
    assert snapshot(canary) == canary_before, "something beside the folder was touched"
    return outcome[0]


def child(work: Path) -> None:
    warnings.simplefilter("ignore")
    sound = work / "sound"
    sound_folders(sound)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))

    def stop(*_):
        raise TimeoutError(f"a try took {MOST_SECONDS} s")  # an OSError without errno, so it is no known one

    signal.signal(signal.SIGALRM, stop)
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 10**12))
    end, counts = time.monotonic() + SECONDS, {}
    while time.monotonic() < end:
        signal.alarm(MOST_SECONDS)
        try:
            outcome = one_try(sound, work / "try", random.Random(seed))
        except BaseException:
            print(f"FUZZ_SEED={seed} fails\n{traceback.format_exc()[-6000:]}", flush=True)
            raise SystemExit(1) from None
        finally:
            signal.alarm(0)
        counts[outcome] = counts.get(outcome, 0) + 1
        seed += 1
    print(json.dumps(counts), flush=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_damaged_checkpoints(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.test_checkpoint_files", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["CheckpointError"] > counts.get("loaded", 0) > 0, "the damage is too small, or too great"


if __name__ == "__main__":
    child(Path(sys.argv[1]))
