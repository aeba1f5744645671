import copy
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from prefixmem_fast import (
    AddressSpec,
    DecodingState,
    PrefixMem,
    PrefixMemConfig,
    PrefixMemory,
    SIDVocabulary,
    attach,
    optim,
)
from prefixmem_fast.operation.backends import choose_backend, functions_of
from tests.helpers import models
from tests.helpers.second_device import AVAILABLE

SPEC = AddressSpec((8, 8, 8, 8), table_rows=50, active_levels=(2, 4))
CONFIG = PrefixMemConfig(SPEC, memory_dim=16, hidden_size=24, output_init_std=1.0)
IDS = {100 + 8 * level + code: (level + 1, code) for level in range(4) for code in range(8)}
VOCABULARY = SIDVocabulary.from_table(IDS, (8,) * 4)
OPTIMIZERS = (optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam)
OVERLAP = {"grad": "fused", "tables": "host", "overlap": True}
FUNCTIONS = functions_of(choose_backend("auto", weight=torch.zeros(1)))


def made(**options):
    torch.manual_seed(1)
    return PrefixMem(CONFIG, **options)


def codes(step=0, *shape):
    return torch.randint(-1, 8, (*(shape or (6, 2)), 4), generator=torch.Generator().manual_seed(step))


def tokens(step=0):
    return (codes(step, 3, 2) + torch.arange(100, 132, 8)).flatten(1)


def train(encoder, optimizer, batch, call=None):
    (call or encoder)(batch).sin().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(encoder, other):
    assert torch.equal(encoder.memory.weight, other.memory.weight)
    assert torch.equal(encoder.out_proj.weight, other.out_proj.weight)


@pytest.fixture
def gathers(monkeypatch):
    """The thread of every gather."""
    threads, forward = [], FUNCTIONS.forward

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return forward(*arguments)

    monkeypatch.setattr(FUNCTIONS, "forward", noted)
    return threads


def in_thread(names):
    return [name.startswith("prefixmem-tables") for name in names]


@pytest.fixture
def gate(monkeypatch):
    """Closed, it holds every fused update back; `opens_soon` lets them go in a moment."""
    opened, update = threading.Event(), FUNCTIONS.fused_update

    def held(*arguments):
        assert opened.wait(60)
        update(*arguments)

    monkeypatch.setattr(FUNCTIONS, "fused_update", held)
    yield opened
    opened.set()


def opens_soon(gate):
    threading.Timer(0.05, gate.set).start()


# Another device


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="this torch has no devices in Python")
def test_on_a_second_device():
    """In a process of its own, see `tests/helpers/second_device.py`."""
    file = Path(__file__).with_name("on_a_second_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=file.parents[2], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_nothing_is_pinned_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda *_: pytest.fail("pinned"))
    encoder = made(tables="host")
    encoder.prefetch(codes())
    encoder(codes()).sum().backward()
    assert not encoder.memory.weight.is_pinned()


# The same results


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    grad=st.sampled_from(["dense", "sparse", "fused"]),
    ahead=st.booleans(),
)
def test_any_shape(shape, grad, ahead):
    results = []
    for options in ({}, {"tables": "host"}, OVERLAP if grad == "fused" else {"tables": "host"}):
        memory = PrefixMemory(CONFIG, **{**options, "grad": grad})
        torch.nn.init.normal_(memory.weight, generator=torch.Generator().manual_seed(0))
        optimizer = optim.for_model(memory, lr=0.1)
        batch = torch.randint(-1, 9, (*shape, 4), generator=torch.Generator().manual_seed(2))
        if options and ahead:
            memory.prefetch(batch)
        S = memory(batch)
        S.sin().sum().backward()
        optimizer.step()
        results.append((S.detach(), memory.weight.detach()))
    for S, weight in results[1:]:
        assert torch.equal(S, results[0][0])
        assert torch.equal(weight, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", OPTIMIZERS)
def test_overlapped_steps_are_those_of_steps_that_wait(rows, dtype):
    """Every other step goes on at once; the optimizer's state is compared, and a schedule runs meanwhile."""
    results = []
    for options in ({"grad": "fused"}, OVERLAP):
        encoder = made(**options, dtype=dtype)
        optimizer = optim.for_model(encoder, lr=0.01, rows=rows, row_options={"weight_decay": 0.1})
        rate = torch.tensor(0.01)
        optimizer.param_groups[0]["lr"] = rate
        for step in range(6):
            batch = codes(step) if step % 3 else tokens(step)
            call = encoder if step % 3 else lambda ids, encoder=encoder: encoder.encode_tokens(ids, VOCABULARY)
            call(batch).float().sin().sum().backward()
            batch.fill_(-1)  # a buffer that the next batch is written into
            rate.mul_(0.9)
            optimizer.step()
            optimizer.zero_grad()
        results.append((encoder, optimizer.state_dict()["state"]))
    (expected, states), (found, found_states) = results
    assert_same(found, expected)
    for i, state in states.items():
        for name, value in state.items():
            assert torch.equal(found_states[i][name], value), name


def test_the_gradient_of_an_update_that_runs_is_its_own(gate):
    tables = []
    for options in ({"grad": "fused"}, OVERLAP):
        gate.clear() if tables else gate.set()
        memory = made(**options).memory
        optimizer = optim.SGD([memory.weight], lr=0.5)
        S = memory(codes())
        gradient = torch.arange(S.numel()).view_as(S).sin()
        S.backward(gradient)
        gradient.zero_()
        gate.set()
        optimizer.step()
        tables.append(memory.weight.detach())
    assert torch.equal(*tables)


@pytest.mark.parametrize("options", [{"grad": "dense"}, {"grad": "sparse"}, {"grad": "fused"}, OVERLAP])
def test_checkpointing(options):
    results = []
    for place in ({"tables": "device", "overlap": False}, {"tables": "host"}):
        encoder = made(**{**options, **place})
        optimizer = optim.for_model(encoder, lr=0.01)
        for step in range(3):
            train(encoder, optimizer, codes(step), lambda batch, e=encoder: checkpoint(e, batch, use_reentrant=False))
        results.append(encoder)
    assert_same(*results)


def test_compile_functional_call_and_autocast():
    torch.compiler.reset()
    for options in ({"tables": "host"}, OVERLAP):
        encoder = made(**options)
        optimizer = optim.for_model(encoder)
        m = encoder(codes())
        assert torch.equal(torch.compile(encoder, backend="eager")(codes()), m)
        doubled = {name: 2 * value.detach() for name, value in encoder.named_parameters()}
        assert torch.equal(functional_call(encoder, doubled, codes()), 4 * m)
        with torch.autocast("cpu", torch.bfloat16):
            assert encoder(codes()).dtype == torch.bfloat16
        assert optimizer is not None


# Where the table is


def test_a_table_made_anywhere_is_on_the_host():
    with torch.device("meta"):
        encoder = made(tables="host")
    assert encoder.memory.weight.is_meta
    assert encoder(codes().to("meta")).is_meta
    encoder.to_empty(device="cpu").memory.reset_parameters()
    assert encoder.memory.weight.std() < 0.1
    with torch.no_grad():
        assert encoder.half().memory.weight.dtype == torch.float16
        assert encoder(codes()).dtype == torch.float16


def test_an_overlapped_table_stays_one():
    encoder = made(**OVERLAP)
    kind = type(encoder.memory.weight)
    assert kind is not torch.nn.Parameter
    encoder.to(torch.bfloat16).float()
    encoder.load_state_dict(made().state_dict(), assign=True)
    assert type(encoder.memory.weight) is kind
    assert_same(encoder, made())
    for other in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), made(**OVERLAP, device="meta")):
        assert type(other.memory.weight) is kind
        assert type(other.to_empty(device="cpu").memory.weight) is kind
    encoder = made(**OVERLAP)
    encoder, optimizer = pickle.loads(pickle.dumps((encoder, optim.for_model(encoder, lr=0.1))))
    before = encoder.memory.weight.clone()
    train(encoder, optimizer, codes())
    assert not torch.equal(encoder.memory.weight, before), "the optimizer holds the table of the module"


@pytest.mark.parametrize("options", [{"tables": "host"}, OVERLAP])
def test_copies_pickles_and_files(options, tmp_path):
    encoder = made(**options)
    optimizer = optim.for_model(encoder, lr=0.1)
    train(encoder, optimizer, codes(1))
    encoder.prefetch(codes())  # a thread is there
    stream = io.BytesIO()
    torch.save(encoder, stream)
    stream.seek(0)
    encoder.save_pretrained(tmp_path)
    loaded = made(**options)
    loaded.load_state_dict(encoder.state_dict())
    for other in (
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
        torch.load(stream, weights_only=False),
        PrefixMem.from_pretrained(tmp_path, **options),
        loaded,
    ):
        assert other.memory.tables == "host"
        assert other.memory.weight.data_ptr() != encoder.memory.weight.data_ptr()
        assert_same(other, encoder)
        with torch.no_grad():
            other.prefetch(codes())
            assert torch.equal(other(codes()), encoder(codes()))


# Gathers ahead


def test_a_gather_ahead_is_taken_once(gathers):
    encoder = made(tables="host")
    batch = codes()
    encoder.prefetch(batch)
    batch[0] = 3  # the caller's own
    m = encoder(codes())
    assert in_thread(gathers) == [True]
    assert torch.equal(m, made()(codes()))
    gathers.clear()
    encoder(codes())
    assert in_thread(gathers) == [False]


def test_gathers_ahead_wait_their_turn(gathers):
    encoder = made(tables="host").requires_grad_(False)
    expected = [made()(codes(step)) for step in range(7)]
    for step in range(1, 7):
        encoder.prefetch(codes(step))
    encoder.memory._reader.worker.wait()
    for step, ahead in ((0, False), (2, False), (4, True), (3, False), (6, True), (5, False)):
        gathers.clear()
        assert torch.equal(encoder(codes(step)), expected[step])
        assert gathers == [] if ahead else in_thread(gathers) == [False], (
            "2 was dropped when 6 came, 3 with 4, 5 with 6"
        )
    encoder.prefetch(codes())
    encoder.memory._reader.worker.wait()
    gathers.clear()
    assert torch.equal(encoder(codes().int()), expected[0])
    assert in_thread(gathers) == [False], "of another dtype"


def codes_ahead(encoder):
    """A reading of S, and what gathers it ahead."""
    return partial(encoder.memory, codes(1)), partial(encoder.prefetch, codes(1))


def tokens_ahead(encoder):
    segments = torch.arange(8).expand(3, 8) // 5
    given = tokens(1), VOCABULARY, segments
    return partial(encoder.memory.read_tokens, *given), partial(encoder.prefetch_tokens, *given)


@pytest.mark.parametrize("ahead", [codes_ahead, tokens_ahead])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("rows", OPTIMIZERS)
@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_a_gather_before_an_update(grad, rows, stale, ahead):
    """It is outdated, unless the user allows one update."""
    encoder = made(tables="host", grad=grad)
    optimizer = optim.for_model(encoder, lr=0.5, rows=rows)
    read, prefetch = ahead(encoder)
    for updates in (1, 2):
        before = read().detach()
        prefetch(stale=stale)
        encoder.memory._reader.worker.wait()
        for _ in range(updates):
            train(encoder, optimizer, codes(0))
        S = read()
        old = stale and updates == 1
        assert torch.equal(S, before if old else ahead(copy.deepcopy(encoder).requires_grad_(False))[0]())
        assert torch.equal(S, before) == old, "the update has changed these rows"


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_the_gradient_of_a_stream_gathered_ahead(grad):
    found, expected = made(tables="host", grad=grad), made(grad=grad)
    for encoder in (found, expected):
        optimizer = optim.for_model(encoder, lr=0.5)
        if encoder is found:
            encoder.prefetch_tokens(tokens(), VOCABULARY)
        train(encoder, optimizer, tokens(), partial(encoder.encode_tokens, vocabulary=VOCABULARY))
    assert_same(found, expected)


def test_which_streams_are_the_same(gathers):
    """Those with the same S, however their packed sequences are numbered."""
    ids, other = tokens(), SIDVocabulary.from_table({**IDS, 100: (1, 1), 101: (1, 0)}, (8,) * 4)
    packed = torch.tensor([7, 7, 7, 7, 7, 3, 3, 3]).expand(3, 8)
    cases = [
        ((ids, VOCABULARY), (ids.clone(), VOCABULARY), True),
        ((ids, VOCABULARY), (ids, VOCABULARY, torch.zeros_like(ids)), True),
        ((ids, VOCABULARY, packed), (ids, VOCABULARY, (packed == 3).int()), True),
        ((ids, VOCABULARY, packed), (ids, VOCABULARY), False),
        ((ids, VOCABULARY), (ids, VOCABULARY, packed), False),
        ((ids, VOCABULARY), (ids.int(), VOCABULARY), False),
        ((ids, VOCABULARY), (ids.roll(1, 0), VOCABULARY), False),
        ((ids, VOCABULARY), (ids, other), False),
    ]
    for ahead, read, taken in cases:
        encoder, expected = made(tables="host").requires_grad_(False), made().encode_tokens(*read)
        encoder.prefetch_tokens(*ahead)
        encoder.memory._reader.worker.wait()
        gathers.clear()
        assert torch.equal(encoder.encode_tokens(*read), expected)
        assert (gathers == []) == taken
    encoder.prefetch_tokens(ids[:, :4], VOCABULARY)
    encoder.memory._reader.worker.wait()
    gathers.clear()
    encoder(ids[:, :4])
    assert in_thread(gathers) == [False], "the same numbers as codes"


def test_a_model_takes_what_was_gathered_ahead(gathers):
    encoder, model = models.encoder(tables="host"), models.tiny_model()
    attach(model, encoder, models.vocabulary())
    ids = models.prompts()["input_ids"]
    packed = (torch.arange(ids.shape[1]) < 7).long().expand_as(ids)
    for segments in ({}, {"segment_ids": packed}):
        with torch.no_grad():
            expected = model(ids, **segments).logits
            encoder.prefetch_tokens(ids, models.vocabulary(), **segments)
            encoder.memory._reader.worker.wait()
            gathers.clear()
            assert torch.equal(model(ids, **segments).logits, expected)
        assert gathers == []


def test_writes_into_the_table_are_seen():
    encoder = made(tables="host").requires_grad_(False)
    for write in (
        lambda weight: weight.add_(1),
        lambda weight: encoder.load_state_dict({**made().state_dict(), "memory.weight": weight + 1}),
        lambda weight: setattr(encoder.memory, "weight", torch.nn.Parameter(weight.clone() * 2, False)),
        lambda weight: setattr(weight, "data", weight.data * 3),
    ):
        encoder.prefetch(codes())
        write(encoder.memory.weight)
        assert torch.equal(encoder(codes()), copy.deepcopy(encoder)(codes()))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_steps_of_fused_optimizers_are_seen(kind):
    """They change a table without a new version of it."""
    encoder = made(tables="host")
    optimizer = kind(encoder.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        encoder(codes()).sin().sum().backward()
        encoder.prefetch(codes())
        encoder.memory._reader.worker.wait()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(encoder(codes()), copy.deepcopy(encoder)(codes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: encoder.load_state_dict({**made().state_dict(), "memory.weight": encoder.memory.weight * 3}),
        lambda encoder: encoder.memory.reset_parameters(),
        lambda encoder: encoder.bfloat16(),
        lambda encoder: encoder.bfloat16().float(),
        lambda encoder: setattr(encoder.memory, "weight", torch.nn.Parameter(encoder.memory.weight.detach() * 2)),
    ],
)
def test_another_table_is_not_read_stale(change):
    """stale=True allows an update of this table, and not another one."""
    encoder = made(tables="host")
    encoder.prefetch(codes(), stale=True)
    encoder.memory._reader.worker.wait()
    change(encoder)
    S = encoder.memory(codes())
    assert S.dtype == encoder.memory.weight.dtype
    assert torch.equal(S, copy.deepcopy(encoder).memory(codes()))


def test_a_table_of_another_shape_is_refused():
    for options in ({"tables": "host"}, OVERLAP):
        encoder = made(**options)
        optimizer = optim.for_model(encoder)
        assert optimizer is not None
        encoder.memory.weight.data = torch.zeros(0, encoder.memory.weight.shape[1])
        for call in (encoder, encoder.prefetch):
            with pytest.raises(ValueError, match=r"weight has shape \(0, 4\); the spec needs \["):
                call(codes())


@pytest.mark.parametrize("source", ["codes", "tokens"])
@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_what_was_gathered_ahead_is_as_what_was_not(grad, source):
    """S may be changed in place, and codes between forward and backward may not."""
    encoder = made(tables="host", grad=grad)
    optimizer = optim.for_model(encoder)
    assert optimizer is not None
    read, prefetch, batch = encoder.memory, encoder.prefetch, codes()
    if source == "tokens":
        read, prefetch = partial(encoder.memory.read_tokens, vocabulary=VOCABULARY), encoder.prefetch_tokens
        prefetch, batch = partial(prefetch, vocabulary=VOCABULARY), tokens()
    prefetch(batch)
    read(batch).mul_(2).sum().backward()
    optimizer.zero_grad()
    prefetch(batch)
    S = read(batch)
    batch.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        S.sum().backward()


PICKLED = """
import sys, torch
from multiprocessing.reduction import ForkingPickler
from prefixmem_fast import AddressSpec, PrefixMemory, PrefixMemConfig
torch.set_num_threads(1)
memory = PrefixMemory(PrefixMemConfig(AddressSpec((2048,) * 4, table_rows=100_000), memory_dim=64), tables="host")
codes = torch.randint(0, 2048, (100_000, 4))
for move in (memory.share_memory, lambda: ForkingPickler.dumps(memory)):
    memory.prefetch(codes)
    move()
    assert memory._reader.worker._running[-1].done()
    memory(codes)
"""


def test_a_table_that_moves_waits_for_the_gather():
    """Memory that is shared with another process is another one; the thread would read what is freed."""
    subprocess.run([sys.executable, "-c", PICKLED], check=True, timeout=100)


def test_a_gather_ahead_inside_inference_mode():
    with torch.inference_mode():
        encoder = made(tables="host")  # its table has no version
        encoder.prefetch(codes())
        encoder.memory.weight.mul_(2)
        assert torch.equal(encoder(codes()), copy.deepcopy(encoder)(codes()))


def test_a_stale_gather_does_not_wait_for_the_update(gate, gathers):
    encoder = made(**OVERLAP)
    optimizer = optim.for_model(encoder, lr=0.5)
    before = encoder.memory(codes(1)).detach()
    encoder.prefetch(codes(1), stale=True)
    train(encoder, optimizer, codes(0))
    S = encoder.memory(codes(1))
    assert not gate.is_set()
    assert torch.equal(S, before)
    for step in (2, 3):
        encoder.prefetch(codes(step))
    gathers.clear()
    opens_soon(gate)
    S = encoder.memory(codes(2))
    encoder.memory._reader.worker.wait()
    following = encoder.memory(codes(3))
    assert in_thread(gathers) == [True, True], "in their turn, after the update"
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    assert torch.equal(S, frozen.memory(codes(2)))
    assert torch.equal(following, frozen.memory(codes(3)))


def test_a_failed_gather_is_raised_where_it_is_taken(monkeypatch):
    encoder = made(tables="host")

    def fails(*_):
        raise ArithmeticError("in the gather")

    with monkeypatch.context() as patched:
        patched.setattr(FUNCTIONS, "forward", fails)
        encoder.prefetch(codes())
        encoder.memory._reader.worker.wait()
    with pytest.raises(ArithmeticError, match=r"^in the gather$"):
        encoder(codes())
    assert torch.equal(encoder(codes()), made()(codes()))


# Updates beside the model


def averaged(encoder, optimizer):
    average = AveragedModel(encoder)
    average.update_parameters(encoder)
    return average.module.memory.weight


def forked(encoder, optimizer):
    """The memory itself, as a forked process finds it."""
    with torch._C.DisableTorchFunctionSubclass():
        memory = encoder.memory.weight.detach()
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writing, pickle.dumps(memory.numpy().copy()))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        return torch.from_numpy(pickle.loads(pipe.read()))


def saved(encoder, folder):
    encoder.save_pretrained(folder)
    return PrefixMem.from_pretrained(folder).memory.weight


def decoded(encoder):
    return DecodingState(encoder, VOCABULARY, 1).prefill(torch.tensor([[100, 109]]))


READS = {
    "forward": lambda e, o: e(codes(0)),
    "tokens": lambda e, o: e.encode_tokens(tokens(), VOCABULARY),
    "decoding": lambda e, o: decoded(e),
    "state_dict": lambda e, o: e.state_dict()["memory.weight"].clone(),
    "state_dict, kept": lambda e, o: e.state_dict(keep_vars=True)["memory.weight"] + 0,
    "parameters": lambda e, o: next(e.parameters()) * 1,
    "data": lambda e, o: e.memory.weight.data.clone(),
    "numpy": lambda e, o: torch.from_numpy(e.memory.weight.detach().numpy().copy()),
    "tolist": lambda e, o: torch.tensor(e.memory.weight.tolist()),
    "a list of tensors": lambda e, o: torch.cat([torch.zeros(1, 4), e.memory.weight]),
    "copy": lambda e, o: copy.deepcopy(e).memory.weight,
    "pickle": lambda e, o: pickle.loads(pickle.dumps(e)).memory.weight,
    "half": lambda e, o: [o.step(), e.half().memory.weight][1],
    "average": averaged,
    "fork": forked,
    "optimizer's state": lambda e, o: o.state[e.memory.weight]["sum"].clone(),
    "optimizer's state_dict": lambda e, o: o.state_dict()["state"][0]["sum"].clone(),
    "optimizer's copy": lambda e, o: copy.deepcopy(o).state_dict()["state"][0]["sum"],
    "optimizer's pickle": lambda e, o: pickle.loads(pickle.dumps(o)).state_dict()["state"][0]["sum"],
    "norm": lambda e, o: torch.linalg.vector_norm(e.memory.weight.grad),
    "another step": lambda e, o: [e.zero_grad(), train(e, o, codes(5)), e.memory.weight.detach()][-1],
}


@pytest.mark.parametrize("read", READS)
def test_reading_waits_for_the_update(read, gate):
    results = []
    for options in ({"grad": "fused"}, OVERLAP):
        encoder = made(**options)
        optimizer = optim.for_model(encoder, lr=0.5)
        for step in range(2):  # the first makes the optimizer's state
            gate.set() if step == 0 or not results else gate.clear()
            encoder.zero_grad()
            encoder(codes(step)).sin().sum().backward()
        if results:
            assert not gate.is_set(), "the backward pass has returned"
            opens_soon(gate)
        results.append(READS[read](encoder, optimizer))
    assert torch.equal(results[1], results[0])
    assert gate.is_set()


def test_another_backward_pass_waits_for_the_update(gate):
    """Adam's correction counts the steps of the table."""
    tables = []
    for options in ({"grad": "fused"}, OVERLAP):
        gate.clear() if tables else gate.set()
        encoder = made(**options)
        optimizer = optim.for_model(encoder, lr=0.5, rows=optim.RowWiseAdam)
        first, second = encoder(codes(0)).sin().sum(), encoder(codes(1)).sin().sum()
        first.backward()
        encoder.zero_grad()
        if tables:
            opens_soon(gate)
        second.backward()
        optimizer.step()
        tables.append(encoder.memory.weight.detach())
    assert torch.equal(*tables)


def test_saving_waits_for_the_update(gate, tmp_path):
    expected, encoder = made(grad="fused"), made(**OVERLAP)
    for one in (expected, encoder):
        gate.set() if one is expected else gate.clear()
        optimizer = optim.for_model(one, lr=0.5)
        one(codes()).sin().sum().backward()
    opens_soon(gate)
    assert torch.equal(saved(encoder, tmp_path), expected.memory.weight)
    assert optimizer is not None


def test_what_tells_no_numbers_does_not_wait(gate):
    encoder = made(**OVERLAP)
    optimizer = optim.for_model(encoder, lr=0.5)
    train(encoder, optimizer, codes())
    weight = encoder.memory.weight
    assert weight.grad is None
    assert (weight.shape, weight.dtype, weight.device, weight.numel()) == (
        (632, 4),
        torch.float32,
        torch.device("cpu"),
        2528,
    )
    assert weight.requires_grad
    assert "overlap" in repr(encoder)
    encoder.prefetch(codes())
    assert not gate.is_set()


def fork_and_train():
    encoder, expected = made(**OVERLAP), made(grad="fused")
    optimizers = [optim.for_model(one, lr=0.5) for one in (encoder, expected)]
    for one, optimizer in zip((encoder, expected), optimizers, strict=True):
        train(one, optimizer, codes())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)  # rather than to wait for a thread that is not there
            torch.set_num_threads(1)
            encoder.prefetch(codes(1))
            for one, optimizer in zip((encoder, expected), optimizers, strict=True):
                train(one, optimizer, codes(1))
            code = 0 if torch.equal(encoder.memory.weight, expected.memory.weight) else 2
        finally:
            os._exit(code)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.slow
def test_a_forked_process_trains_on():
    """From a process of its own: other tests leave threads of autograd behind, and torch refuses to fork with them."""
    process = multiprocessing.get_context("spawn").Process(target=fork_and_train)
    process.start()
    process.join(120)
    assert process.exitcode == 0


NEXT_CALLS = {
    "forward": lambda e, o: e(codes()),
    "tokens": lambda e, o: e.encode_tokens(tokens(), VOCABULARY),
    "a gather ahead": lambda e, o: [e.prefetch(codes()), e(codes())],
    "state_dict": lambda e, o: e.state_dict(),
    "step": lambda e, o: [e.memory._reader.worker.wait(), o.step()],
    "optimizer's state": lambda e, o: o.state,
    "optimizer's state_dict": lambda e, o: o.state_dict(),
    "copy": lambda e, o: copy.deepcopy(e),
    "pickle": lambda e, o: pickle.dumps(e),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_what_the_update_raises_is_raised_at_the_next_call(call, monkeypatch):
    encoder = made(**OVERLAP)
    optimizer = optim.for_model(encoder, lr=0.5)

    def fails(*_):
        raise ArithmeticError("in the update")

    monkeypatch.setattr(FUNCTIONS, "fused_update", fails)
    encoder(codes()).sum().backward()
    with pytest.raises(ArithmeticError, match=r"^in the update$"):
        NEXT_CALLS[call](encoder, optimizer)
    NEXT_CALLS[call](encoder, optimizer)  # once


def test_modules_let_go_of_their_threads():
    encoder = made(**OVERLAP)
    optimizer = optim.for_model(encoder, lr=0.5)
    before = {thread for thread in threading.enumerate() if thread.name.startswith("prefixmem-tables")}
    train(encoder, optimizer, codes())
    (thread,) = {t for t in threading.enumerate() if t.name.startswith("prefixmem-tables")} - before
    del encoder, optimizer
    thread.join(20)
    assert not thread.is_alive()


# Refusals


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="tables = 'disk' is unknown; allowed are 'device', 'host', 'mapped'"):
        made(tables="disk")
    with pytest.raises(ValueError, match=r'tables = "mapped" reads a file; give it to PrefixMem.from_pretrained'):
        made(tables="mapped")
    for options in ({"tables": "device", "grad": "fused"}, {"tables": "host", "grad": "sparse"}):
        with pytest.raises(ValueError, match="overlap = True with tables"):
            made(**options, overlap=True)
    with pytest.raises(TypeError, match="overlap = 1 is not a bool"):
        made(tables="host", grad="fused", overlap=1)
    with pytest.raises(ValueError, match='prefetch is for tables in the host\'s memory, and tables = "device"'):
        made().prefetch(codes())
    with pytest.raises(ValueError, match='prefetch is for tables in the host\'s memory, and tables = "device"'):
        made().prefetch_tokens(tokens(), VOCABULARY)
    with pytest.raises(TypeError, match=r"input_ids has dtype torch\.float32"):
        made(tables="host").prefetch_tokens(tokens().float(), VOCABULARY)
    with pytest.raises(ValueError, match="its last dimension must be the 4 levels"):
        made(tables="host").prefetch(codes()[..., :3])
    with pytest.raises(TypeError, match=r"codes has dtype torch.float32"):
        made(tables="host")(codes().float())
    with pytest.raises(TypeError, match="stale = 1 is not a bool"):
        made(tables="host").prefetch(codes(), stale=1)


def test_fused_refuses_what_it_refuses_elsewhere():
    encoder = made(**OVERLAP)
    with pytest.raises(RuntimeError, match="found no optimizer"):
        encoder(codes())
    optimizer = optim.for_model(encoder)
    encoder(codes()).sum().backward()
    with pytest.raises(RuntimeError, match="gradients cannot be accumulated"):
        encoder(codes()).sum().backward()
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
    assert optimizer is not None
