"""The three kinds of sequences that a model trains on (PrefixMem, arXiv 2606.00324), as token ids.

    histories     s1 s2 s3 ...                      the Semantic IDs that a user met
    interleaved   text1 s1; text2 s2; ...           the same with the text of each item before its SID
    pairs         What is s? text   /   Which item is text? s

A causal LM predicts every token of a sequence. An encoder-decoder reads all but the last part, and predicts that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...sid.catalogue import Catalogue
from ...sid.vocabulary import SIDVocabulary
from .interactions import Histories

KINDS = ("histories", "interleaved", "pairs")


@dataclass
class Tokens:
    """A catalogue as token ids.

    Attributes:
        sids: int64 ``[items, L]``.
        texts: the text of each item; None where there is none.
        start, end, pad: ids of the tokens before a sequence, after it and beside it; `start` may be None.
        phrases: what stands between them.
    """

    sids: np.ndarray
    start: int | None
    end: int
    pad: int
    texts: list[list[int]] | None = None
    phrases: dict[str, list[int]] = field(default_factory=dict)

    @property
    def levels(self) -> int:
        return self.sids.shape[1]

    @property
    def begin(self) -> list[int]:
        return [] if self.start is None else [self.start]

    def history(self, items: np.ndarray) -> list[int]:
        """The SIDs of items, one after the other."""
        return self.sids[items].reshape(-1).tolist()

    def interleaved(self, items: np.ndarray) -> list[int]:
        ids: list[int] = []
        for item in items.tolist():
            ids += [*self.texts[item], *self.phrases["is"], *self.sids[item].tolist(), *self.phrases["then"]]
        return ids

    def describe(self, item: int) -> list[int]:
        """The question whose answer is an item's text."""
        return [*self.phrases["what"], *self.sids[item].tolist(), *self.phrases["?"]]

    def find(self, item: int) -> list[int]:
        """The question whose answer is an item's SID."""
        return [*self.phrases["which"], *self.texts[item], *self.phrases["?"]]


_PHRASES = {"what": "What is ", "which": "Which item is ", "?": "? ", "is": " ", "then": "; "}


def tokens_of(
    catalogue: Catalogue,
    vocabulary: SIDVocabulary,
    tokenizer: Any,
    text: Sequence[str] | None = None,
    max_text_tokens: int = 32,
) -> Tokens:
    """Look up the tokens of a catalogue's Semantic IDs and of its text.

    Texts come from whoever names items. Where one spells a SID token or a special token, such as ``<a_7>`` or
    ``</s>``, it is read as the letters that it consists of: no text holds the id of either.

    Args:
        tokenizer: of transformers; it names the special tokens, and reads the text.
        text: one string an item, or None.
        max_text_tokens: longer texts are cut.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token, or a code has no token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token; set one")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    sids = vocabulary.encode(catalogue.codes).numpy()
    if text is None:
        return Tokens(sids, start, end, pad)
    texts = _read_texts(text, tokenizer, _reserved_ids(vocabulary, tokenizer, (start, end, pad)))
    phrases = {name: tokenizer(phrase, add_special_tokens=False)["input_ids"] for name, phrase in _PHRASES.items()}
    return Tokens(sids, start, end, pad, [ids[:max_text_tokens] for ids in texts], phrases)


def _reserved_ids(vocabulary: SIDVocabulary, tokenizer: Any, others: Sequence[int]) -> set[int]:
    """Ids of SID tokens and of special tokens; that of unknown words is not one of them unless it is another too."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    codes = vocabulary.table[:, 0].nonzero().squeeze(1).tolist()
    return {*special - {tokenizer.unk_token_id}, *codes, *others}


def _read_texts(texts: Sequence[str], tokenizer: Any, reserved: set[int]) -> list[list[int]]:
    """The ids of texts; where one spells a reserved token, a space after its first letter makes it plain text."""
    texts = list(texts)
    read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for _ in range(2):  # a space may complete another token
        found = {i: held for i, ids in enumerate(read) if (held := reserved.intersection(ids))}
        if not found:
            return read
        names = tokenizer.convert_ids_to_tokens(sorted(set().union(*found.values())))
        spelled = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)), re.IGNORECASE)
        for i in found:
            texts[i] = spelled.sub(lambda name: f"{name[0][0]} {name[0][1:]}", texts[i])
            read[i] = tokenizer(texts[i], add_special_tokens=False)["input_ids"]
    return [[token for token in ids if token not in reserved] for ids in read]


@dataclass
class Sequences:
    """One kind of sequences: `len` of them, each made anew at each visit by a generator of its own.

    Args:
        kind: one of KINDS.
        tokens: of the catalogue.
        histories: to train on.
        max_items: of one sequence; longer histories give a random window at each visit.
        encoder_decoder: whether a sequence is (source, target), for an encoder-decoder, or one list.
    """

    kind: str
    tokens: Tokens
    histories: Histories
    max_items: int
    encoder_decoder: bool = False

    def __post_init__(self) -> None:
        if self.kind != "histories" and self.tokens.texts is None:
            raise ValueError(f"the sequences {self.kind!r} need the text of the items; give text")
        shortest = 2 if self.encoder_decoder else 1
        if self.kind == "pairs":
            with_text = np.array([i for i, text in enumerate(self.tokens.texts) if text], dtype=np.int64)
            self._units = np.stack([np.repeat(with_text, 2), np.tile([0, 1], len(with_text))], 1)
        elif self.encoder_decoder:  # one for each item that has some before it
            self._units = np.array(
                [(user, stop) for user, items in enumerate(self.histories.items) for stop in range(2, len(items) + 1)],
                dtype=np.int64,
            ).reshape(-1, 2)
        else:
            self._units = np.array(
                [(user, len(items)) for user, items in enumerate(self.histories.items) if len(items) >= shortest],
                dtype=np.int64,
            ).reshape(-1, 2)
        if not len(self._units):
            lacks = "no item has a text" if self.kind == "pairs" else f"no history has {shortest} items"
            raise ValueError(f"there is no sequence {self.kind!r} to train on: {lacks}")

    def __len__(self) -> int:
        return len(self._units)

    def make(self, index: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """Source and target of a sequence; the source is empty where `encoder_decoder` is not set."""
        tokens = self.tokens
        first, second = self._units[index].tolist()
        if self.kind == "pairs":
            sid, text = tokens.sids[first].tolist(), tokens.texts[first]
            source, target = (tokens.describe(first), text) if second else (tokens.find(first), sid)
        else:
            write = tokens.history if self.kind == "histories" else tokens.interleaved
            items = self.histories.items[first][:second]
            if self.encoder_decoder:
                source, target = write(items[:-1][-self.max_items :]), tokens.sids[items[-1]].tolist()
            else:
                start = int(random.integers(len(items) - self.max_items + 1)) if len(items) > self.max_items else 0
                source, target = [], write(items[start : start + self.max_items])
        if self.encoder_decoder:
            return source, [*target, tokens.end]
        end = [tokens.end] if self.kind == "pairs" else []
        return [], [*tokens.begin, *source, *target, *end]
