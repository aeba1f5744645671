import json
import os

import pytest
import torch

from prefixmem_fast import Catalogue
from prefixmem_fast.recommender.data import load_item_text


@pytest.fixture
def load(tmp_path):
    catalogue = Catalogue(["2", "a", "1"], torch.arange(3)[:, None])

    def read(content, **options):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "text.json").write_bytes(raw)
        return load_item_text(tmp_path / "text.json", catalogue, **options)

    return read


def test_texts_stand_in_the_order_of_the_catalogue(load):
    assert load({"1": "one", "a": "letter", "2": "two", "other": 7}) == ["two", "letter", "one"]


def test_fields(load):
    content = {"1": {"title": "one", "brand": "uno"}, "2": {"title": "two"}, "a": {"brand": "alpha"}}
    assert load(content) == ["two", "", "one"]
    assert load(content, field="brand") == ["", "alpha", "uno"]
    assert load({"1": {"title": "one"}, "2": "two"}) == ["two", "", "one"]
    assert load({"1": {"title": "one"}, "2": {"title": None}}) == ["", "", "one"]


def test_a_text_is_one_line(load):
    assert load({"1": "  one\n\ttwo  three\r\n", "2": "  "}) == ["", "", "one two three"]
    assert load({"1": "café — 電"}) == ["", "", "café — 電"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"1": "one"', r"text .*text\.json: it is not JSON \(.*line 1"),
        (b"\xff", r"text .*text\.json: it is not JSON \(.*utf-8"),
        (["one"], r'text .*text\.json: it holds a list; \{"item": "text"\} was expected'),
        (b'{"1": "one", "1": "two"}', r"text .*text\.json: .*key '1' is there twice; name each key once"),
        (b'{"1": {"title": "a", "title": "b"}}', "key 'title' is there twice"),
        (b'{"1": ' + b"[" * 100_000, r"text .*text\.json: .*nested too deeply"),
        ({"1": ["long" * 12_500]}, r"key '1' has \['longlong.{,80}\]; a string"),
        ({"1": 7}, "key '1' has 7; a string, or an object with 'title', was expected"),
        ({"1": "one", "a": {"title": ["x"]}}, r"key 'a' has \['x'\]; a string, or an object with 'title'"),
        ({}, r"text .*text\.json: no item of the index has a 'title' in it; check text_field and the item names"),
        ({"elsewhere": "text"}, "no item of the index has a 'title' in it"),
        ({"1": {"name": "one"}, "2": " "}, "no item of the index has a 'title' in it"),
    ],
)
def test_errors(content, message, load):
    with pytest.raises(ValueError, match=message):
        load(content)


def test_the_field_is_named(load):
    with pytest.raises(ValueError, match="key '1' has 3; a string, or an object with 'brand', was expected"):
        load({"1": {"brand": 3}}, field="brand")
    with pytest.raises(ValueError, match="no item of the index has a 'brand' in it"):
        load({"1": {"title": "one"}}, field="brand")


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"text .*none\.json is not there; give a \.json file"):
        load_item_text(tmp_path / "none.json", Catalogue(["a"], torch.zeros(1, 1, dtype=torch.int64)))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "text.json")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        load_item_text(tmp_path / "text.json", Catalogue(["a"], torch.zeros(1, 1, dtype=torch.int64)))
