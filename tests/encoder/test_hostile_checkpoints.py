"""Checkpoints that somebody made to do harm, and folders that others use at the same time."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixmem_fast import AddressSpec, CheckpointError, PrefixMem, PrefixMemConfig, SIDVocabulary, attach, checkpoint
from prefixmem_fast._weights import FOLDER, find_in_model
from prefixmem_fast.encoder import SIDTransformer, SIDTransformerConfig
from prefixmem_fast.encoder.saving import kind_of_encoder
from tests.helpers.models import encoder, tiny_model, vocabulary


def edit(config, change):
    """Change config.json, and its digest with it."""
    values = json.loads(config.read_text())
    change(values)
    values.pop("digest")
    values["digest"] = checkpoint._digest(values)
    config.write_text(json.dumps(values))


def entry(values):
    return values["tensors"]["memory.weight"]


@pytest.fixture
def saved(tmp_path):
    encoder().save_pretrained(tmp_path / "encoder", vocabulary())
    return tmp_path / "encoder"


def victim_of(folder):
    victim = folder.parent / "victim.safetensors"
    save_file({"x": torch.zeros(0)}, victim)
    return victim


@pytest.mark.parametrize(
    "name", ["/{}", "../victim.safetensors", "..\\victim.safetensors", "x/../victim", "", ".", "a"]
)
def test_a_part_is_a_bare_name_of_the_folder(saved, name):
    """Such a name had save_pretrained remove any file of the user."""
    victim = victim_of(saved)
    inside = saved / "a"
    inside.write_text("of the user")
    part = {"file": name.format(str(victim)[1:]), "key": "x", "rows": 0}
    extra = {"dtype": "float32", "shape": [0], "sha256": "0" * 64, "parts": [part]}
    edit(saved / "config.json", lambda values: values["tensors"].update(x=extra))
    with pytest.raises(CheckpointError, match=r"config.json is malformed: the file of a part of tensors\['x'\]"):
        PrefixMem.from_pretrained(saved)
    encoder(std=2.0).save_pretrained(saved)
    assert victim.is_file()
    assert inside.is_file()
    PrefixMem.from_pretrained(saved)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/{}", "x/y.safetensors", "..", ".", "", "a\0b"])
def test_a_file_of_a_model_is_a_bare_name_too(tmp_path, name):
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "outside.safetensors")
    names = [f"prefixmem.{name}" for name in model.prefixmem.state_dict()]
    name = name.format(str(tmp_path / "outside.safetensors")[1:])
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(
        CheckpointError, match=r"index.json names the file .* which is not the bare name|no regular file"
    ):
        PrefixMem.from_pretrained(tmp_path / "model")


def test_links_as_in_the_cache_of_a_hub(saved):
    """Its snapshots are links to files elsewhere: the name is bare, and the file may lie anywhere."""
    blobs, snapshot = saved.parent / "blobs", saved.parent / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, file in enumerate(list(saved.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    PrefixMem.from_pretrained(snapshot)
    SIDVocabulary.from_pretrained(snapshot)
    encoder(std=2.0).save_pretrained(snapshot)
    PrefixMem.from_pretrained(snapshot)
    assert len(list(blobs.iterdir())) == 2, "what the links led to stays"


def pipe(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda folder: pipe(folder / "config.json"), PrefixMem),
        (lambda folder: pipe(next(folder.glob("*.safetensors"))), PrefixMem),
        (lambda folder: pipe(folder / "sid_vocabulary.json"), SIDVocabulary),
        (lambda folder: (folder / "sid_vocabulary.json").mkdir(), SIDVocabulary),
        (lambda folder: (folder / "sid_vocabulary.json").symlink_to("/dev/zero"), SIDVocabulary),
    ],
)
def test_what_is_no_regular_file_is_not_opened(saved, make, read):
    make(saved)
    found = []

    def load():
        with pytest.raises(CheckpointError, match="it is no regular file"):
            read.from_pretrained(saved)
        found.append(True)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits"


def test_a_pipe_for_a_models_index(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path)
    pipe(tmp_path / "model.safetensors.index.json")
    PrefixMem.from_pretrained(tmp_path)  # nobody reads an index beside the file
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it is no regular file"):
        PrefixMem.from_pretrained(tmp_path)


def test_a_config_that_is_a_pipe_or_a_folder_is_not_replaced(tmp_path):
    pipe(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.json belongs to something else"):
        encoder().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_fifo()


FOREIGN = [
    b"",
    b"[1, 2]",
    b"null",
    b'"prefixmem"',
    b'{"model_type": "qwen3"}',
    b'{"model_type": "qwen3"',
    b"learning_rate: 3e-4\nformat: prefixmem\n",
    bytes(range(256)) * 9,
    b'{"notes": "' + b"x" * 300 + b'", "format": "prefixmem"',
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_config_is_not_replaced(tmp_path, content):
    """A file of weights beside it had save_pretrained take it for a damaged one of its own."""
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "memory-0123456789ab.safetensors").write_bytes(b"of the user")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"config.json belongs to something else, .* or move the file away"):
        encoder().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [*FOREIGN, b'{"format": "prefixmem", "format_version": 1}'])
def test_a_foreign_vocabulary_is_not_replaced(tmp_path, content):
    (tmp_path / "sid_vocabulary.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"sid_vocabulary.json belongs to something else"):
        vocabulary().save_pretrained(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


def test_damaged_files_of_its_own_are_replaced(saved):
    vocabulary().save_pretrained(saved)
    for name in ("config.json", "sid_vocabulary.json"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: len(content) // 2])
    encoder(std=2.0).save_pretrained(saved)
    vocabulary().save_pretrained(saved)
    PrefixMem.from_pretrained(saved)
    assert SIDVocabulary.from_pretrained(saved) == vocabulary()


def test_text_files_have_a_largest_size(saved):
    with open(saved / "config.json", "r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(CheckpointError, match="it has 1099511627776 bytes; allowed are 268435456"):
        PrefixMem.from_pretrained(saved)


DEEP = 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP + "]" * DEEP, "nested too deeply"),
        ('{"format": "prefixmem", "x": ' + "[" * 900 + "]" * 900 + "}", "format version None"),
        ('{"format": "prefixmem", "format": "prefixmem"}', "key 'format' is there twice"),
        ('{"format": NaN}', "NaN is no number of JSON"),
        ('{"format": "prefixmem", "format_version": true}', "format version True"),
        ('{"format": "prefixmem", "format_version": 1.0}', "format version 1.0"),
        ("9" * 10_000, "it is not as expected"),
    ],
)
def test_json_that_is_not_as_it_should_be(saved, text, message):
    (saved / "config.json").write_text(text)
    (saved / "sid_vocabulary.json").write_text(text.replace("prefixmem", "prefixmem vocabulary"))
    for kind in (PrefixMem, SIDVocabulary):
        with pytest.raises(CheckpointError, match=message):
            kind.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("tensors"), "tensors is None, not a table of tensors; save the encoder again"),
        (lambda v: v.update(tensors={}), "tensors is {}, not a table"),
        (lambda v: v.update(tensors=[1]), r"tensors is \[1\], not a table"),
        (lambda v: v.pop("encoder"), "encoder is None, not a config"),
        (lambda v: v.update(encoder=[]), r"encoder is \[\], not a config"),
        (lambda v: v.update(vocabulary=[]), r"vocabulary is \[\]"),
        (lambda v: v["tensors"].update({"memory.weight": 3}), r"tensors\['memory.weight'\] is 3"),
        (lambda v: entry(v).update(dtype="nonsense"), "'nonsense', not one of float32, bfloat16"),
        (lambda v: entry(v).update(dtype="int64"), "'int64', not one of float32"),
        (lambda v: entry(v).update(dtype=[]), "not one of float32"),
        (lambda v: entry(v).pop("shape"), "is None, not a list of sizes"),
        (lambda v: entry(v).update(shape=[-1, 4]), r"is \[-1, 4\], not a list of sizes"),
        (lambda v: entry(v).update(shape=[True, 4]), r"is \[True, 4\], not a list of sizes"),
        (lambda v: entry(v).update(shape=["8", 4]), "not a list of sizes"),
        (lambda v: entry(v).pop("sha256"), "not a digest"),
        (lambda v: entry(v).update(sha256="\ud800"), "not a digest"),
        (lambda v: entry(v).update(parts={}), "is {}, not a list"),
        (lambda v: entry(v)["parts"][0].pop("key"), "a part of tensors"),
        (lambda v: entry(v)["parts"][0].update(rows="8"), "a part of tensors"),
        (lambda v: entry(v)["parts"][0].update(key="x" * 5000), "safetensors is damaged or cut: .*not contain tensor"),
        (lambda v: entry(v).update(parts=[]), "holds no model.safetensors"),
        (lambda v: v["encoder"].update(kind="gru"), "the encoder's kind is 'gru'"),
        (lambda v: v["encoder"].update(kind=[]), r"the encoder's kind is \[\]"),
        (
            lambda v: v["encoder"].update(memory_dim=1 << 60),
            "config.json: .* do not fit 2.63 elements|no tensors can be",
        ),
        (lambda v: v["encoder"].update(hidden_size=1 << 62), "no tensors can be of the sizes of the config"),
        (lambda v: v["encoder"].update(hidden_size=1 << 70), r"hidden_size = \d+ is above 2.63 - 1"),
        (lambda v: v["encoder"]["spec"].update(max_order=10**7), "the most primes of a spec"),
        (lambda v: v["encoder"]["spec"].update(heads=10**18), "the most primes of a spec"),
        (lambda v: v["encoder"]["spec"].update(codebook_sizes=[4] * 10**5), "100000 levels; give 1024 at most"),
        (lambda v: v["encoder"]["spec"].update(codebook_sizes=[[]] * 3), "is not an integer"),
        (lambda v: v["encoder"].update(spec=None), "the address spec is a NoneType"),
    ],
)
def test_a_malformed_config_is_one_error(saved, change, message):
    edit(saved / "config.json", change)
    start = time.process_time()  # others may use the machine too
    with pytest.raises(CheckpointError, match=message) as error:
        PrefixMem.from_pretrained(saved)
    assert str(saved.parent) in str(error.value)
    assert len(str(error.value)) < 3000
    assert time.process_time() - start < 5
    encoder().save_pretrained(saved)
    PrefixMem.from_pretrained(saved)


def test_rows_of_another_width_are_refused_without_a_digest_too(saved):
    """A column alone would fill every column of the table."""
    name = next(saved.glob("*.safetensors"))
    tensors = load_file(name)
    save_file({**tensors, "memory.weight": tensors["memory.weight"][:, :1].contiguous()}, name)
    with pytest.raises(CheckpointError, match=r"holds 'memory.weight' as float32, rows of \[1\]; config.json says"):
        PrefixMem.from_pretrained(saved, verify=False)


def test_a_tensor_whose_name_only_ends_alike_is_another(tmp_path):
    save_file({f"not_{FOLDER}.memory.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"hold no prefixmem\.memory\.weight"):
        find_in_model(f"{FOLDER}.memory.weight", tmp_path)
    save_file({f"base_model.{FOLDER}.memory.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert find_in_model(f"{FOLDER}.memory.weight", tmp_path)[1] == f"base_model.{FOLDER}.memory.weight"


def test_sizes_are_held_against_the_files_before_anything_is_allocated(saved):
    """A table of 2^57 bytes that a small file is said to hold."""
    spec = AddressSpec((1 << 20,) * 3, table_rows=1 << 50, heads=2, max_order=3, addressing="hash")
    config = PrefixMemConfig(spec, memory_dim=8, hidden_size=32)

    def claim(values):
        values["encoder"] = config.to_dict()
        entry(values)["shape"] = [spec.total_rows, 4]
        entry(values)["parts"][0]["rows"] = spec.total_rows

    rows = len(encoder().memory.weight)
    edit(saved / "config.json", claim)
    with pytest.raises(CheckpointError, match=f"the files hold {rows} rows of memory.weight; config.json says"):
        PrefixMem.from_pretrained(saved)

    def repeat(values):
        claim(values)
        spec = AddressSpec((rows,), table_rows=rows * 500, heads=2, max_order=1, addressing="hash")
        values["encoder"] = PrefixMemConfig(spec, memory_dim=8, hidden_size=32).to_dict()
        entry(values)["shape"] = [spec.total_rows, 4]
        entry(values)["parts"] = [{**entry(values)["parts"][0], "rows": rows}] * 1000

    edit(saved / "config.json", repeat)
    with pytest.raises(CheckpointError, match=r"names one part of memory.weight twice"):
        PrefixMem.from_pretrained(saved)


def test_a_transformer_of_a_billion_layers(tmp_path):
    config = SIDTransformerConfig((4, 5, 6), 32, width=8, layers=1, heads=2)
    SIDTransformer(config).save_pretrained(tmp_path)
    assert kind_of_encoder(tmp_path) == "sid-transformer"
    edit(tmp_path / "config.json", lambda values: values["encoder"].update(layers=10**9))
    with pytest.raises(CheckpointError, match=r"layers = 1000000000, but there are \d+ tensors"):
        SIDTransformer.from_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda values: values["encoder"].update(layers=1, width=1 << 40))
    with pytest.raises(CheckpointError):
        SIDTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "has no weight_map of names of files"),
        ("null", "has no weight_map"),
        ("3", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"prefixmem.memory.weight": 3}}', "has no weight_map"),
        ("[" * DEEP, "nested too deeply"),
    ],
)
def test_a_malformed_index_of_a_model(tmp_path, index, message):
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        PrefixMem.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1 << 60, 1, 0, None]], r"token id 1152921504606846976 is outside 0..67108863"),
        ([[1 << 27, 1, 0, None]], "is outside 0"),
        ([[1, 1, 0, None], [1, 1, 1, None]], "each token id once"),
        ([[1, 1, 0, []]], "the vocabulary is not what to_dict"),
        ([[[], 1, 0, None]], "the vocabulary is not what to_dict"),
        ([[1, 1, 0]], "the vocabulary is not what to_dict"),
        ([[1, 1 << 70, 0, None]], "has level"),
        (3, "the vocabulary is not what to_dict"),
    ],
)
def test_malformed_vocabularies(tmp_path, rows, message):
    vocabulary().save_pretrained(tmp_path)
    edit(tmp_path / "sid_vocabulary.json", lambda values: values["vocabulary"].update(tokens=rows))
    with pytest.raises(CheckpointError, match=message):
        SIDVocabulary.from_pretrained(tmp_path)
    edit(tmp_path / "sid_vocabulary.json", lambda values: values.update(vocabulary=rows))
    with pytest.raises(CheckpointError, match="is malformed: vocabulary is"):
        SIDVocabulary.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_an_os_error(tmp_path):
    code = (
        "import resource, sys\nfrom tests.helpers.models import encoder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n    encoder().save_pretrained(sys.argv[1])\nexcept OSError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "cannot be written" in done.stdout, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_not_there_is_said(saved, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(PrefixMem, "to_empty", fail)
    with pytest.raises(MemoryError, match=r"the encoder takes [0-9]+ bytes, more than there is"):
        PrefixMem.from_pretrained(saved)


def test_what_a_killed_save_has_left_goes_with_the_next(saved):
    stale = saved / "memory-0123456789ab-00001-of-00002.safetensors"
    stale.write_text("a shard that nothing names")
    folder = saved / ".memory-0123456789ab.safetensors.tmp-abcd1234"
    folder.mkdir()
    (folder / "memory-0123456789ab.safetensors").write_text("cut")
    (folder / ".tmpAb3dE6").write_text("cut")
    foreign = saved / ".config.json.tmp-abcd1234"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("of the user")
    alike = saved / ".config.json.folder12"
    alike.mkdir()
    (alike / "config.json").write_text("of the user")
    kept = [
        "memory-of-me.safetensors",
        "memory-0123456789ab.safetensors.bak",
        ".tmpAb3dE6",
        ".memory-x.safetensors.tmp-abcd1234",
    ]
    for name in kept:
        (saved / name).write_text("of the user")
    link = saved / ".memory-0123456789ab.safetensors.tmp-linklink"
    link.symlink_to(foreign)
    (foreign / link.name.removeprefix(".").removesuffix(".tmp-linklink")).write_text("of the user")
    encoder(std=2.0).save_pretrained(saved)
    left = {path.name for path in saved.iterdir()}
    assert len(left - {"config.json", foreign.name, alike.name, link.name, *kept}) == 1
    assert {foreign.name, alike.name, link.name, *kept} <= left
    assert (alike / "config.json").read_text() == "of the user"
    assert len(list(foreign.iterdir())) == 2


_SAVE = """
import sys, torch
from tests.helpers.models import encoder
one = encoder(float(sys.argv[2]))
torch.nn.init.normal_(one.memory.weight, std=float(sys.argv[2]))
print("ready", flush=True)
while True:
    one.save_pretrained(sys.argv[1], max_shard_size=1000)
"""


def test_what_a_damaged_file_holds_can_be_printed(saved):
    edit(saved / "config.json", lambda values: values["encoder"]["spec"].update(total_rows="\ud800"))
    with pytest.raises(CheckpointError, match=r"gives total_rows = \\ud800") as found:
        PrefixMem.from_pretrained(saved)
    str(found.value).encode()


@pytest.mark.slow
def test_readers_while_two_processes_save(tmp_path):
    savers = [
        subprocess.Popen([sys.executable, "-c", _SAVE, str(tmp_path), std], stdout=subprocess.PIPE)
        for std in ("1", "2")
    ]
    try:
        for saver in savers:
            saver.stdout.readline()
        while not (tmp_path / "config.json").exists():
            time.sleep(0.01)
        for _ in range(30):
            PrefixMem.from_pretrained(tmp_path)
    finally:
        for saver in savers:
            saver.kill()
            saver.wait()
            saver.stdout.close()
    encoder().save_pretrained(tmp_path)
    assert sorted(path.name[:7] for path in tmp_path.iterdir()) == ["config.", "memory-"]


def test_a_state_dict_without_a_spec_is_said(recwarn):
    one = encoder()
    state = {name: value for name, value in one.state_dict().items() if not name.endswith("_extra_state")}
    with pytest.warns(
        UserWarning, match=r"holds memory.weight without memory._extra_state: its address spec could not"
    ):
        one.load_state_dict(state, strict=False)
    recwarn.clear()
    one.load_state_dict(one.state_dict())
    one.load_state_dict({"out_proj.weight": one.out_proj.weight}, strict=False)
    assert not recwarn.list


def test_the_primes_of_a_spec_are_bounded():
    with pytest.raises(ValueError, match="max_order = 3000 times heads = 2 is above 4096"):
        AddressSpec((4, 5), max_order=3000, heads=2)
    with pytest.raises(ValueError, match="codebook_sizes has 1025 levels; give 1024 at most"):
        AddressSpec((2,) * 1025)
    with pytest.raises(ValueError, match="codebook_sizes has 1025 levels; give 1024 at most"):
        SIDVocabulary.from_table({}, (2,) * 1025)
    start = time.process_time()
    AddressSpec((2,) * 1024, max_order=64, heads=64)
    assert time.process_time() - start < 10
