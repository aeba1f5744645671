"""Each kind of sequence by hand, from a catalogue of four items with two levels."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizer, PreTrainedTokenizerFast

from prefixmem_fast import Catalogue, SIDVocabulary
from prefixmem_fast.recommender.data import KINDS, Histories, Sequences, Tokens, tokens_of

START, END, PAD = 1, 2, 0
SIDS = np.array([[10, 20], [11, 21], [12, 22], [13, 23]])
TEXTS = [[30], [31, 32], [], [33]]
PHRASES = {"what": [40], "which": [41, 42], "?": [43], "is": [44], "then": [45]}


def tokens(start=START, texts=TEXTS):
    return Tokens(SIDS, start, END, PAD, texts, {} if texts is None else PHRASES)


def sequences(kind, histories=((0, 1, 3), (2,), (), (3, 0)), max_items=20, encoder_decoder=False, **options):
    items = [np.array(own, dtype=np.int64) for own in histories]
    return Sequences(
        kind, tokens(**options), Histories([str(i) for i in range(len(items))], items), max_items, encoder_decoder
    )


def every(made, seed=0):
    return [made.make(i, np.random.default_rng(seed)) for i in range(len(made))]


def test_kinds():
    assert KINDS == ("histories", "interleaved", "pairs")
    assert tokens().levels == 2


class TestCausal:
    def test_histories(self):
        assert every(sequences("histories")) == [
            ([], [START, 10, 20, 11, 21, 13, 23]),
            ([], [START, 12, 22]),
            ([], [START, 13, 23, 10, 20]),
        ]

    def test_interleaved(self):
        assert every(sequences("interleaved")) == [
            ([], [START, 30, 44, 10, 20, 45, 31, 32, 44, 11, 21, 45, 33, 44, 13, 23, 45]),
            ([], [START, 44, 12, 22, 45]),
            ([], [START, 33, 44, 13, 23, 45, 30, 44, 10, 20, 45]),
        ]

    def test_pairs_of_the_items_that_have_text(self):
        assert sorted(every(sequences("pairs"))) == sorted(
            [
                ([], [START, 40, 10, 20, 43, 30, END]),
                ([], [START, 41, 42, 30, 43, 10, 20, END]),
                ([], [START, 40, 11, 21, 43, 31, 32, END]),
                ([], [START, 41, 42, 31, 32, 43, 11, 21, END]),
                ([], [START, 40, 13, 23, 43, 33, END]),
                ([], [START, 41, 42, 33, 43, 13, 23, END]),
            ]
        )

    def test_without_a_token_before_a_sequence(self):
        assert every(sequences("histories", start=None))[1] == ([], [12, 22])
        assert ([], [40, 10, 20, 43, 30, END]) in every(sequences("pairs", start=None))

    @pytest.mark.parametrize("kind", ["histories", "interleaved"])
    def test_windows_of_long_histories(self, kind):
        whole = [0, 1, 3, 2, 1]
        made = sequences(kind, [whole, [0, 1, 3], [2, 0, 1, 3]], max_items=3)
        write = tokens().history if kind == "histories" else tokens().interleaved
        windows = [([], [START, *write(np.array(whole[i : i + 3]))]) for i in range(3)]
        random = np.random.default_rng(0)
        found = [made.make(0, random) for _ in range(90)]
        assert all(one in windows for one in found)
        assert all(found.count(window) > 15 for window in windows)  # 30 of each
        assert made.make(0, np.random.default_rng(7)) == made.make(0, np.random.default_rng(7))
        assert {tuple(made.make(2, random)[1]) for _ in range(20)} == {
            (START, *write(np.array(own))) for own in ([2, 0, 1], [0, 1, 3])
        }
        assert all(made.make(1, random) == ([], [START, *write(np.array([0, 1, 3]))]) for _ in range(5))


class TestParts:
    def test_histories(self):
        assert every(sequences("histories", encoder_decoder=True)) == [
            ([10, 20], [11, 21, END]),
            ([10, 20, 11, 21], [13, 23, END]),
            ([13, 23], [10, 20, END]),
        ]

    def test_interleaved(self):
        assert every(sequences("interleaved", encoder_decoder=True)) == [
            ([30, 44, 10, 20, 45], [11, 21, END]),
            ([30, 44, 10, 20, 45, 31, 32, 44, 11, 21, 45], [13, 23, END]),
            ([33, 44, 13, 23, 45], [10, 20, END]),
        ]

    def test_pairs(self):
        assert sorted(every(sequences("pairs", encoder_decoder=True))) == sorted(
            [
                ([40, 10, 20, 43], [30, END]),
                ([41, 42, 30, 43], [10, 20, END]),
                ([40, 11, 21, 43], [31, 32, END]),
                ([41, 42, 31, 32, 43], [11, 21, END]),
                ([40, 13, 23, 43], [33, END]),
                ([41, 42, 33, 43], [13, 23, END]),
            ]
        )

    def test_the_last_items_before_a_long_historys_target(self):
        made = sequences("histories", [[0, 1, 3, 2, 1]], max_items=2, encoder_decoder=True)
        expected = [
            ([10, 20], [11, 21, END]),
            ([10, 20, 11, 21], [13, 23, END]),
            ([11, 21, 13, 23], [12, 22, END]),
            ([13, 23, 12, 22], [11, 21, END]),
        ]
        assert every(made, seed=0) == every(made, seed=1) == expected


class TestNothingToTrainOn:
    @pytest.mark.parametrize("kind", ["interleaved", "pairs"])
    def test_without_text(self, kind):
        with pytest.raises(ValueError, match=f"the sequences '{kind}' need the text of the items; give text"):
            sequences(kind, texts=None)
        assert len(sequences("histories", texts=None)) == 3

    @pytest.mark.parametrize("kind", ["histories", "interleaved"])
    def test_without_items(self, kind):
        with pytest.raises(ValueError, match=f"no sequence '{kind}' to train on: no history has 1 items"):
            sequences(kind, [[], []])
        with pytest.raises(ValueError, match=f"no sequence '{kind}' to train on: no history has 2 items"):
            sequences(kind, [[0], [1]], encoder_decoder=True)

    def test_without_a_word_of_text(self):
        with pytest.raises(ValueError, match=r"no sequence 'pairs' to train on: no .*text"):
            sequences("pairs", texts=[[], [], [], []])


class TestTokensOf:
    WORDS = ("<pad>", "<s>", "</s>", "<unk>", "What", "Which", "is", "item", "?", ";", "red", "blue", "lamp")

    @pytest.fixture
    def catalogue(self):
        return Catalogue(["a", "b", "c"], torch.tensor([[1, 0], [0, 1], [1, 1]]))

    @pytest.fixture
    def vocabulary(self):
        return SIDVocabulary.from_table({50: (1, 0), 51: (1, 1), 61: (2, 0), 60: (2, 1)}, (2, 2))

    def tokenizer(self, **special):
        """Of words; it puts <s> and </s> around what it reads unless told not to."""
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(self.WORDS)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)

    def test_ids(self, catalogue, vocabulary):
        tokenizer = self.tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
        found = tokens_of(catalogue, vocabulary, tokenizer, ["red lamp", "", "blue red lamp blue"], max_text_tokens=3)
        assert found.sids.tolist() == [[51, 61], [50, 60], [51, 60]]
        assert (found.start, found.end, found.pad) == (1, 2, 0)
        assert found.begin == [1]
        assert found.texts == [[10, 12], [], [11, 10, 12]]
        assert found.phrases["?"] == [8]
        assert {"what", "which", "?", "is", "then"} == set(found.phrases)
        assert not {1, 2} & {token for ids in found.phrases.values() for token in ids}
        assert found.describe(0) == [*found.phrases["what"], 51, 61, 8]
        assert found.find(0) == [*found.phrases["which"], 10, 12, 8]

    def test_without_text(self, catalogue, vocabulary):
        found = tokens_of(catalogue, vocabulary, self.tokenizer(pad_token="<pad>", eos_token="</s>"))
        assert found.texts is None
        assert (found.start, found.end, found.pad) == (2, 2, 0)  # the end stands for a start that there is not
        assert tokens_of(catalogue, vocabulary, self.tokenizer(eos_token="</s>")).pad == 2

    def test_errors(self, catalogue, vocabulary):
        with pytest.raises(ValueError, match="the tokenizer has no eos_token; set one"):
            tokens_of(catalogue, vocabulary, self.tokenizer(pad_token="<pad>"))
        without = SIDVocabulary.from_table({50: (1, 0), 51: (1, 1), 61: (2, 0)}, (2, 2))
        with pytest.raises(ValueError, match=r"codes\[1, 1\] = 1: no token of level 2 stands for it"):
            tokens_of(catalogue, without, self.tokenizer(eos_token="</s>"))


class TestTextsOfThirdParties:
    """Titles that spell SID tokens and special tokens, with tokenizers of every kind."""

    TITLES = ("red <a_0><b_1> </s> lamp", "blue", "<a_0>", "</S><s>", "x<b_1>y", "<a_<a_0>0></s", "<<b_1>></s></s>")

    @pytest.fixture
    def catalogue(self):
        return Catalogue(list("abcdef"), torch.tensor([[0, 1]] * 6), (2, 2))

    def made(self, kind, catalogue, tmp_path):
        """(tokenizer, vocabulary): SID tokens added to a fast one, or among its words; or added to a slow one."""
        if kind == "slow":
            letters = {"<unk>": 0, **{letter: i for i, letter in enumerate("redblump", 1)}}
            (tmp_path / "vocab.json").write_text(json.dumps(letters))
            tokenizer = ByLetters(tmp_path / "vocab.json")
        elif kind == "words":
            words = ["<unk>", "<s>", "</s>", "<a_0>", "<a_1>", "<b_0>", "<b_1>", "red", "blue", "lamp", "<", ">", "x"]
            made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
            made.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|\s|[<>]|\w+"), "isolated")
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
            )
            return tokenizer, SIDVocabulary.from_tokenizer(tokenizer, (2, 2))
        else:
            made = Tokenizer(models.BPE(unk_token="<unk>" if kind == "lower" else None))
            made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            if kind == "lower":
                made.normalizer = normalizers.Lowercase()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False)
            made.train_from_iterator(["red lamp blue"], trainer)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
            bos, eos = (AddedToken(name, normalized=kind == "lower", special=True) for name in ("<s>", "</s>"))
            tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
        vocabulary = SIDVocabulary.extend(tokenizer, None, (2, 2))
        return tokenizer, vocabulary

    @pytest.mark.parametrize("kind", ["bpe", "lower", "words", "slow"])
    def test_no_text_holds_a_sid_or_special_token(self, kind, catalogue, tmp_path):
        tokenizer, vocabulary = self.made(kind, catalogue, tmp_path)
        raw = [tokenizer(title, add_special_tokens=False)["input_ids"] for title in self.TITLES]
        forbidden = {i for i in range(len(vocabulary.table)) if vocabulary.is_code(i)}
        forbidden |= {tokenizer.bos_token_id, tokenizer.eos_token_id}
        assert any(forbidden & set(ids) for ids in raw), "the titles are an attack on this tokenizer"
        texts = tokens_of(catalogue, vocabulary, tokenizer, self.TITLES).texts
        assert not any(forbidden & set(ids) for ids in texts)
        assert texts[1] == raw[1], "what spells none is not touched"
        if kind == "bpe":
            assert tokenizer.decode(texts[0]) == "red < a_0>< b_1> < /s> lamp"
        if kind == "lower":
            assert tokenizer.decode(texts[3]) == "< /s>< s>"

    def test_what_a_space_makes_a_token_of_is_left_out(self, catalogue, tmp_path):
        tokenizer, vocabulary = self.made("bpe", catalogue, tmp_path)
        tokenizer.add_tokens([AddedToken(name, special=True) for name in ("< s>", "<  s>")], special_tokens=True)
        texts = tokens_of(catalogue, vocabulary, tokenizer, ["red<s>"] * 6).texts
        assert tokenizer.decode(texts[0]) == "red"

    def test_unknown_words_stay(self, catalogue, tmp_path):
        tokenizer, vocabulary = self.made("words", catalogue, tmp_path)
        texts = tokens_of(catalogue, vocabulary, tokenizer, ["zzz red"] * 6).texts
        assert tokenizer.unk_token_id in texts[0]


class ByLetters(PreTrainedTokenizer):
    """A slow tokenizer, in Python, of letters."""

    vocab_files_names: ClassVar = {"vocab_file": "vocab.json"}

    def __init__(self, vocab_file, **options):
        self.letters = json.loads(Path(vocab_file).read_text())
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        super().__init__(**special | options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return self.letters | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return next((letter for letter, i in self.letters.items() if i == index), "<unk>")
