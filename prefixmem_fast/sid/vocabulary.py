"""Semantic ID vocabulary: which token id stands for which code of which level."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks, checkpoint
from .._inputs import clipped
from ..addressing.spec import MOST_LEVELS
from ..addressing.token_stream import token_entries
from .formats import KNOWN_FORMATS, TokenFormat, recognise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# 512 MiB of table; the largest vocabularies have a few million ids.
_MOST_IDS = 1 << 26


class SIDVocabulary:
    """Maps token ids to (level, code) and back. Every id it does not know is text.

    Token ids need not be arithmetic: codes may be missing, and ids may stand in any order.

    Attributes:
        codebook_sizes: K_1 .. K_L.
        table: int32 ``[V, 2]`` on the CPU, (level, code) of the ids 0 .. V - 1; level 0 is text.
        names: the token of each id, where a tokenizer gave them.
    """

    def __init__(
        self, ids: Mapping[tuple[int, int], int], codebook_sizes: Sequence[int], names: Mapping[int, str] | None = None
    ) -> None:
        """`ids` maps (level, code) to token ids and is taken as it is; `from_table` checks what users give."""
        self.codebook_sizes = tuple(codebook_sizes)
        self.names = dict(names or {})
        self.table = torch.zeros((max(ids.values(), default=-1) + 1, 2), dtype=torch.int32)
        if ids:
            self.table[list(ids.values())] = torch.tensor(list(ids), dtype=torch.int32)
        self._ids = dict(ids)
        self._by_code: list[tuple[Tensor, Tensor]] = []  # codes of each level, ascending, and their ids
        of_level: list[list[tuple[int, int]]] = [[] for _ in self.codebook_sizes]
        for (level, code), token in ids.items():
            of_level[level - 1].append((code, token))
        for pairs in map(sorted, of_level):
            self._by_code.append(tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()))
        self._on_device: dict[torch.device, Tensor] = {}

    @classmethod
    def from_table(
        cls,
        tokens: Mapping[int, tuple[int, int]],
        codebook_sizes: Sequence[int],
        names: Mapping[int, str] | None = None,
    ) -> SIDVocabulary:
        """A vocabulary from an explicit table ``{token_id: (level, code)}``; levels count from 1, codes from 0.

        Codes that never occur may be missing.

        Raises:
            TypeError: something is not an integer, a pair or a mapping.
            ValueError: an id, level or code is out of range, or two ids share one (level, code).
        """
        sizes = _checks.codebook_sizes(codebook_sizes)
        if len(sizes) > MOST_LEVELS:
            raise ValueError(f"codebook_sizes has {len(sizes)} levels; give {MOST_LEVELS} at most")
        if max(sizes) > 1 << 31:
            raise ValueError(f"codebook_sizes = {sizes}; a level of a vocabulary has at most 2^31 codes")
        if not isinstance(tokens, Mapping):
            raise TypeError(f"tokens is a {type(tokens).__name__}; give a dict {{token_id: (level, code)}}")
        owner: dict[tuple[int, int], int] = {}
        names = dict(names or {})

        def call(token: int) -> str:
            return f"token id {token}" + (f" ({names[token]})" if token in names else "")

        for token, entry in tokens.items():
            token = _checks.integer("token id", token)
            if not 0 <= token < _MOST_IDS:
                raise ValueError(f"{call(token)} is outside 0..{_MOST_IDS - 1}")
            entry = _checks.integers(f"the entry of {call(token)}", entry)
            if len(entry) != 2:
                raise ValueError(f"{call(token)} has the entry {entry}; give (level, code)")
            level, code = entry
            if not 1 <= level <= len(sizes):
                raise ValueError(f"{call(token)} has level {level}; allowed are 1..{len(sizes)}")
            if not 0 <= code < sizes[level - 1]:
                raise ValueError(f"{call(token)} has code {code}; level {level} allows 0..{sizes[level - 1] - 1}")
            if entry in owner:
                raise ValueError(f"{call(owner[entry])} and {call(token)} both mean level {level}, code {code}")
            owner[entry] = token
        return cls(owner, sizes, names)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        codebook_sizes: Sequence[int] | None = None,
        *,
        token_format: str | None = None,
        tokens: Mapping[str, tuple[int, int]] | None = None,
    ) -> SIDVocabulary:
        """Recognise the SID tokens that a tokenizer has.

        Args:
            tokenizer: any tokenizer with ``get_vocab()``.
            codebook_sizes: K_1 .. K_L; one more than the largest code of each level unless given.
            token_format: a template, see `TokenFormat`; recognised among `KNOWN_FORMATS` unless given.
            tokens: instead of a template, the tokens one by one: ``{"<a_1>": (level, code)}``.

        Raises:
            TypeError, ValueError: no token is recognised, several formats are there, a level has none, two tokens
                mean one code, or a code is out of range; the message names the token.
        """
        ids = _vocabulary_of(tokenizer)
        if tokens is not None:
            missing = [token for token in tokens if token not in ids]
            if missing:
                raise ValueError(f"the tokenizer has no token {missing[0]!r}; SIDVocabulary.extend adds tokens")
            entries = {token: _checks.integers(f"the entry of {token!r}", entry) for token, entry in tokens.items()}
        else:
            form = TokenFormat(token_format, codebook_sizes) if token_format else recognise(ids, codebook_sizes)
            entries = {token: entry for token in ids if (entry := form.read(token)) is not None}
            if not entries:
                raise ValueError(f"no token of the tokenizer has the form {form.template}")
        if codebook_sizes is None:
            codebook_sizes = _observed_sizes(entries)
        table = {ids[token]: entry for token, entry in entries.items()}
        return cls.from_table(table, codebook_sizes, {ids[token]: token for token in entries})

    @classmethod
    def extend(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel | None,
        codebook_sizes: Sequence[int],
        *,
        codes: Tensor | None = None,
        token_format: str = KNOWN_FORMATS[0],
        noise: float = 0.1,
        pad_to_multiple_of: int | None = None,
    ) -> SIDVocabulary:
        """Add SID tokens to a tokenizer and rows for them to a model.

        The new rows of the input embedding, and of an output layer of its own, start from the mean of the old rows
        plus normal noise, so that the model begins close to where it was and the codes are told apart.

        Args:
            tokenizer: of transformers; tokens are added in place, level by level, in the order of the codes.
            model: its embeddings grow in place, if they have too few rows for the new tokens; None leaves it out.
            codebook_sizes: K_1 .. K_L.
            codes: integer ``[items, L]``; with it, only codes that occur get a token.
            token_format: a template, see `TokenFormat`.
            noise: standard deviation of the noise, in units of the root mean square of the old rows.
            pad_to_multiple_of: of `resize_token_embeddings`.

        Raises:
            TypeError, ValueError: an argument is not as stated, the tokenizer has one of the tokens already, or it
                would not read them back as single tokens; nothing has been changed then.
        """
        sizes = _checks.codebook_sizes(codebook_sizes)
        form = TokenFormat(token_format, sizes)
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
            raise ValueError(f"noise = {noise!r} is not a finite number of 0 or more")
        if model is not None and not hasattr(model, "resize_token_embeddings"):
            raise TypeError(f"model is a {type(model).__name__}; give a model of transformers, or None")
        entries = [(l, code) for l in range(1, len(sizes) + 1) for code in _codes_of_level(l, sizes, codes)]
        names = [form.write(*entry) for entry in entries]
        ids = _add_tokens(copy.deepcopy(tokenizer), names)  # a try: tokenizers cannot take tokens back
        old = len(tokenizer)
        _add_tokens(tokenizer, names)
        if model is not None:
            _grow(model, max(ids) + 1, old, torch.tensor(ids), noise, pad_to_multiple_of)
        return cls(dict(zip(entries, ids, strict=True)), sizes, dict(zip(ids, names, strict=True)))

    def __len__(self) -> int:
        """Number of SID tokens."""
        return len(self._ids)

    def __repr__(self) -> str:
        return f"SIDVocabulary(tokens={len(self)}, codebook_sizes={self.codebook_sizes})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SIDVocabulary):
            return NotImplemented
        return self.codebook_sizes == other.codebook_sizes and self._ids == other._ids

    __hash__ = None  # type: ignore[assignment]

    def is_code(self, token: int) -> bool:
        """Whether a token id stands for a code."""
        return 0 <= token < len(self.table) and bool(self.table[token, 0] > 0)

    def token_id(self, level: int, code: int) -> int:
        """Token id of a code.

        Raises:
            KeyError: no token stands for it.
        """
        try:
            return self._ids[level, code]
        except KeyError:
            raise KeyError(f"no token stands for level {level}, code {code}") from None

    def encode(self, codes: Tensor) -> Tensor:
        """Token ids, int64 ``[..., L]``, of integer codes ``[..., L]``.

        Raises:
            TypeError, ValueError: the shape is another, or no token stands for a code; the message says where.
        """
        if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dim() < 1:
            raise TypeError("codes is not an integer tensor [..., L]")
        if codes.shape[-1] != len(self.codebook_sizes):
            raise ValueError(f"codes has shape {tuple(codes.shape)}; the last is the {len(self.codebook_sizes)} levels")
        ids = torch.full_like(codes, -1, dtype=torch.int64)
        for l, (known, tokens) in enumerate(self._by_code):
            if len(known) and codes.numel():
                known, tokens = known.to(codes.device), tokens.to(codes.device)
                wanted = codes[..., l].long().contiguous()
                place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
                ids[..., l] = torch.where(known[place] == wanted, tokens[place], -1)
        if bool((ids < 0).any()):
            where = (ids < 0).nonzero()[0].tolist()
            raise ValueError(
                f"codes{where} = {int(codes[tuple(where)])}: no token of level {where[-1] + 1} stands for it"
            )
        return ids

    def decode(self, ids: Tensor) -> Tensor:
        """Codes, int64 ``[..., L]``, of token ids ``[..., L]``; -1 where the token is none of its level."""
        level, code = token_entries(ids, self.token_table(ids.device))
        levels = torch.arange(1, len(self.codebook_sizes) + 1, device=ids.device)
        return torch.where(level == levels, code, -1)

    def text(self, codes: Sequence[int]) -> str:
        """One SID as the tokenizer reads it, such as ``<a_1><b_2>``.

        Raises:
            ValueError: no token stands for a code, or the vocabulary was made without a tokenizer.
        """
        if not self.names:
            raise ValueError("this vocabulary was made without a tokenizer and does not know the tokens' text")
        tokens = [self._ids.get(entry) for entry in enumerate(torch.as_tensor(codes).tolist(), start=1)]
        if None in tokens or len(tokens) != len(self.codebook_sizes):
            self.encode(torch.as_tensor(codes))  # says which code has none
        return "".join(self.names[token] for token in tokens)

    def check_codebooks(self, spec: Any) -> None:
        """Compare with an encoder's spec or config, by `codebook_sizes`.

        Raises:
            ValueError: the codebooks differ; the message gives both.
        """
        if self.codebook_sizes != spec.codebook_sizes:
            raise ValueError(
                f"the vocabulary's codebook_sizes {self.codebook_sizes} differ from the encoder's "
                f"{spec.codebook_sizes}; build both from the same Semantic IDs"
            )

    def token_table(self, device: torch.device | str) -> Tensor:
        """`table` on a device; copied there once."""
        device = torch.device(device)
        if device == self.table.device:
            return self.table
        if device not in self._on_device:
            with torch.inference_mode(False):  # a first call while serving must not spoil a later training step
                table = self.table.to(device)
            if type(table) is not Tensor:
                return table  # a fake of a tracer is not kept
            self._on_device[device] = table
        return self._on_device[device]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare with a tokenizer.

        Raises:
            ValueError: a token has another id there, or none; the message gives both.
        """
        ids = _vocabulary_of(tokenizer)
        for token, name in self.names.items():
            if ids.get(name) != token:
                has = f"id {ids[name]}" if name in ids else "no such token"
                raise ValueError(
                    f"the vocabulary has token {name!r} with id {token} and the tokenizer has {has}; load the "
                    "tokenizer that was saved with it, or recognise its tokens with SIDVocabulary.from_tokenizer"
                )

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON: ``[token id, level, code, token or None]`` a token."""
        rows = [[token, *entry, self.names.get(token)] for entry, token in sorted(self._ids.items())]
        return {"codebook_sizes": list(self.codebook_sizes), "tokens": rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SIDVocabulary:
        """Rebuild a vocabulary from `to_dict()`.

        Raises:
            TypeError, ValueError: `values` is something else.
        """
        try:
            rows, sizes = values["tokens"], values["codebook_sizes"]
            table = {token: (level, code) for token, level, code, _ in rows}
            names = {token: name for token, _, _, name in rows if name is not None}
            if len(table) != len(rows) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                "the vocabulary is not what to_dict() returned: codebook_sizes, and each token id once, in four entries"
            ) from None
        return cls.from_table(table, sizes, names)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``sid_vocabulary.json`` into a folder."""
        checkpoint.save_vocabulary(self.to_dict(), path)

    @classmethod
    def from_pretrained(cls, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> SIDVocabulary:
        """Read the vocabulary of a folder that `save_pretrained` of a vocabulary, an encoder or a model wrote.

        Args:
            path: the folder.
            tokenizer: compared with the vocabulary if given.

        Raises:
            FileNotFoundError, ValueError: the file is not there or damaged, or the tokenizer has other ids.
        """
        file, values = checkpoint.read_vocabulary(path)
        try:
            vocabulary = cls.from_dict(values)
        except (TypeError, ValueError, RecursionError) as error:
            raise checkpoint.CheckpointError(f"{file}: {clipped(error, 2000)}") from error
        if tokenizer is not None:
            vocabulary.check_tokenizer(tokenizer)
        return vocabulary


def _vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; give a tokenizer of transformers")
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))


def _add_tokens(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> list[int]:
    """Add tokens and check that each is one token, new, and read back from text."""
    from transformers import AddedToken

    before = _vocabulary_of(tokenizer)
    known = next((name for name in names if name in before), None)
    if known is not None:
        raise ValueError(
            f"the tokenizer has the token {known!r} already; recognise its tokens with SIDVocabulary.from_tokenizer, "
            "or give another token_format"
        )
    # Not normalized: normalizers that put a mark before words would hide a token that follows another.
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    ids = tokenizer.convert_tokens_to_ids(names)
    taken = set(before.values())
    for name, token in zip(names, ids, strict=True):
        if token in taken:
            raise ValueError(
                f"the tokenizer did not take {name!r} as a token of its own: its id {token} is that of another; give "
                "another token_format, or another tokenizer"
            )
        taken.add(token)
    text = names[0] + names[-1] + names[0]
    read = tokenizer(text, add_special_tokens=False)["input_ids"]
    if read != [ids[0], ids[-1], ids[0]]:
        raise ValueError(
            f"the tokenizer reads {text!r} as {tokenizer.convert_ids_to_tokens(read)}; give another token_format, or "
            "another tokenizer"
        )
    return ids


def _observed_sizes(entries: Mapping[str, tuple[int, int]]) -> list[int]:
    largest: dict[int, int] = {}
    for level, code in entries.values():
        largest[level] = max(largest.get(level, 0), code)
    missing = next((level for level in range(1, max(largest) + 1) if level not in largest), None)
    if missing is not None or min(largest) < 1:
        token, (level, _) = max(entries.items(), key=lambda entry: entry[1])
        raise ValueError(
            f"the tokens have the levels {sorted(largest)} ({token} is of level {level}); they must be 1..L without "
            "a gap: check token_format"
        )
    return [largest[level] + 1 for level in sorted(largest)]


def _codes_of_level(level: int, sizes: tuple[int, ...], codes: Tensor | None) -> list[int]:
    if codes is None:
        return list(range(sizes[level - 1]))
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dim() != 2 or codes.shape[1] != len(sizes):
        shape = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"codes is {shape}; give integers [items, {len(sizes)}]")
    observed = codes[:, level - 1].unique().tolist()
    if observed and not 0 <= observed[0] <= observed[-1] < sizes[level - 1]:
        raise ValueError(
            f"codes has {observed[0]}..{observed[-1]} at level {level}; allowed are 0..{sizes[level - 1] - 1}"
        )
    return observed


@torch.no_grad()
def _grow(
    model: PreTrainedModel, tokens: int, old: int, new_ids: Tensor, noise: float, pad_to_multiple_of: int | None
) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows or pad_to_multiple_of:
        model.resize_token_embeddings(max(tokens, rows), pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # one weight where they are tied
        if layer is None:
            continue
        weight = layer.weight
        mean = weight[:old].mean(0, dtype=torch.float32)
        scale = torch.linalg.vector_norm(weight[:old], dtype=torch.float32) / math.sqrt(weight[:old].numel())
        rows = mean + noise * scale * torch.randn(len(new_ids), len(mean), device=weight.device)
        weight[new_ids.to(weight.device)] = rows.to(weight.dtype)
