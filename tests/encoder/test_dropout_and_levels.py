from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefixmem_fast import AddressSpec, CheckpointError, PrefixMem, PrefixMemConfig, attach
from tests.helpers.models import encoder, prompts, sid, tiny_model, vocabulary

CODES = torch.cartesian_prod(*(torch.arange(size) for size in (4, 5, 6)))  # all 120 SIDs


def test_dropout_is_off_outside_of_training():
    plain, dropping = encoder(), encoder(dropout=0.5).eval()
    ids = prompts()["input_ids"]
    assert torch.equal(dropping(CODES), plain(CODES))
    assert torch.equal(dropping.encode_tokens(ids, vocabulary()), plain.encode_tokens(ids, vocabulary()))
    assert plain.training
    assert plain.dropout == 0
    assert torch.equal(plain(CODES), plain(CODES)), "no dropout in training either unless it is asked for"


@pytest.mark.parametrize("p", [0.25, 0.6])
def test_dropout_leaves_out_whole_tokens(p):
    plain, dropping = encoder(), encoder(dropout=p)
    expected, m = plain(CODES) / (1 - p), dropping(CODES)
    kept = m.abs().sum(-1) > 0  # [120, 3]
    torch.testing.assert_close(m, expected * kept[..., None], rtol=1e-5, atol=1e-6)
    assert expected.abs().sum(-1).min() > 0.1
    dropped = (~kept).float()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(dropped.mean() - p) < 4 * deviation
    assert dropped.sum(1).unique().numel() > 2, "the tokens of a SID are drawn one by one"
    assert not torch.equal(dropping(CODES), m), "anew at each call"
    whole = encoder(dropout=p, spec={"active_levels": (1, 3)})(CODES)
    assert not whole[:, 1].any()
    assert whole[:, 0].any()


@pytest.mark.parametrize("new_tokens", [None, 90])
def test_dropout_in_a_token_stream(new_tokens):
    ids = torch.tensor([[5, *sid(1, 3, 4), *sid(0, 1, 5), 9] * 20] * 2)
    plain, dropping = encoder(), encoder(dropout=0.5)
    expected = plain.encode_tokens(ids, vocabulary(), new_tokens=new_tokens)
    m = dropping.encode_tokens(ids, vocabulary(), new_tokens=new_tokens)
    here, kept = expected.abs().sum(-1) > 0, m.abs().sum(-1) > 0
    assert not kept[~here].any()
    torch.testing.assert_close(m, 2 * expected * kept[..., None], rtol=1e-5, atol=1e-6)
    assert abs(kept[here].float().mean() - 0.5) < 4 * 0.5 / here.sum() ** 0.5
    assert not torch.equal(kept[0], kept[1])


def test_what_is_left_out_learns_nothing():
    dropping = encoder(dropout=0.5)
    codes = torch.tensor([[1, 3, 4]])
    while True:
        m = dropping(codes)
        kept = m[0].abs().sum(-1) > 0
        if kept.tolist() == [False, True, True]:
            break
    (grad,) = torch.autograd.grad(m[0, 0].sum(), dropping.memory.weight, retain_graph=True)
    assert not grad.any()
    (grad,) = torch.autograd.grad(m[0, 1].sum(), dropping.memory.weight)
    assert grad.any()


def test_a_model_trains_with_dropout_and_answers_without():
    model = attach(tiny_model(), encoder(dropout=0.5), vocabulary())
    inputs = prompts()
    plain = attach(tiny_model(), encoder(), vocabulary())
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1, 1.5, float("nan"), float("inf")])
def test_dropout_errors(p, tmp_path):
    encoder().save_pretrained(tmp_path)
    for make in (lambda: encoder(dropout=p), lambda: PrefixMem.from_pretrained(tmp_path, dropout=p)):
        with pytest.raises(ValueError, match=rf"dropout = {p!r}; allowed are 0 <= p < 1"):
            make()


def test_dropout_is_no_part_of_the_files(tmp_path):
    encoder(dropout=0.5).save_pretrained(tmp_path)
    assert PrefixMem.from_pretrained(tmp_path).dropout == 0
    assert PrefixMem.from_pretrained(tmp_path, dropout=0.25).dropout == 0.25
    assert list(encoder(dropout=0.5).state_dict()) == list(encoder().state_dict())


@pytest.mark.parametrize("active_levels", [(1, 3), (2,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_each_active_level_is_w_out_of_its_memory(active_levels, autocast):
    """Also where another module has taken the place of W_out, as adapters do: inactive levels stay zero."""
    torch._dynamo.reset()  # it compiles one function so often, and no more
    memory = encoder(spec={"active_levels": active_levels})
    memory.out_proj = torch.nn.Sequential(memory.out_proj, torch.nn.Linear(memory.config.hidden_size, 7))
    codes = CODES[:24].view(2, 12, 3)

    def by_level(codes):
        projected = memory.out_proj(memory.memory(codes))
        return [
            projected[..., active_levels.index(level), :] if level in active_levels else projected.new_zeros(2, 12, 7)
            for level in (1, 2, 3)
        ]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = torch.stack(by_level(codes), dim=-2)
        found = memory(codes)
        compiled = torch.compile(memory.forward, fullgraph=True, backend="aot_eager")(codes)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(compiled, expected)
    grad = torch.randn_like(expected)
    parameters = list(memory.parameters())
    for result in (found, compiled):
        for ours, theirs in zip(
            torch.autograd.grad(result, parameters, grad),
            torch.autograd.grad(expected, parameters, grad, retain_graph=True),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_zeros_of_inactive_levels_are_written_once():
    class Results(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            results.append(operator(*args, **(kwargs or {})))
            return results[-1]

    memory, results = encoder(spec={"active_levels": (2,)}), []
    S = memory.memory(CODES)
    with mock.patch.object(memory.memory, "forward", return_value=S), Results():
        m = memory(CODES)
    written = {result.data_ptr(): result.untyped_storage().nbytes() for result in results}
    for given in (S, memory.out_proj.weight):  # their views
        written.pop(given.data_ptr())
    assert sum(written.values()) == (memory.out_proj(S).numel() + m.numel() + 1) * 4


@pytest.mark.parametrize("mode", ["prefix", "suffix", "full"])
@pytest.mark.parametrize("active_levels", [(1, 3), (2,), [1, 2, 3]])
def test_other_levels_read_the_same_rows(tmp_path, mode, active_levels):
    stored = encoder(spec={"active_levels": (2, 3), "mode": mode, "seed": 5})
    stored.save_pretrained(tmp_path, vocabulary(), max_shard_size=1000)
    found = PrefixMem.from_pretrained(tmp_path, active_levels=active_levels)
    assert torch.equal(found.memory.weight, stored.memory.weight)
    assert torch.equal(found.out_proj.weight, stored.out_proj.weight)
    ours, theirs = found.config.spec.to_dict(), stored.config.spec.to_dict()
    assert ours.pop("active_levels") == list(active_levels)
    assert theirs.pop("active_levels") == [2, 3]
    assert ours == theirs
    everywhere = encoder(spec={"mode": mode, "seed": 5})
    everywhere.load_state_dict({**everywhere.state_dict(), **dict(stored.named_parameters())})
    m, expected = found(CODES), everywhere(CODES)
    for level in (1, 2, 3):
        if level in active_levels:
            torch.testing.assert_close(m[:, level - 1], expected[:, level - 1])
            assert m[:, level - 1].any()
        else:
            assert not m[:, level - 1].any()
    assert PrefixMem.from_pretrained(tmp_path).config == stored.config


def test_other_levels_and_another_width_are_saved_again(tmp_path):
    stored = encoder(spec={"active_levels": (2, 3)})
    stored.save_pretrained(tmp_path / "one")
    found = PrefixMem.from_pretrained(tmp_path / "one", active_levels=(1,), hidden_size=48, grad="sparse", dropout=0.1)
    assert found.out_proj.weight.shape == (48, 8)
    assert found.memory.grad == "sparse"
    found.save_pretrained(tmp_path / "two")
    again = PrefixMem.from_pretrained(tmp_path / "two")
    assert again.config.spec.active_levels == (1,)
    assert again.config.hidden_size == 48
    assert torch.equal(again.memory.weight, stored.memory.weight)
    with pytest.raises(RuntimeError, match="differs in active_levels"):
        again.load_state_dict(stored.state_dict())


@pytest.mark.parametrize("active_levels", [(4,), (), (2, 1), (0,), 2, "ab"])
def test_levels_that_are_not_there(tmp_path, active_levels):
    encoder().save_pretrained(tmp_path)
    with pytest.raises((CheckpointError, TypeError, ValueError), match="active_levels"):
        PrefixMem.from_pretrained(tmp_path, active_levels=active_levels)


def test_config_with_active_levels():
    config = PrefixMemConfig(AddressSpec((8, 8, 8), table_rows=50, seed=3), 16, 24, 0.5, 0.25)
    found = config.with_active_levels([1, 3])
    assert found.spec.active_levels == (1, 3)
    assert config.spec.active_levels == (1, 2, 3)
    assert found.with_active_levels((1, 2, 3)) == config
