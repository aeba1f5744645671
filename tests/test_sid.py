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
    assert SIDVocabulary.from_table({}, (4,)).table.shape == (0, 2)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({-1: (1, 0)}, "token id -1 is negative"),
        ({5: (0, 0)}, r"token id 5 has level 0; allowed are 1\.\.2"),
        ({5: (3, 0)}, "token id 5 has level 3"),
        ({5: (2, 5)}, r"token id 5 has code 5; level 2 allows 0\.\.4"),
        ({5: (1, 2), 6: (1, 2)}, "token ids 5 and 6 both mean level 1, code 2"),
    ],
)
def test_errors(tokens, message):
    with pytest.raises(ValueError, match=message):
        SIDVocabulary.from_table(tokens, (4, 5))
