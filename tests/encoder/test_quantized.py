"""Encoders of 8 bits a number: made, called, decoded, moved, saved and read as others are, and not trained."""

import copy
import json
from contextlib import contextmanager

import pytest
import torch

from prefixmem_fast import CheckpointError, DecodingState, PrefixMem, PrefixMemConfig, attach, checkpoint, optim
from prefixmem_fast.encoder import QuantizedMemory
from prefixmem_fast.encoder.saving import load_weights
from prefixmem_fast.operation import reference
from prefixmem_fast.operation.quantization import dequantized, quantize
from tests.helpers.cases import BACKENDS, MODES, mostly_slow, slow
from tests.helpers.models import SIZES, TOKENS, encoder, sid, tiny_model, vocabulary
from tests.helpers.quantized import KINDS, sum_error_bound

SUMS = [torch.float32, torch.bfloat16, torch.float16]


def codes(count=9):
    return torch.stack([torch.randint(-1, size, (count,)) for size in SIZES], 1)


def quantized(kind="int8", dtype=torch.float32, **options):
    return encoder(**options).to(dtype).quantize(kind)


def same(one, other):
    """Every entry of two state_dicts, bit for bit."""
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@contextmanager
def bad(error, message):
    with pytest.raises(error, match=message):
        yield


# Made and called


@pytest.mark.parametrize("dtype", SUMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_and_called(kind, dtype):
    whole = encoder().to(dtype).eval()
    one, some = whole.quantize(kind), codes()
    assert isinstance(one, PrefixMem)
    assert isinstance(one.memory, QuantizedMemory)
    assert not one.training
    assert one.memory.values.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    assert one.memory.scales.dtype == torch.float32
    S, m = one.memory(some), one(some)
    assert S.dtype == m.dtype == dtype
    assert m.shape == whole(some).shape
    weight, spec = whole.memory.weight.detach(), whole.config.spec
    bound = sum_error_bound(some, weight, one.memory.table, spec, kind)
    exact = reference.forward(some, weight.double(), spec)
    rounding = torch.finfo(dtype).eps * (exact.abs() + bound) if dtype != torch.float32 else 0
    assert ((S.double() - exact).abs() <= bound + rounding).all()
    ids = torch.tensor([[5, *sid(1, 3, 4), 7, *sid(0, 1)]])
    torch.testing.assert_close(one.encode_tokens(ids, vocabulary())[:, 1:4], one(torch.tensor([[1, 3, 4]])))
    assert "quantization=" + kind in repr(one)


def test_the_copy_is_its_own():
    whole = encoder()
    one, some = whole.quantize("int8"), codes()
    before = one(some)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(1)
    assert torch.equal(one(some), before)
    assert whole.out_proj.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in one.parameters())
    one.memory.requires_grad_(False).zero_grad()  # as of every module; it has no table to ask
    twin = copy.deepcopy(one)
    same(twin.state_dict(), one.state_dict())
    assert torch.equal(twin(some), before)


def test_what_cannot_be_quantized_is_refused():
    with bad(TypeError, r"weight has dtype torch.float64, and quantized tables are read in float32"):
        encoder().double().quantize("int8")
    with bad(ValueError, "kind = 'int4' is unknown; allowed are 'int8', 'fp8'"):
        encoder().quantize("int4")
    with bad(ValueError, "the encoder is fp8; quantize the one that it was made from"):
        quantized("fp8").quantize("int8")
    broken = encoder()
    with torch.no_grad():
        broken.memory.weight[17, 1] = torch.nan
    with bad(ValueError, r"weight\[17\] holds an infinity or NaN"):
        broken.quantize("int8")


@pytest.mark.parametrize("kind", KINDS)
def test_moved_and_converted(kind):
    """S changes its dtype with the model; values and scales keep theirs, and their bits."""
    one, some = quantized(kind), codes()
    state, S = one.state_dict(), one.memory(some)
    for convert, dtype in ((one.half, torch.float16), (one.bfloat16, torch.bfloat16), (one.float, torch.float32)):
        convert()
        assert one.memory.dtype == one(some).dtype == dtype
        for name in ("memory.values", "memory.scales"):
            assert torch.equal(one.state_dict()[name].view(torch.uint8), state[name].view(torch.uint8))
    assert torch.equal(one.memory(some), S)
    meta = copy.deepcopy(one).to("meta", torch.bfloat16)
    assert (meta.memory.values.device.type, meta.memory.scales.device.type) == ("meta", "meta")
    assert meta(some.to("meta")).dtype == torch.bfloat16
    empty = meta.to_empty(device="cpu")
    assert empty.memory.values.dtype == one.memory.values.dtype
    before = one.memory.dtype
    with bad(TypeError, r"dtype = torch.float64, and S of a quantized table is summed in float32"):
        one.double()
    assert one.memory.dtype == before


def test_compiled():
    torch.compiler.reset()
    one, some = quantized("fp8"), codes()
    torch.testing.assert_close(torch.compile(one, fullgraph=True)(some), one(some))


# Tables in the host's memory


def test_tables_move_with_the_module(tmp_path):
    config = quantized().config
    quantized().save_pretrained(tmp_path)
    for make in (lambda **o: PrefixMem(config, **o), lambda **o: PrefixMem.from_pretrained(tmp_path, **o)):
        for options in ({"tables": "host"}, {"tables": "mapped"}, {"overlap": True}):
            with bad(ValueError, "and a quantized table moves with its module and has no updates; leave both out"):
                make(**options)
        with bad(ValueError, "tables = 'gpu' is unknown; allowed are"):
            make(tables="gpu")
        with bad(TypeError, "overlap = 1 is not a bool"):
            make(overlap=1)
        one = make(tables="device", overlap=False)
        assert one.memory.tables == "device"
        with bad(ValueError, "prefetch is for tables in the host's memory, and a quantized table moves with its"):
            one.prefetch(codes())


@pytest.mark.parametrize("place", ["host", "mapped", "overlap"])
def test_quantized_from_the_hosts_memory(place, tmp_path):
    """The table is that of an encoder on its device, with all updates in it."""
    one = encoder()
    one.save_pretrained(tmp_path)
    options = {"tables": "host", "overlap": True, "grad": "fused"} if place == "overlap" else {"tables": place}
    other = PrefixMem.from_pretrained(tmp_path, **options)
    if place == "overlap":
        one = PrefixMem.from_pretrained(tmp_path, grad="fused")
        for trained in (one, other):
            optimizer = optim.for_model(trained, lr=0.1)
            trained(codes(400).fill_(1)).square().sum().backward()  # the other's is under way
            expected = trained.quantize("int8")
            optimizer.step()
            same(trained.quantize("int8").memory.state_dict(), expected.memory.state_dict())
    found, expected = other.quantize("int8"), one.quantize("int8")
    same(found.state_dict(), expected.state_dict())
    some = codes()
    assert torch.equal(found(some), expected(some))
    assert found.memory.tables == "device"


# Decoding


@pytest.mark.parametrize(
    ("kind", "mode", "backend"),
    mostly_slow(
        lambda kind, mode, backend: (kind == "fp8" and mode == "prefix") or backend != "triton", KINDS, MODES, BACKENDS
    ),
)
def test_steps_are_the_encoder_over_the_whole_sequence(kind, mode, backend):
    spec = {"mode": mode, "active_levels": (1, 3), "addressing": "hash"}
    one, known = quantized(kind, spec=spec, backend=backend), vocabulary()
    assert one.memory.backend == backend
    good = [[*sid(1, 3, 4), 5, *sid(0, 1, 5)], [7, 8, *sid(3, 0), sid(0)[0], 9, *sid(0)]]
    tokens = torch.cat([torch.tensor(good), torch.randint(0, TOKENS + 9, (3, 7))])
    whole, S = one.encode_tokens(tokens, known), one.memory.read_tokens(tokens, known)
    state = DecodingState(one, known, len(tokens))
    torch.testing.assert_close(state.prefill(tokens[:, :2]), whole[:, :2])
    for t in range(2, tokens.shape[1]):
        torch.testing.assert_close(state.step(tokens[:, t]), whole[:, t], rtol=1e-6, atol=1e-6)
        assert torch.equal(one.memory.read_window(tokens[:, : t + 1], known), S[:, t])


def test_a_step_has_the_dtype_of_the_encoder():
    one = quantized("int8", torch.bfloat16)
    state = DecodingState(one, vocabulary(), 1)
    assert state.prefill(torch.tensor([sid(1, 3)])).dtype == torch.bfloat16
    assert state.step(torch.tensor([sid(1, 3, 4)[2]])).dtype == torch.bfloat16


# Attached


@pytest.mark.parametrize("kind", ["fp8", slow("int8")])
def test_attached_saved_and_attached_again(kind, tmp_path):
    """The model's own files hold values and scales, in their dtypes."""
    model = attach(tiny_model(), quantized(kind), vocabulary())
    ids = torch.tensor([[5, 6, *sid(1, 3, 4), 7]])
    logits = model(ids).logits
    assert not torch.equal(logits, tiny_model()(ids).logits)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False), generated)
    model.save_pretrained(tmp_path)
    assert not list((tmp_path / "prefixmem").glob("*.safetensors"))
    again = attach(type(model).from_pretrained(tmp_path), PrefixMem.from_pretrained(tmp_path), vocabulary())
    same(again.prefixmem.state_dict(), model.prefixmem.state_dict())
    assert torch.equal(again(ids).logits, logits)
    assert not load_weights(again.prefixmem, tmp_path), "nothing was another"


# Saved and read


@pytest.mark.parametrize("size", ["2GB", 500])
@pytest.mark.parametrize("dtype", SUMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read(kind, dtype, size, tmp_path):
    one = quantized(kind, dtype)
    one.save_pretrained(tmp_path, vocabulary(), max_shard_size=size)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["format_version"] == 2
    assert stored["encoder"]["quantization"] == kind
    found = PrefixMem.from_pretrained(tmp_path, backend="reference")
    same(found.state_dict(), one.state_dict())
    assert found.config == one.config
    assert found.memory.dtype == dtype
    assert found.memory.backend == "reference"
    assert torch.equal(found(codes(5)[:0]), one(codes(5)[:0]))
    assert not found.out_proj.weight.requires_grad
    other = PrefixMem.from_pretrained(tmp_path, dtype=torch.bfloat16, active_levels=(2,))
    assert other.memory.dtype == other.out_proj.weight.dtype == torch.bfloat16
    assert other.config.spec.active_levels == (2,)
    assert torch.equal(other.memory.scales, one.memory.scales)


def test_encoders_that_are_not_quantized_keep_their_version(tmp_path):
    encoder().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["format_version"] == 1
    assert "quantization" not in stored["encoder"]


def edited(folder, change):
    """Change config.json, and its digest with it."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    values.pop("digest")
    file.write_text(json.dumps({**values, "digest": checkpoint._digest(values)}))


def with_dtype(name, dtype):
    return lambda values: values["tensors"][name].update(dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["encoder"].update(quantization="fp8"), "memory.values is of int8; the config needs float8_e4m3fn"),
        (
            lambda v: v["encoder"].update(quantization="int4"),
            "quantization = 'int4' is unknown; allowed are 'int8', 'fp8'",
        ),
        (lambda v: v["encoder"].update(quantization=["int8"]), r"quantization = \['int8'\] is unknown"),
        (lambda v: v["encoder"].pop("quantization"), "memory.weight is missing; the config needs"),
        (lambda v: v["tensors"].pop("memory.scales"), "memory.scales is missing"),
        (with_dtype("memory.values", "float8_e4m3fn"), "memory.values is of float8_e4m3fn; the config needs int8"),
        (with_dtype("memory.scales", "int8"), "memory.scales is of int8; the config needs float32"),
        (with_dtype("memory.scales", "bfloat16"), "holds 'memory.scales' as float32"),
        (with_dtype("out_proj.weight", "int8"), "its first tensor is of int8"),
        (lambda v: v.update(format_version=1), r"'memory.values'\]\['dtype'\] is 'int8', not one of float32"),
        (lambda v: v.update(format_version=4), "format version 4, .* reads versions 1, 2, 3"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change, message, tmp_path):
    quantized("int8").save_pretrained(tmp_path)
    edited(tmp_path, change)
    with bad(CheckpointError, message):
        PrefixMem.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["memory.values", "memory.scales"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused(kind, name, tmp_path):
    from safetensors.torch import load_file, save_file

    quantized(kind).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with bad(CheckpointError, f"{name} in .* is damaged"):
        PrefixMem.from_pretrained(tmp_path)


def test_one_kind_is_not_read_as_another(tmp_path):
    one = quantized("int8")
    one.save_pretrained(tmp_path)
    for other in (quantized("fp8"), encoder()):
        before = copy.deepcopy(other.state_dict())
        with bad(CheckpointError, "is of another encoder: it differs in quantization"):
            load_weights(other, tmp_path)
        same(other.state_dict(), before)
    encoder().save_pretrained(tmp_path)
    with bad(CheckpointError, "is of another encoder: it differs in quantization"):
        load_weights(one, tmp_path)


def test_state_dicts():
    one, other = quantized("int8"), quantized("int8", std=2.0)
    assert list(one.state_dict()) == ["memory.values", "memory.scales", "memory._extra_state", "out_proj.weight"]
    other.load_state_dict(one.state_dict())
    same(other.state_dict(), one.state_dict())
    for state, message in (
        (quantized("fp8").state_dict(), r"memory.values of the state_dict is torch.float8_e4m3fn and the module's is"),
        (encoder().state_dict(), r"memory.weight of the state_dict is not quantized; load it before quantize\(\)"),
        (quantized("int8", spec={"seed": 1}).state_dict(), "differs in seed, multipliers"),
    ):
        with bad(RuntimeError, message):
            other.load_state_dict(state)
        same(other.state_dict(), one.state_dict())
    state = one.state_dict()
    del state["memory._extra_state"]
    with pytest.warns(UserWarning, match=r"holds memory\.values without memory\._extra_state"):
        other.load_state_dict(state, strict=False)


# Not trained


def test_training_is_refused(tmp_path):
    one = quantized()
    for call in (
        lambda: PrefixMem.from_pretrained(tmp_path, grad="sparse"),
        lambda: PrefixMem(one.config, grad="sparse"),
    ):
        one.save_pretrained(tmp_path)
        with bad(ValueError, "grad = 'sparse', and a quantized table has no gradient; leave grad out, or train the"):
            call()
    with bad(ValueError, "holds a quantized encoder, which is not trained; train the one that it was made from"):
        optim.for_model(torch.nn.Sequential(one, torch.nn.Linear(32, 4)))
    with bad(CheckpointError, "hidden_size = 48, and the encoder, which is quantized and not trained, has 32"):
        PrefixMem.from_pretrained(tmp_path, hidden_size=48)
    with bad(ValueError, "quantization = None; give 'int8' or 'fp8' in PrefixMemConfig, or take a PrefixMemory"):
        QuantizedMemory(encoder().config)


def test_the_model_around_it_trains():
    """The memory is a constant to it; train() and eval() are as ever."""
    one = quantized(dropout=0.5).train()
    head = torch.nn.Linear(32, 4)
    m = one(codes())
    assert not m.requires_grad
    head(m).square().mean().backward()
    assert head.weight.grad.any()
    assert torch.equal(one.eval()(codes()[:0]), one(codes()[:0]))


def test_a_config_says_the_quantization():
    config = encoder().config
    assert "quantization" not in config.to_dict()
    small = quantized("fp8").config
    assert PrefixMemConfig.from_dict(small.to_dict()) == small
    fresh = PrefixMem(small)
    assert not fresh(codes()).any(), "zero until it is loaded"
    table = quantize(encoder().memory.weight, "fp8")
    fresh.memory.values, fresh.memory.scales = table
    assert torch.equal(
        fresh.memory(codes(0)), reference.forward(codes(0), dequantized(table, torch.arange(148)), config.spec)
    )
    with bad(ValueError, "quantization = 'int4' is unknown"):
        PrefixMemConfig(config.spec, quantization="int4")
