import json
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixmem_fast import (
    CheckpointError,
    PrefixMem,
    SIDLogitsProcessor,
    SIDTrie,
    SIDVocabulary,
    attach,
)
from prefixmem_fast.encoder import SIDTransformer, SIDTransformerConfig, saving
from prefixmem_fast.encoder.saving import kind_of_encoder
from prefixmem_fast.huggingface.attach import detach
from tests.helpers.examples import catalogue
from tests.helpers.models import HIDDEN, SIZES, encoder, prompts, sid, tiny_model, vocabulary

ARGUMENTS = {"codebook_sizes": SIZES, "hidden_size": HIDDEN, "width": 16, "layers": 2, "heads": 2}


def made(**changes):
    """A new one, with weights large enough that order, levels and attention all show."""
    torch.manual_seed(1)
    module = SIDTransformer(SIDTransformerConfig(**{**ARGUMENTS, **changes}))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@cache
def known(active_levels=None):
    """One that no test changes."""
    return made(active_levels=active_levels).requires_grad_(False)


def plain(module, codes):
    """What one SID, a list of codes, is encoded as: ``[L, hidden_size]``, with the arithmetic written out."""
    config = module.config
    alive = 0
    while alive < config.levels and 0 <= codes[alive] < config.codebook_sizes[alive]:
        alive += 1
    out = torch.zeros(config.levels, config.hidden_size)
    starts = [sum(config.codebook_sizes[:l]) for l in range(config.levels)]
    x = [module.codes.weight[starts[l] + codes[l]] + module.levels.weight[l] for l in range(alive)]
    size = config.width // config.heads
    for layer in module.layers:
        attention, normed = layer.self_attn, [normalise(v, layer.norm1) for v in x]
        q, k, v = (
            [w @ n + b for n in normed]
            for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        )
        for l in range(alive):
            heads = []
            for h in range(config.heads):
                part = slice(h * size, (h + 1) * size)
                weight = torch.stack([q[l][part] @ k[m][part] / math.sqrt(size) for m in range(l + 1)]).softmax(0)
                heads.append(sum(weight[m] * v[m][part] for m in range(l + 1)))
            x[l] = x[l] + attention.out_proj.weight @ torch.cat(heads) + attention.out_proj.bias
        for l in range(alive):
            inner = layer.linear1.weight @ normalise(x[l], layer.norm2) + layer.linear1.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            x[l] = x[l] + layer.linear2.weight @ inner + layer.linear2.bias
    for level in config.active_levels:
        if level <= alive:
            out[level - 1] = module.out_proj.weight @ normalise(x[level - 1], module.norm)
    return out


def normalise(x, norm):
    x = x - x.mean()
    return x / torch.sqrt((x * x).mean() + norm.eps) * norm.weight + norm.bias


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


code = st.one_of(*[st.integers(0, 3)] * 4, st.sampled_from((-1, 4, 5, 6, -(2**40), 2**40)))


@pytest.mark.parametrize("active_levels", [None, (2,), (1, 3)])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_forward_is_the_plain_computation(active_levels, training):
    module = made(active_levels=active_levels, heads=4).train(training)
    codes = torch.stack([torch.randint(0, size, (12,)) for size in SIZES], 1)
    codes[3, 1], codes[4, 0], codes[5, 2], codes[6, 1] = 5, -1, 6, -(2**40)
    expected = torch.stack([plain(module, row) for row in codes.tolist()])
    close(module(codes), expected)
    assert len(expected[:, (active_levels or (3,))[0] - 1].unique(dim=0)) > 3
    close(module(codes.view(3, 2, 2, 3)), expected.view(3, 2, 2, 3, HIDDEN))
    close(module(codes[0]), expected[0])
    close(module(codes.clamp(-9, 9).to(torch.int16)), expected)


def test_shapes_without_sids():
    module = made()
    for shape in ((0,), (2, 0), (0, 4)):
        for mode in (True, False):
            assert module.train(mode)(torch.zeros(*shape, 3, dtype=torch.int64)).shape == (*shape, 3, HIDDEN)
    assert not module(torch.full((2, 3), -1)).any()


@given(st.lists(code, min_size=3, max_size=3), st.lists(code, min_size=3, max_size=3), st.integers(1, 2))
def test_later_codes_change_nothing_before(one, other, kept):
    module = known()
    codes = torch.tensor([one, [*one[:kept], *other[kept:]]])
    first, second = module(codes)
    torch.testing.assert_close(first[:kept], second[:kept])  # some processors round the rows of one product differently


def test_a_later_output_knows_the_codes_before():
    module = made()
    m = module(torch.tensor([[0, 1, 2], [1, 1, 2], [0, 3, 2]]))
    assert (m[0, 2] - m[1, 2]).abs().max() > 0.1
    assert (m[0, 2] - m[2, 2]).abs().max() > 0.1
    swapped = made(codebook_sizes=(5, 5, 6))(torch.tensor([[0, 1, 2], [1, 0, 2]]))
    assert (swapped[0, 2] - swapped[1, 2]).abs().max() > 0.1, "a code means something else at another level"


@given(st.integers(0, 2), st.sampled_from((-1, 100)), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_zero_from_an_invalid_code_on(place, wrong, codes):
    module, broken = known(), list(codes)
    broken[place] = wrong
    m, whole = module(torch.tensor([broken, codes]))
    assert not m[place:].any()
    torch.testing.assert_close(m[:place], whole[:place])
    assert all(row.any() for row in whole)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.int64), r"codes has shape \(2, 6\); its last dimension must be the 3 levels"),
        (torch.zeros(2, 3), "codes has dtype torch.float32"),
    ],
)
def test_codes_that_are_none(codes, message):
    for module in (encoder(), made()):
        with pytest.raises((TypeError, ValueError), match=message):
            module(codes)


# Over token streams

_TEXT = st.sampled_from((0, 5, 9, -100, 10_000))
_TOKEN = st.tuples(st.integers(1, 3), st.sampled_from((0, 1, 3)))
_PART = st.one_of(
    st.tuples(*[st.sampled_from((0, 1, 3))] * 3).map(lambda codes: sid(*codes)),
    st.tuples(*[st.sampled_from((0, 1, 3))] * 2).map(lambda codes: sid(*codes)),
    _TEXT.map(lambda token: [token]),
    _TOKEN.map(lambda entry: [vocabulary().token_id(*entry)]),
)


@st.composite
def streams(draw):
    """Rows of tokens: SIDs whole and broken, text, and where packed sequences begin."""
    rows = [
        [token for part in draw(st.lists(_PART, max_size=5)) for token in part] for _ in range(draw(st.integers(1, 3)))
    ]
    length = draw(st.integers(0, max(map(len, rows))))
    rows = [(row + [5] * length)[:length] for row in rows]
    segments = [draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)) for _ in rows]
    shape = (len(rows), length)
    return torch.tensor(rows).long().view(shape), torch.tensor(segments).long().view(shape)


def codes_up_to(row, place, segments, table):
    """The codes of the SID that the token at `place` belongs to, up to it; none for text and broken SIDs."""
    entries = [table[token] if 0 <= token < len(table) else [0, 0] for token in row]
    level = entries[place][0]
    window = range(place - level + 1, place + 1)
    if not level or window[0] < 0 or [entries[t][0] for t in window] != list(range(1, level + 1)):
        return []
    return [] if len({segments[t] for t in window}) > 1 else [entries[t][1] for t in window]


@given(streams(), st.booleans(), st.sampled_from((None, (2,), (1, 3))), st.integers(0, 20))
def test_tokens_are_encoded_as_their_sids(stream, packed, active_levels, new_tokens):
    module = known(active_levels)
    input_ids, segments = stream
    given = segments if packed else None
    # A segment's number may come again later: what counts is where it changes.
    runs = (segments.diff(dim=1, prepend=segments[:, :1]) != 0).cumsum(1) if packed else torch.zeros_like(segments)
    expected, table = torch.zeros(*input_ids.shape, HIDDEN), vocabulary().table.tolist()
    for b, row in enumerate(input_ids.tolist()):
        codes = [codes_up_to(row, t, runs[b].tolist(), table) for t in range(len(row))]
        m = module(torch.tensor([[*found, *[-1] * (3 - len(found))] for found in codes]).long().view(-1, 3))
        for t, found in enumerate(codes):
            if found:
                expected[b, t] = m[t, len(found) - 1]
    found = module.encode_tokens(input_ids, vocabulary(), given)
    close(found, expected)
    new_tokens = min(new_tokens, input_ids.shape[1])
    last = module.encode_tokens(input_ids, vocabulary(), given, new_tokens=new_tokens)
    assert torch.equal(last, found[:, found.shape[1] - new_tokens :])


def test_a_stream_by_hand():
    module = made(active_levels=(1, 2))
    input_ids = torch.tensor(
        [[5, *sid(1, 3, 4), *sid(0, 1), 9, sid(0, 0, 5)[2]], [*sid(3), *sid(3, 0, 0), 7, 7, *sid(1)] + [6]]
    )
    whole, begun, other = (module(torch.tensor(codes)) for codes in ([1, 3, 4], [0, 1, -1], [3, 0, 0]))
    m = module.encode_tokens(input_ids, vocabulary())
    close(m[0, 1:4], whole)
    close(m[0, 4:6], begun[:2])
    close(m[1, 1:4], other)
    close(m[1, 0], other[0])
    assert not m[0, [0, 3, 6, 7]].any()
    assert not m[1, [3, 4, 5, 7]].any()
    assert m[1, 6].any()
    cut = module.encode_tokens(input_ids, vocabulary(), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0] * 8]))
    close(cut[0, 1], whole[0])
    assert not cut[0, 2:4].any(), "the SID is cut by a segment"
    close(cut[0, 4:], m[0, 4:])


@pytest.mark.parametrize("shape", [(2, 0), (0, 4), (0, 0), (2, 4)])
@pytest.mark.parametrize("new_tokens", [None, 0])
def test_batches_without_sids(shape, new_tokens):
    for module in (encoder(), made()):
        m = module.encode_tokens(torch.full(shape, 5), vocabulary(), new_tokens=new_tokens)
        assert m.shape == (shape[0], shape[1] if new_tokens is None else 0, HIDDEN)
        assert not m.any()
        (m.sum() + 0.0).backward()


def test_token_streams_that_are_none():
    other = SIDVocabulary.from_table({0: (1, 0)}, (8, 8))
    ids = torch.zeros(2, 4, dtype=torch.int64)
    for module in (encoder(), made()):
        with pytest.raises(ValueError, match=r"codebook_sizes \(8, 8\) differ from the encoder's \(4, 5, 6\)"):
            module.encode_tokens(ids, other)
        with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 3\)"):
            module.encode_tokens(ids, vocabulary(), ids[:, :3])
        with pytest.raises(ValueError, match=r"input_ids has shape \(4,\); give \[B, T\]"):
            module.encode_tokens(ids[0], vocabulary())


def test_every_weight_learns():
    module = made()
    input_ids = torch.tensor([[*sid(1, 3, 4), 5, *sid(0, 1, 5)]])
    (module.encode_tokens(input_ids, vocabulary()) ** 2).sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())
    used = module.codes.weight.grad.abs().sum(1).nonzero().squeeze(1).tolist()
    assert used == [0, 1, 4 + 1, 4 + 3, 9 + 4, 9 + 5], "the rows of the codes that were read, level behind level"


# What it is made of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_sizes": ()}, "codebook_sizes is empty"),
        ({"codebook_sizes": (4, 0)}, r"codebook_sizes\[1\] = 0 is not positive"),
        ({"codebook_sizes": 5}, "codebook_sizes = 5 is not a sequence"),
        ({"codebook_sizes": (4, 2.5)}, r"codebook_sizes\[1\] = 2.5 is not an integer"),
        ({"hidden_size": 0}, "hidden_size = 0 is not positive"),
        ({"hidden_size": None}, "hidden_size = None is not an integer"),
        ({"width": 18, "heads": 4}, "width = 18 is no multiple of heads = 4"),
        ({"width": -16}, "width = -16 is not positive"),
        ({"layers": 0}, "layers = 0 is not positive"),
        ({"heads": 1.5}, "heads = 1.5 is not an integer"),
        ({"active_levels": (4,)}, r"active_levels = \(4,\) is not allowed; give strictly increasing levels of 1..3"),
        ({"active_levels": ()}, r"active_levels = \(\) is not allowed"),
        ({"active_levels": 2}, "active_levels = 2 is not a sequence"),
        ({"output_init_std": -1.0}, "output_init_std = -1.0"),
        ({"output_init_std": float("nan")}, "output_init_std = nan"),
        ({"output_init_std": "a"}, "output_init_std = 'a'"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SIDTransformerConfig(**{**ARGUMENTS, **changes})


def test_config():
    config = SIDTransformerConfig([4, 5, 6], 32, active_levels=[1, 3])
    assert config.codebook_sizes == (4, 5, 6)
    assert config.active_levels == (1, 3)
    assert (config.levels, config.memory_dim, config.layers) == (3, 128, 4)
    assert SIDTransformerConfig([4, 5, 6], 32).active_levels == (1, 2, 3)
    assert SIDTransformerConfig.from_dict(config.to_dict()) == config
    assert SIDTransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong in ({}, encoder().config.to_dict(), {**config.to_dict(), "kind": "prefixmem"}):
        with pytest.raises(ValueError, match="not one of a SID-Transformer"):
            SIDTransformerConfig.from_dict(wrong)


def test_it_starts_near_zero():
    torch.manual_seed(0)
    module = SIDTransformer(SIDTransformerConfig((300,) * 3, 64))
    assert 0.0009 < module.out_proj.weight.std() < 0.0011
    assert 0.019 < module.codes.weight.std() < 0.021
    assert 0.015 < module.levels.weight.std() < 0.025
    assert module.out_proj.bias is None
    assert len(module.layers) == 4
    module.out_proj.weight.data.fill_(3.0)
    module.reset_output()
    assert module.out_proj.weight.abs().max() < 0.01
    zero = SIDTransformer(SIDTransformerConfig(**ARGUMENTS, output_init_std=0.0))
    assert not zero(torch.zeros(1, 3, dtype=torch.int64)).any()
    assert SIDTransformer(SIDTransformerConfig(**ARGUMENTS), dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["2GB", 700])
def test_saved_and_loaded(tmp_path, dtype, size):
    module = made(active_levels=(1, 3)).to(dtype)
    module.save_pretrained(tmp_path, vocabulary(), max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == 700)
    found = SIDTransformer.from_pretrained(tmp_path)
    assert found.config == module.config
    assert list(found.state_dict()) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
        assert found.state_dict()[name].dtype == dtype
    codes = torch.tensor([[1, 3, 4], [0, 1, -1]])
    assert torch.equal(found(codes), module(codes))
    assert SIDVocabulary.from_pretrained(tmp_path) == vocabulary()
    assert SIDTransformer.from_pretrained(tmp_path, dtype=torch.float64).codes.weight.dtype == torch.float64
    found(codes).sum().backward()


def test_a_new_width_starts_w_out_afresh(tmp_path):
    module = made(output_init_std=2.0)
    module.save_pretrained(tmp_path)
    found = SIDTransformer.from_pretrained(tmp_path, hidden_size=48)
    assert found.config.hidden_size == 48
    assert found.out_proj.weight.shape == (48, 16)
    assert 1.8 < found.out_proj.weight.std() < 2.2, "the config's output_init_std is 2"
    for name, tensor in module.named_parameters():
        if name != "out_proj.weight":
            assert torch.equal(dict(found.named_parameters())[name], tensor)
    assert torch.equal(SIDTransformer.from_pretrained(tmp_path, hidden_size=32).out_proj.weight, module.out_proj.weight)


def test_weights_are_read_into_another(tmp_path):
    module, other = made(), made()
    torch.nn.init.zeros_(other.codes.weight)
    module.save_pretrained(tmp_path)
    saving.load_weights(other, tmp_path)
    assert torch.equal(other.codes.weight, module.codes.weight)
    with pytest.raises(CheckpointError, match="it differs in layers"):
        saving.load_weights(made(layers=1), tmp_path)


def test_each_folder_says_what_it_holds(tmp_path):
    made().save_pretrained(tmp_path / "sid")
    encoder().save_pretrained(tmp_path / "memory")
    assert kind_of_encoder(tmp_path / "sid") == "sid-transformer"
    assert kind_of_encoder(tmp_path / "memory") == "prefixmem"
    with pytest.raises(CheckpointError, match=r"memory.config\.json: the config is not one of a SID-Transformer"):
        SIDTransformer.from_pretrained(tmp_path / "memory")
    with pytest.raises(CheckpointError, match=r"sid.config\.json: .*(sid-transformer|SID-?Transformer)"):
        PrefixMem.from_pretrained(tmp_path / "sid")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        kind_of_encoder(tmp_path / "nothing")


def test_levels_are_exchanged_as_for_prefixmem(tmp_path):
    """Or refused by name: never an AttributeError."""
    made().save_pretrained(tmp_path)
    try:
        found = SIDTransformer.from_pretrained(tmp_path, active_levels=(1, 2))
    except (TypeError, ValueError) as error:
        assert "active_levels" in str(error)  # noqa: PT017
    else:
        assert found.config.active_levels == (1, 2)
        assert torch.equal(found.codes.weight, made().codes.weight)


def test_a_damaged_file_is_refused(tmp_path):
    made().save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        SIDTransformer.from_pretrained(tmp_path)


# On a model


def attached():
    return attach(tiny_model(), made(active_levels=(1, 2)), vocabulary()).eval()


def test_attached_it_is_added_to_the_embeddings():
    model, bare = attached(), tiny_model()
    ids = prompts()["input_ids"]
    embeds = bare.get_input_embeddings()(ids) + made(active_levels=(1, 2)).encode_tokens(ids, vocabulary())
    with torch.no_grad():
        found, expected = model(ids).logits, bare(inputs_embeds=embeds).logits
        close(found, expected)
        assert (found - bare(ids).logits).abs().max() > 0.1
    assert isinstance(detach(model), SIDTransformer)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare(ids).logits)


@pytest.mark.parametrize("constrained", [True, False])
def test_generation_with_a_cache_is_that_without(constrained):
    """Greedy from prompts that end inside SIDs, against a forward over everything for each token."""
    model, inputs = attached(), prompts()
    processors = [SIDLogitsProcessor(SIDTrie(catalogue(), vocabulary()), 8, 2)] if constrained else []
    found = model.generate(
        **inputs, do_sample=False, max_new_tokens=5, eos_token_id=None, use_cache=True, logits_processor=processors
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(5):
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            scores = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        for processor in processors:
            scores = processor(ids, scores)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(found, ids)
    if constrained:
        assert vocabulary().decode(found[0, 8:11]).tolist() in catalogue().codes.tolist()


def test_a_cache_fed_token_by_token():
    """SIDs that come one token at a time behind a cache are encoded as they are in one piece."""
    model = attached()
    ids = torch.tensor([[5, *sid(1, 3, 4), 9, *sid(0, 1, 5)], [*sid(3, 0, 0), *sid(1, 0, 1), 7, *sid(3)]])
    with torch.no_grad():
        whole, cache, pieces = model(ids).logits, None, []
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    close(torch.cat(pieces, 1), whole)


def test_saved_with_a_model(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    assert kind_of_encoder(tmp_path) == "sid-transformer"
    found = SIDTransformer.from_pretrained(tmp_path)
    assert found.config == model.prefixmem.config
    for name, tensor in model.prefixmem.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name], tensor)


def test_attach_checks_it():
    with pytest.raises(ValueError, match="the encoder has hidden_size = 48 and the model's embeddings have 32"):
        attach(tiny_model(), made(hidden_size=48), vocabulary())
    with pytest.raises(ValueError, match="codebook_sizes"):
        attach(tiny_model(), made(codebook_sizes=(4, 5)), vocabulary())
