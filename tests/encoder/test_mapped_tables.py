import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from prefixmem_fast import AddressSpec, CheckpointError, DecodingState, PrefixMem, PrefixMemConfig, attach, optim
from prefixmem_fast._weights import _mapped
from prefixmem_fast.encoder.saving import load_weights
from tests.helpers import models
from tests.helpers.cases import BACKENDS, FLOATS


def codes():
    return torch.stack([torch.randint(0, size, (10,)) for size in models.SIZES], 1)


@pytest.fixture
def folder(tmp_path):
    models.encoder().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def mapped(folder, **options):
    return PrefixMem.from_pretrained(folder, tables="mapped", **options)


def file_of(folder):
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize(
    ("dtype", "backend"), [*((dtype, "auto") for dtype in FLOATS), *((torch.float32, one) for one in BACKENDS)], ids=str
)
def test_reads_are_those_of_a_loaded_table(dtype, backend, tmp_path):
    models.encoder(dtype=dtype).save_pretrained(tmp_path)
    loaded = PrefixMem.from_pretrained(tmp_path, backend=backend).requires_grad_(False)
    for verify in (False, True):
        encoder = mapped(tmp_path, backend=backend, verify=verify)
        assert torch.equal(encoder.memory.weight, loaded.memory.weight)
        assert encoder.memory.weight.dtype == dtype
        batch = codes()
        assert torch.equal(encoder(batch), loaded(batch))
    ids = models.prompts()["input_ids"]
    vocabulary = models.vocabulary()
    assert torch.equal(encoder.encode_tokens(ids, vocabulary), loaded.encode_tokens(ids, vocabulary))
    steps = [DecodingState(one, vocabulary, len(ids)).prefill(ids) for one in (encoder, loaded)]
    assert torch.equal(*steps)
    batch = codes()
    encoder.prefetch(batch)
    assert torch.equal(encoder(batch), loaded(batch))


_MEASURE = """
import json, sys, torch
from prefixmem_fast import PrefixMem

def resident():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) << 10 for name in ("VmRSS", "RssAnon")]

small = PrefixMem.from_pretrained(sys.argv[1])
small(torch.zeros(1, 3, dtype=torch.int64))  # what the first call imports
found = []
for verify in (False, True):
    found.append([resident()])
    encoder = PrefixMem.from_pretrained(sys.argv[2], tables="mapped", verify=verify)
    found[-1].append(resident())
    encoder(torch.randint(0, 64, (10, 3)))
    found[-1].append(resident())
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_resident_memory_does_not_grow_by_the_table(folder, tmp_path):
    spec = AddressSpec((64,) * 3, table_rows=50_000, addressing="hash")
    encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=64, hidden_size=8))
    encoder.save_pretrained(tmp_path / "large", max_shard_size="1GB")
    command = [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table = encoder.memory.weight.nbytes
    assert table > 36 << 20
    for before, loaded, read in json.loads(done.stdout):
        assert loaded[0] - before[0] < table // 4
        # A fault maps the pages around it that the system has in its cache, up to 2 MB: they are not the process's own.
        assert read[1] - before[1] < table // 8


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and memory as Linux counts it")
def test_a_table_larger_than_memory(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = memory // 4 * 2 + 1  # twice as large, and a hole
    header = json.dumps({"x": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / "x", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(file.tell() + 4 * count)
        except OSError as error:
            pytest.skip(f"no file of twice the memory here: {error}")
    x = _mapped(tmp_path / "x", "x", torch.float32)
    assert x.shape == (count,)
    assert x[-1] == 0


def test_what_is_written_into_it_stays_in_memory(folder):
    encoder, before = mapped(folder), file_of(folder).read_bytes()
    encoder.memory.weight.zero_()
    assert not encoder.memory.weight.any()
    assert file_of(folder).read_bytes() == before
    assert mapped(folder).memory.weight.any()


def test_a_damaged_file_is_found(folder):
    content = bytearray(file_of(folder).read_bytes())
    content[-1] ^= 1
    file_of(folder).write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        mapped(folder)
    assert mapped(folder, verify=False).memory.weight.any()
    file_of(folder).write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="damaged or cut"):
        mapped(folder, verify=False)
    file_of(folder).unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        mapped(folder)


def test_shards_are_refused(folder):
    encoder = models.encoder()
    size = encoder.memory.weight.nbytes
    encoder.save_pretrained(folder, max_shard_size=size - 1)
    with pytest.raises(ValueError, match=rf"stored in 2 parts, .* save the encoder again with max_shard_size={size} "):
        mapped(folder)
    encoder.save_pretrained(folder, max_shard_size=size)
    assert torch.equal(mapped(folder).memory.weight, encoder.memory.weight)


def test_another_dtype_is_refused(folder):
    with pytest.raises(ValueError, match=r"dtype = torch.bfloat16, and .* in torch.float32; leave dtype out"):
        mapped(folder, dtype=torch.bfloat16)
    encoder = mapped(folder, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r'load the encoder with tables="host", dtype=torch.float16'):
        encoder.half()
    assert encoder.to("cpu").float() is encoder


def test_training_it_is_refused(folder):
    encoder = mapped(folder, grad="sparse")
    assert not encoder.memory.weight.requires_grad
    optimizer = optim.for_model(encoder, lr=0.1)
    before = encoder.out_proj.weight.detach().clone()
    table = encoder.memory.weight.clone()
    encoder(codes()).sin().sum().backward()
    optimizer.step()
    assert not torch.equal(encoder.out_proj.weight, before), "W_out trains on it"
    assert torch.equal(encoder.memory.weight, table)
    encoder.requires_grad_(True)
    for call in (lambda: encoder(codes()), lambda: encoder.encode_tokens(codes(), models.vocabulary())):
        with pytest.raises(RuntimeError, match='tables = "mapped" cannot be trained'):
            call()
    with torch.no_grad():
        encoder(codes())


def test_loading_into_it_is_refused(folder):
    encoder, other = mapped(folder), models.encoder()
    with torch.no_grad():
        other.memory.weight.add_(1)
    other.save_pretrained(folder.parent / "other")
    for load in (
        lambda: encoder.load_state_dict(other.state_dict()),
        lambda: encoder.load_state_dict(other.state_dict(), assign=True),
        lambda: load_weights(encoder, folder.parent / "other"),
        encoder.memory.reset_parameters,
    ):
        with pytest.raises(RuntimeError, match='tables = "mapped" is read-only'):
            load()
    assert torch.equal(encoder.memory.weight, models.encoder().memory.weight)
    encoder.load_state_dict({"out_proj.weight": other.out_proj.weight}, strict=False)


def test_copies_share_the_map_and_pickles_hold_the_table(folder):
    encoder = mapped(folder)
    assert copy.deepcopy(encoder).memory.weight is encoder.memory.weight
    other = pickle.loads(pickle.dumps(encoder))
    assert other.memory.weight.data_ptr() != encoder.memory.weight.data_ptr()
    batch = codes()
    assert torch.equal(other(batch), encoder(batch))
    other.save_pretrained(folder)  # over the file that is mapped
    assert torch.equal(encoder(batch), mapped(folder)(batch))


def test_other_widths_and_levels(folder):
    encoder = mapped(folder, hidden_size=5, active_levels=(2,))
    assert encoder(codes()).shape == (10, 3, 5)
    assert torch.equal(encoder.memory.weight, models.encoder().memory.weight)


def test_a_table_in_the_files_of_a_model(tmp_path):
    model = attach(models.tiny_model(), models.encoder(), models.vocabulary())
    model.save_pretrained(tmp_path)
    found = attach(models.tiny_model(), mapped(tmp_path), models.vocabulary())
    inputs = models.prompts()
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(mapped(tmp_path / "again").memory.weight, model.prefixmem.memory.weight)
