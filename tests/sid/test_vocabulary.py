import pytest
import torch

from prefixmem_fast import SIDVocabulary


def test_table_and_back():
    vocabulary = SIDVocabulary.from_table({7: (1, 3), 2: (2, 0)}, (4, 5))
    assert vocabulary.table.tolist() == [[0, 0], [0, 0], [2, 0], [0, 0], [0, 0], [0, 0], [0, 0], [1, 3]]
    assert vocabulary.token_id(1, 3) == 7
    assert len(vocabulary) == 2
    assert vocabulary.token_table("cpu") is vocabulary.token_table(torch.device("cpu")), "copied once"
    with pytest.raises(KeyError, match="level 2, code 1"):
        vocabulary.token_id(2, 1)


def test_empty():
    vocabulary = SIDVocabulary.from_table({}, (4,))
    assert vocabulary.table.shape == (0, 2)
    assert vocabulary.decode(torch.tensor([[0], [7]])).tolist() == [[-1], [-1]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({-1: (1, 0)}, r"token id -1 is outside 0\.\.67108863"),
        ({5: (0, 0)}, r"token id 5 has level 0; allowed are 1\.\.2"),
        ({5: (3, 0)}, "token id 5 has level 3"),
        ({5: (2, 5)}, r"token id 5 has code 5; level 2 allows 0\.\.4"),
        ({5: (1, 2), 6: (1, 2)}, "token id 5 and token id 6 both mean level 1, code 2"),
        ({1 << 45: (1, 2)}, "token id 35184372088832 is outside"),
        ({5: (1, 2, 3)}, "token id 5 has the entry"),
        ({5: 1}, "the entry of token id 5 = 1 is not a sequence of integers"),
        ({5: (1, 1.5)}, r"the entry of token id 5\[1\] = 1.5 is not an integer"),
        ({"a": (1, 1)}, "token id = 'a' is not an integer"),
        ([(1, 2)], "tokens is a list"),
    ],
)
def test_errors(tokens, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SIDVocabulary.from_table(tokens, (4, 5))


@pytest.mark.parametrize("sizes", [(), (3.7,), "34", (-3,), None, (1 << 32,)])
def test_codebook_sizes(sizes):
    with pytest.raises((ValueError, TypeError), match="codebook_sizes"):
        SIDVocabulary.from_table({}, sizes)


def test_a_table_copied_while_serving_can_be_trained_with():
    vocabulary = SIDVocabulary.from_table({7: (1, 3)}, (4,))
    with torch.inference_mode():
        assert not vocabulary.token_table("meta").is_inference()


def test_ids_outside_the_table_are_text_where_id_0_is_a_code():
    vocabulary = SIDVocabulary.from_table({0: (1, 3)}, (4,))
    assert vocabulary.decode(torch.tensor([[0], [-1], [99]])).tolist() == [[3], [-1], [-1]]
