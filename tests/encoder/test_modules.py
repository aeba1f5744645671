import pytest
import torch
from torch.func import functional_call

from prefixmem_fast import (
    AddressSpec,
    PrefixMem,
    PrefixMemConfig,
    PrefixMemory,
    SIDVocabulary,
    prefix_memory,
)

SPEC = AddressSpec((8, 8, 8, 8), table_rows=50, active_levels=(2, 4))
CONFIG = PrefixMemConfig(SPEC, memory_dim=16, hidden_size=24)
VOCABULARY = SIDVocabulary.from_table(
    {100 + 8 * level + code: (level + 1, code) for level in range(4) for code in range(8)}, (8,) * 4
)


def test_encoder_follows_the_formula():
    encoder = PrefixMem(CONFIG)
    codes = torch.randint(0, 8, (3, 5, 4))
    m = encoder(codes)
    assert m.shape == (3, 5, 4, 24)
    memory = prefix_memory(codes, encoder.memory.weight, SPEC)
    expected = memory @ encoder.out_proj.weight.T
    torch.testing.assert_close(m[..., [1, 3], :], expected)
    assert not m[..., [0, 2], :].any(), "zero at inactive levels"


def test_every_level_active():
    encoder = PrefixMem(PrefixMemConfig(AddressSpec((8, 8), table_rows=50), 16, 24))
    assert encoder(torch.randint(0, 8, (0, 2))).shape == (0, 2, 24)
    assert encoder(torch.randint(0, 8, (2,))).shape == (2, 24)


def test_encode_tokens():
    encoder = PrefixMem(CONFIG)
    ids = torch.tensor([[5, 101, 110, 119, 124, 3, 101, 110, 7, 119, -100]])
    m = encoder.encode_tokens(ids, VOCABULARY)
    assert m.shape == (1, 11, 24)
    of_sid = encoder(torch.tensor([1, 2, 3, 0]))
    torch.testing.assert_close(m[0, 1:5], of_sid)
    torch.testing.assert_close(m[0, 7], of_sid[1])
    assert not m[0, [0, 5, 6, 8, 9, 10]].any(), "text, inactive levels and a broken SID"
    packed = encoder.encode_tokens(ids, VOCABULARY, torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]))
    assert not packed[0, 1:5].any(), "the SID is cut by a segment"


@pytest.mark.parametrize("count", [-1, 12, 50])
def test_more_new_tokens_than_there_are(count):
    ids = torch.zeros(1, 11, dtype=torch.int64)
    encoder = PrefixMem(CONFIG)
    with pytest.raises(ValueError, match=rf"new_tokens = {count}; input_ids has 11 tokens, so give 0\.\.11"):
        encoder.encode_tokens(ids, VOCABULARY, new_tokens=count)
    assert [encoder.encode_tokens(ids, VOCABULARY, new_tokens=n).shape[1] for n in (0, 11)] == [0, 11]


def test_encode_tokens_refuses_another_vocabulary():
    other = SIDVocabulary.from_table({0: (1, 0)}, (8, 8))
    with pytest.raises(ValueError, match="codebook_sizes"):
        PrefixMem(CONFIG).encode_tokens(torch.zeros(1, 2, dtype=torch.int64), other)


def test_zero_output_adds_nothing():
    encoder = PrefixMem(PrefixMemConfig(SPEC, 16, 24, output_init_std=0.0))
    assert not encoder(torch.randint(0, 8, (5, 4))).any()


def test_initialisation():
    torch.manual_seed(0)
    encoder = PrefixMem(PrefixMemConfig(AddressSpec((256,) * 4, table_rows=5000), 64, 32, 0.5, 0.01))
    assert abs(encoder.memory.weight.std().item() - 0.5) < 0.01
    assert abs(encoder.out_proj.weight.std().item() - 0.01) < 0.001
    encoder.out_proj.weight.data.fill_(3.0)
    encoder.reset_output()
    assert encoder.out_proj.weight.abs().max() < 0.1


@pytest.mark.slow
def test_compile_functional_call_and_autocast():
    torch.compiler.reset()  # other tests of this process compile the same forward for their modules
    encoder = PrefixMem(CONFIG)
    codes, ids = torch.randint(0, 8, (5, 4)), torch.tensor([[101, 110, 119, 124]])
    m = encoder(codes)
    compiled = torch.compile(encoder, fullgraph=True)
    torch.testing.assert_close(compiled(codes), m)
    compiled(codes).sum().backward()
    assert encoder.memory.weight.grad.any()
    tokens = torch.compile(lambda ids: encoder.encode_tokens(ids, VOCABULARY), fullgraph=True)
    torch.testing.assert_close(tokens(ids), encoder.encode_tokens(ids, VOCABULARY))

    doubled = {name: 2 * value for name, value in encoder.named_parameters()}
    torch.testing.assert_close(functional_call(encoder, doubled, codes), 4 * m)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(codes).dtype == torch.bfloat16


def test_training_learns_a_code_that_only_its_prefix_tells():
    """Classification pre-training in small: the next code is a function of the whole prefix."""
    spec = AddressSpec((6, 6, 6), table_rows=500, active_levels=(2,))
    encoder = PrefixMem(PrefixMemConfig(spec, 32, 6, output_init_std=0.1))
    codes = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    target = torch.randint(0, 6, (36,))
    codes = torch.cat([codes, target[:, None]], 1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(encoder(codes)[:, 1], target).backward()
        optimizer.step()
    assert (encoder(codes)[:, 1].argmax(-1) == target).all()


def test_state_dict_carries_the_spec():
    source, target = PrefixMem(CONFIG), PrefixMem(CONFIG)
    state = source.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values()), "safetensors takes tensors alone"
    target.load_state_dict(state)
    codes = torch.randint(0, 8, (5, 4))
    assert torch.equal(source(codes), target(codes))


def test_state_dict_of_another_spec_is_refused_and_changes_nothing():
    other = PrefixMem(PrefixMemConfig(AddressSpec((8,) * 4, table_rows=50, active_levels=(2, 4), seed=1), 16, 24))
    encoder = PrefixMem(CONFIG)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(RuntimeError, match="differs in seed, multipliers") as error:
        encoder.load_state_dict(other.state_dict())
    assert "'seed': 1" in str(error.value)
    assert "'seed': 0" in str(error.value)
    after = encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "W_out is kept too"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.tensor([255, 3], dtype=torch.uint8), "not JSON"),
        (torch.tensor(list(b"[1]"), dtype=torch.uint8), "not JSON"),
        (torch.zeros(5), "is torch.float32 on cpu; load it as it was saved"),
        (torch.zeros(5, dtype=torch.uint8, device="meta"), "on meta"),
        ("{}", "not JSON"),
        (None, "not JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_spec_is_refused(stored, message):
    encoder = PrefixMem(CONFIG)
    state = encoder.state_dict()
    state["memory._extra_state"] = stored
    with pytest.raises(RuntimeError, match=message):
        encoder.load_state_dict(state)
    del state["memory._extra_state"]
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        encoder.load_state_dict(state)


def test_reset_parameters_starts_near_zero():
    """What FSDP calls on every module after meta-device construction."""
    encoder = PrefixMem(CONFIG, device="meta").to_empty(device="cpu")
    for module in encoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert 0 < encoder.out_proj.weight.std() < 0.002
    assert 0.01 < encoder.memory.weight.std() < 0.03


def test_repr_says_what_it_holds():
    text = repr(PrefixMem(CONFIG, deterministic=True))
    for part in ("rows=632", "width=4", "orders=4", "heads=4", "mode=prefix", "active_levels=(2, 4)", "deterministic"):
        assert part in text


def test_config_round_trip():
    assert PrefixMemConfig.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_dim": 18}, "memory_dim = 18 is not a multiple of the spec's 4 heads; give 16 or 20"),
        ({"memory_dim": 0}, "memory_dim = 0"),
        ({"hidden_size": -1}, "hidden_size = -1"),
        ({"memory_init_std": -1.0}, "memory_init_std = -1.0"),
        ({"output_init_std": float("nan")}, "output_init_std = nan"),
        ({"output_init_std": "a"}, "output_init_std = 'a'"),
        ({"memory_dim": 1 << 60}, r"do not fit 2\^63"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        PrefixMemConfig(**{"spec": SPEC, "memory_dim": 16, **changes})


def test_encoder_needs_a_hidden_size():
    with pytest.raises(ValueError, match="hidden_size = None"):
        PrefixMem(PrefixMemConfig(SPEC, 16))
    PrefixMemory(PrefixMemConfig(SPEC, 16))
    for wrong, message in (
        (lambda: PrefixMemConfig({}), "spec is a dict"),
        (lambda: PrefixMem(SPEC), "config is a AddressSpec"),
        (lambda: PrefixMemory(None), "config is a NoneType"),
        (lambda: PrefixMem(CONFIG).encode_tokens(torch.zeros(1, 2).long(), {}), "vocabulary a dict"),
        (lambda: PrefixMem(CONFIG, deterministic="no"), "deterministic = 'no'"),
    ):
        with pytest.raises(TypeError, match=message):
            wrong()
    with pytest.raises(ValueError, match="backend = 'cuda' is unknown"):
        PrefixMem(CONFIG, backend="cuda")
    with pytest.raises(ValueError, match="lacks spec"):
        PrefixMemConfig.from_dict({})


def test_a_sharded_state_dict_holds_nothing_but_shards(tmp_path):
    """Loaders of FSDP2 take DTensors alone; the whole state_dict keeps the address spec."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    spec = AddressSpec((5, 4), heads=2, table_rows=7)
    encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=4, hidden_size=3))
    assert "memory._extra_state" in encoder.state_dict()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(encoder, mesh=mesh)
        state = encoder.state_dict()
        assert state.keys() == {"memory.weight", "out_proj.weight"}
        assert all(isinstance(tensor, DTensor) for tensor in state.values())
        encoder.load_state_dict(state)
        with pytest.raises(
            TypeError, match="weight is a DTensor, and the operation reads whole tables; keep the table"
        ):
            encoder.memory(torch.zeros(1, 2, dtype=torch.int64))
    finally:
        torch.distributed.destroy_process_group()
