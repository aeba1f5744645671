import pytest

from prefixmem_fast import SIDVocabulary
from prefixmem_fast.sid import KNOWN_FORMATS, TokenFormat
from tests.helpers.tokenizers import tokenizer


@pytest.mark.parametrize(
    ("template", "token", "entry"),
    [
        ("<{letter}_{code}>", "<b_12>", (2, 12)),
        ("<s_{letter}_{code}>", "<s_a_340>", (1, 340)),
        ("<C{level0}_{code}>", "<C0_12>", (1, 12)),
        ("<item_L{level0}_C{code}>", "<item_L2_C7>", (3, 7)),
        ("<|sid_{number}|>", "<|sid_700|>", (2, 188)),
        ("[{level}:{code}]", "[3:0]", (3, 0)),
    ],
)
def test_written_and_read(template, token, entry):
    form = TokenFormat(template, (512, 512, 512))
    assert form.read(token) == entry
    assert form.write(*entry) == token
    for other in ("the", "<z>", token + "x", "x" + token, "<a_>", ""):
        assert form.read(other) is None


def test_numbers_beyond_all_codebooks_are_no_codes():
    form = TokenFormat("<|sid_{number}|>", (3, 2))
    assert [form.read(f"<|sid_{n}|>") for n in range(6)] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), None]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<{code}>", r"has the fields \['code'\]; give \{code\} with one of"),
        ("<a_1>", r"has the fields \[\]"),
        ("<{letter}_{code}_{code}>", "has the fields"),
        ("<|sid_{number}|>", "numbers all levels in one row; give codebook_sizes too"),
        (7, "token_format = 7 is a int"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TokenFormat(template)


@pytest.mark.parametrize("template", KNOWN_FORMATS)
def test_a_tokenizer_is_recognised(template):
    sizes = (3, 2, 4)
    form = TokenFormat(template, sizes)
    names = [form.write(level, code) for level, size in enumerate(sizes, 1) for code in range(size)]
    one = tokenizer(["item", *reversed(names[:4]), "and", *names[5:], "<sid_begin>"])  # unordered, one missing
    found = SIDVocabulary.from_tokenizer(one, sizes)
    assert len(found) == len(names) - 1
    for level, size in enumerate(sizes, 1):
        for code in range(size):
            name = form.write(level, code)
            if name == names[4]:
                with pytest.raises(KeyError, match="no token stands for level 2, code 1"):
                    found.token_id(level, code)
            else:
                assert found.token_id(level, code) == one.convert_tokens_to_ids(name)
    found.check_tokenizer(one)


def test_sizes_come_from_the_tokens():
    assert SIDVocabulary.from_tokenizer(tokenizer(["<a_0>", "<a_9>", "<b_1>"])).codebook_sizes == (10, 2)
    one = tokenizer(["x", "y"])
    listed = SIDVocabulary.from_tokenizer(one, tokens={"x": (1, 4), "y": (2, 0)})
    assert listed.codebook_sizes == (5, 1)
    assert listed.text([4, 0]) == "xy"


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["the"], {}, "none of the 4 tokens is a Semantic ID token of a known format"),
        (
            ["<a_0>", "<C1_3>"],
            {},
            r"several formats: <\{letter\}_\{code\}> \(<a_0>\), <C\{level0\}_\{code\}>",
        ),
        (["<a_0>", "<c_0>"], {}, r"have the levels \[1, 3\] \(<c_0> is of level 3\)"),
        (["<a_1>", "<a_01>"], {}, r"token id 3 \(<a_1>\) and token id 4 \(<a_01>\) both mean level 1, code 1"),
        (["<a_1>", "<a_7>"], {"codebook_sizes": (5,)}, r"token id 4 \(<a_7>\) has code 7; level 1 allows 0\.\.4"),
        (["<a_1>", "<b_7>"], {"codebook_sizes": (5,)}, r"token id 4 \(<b_7>\) has level 2; allowed are 1\.\.1"),
        (["x"], {"token_format": "<{letter}_{code}>"}, "no token of the tokenizer has the form"),
        (["x"], {"tokens": {"y": (1, 1)}}, "the tokenizer has no token 'y'"),
    ],
)
def test_errors_name_the_token(words, options, message):
    with pytest.raises(ValueError, match=message):
        SIDVocabulary.from_tokenizer(tokenizer(words), **options)


def test_no_tokenizer():
    with pytest.raises(TypeError, match="tokenizer is a dict"):
        SIDVocabulary.from_tokenizer({})
