"""Tables in the host's memory under a model on another device; `test_host_tables.py` runs this file by itself."""

import copy
from functools import partial

import pytest
import torch

from prefixmem_fast import DecodingState, attach, optim
from tests.helpers import models
from tests.helpers.second_device import CROSSINGS, second_device

FAR = second_device()
CPU = torch.device("cpu")
VOCABULARY = models.vocabulary()
ROWS = (optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam)
WAYS = [("dense", optim.RowWiseAdagrad), *((grad, rows) for grad in ("sparse", "fused") for rows in ROWS)]


def codes(step=0, count=6):
    draw = torch.Generator().manual_seed(step)
    return torch.stack([torch.randint(-1, size, (count,), generator=draw) for size in models.SIZES], 1)


def tokens(step=0):
    return models.prompts()["input_ids"].roll(step, 0)


def trained(device, source, rows, ahead=False, **options):
    """The encoder and the state of its table after four steps, with the model on `device`."""
    encoder = models.encoder(**options).to(device)
    optimizer = optim.for_model(encoder, lr=0.01, rows=rows)
    if source == "codes":
        call, prefetch, batch = encoder, encoder.prefetch, codes
    else:
        call, prefetch = (partial(f, vocabulary=VOCABULARY) for f in (encoder.encode_tokens, encoder.prefetch_tokens))
        batch = tokens
    for step in range(4):
        if ahead:
            prefetch(batch(step + 1))
        given = batch(step).to(device)
        CROSSINGS.clear()
        call(given).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder, optimizer.state[encoder.memory.weight]


def assert_same(found, expected):
    (encoder, state), (other, other_state) = found, expected
    assert encoder.memory.weight.device == CPU
    assert torch.equal(encoder.memory.weight, other.memory.weight)
    assert torch.equal(encoder.out_proj.weight.cpu(), other.out_proj.weight)
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        assert value.device == CPU
        assert torch.equal(value, other_state[name]), name


@pytest.mark.parametrize("source", ["codes", "tokens"])
@pytest.mark.parametrize(("grad", "rows"), WAYS)
def test_steps_are_those_of_tables_on_the_device(grad, rows, source):
    expected = trained(CPU, source, rows, grad=grad)
    found = trained(FAR, source, rows, grad=grad, tables="host")
    assert found[0].out_proj.weight.device == FAR
    given = {"codes": codes(), "tokens": tokens()}[source]
    shape, S = tuple(given.shape), (6, 3, 8) if source == "codes" else (*given.shape, 8)
    crossings = [("back", torch.int64, shape), ("there", torch.float32, S), ("back", torch.float32, S)]
    assert crossings == CROSSINGS, "codes, S and dS cross, and nothing else"
    assert_same(found, expected)
    if grad == "fused":
        assert_same(trained(FAR, source, rows, grad=grad, tables="host", overlap=True), expected)


@pytest.mark.parametrize("source", ["codes", "tokens"])
@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_steps_with_gathers_ahead(grad, source):
    expected = trained(CPU, source, optim.RowWiseAdam, grad=grad)
    options = {"grad": grad, "tables": "host", "overlap": grad == "fused"}
    assert_same(trained(FAR, source, optim.RowWiseAdam, ahead=True, **options), expected)


def test_prefetched_codes_are_taken_on_the_other_device():
    encoder = models.encoder(tables="host").to(FAR)
    expected = encoder(codes().to(FAR))
    encoder.prefetch(codes().to(FAR))
    encoder.memory._reader.worker.wait()
    encoder.memory.weight.data.zero_()  # unseen, so that what was gathered is told from what would be
    m = encoder(codes().to(FAR))
    assert m.device == FAR
    assert torch.equal(m.cpu(), expected.cpu())


def test_double_backward_crosses_twice():
    def second(device, **options):
        encoder = models.encoder(**options).to(device)
        scale = torch.ones((), requires_grad=True)
        S = encoder.memory(codes().to(device)) * scale.to(device)
        (first,) = torch.autograd.grad(S.pow(3).sum(), encoder.memory.weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [encoder.memory.weight, scale])

    for found, expected in zip(second(FAR, tables="host"), second(CPU), strict=True):
        assert torch.equal(found, expected)


def test_moving_a_model_leaves_the_table():
    model = torch.nn.Sequential(models.encoder(tables="host"), torch.nn.Linear(32, 2))
    table = model[0].memory.weight
    model.to(FAR)
    assert model[0].memory.weight is table
    assert table.device == CPU
    assert {p.device for p in model.parameters() if p is not table} == {FAR}
    assert tuple(table.shape) not in {shape for _, _, shape in CROSSINGS}
    model.to(FAR, torch.bfloat16)
    assert table.device == CPU
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert copy.deepcopy(model)[0].memory.weight.device == CPU
    assert models.encoder(tables="host", device="far:0").memory.weight.device == CPU
    model.to_empty(device=FAR)
    assert model[0].memory.weight.device == CPU


def test_loss_scaling_of_the_other_device_is_seen(monkeypatch):
    encoder = models.encoder(tables="host", grad="fused").to(FAR)
    optimizer = optim.for_model(encoder)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "far")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    with pytest.raises(RuntimeError, match="as GradScaler scaled them"):
        encoder(codes().to(FAR))
    assert optimizer is not None


def test_decoding():
    near, far = models.encoder(), models.encoder(tables="host").to(FAR)
    ids = models.prompts()["input_ids"]
    expected, found = (DecodingState(encoder, models.vocabulary(), len(ids)) for encoder in (near, far))
    assert torch.equal(found.prefill(ids[:, :5].to(FAR)).cpu(), expected.prefill(ids[:, :5]))
    beams = torch.tensor([1, 1, 3, 0])
    found.reorder(beams.to(FAR))
    expected.reorder(beams)
    for t in range(5, ids.shape[1]):
        CROSSINGS.clear()
        m = found.step(ids[:, t].to(FAR))
        assert m.device == FAR
        assert torch.equal(m.cpu(), expected.step(ids[:, t]))
        assert [shape for _, _, shape in CROSSINGS[1:3]] == [(4, 3), (4, 8)], "tokens and S"


def test_a_quantized_copy_is_where_the_model_is():
    expected = models.encoder().quantize("int8")
    found = models.encoder(tables="host").to(FAR).quantize("int8")
    assert {tensor.device for tensor in (*found.parameters(), *found.buffers())} == {FAR}
    assert torch.equal(found.memory.values.cpu(), expected.memory.values)
    assert torch.equal(found(codes().to(FAR)).cpu(), expected(codes()))


def test_attached_model():
    """The model's own sums differ in their last bits: the stand-in takes other paths through attention."""

    def trained(device, **options):
        model = attach(models.tiny_model(), models.encoder(**options), models.vocabulary()).to(device)
        logits = model(**{name: value.to(device) for name, value in models.prompts().items()}).logits
        logits.sin().sum().backward()
        return logits, model.prefixmem.memory.weight.grad

    (expected, gradient), (found, host_gradient) = trained(CPU), trained(FAR, tables="host")
    assert (found.device, host_gradient.device) == (FAR, CPU)
    torch.testing.assert_close(found.cpu(), expected)
    torch.testing.assert_close(host_gradient, gradient, rtol=1e-4, atol=1e-4)
    assert gradient.any()
