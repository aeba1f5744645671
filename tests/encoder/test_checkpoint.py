import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixmem_fast import (
    AddressSpec,
    CheckpointError,
    PrefixMem,
    PrefixMemConfig,
    SIDVocabulary,
    _files,
    checkpoint,
)
from prefixmem_fast._files import write_file
from prefixmem_fast.encoder import saving
from tests.helpers.models import encoder, lagged_encoder, vocabulary
from tests.helpers.tokenizers import tokenizer


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def weights(folder):
    return sorted(Path(folder).glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_saved_and_loaded(tmp_path, dtype):
    one = encoder().to(dtype)
    one.save_pretrained(tmp_path, vocabulary())
    found = PrefixMem.from_pretrained(tmp_path, backend="reference", grad="sparse")
    assert found.config == one.config
    assert found.memory.backend == "reference"
    assert found.memory.grad == "sparse"
    for name, tensor in one.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert SIDVocabulary.from_pretrained(tmp_path) == vocabulary()
    assert SIDVocabulary.from_pretrained(tmp_path).names == vocabulary().names
    assert PrefixMem.from_pretrained(tmp_path, dtype=torch.float32).memory.weight.dtype == torch.float32
    assert len(weights(tmp_path)) == 1
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~_umask()}


@pytest.mark.parametrize("mask", [0o000, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        encoder().save_pretrained(tmp_path, max_shard_size=1500)
        vocabulary().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_file_has_the_mode_of_a_new_one_however_it_was_written(tmp_path):
    def write(temporary):
        os.unlink(temporary)
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))

    write_file(tmp_path / "file", write)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", [None, "memory.weight", "out_proj.weight"])
def test_reading_says_whether_anything_was_another(tmp_path, name):
    one = encoder()
    one.save_pretrained(tmp_path)
    if name:
        with torch.no_grad():
            one.get_parameter(name)[0] += 1
    assert saving.load_weights(one, tmp_path) == bool(name)
    assert not saving.load_weights(one, tmp_path)


def test_how_weights_started_is_not_compared(tmp_path):
    one = lagged_encoder()
    one.save_pretrained(tmp_path)
    short = replace(one.config.cross_item.cross_item, output_init_std=0.25)
    across = replace(one.config.cross_item, memory_init_std=0.5, cross_item=short)
    other = PrefixMem(replace(one.config, output_init_std=0.125, cross_item=across))
    assert saving.load_weights(other, tmp_path)
    assert all(torch.equal(p, one.get_parameter(name)) for name, p in other.named_parameters())
    fewer = PrefixMem(replace(one.config, cross_item=replace(across, lags=2)))
    with pytest.raises(CheckpointError, match="differs in cross_item"):
        saving.load_weights(fewer, tmp_path)


def test_a_new_width_starts_w_out_afresh(tmp_path):
    one = encoder()
    one.save_pretrained(tmp_path)
    found = PrefixMem.from_pretrained(tmp_path, hidden_size=48)
    assert torch.equal(found.memory.weight, one.memory.weight)
    assert found.out_proj.weight.shape == (48, 8)
    assert 0.5 < found.out_proj.weight.std() < 2, "the config's output_init_std is 1"
    assert torch.equal(PrefixMem.from_pretrained(tmp_path, hidden_size=32).out_proj.weight, one.out_proj.weight)


@pytest.mark.parametrize(("size", "count"), [("2GB", 1), (1000, None), ("1.5KB", None), ("1KiB", None), (1, None)])
def test_shards(tmp_path, size, count):
    one = encoder()
    one.save_pretrained(tmp_path, max_shard_size=size)
    found = PrefixMem.from_pretrained(tmp_path)
    assert torch.equal(found.memory.weight, one.memory.weight)
    assert torch.equal(found.out_proj.weight, one.out_proj.weight)
    if count:
        assert len(weights(tmp_path)) == count
        return
    limit = max({1000: 1000, "1.5KB": 1500, "1KiB": 1024, 1: 1}[size], 32)  # a row is never split
    sizes = [sum(t.numel() * t.element_size() for t in _tensors(path).values()) for path in weights(tmp_path)]
    assert max(sizes) <= limit
    assert len(sizes) >= 3


def _tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("size", [0, "2 PB", "1.2.3GB", -1, 1.5, True, None])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match=r"max_shard_size = .* is no size; give bytes"):
        encoder().save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_a_new_checkpoint_replaces_the_old_one_and_its_files(tmp_path):
    one = encoder()
    one.save_pretrained(tmp_path, max_shard_size=1000)
    (tmp_path / "tokenizer.json").write_text("of somebody else")
    torch.nn.init.normal_(one.memory.weight)
    one.save_pretrained(tmp_path)
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, one.memory.weight)
    assert sorted(f for f in files(tmp_path) if not f.startswith("memory-")) == ["config.json", "tokenizer.json"]
    assert len(weights(tmp_path)) == 1


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_interrupted_while_writing(tmp_path, monkeypatch, fails):
    """Whichever write stops, the old checkpoint stays valid and nothing of the new one is left."""
    one = encoder()
    one.save_pretrained(tmp_path, vocabulary(), max_shard_size=1500)
    before = files(tmp_path)
    torch.nn.init.normal_(one.memory.weight)
    replace, calls = os.replace, []

    def stop(source, target):
        calls.append(target)
        if len(calls) == fails:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        one.save_pretrained(tmp_path, max_shard_size=1500)
    assert files(tmp_path) == before


FAILURES = [OSError("of the folder's flush"), KeyboardInterrupt()]


@pytest.mark.parametrize("function", ["open", "fsync", "close"])
@pytest.mark.parametrize("failure", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("size", ["2GB", 1500])
def test_a_failure_after_the_rename_of_the_config_keeps_the_encoder(tmp_path, monkeypatch, function, failure, size):
    """The files that config.json named already were removed, and those of the encoder before with the next save."""
    one, renamed = encoder(), []
    one.save_pretrained(tmp_path, vocabulary(), max_shard_size=size)
    torch.nn.init.normal_(one.memory.weight)
    replace, original = os.replace, getattr(os, function)

    def note(source, target):
        replace(source, target)
        renamed.append(Path(target).name)

    def fail(*args, **options):
        result = original(*args, **options)
        flushing = any(name in ("flush", "suppress") for name in _callers())
        if renamed[-1:] == ["config.json"] and flushing:
            renamed.append("")
            raise failure
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", note)
        patch.setattr(os, function, fail)
        if isinstance(failure, OSError):
            one.save_pretrained(tmp_path, max_shard_size=size)
        else:
            with pytest.raises(KeyboardInterrupt):
                one.save_pretrained(tmp_path, max_shard_size=size)
    assert renamed[-1] == "", "nothing failed"
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, one.memory.weight)
    one.save_pretrained(tmp_path)
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, one.memory.weight)
    assert len(weights(tmp_path)) == 1


def _callers():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


def test_an_interrupt_between_the_rename_and_the_return_of_it(tmp_path, monkeypatch):
    one, replace = encoder(), os.replace
    one.save_pretrained(tmp_path)
    torch.nn.init.normal_(one.memory.weight)

    def interrupted(source, target):
        replace(source, target)
        if Path(target).name == "config.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.save_pretrained(tmp_path)
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, one.memory.weight)


def test_an_old_file_that_cannot_be_removed_is_no_failure(tmp_path):
    one = encoder()
    one.save_pretrained(tmp_path)
    (tmp_path / "memory-0123456789ab.safetensors").mkdir()
    torch.nn.init.normal_(one.memory.weight)
    one.save_pretrained(tmp_path)
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, one.memory.weight)
    assert len(weights(tmp_path)) == 2


def test_the_same_content_saved_again_and_interrupted_loses_nothing(tmp_path, monkeypatch):
    one = encoder()
    one.save_pretrained(tmp_path)
    before = files(tmp_path)

    def stop(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write_json", stop)
    with pytest.raises(OSError, match="disk full"):
        one.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def saved(tmp_path):
    encoder().save_pretrained(tmp_path, vocabulary())
    return tmp_path / "config.json", weights(tmp_path)[0]


def edit(config, change, digest=True):
    values = json.loads(config.read_text())
    change(values)
    if digest:
        values.pop("digest")
        values["digest"] = checkpoint._digest(values)
    config.write_text(json.dumps(values))


def repeat_part(values):
    entry = values["tensors"]["out_proj.weight"]
    entry["parts"] = entry["parts"] * 2


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, w: c.write_text("{"), r"config.json is damaged: it is not JSON"),
        (lambda c, w: c.write_bytes(b"\xff\xfe"), r"config.json is damaged: it is not JSON"),
        (lambda c, w: c.write_text("[]"), "is not of prefixmem_fast .its format is 'list'"),
        (lambda c, w: c.write_text('{"model_type": "qwen3"}'), "is not of prefixmem_fast .its format is None"),
        (
            lambda c, w: edit(c, lambda v: v.update(format_version=4, package_version="9.0")),
            r"format version 4, written by prefixmem_fast 9.0; prefixmem_fast 0.1.0 reads versions 1, 2, 3",
        ),
        (
            lambda c, w: edit(c, lambda v: v.update(format_version=3)),
            r"\['parts'\]\[0\]\['sha256'\] is None, not a digest of 64 hexadecimal digits",
        ),
        (
            lambda c, w: edit(c, lambda v: v["encoder"].update(memory_dim=4), digest=False),
            "config.json is damaged or edited: its digest is",
        ),
        (lambda c, w: edit(c, lambda v: v["encoder"]["spec"].update(seed=5)), "multipliers"),
        (lambda c, w: edit(c, lambda v: v["encoder"]["spec"].update(version=9)), "version"),
        (lambda c, w: edit(c, lambda v: v["tensors"]["memory.weight"].update(shape=[3, 4])), r"shape \[3, 4\]"),
        (lambda c, w: edit(c, lambda v: v["tensors"].pop("out_proj.weight")), "out_proj.weight is missing"),
        (lambda c, w: edit(c, repeat_part), "the files hold 64 rows of out_proj.weight; config.json says 32"),
        (lambda c, w: edit(c, lambda v: v["tensors"]["memory.weight"].update(dtype="float16")), "float32"),
        (lambda c, w: w.write_bytes(w.read_bytes()[:-9]), "safetensors is damaged or cut"),
        (lambda c, w: w.write_bytes(b"junk"), "safetensors is damaged or cut"),
        (lambda c, w: w.write_bytes(b""), "safetensors is damaged or cut"),
        (lambda c, w: w.unlink(), r"safetensors is not there, and config.json names it for memory.weight"),
        (lambda c, w: flip(w, -3), "is damaged, or not the one that config.json was saved with: its SHA-256 is"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, message):
    damage(*saved(tmp_path))
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        PrefixMem.from_pretrained(tmp_path)
    assert files(tmp_path) == before
    one = encoder()
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    with pytest.raises(CheckpointError):
        saving.load_weights(one, tmp_path)
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in state.items()), "left half loaded"


def test_loaded_while_serving_it_can_be_trained(tmp_path):
    saved(tmp_path)
    with torch.inference_mode():
        one = PrefixMem.from_pretrained(tmp_path)
    one(torch.tensor([[1, 3, 4]])).sum().backward()
    assert one.memory.weight.grad.any()


def test_two_writers_leave_one_of_the_two(tmp_path, monkeypatch):
    """The second begins while the first is about to write its config: it waits, and is the one that stays."""
    first, second = encoder(), encoder(std=2.0)
    write, events = checkpoint.write_json, []
    other = threading.Thread(target=lambda: (second.save_pretrained(tmp_path), events.append("second")))

    def meanwhile(*args):
        monkeypatch.setattr(checkpoint, "write_json", write)
        other.start()
        other.join(0.3)
        events.append("first")
        write(*args)

    monkeypatch.setattr(checkpoint, "write_json", meanwhile)
    first.save_pretrained(tmp_path)
    other.join(60)
    assert events == ["first", "second"]
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).out_proj.weight, second.out_proj.weight)
    assert len(weights(tmp_path)) == 1


_HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_holds(tmp_path, monkeypatch):
    """The save waited for ever without a word."""
    monkeypatch.setattr(_files, "LOCK_SECONDS", 0.3, raising=False)
    monkeypatch.setattr(_files, "LOCK_QUIET_SECONDS", 0.1, raising=False)
    one = encoder()
    one.save_pretrained(tmp_path)
    before = files(tmp_path)
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            torch.nn.init.normal_(one.memory.weight)
            failed = []

            def save():
                with pytest.raises(OSError, match="another process holds") as error, pytest.warns() as found:
                    one.save_pretrained(tmp_path)
                failed.extend([str(error.value), *(str(warning.message) for warning in found)])

            thread = threading.Thread(target=save, daemon=True)
            thread.start()
            thread.join(20)
            assert failed, "it waits"
            assert f"another process holds {tmp_path}: it could not be written into for 0.3 s" in failed[0]
            assert failed[1:] == [f"another process holds {tmp_path}; waiting until 0.3 s have passed"]
            assert files(tmp_path) == before
        finally:
            holder.kill()
    one.save_pretrained(tmp_path)
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, one.memory.weight)


def test_unverified_loading_trusts_the_content(tmp_path):
    _, file = saved(tmp_path)
    flip(file, -3)
    PrefixMem.from_pretrained(tmp_path, verify=False)


def test_another_encoder_is_refused_with_both_printed(tmp_path):
    saved(tmp_path)
    other = PrefixMem(PrefixMemConfig(AddressSpec((4, 5, 6), table_rows=51, heads=2, max_order=3), 8, 32))
    with pytest.raises(CheckpointError, match=r"differs in spec\n  checkpoint: .*50, 50.*\n  encoder: .*51, 51"):
        saving.load_weights(other, tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        PrefixMem.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor prefixmem/config.json is there"):
        PrefixMem.from_pretrained(tmp_path)
    encoder().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no vocabulary"):
        SIDVocabulary.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"codebook_sizes \(4,\) differ"):
        encoder().save_pretrained(tmp_path, SIDVocabulary.from_table({}, (4,)))


def test_vocabularies(tmp_path):
    one = tokenizer(["<b_1>", "x", "<a_0>", "<a_7>"])
    known = SIDVocabulary.from_tokenizer(one, (8, 2))
    known.save_pretrained(tmp_path)
    found = SIDVocabulary.from_pretrained(tmp_path, one)
    assert found == known
    assert found.names == known.names
    assert found.table.tolist() == known.table.tolist()
    other = tokenizer(["<b_1>", "<a_0>", "x", "<a_7>"])
    with pytest.raises(ValueError, match="token '<a_0>' with id 5 and the tokenizer has id 4"):
        SIDVocabulary.from_pretrained(tmp_path, other)
    with pytest.raises(ValueError, match="token '<a_7>' with id 6 and the tokenizer has no such token"):
        SIDVocabulary.from_pretrained(tmp_path, tokenizer(["<b_1>", "x", "<a_0>"]))
    flip(tmp_path / "sid_vocabulary.json", 80)
    with pytest.raises(CheckpointError, match=r"sid_vocabulary.json is damaged"):
        SIDVocabulary.from_pretrained(tmp_path)


_LOAD = """
import sys, threading, time
from prefixmem_fast import PrefixMem

def private():  # without the pages of mapped files
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

start, peak, done = private(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private() - start)
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
weight = PrefixMem.from_pretrained(sys.argv[1]).memory.weight
done.set()
thread.join()
print(peak[0], weight.sum().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_one_copy_of_a_table_is_enough(tmp_path):
    spec = AddressSpec((2048,) * 3, table_rows=131_072, heads=4, max_order=3, addressing="hash")
    one = PrefixMem(PrefixMemConfig(spec, memory_dim=256, hidden_size=8))  # 400 MB
    table = one.memory.weight.numel() * 4
    one.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", _LOAD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, total = map(float, done.stdout.split())
    assert total == one.memory.weight.sum().item()
    assert 0.9 * table < peak < 1.4 * table
