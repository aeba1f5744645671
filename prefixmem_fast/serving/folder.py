"""What a folder serves: its model, its vocabulary, and how a history becomes a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _checks
from .._inputs import clipped, shown
from ..checkpoint import FOLDER
from ..sid import Catalogue, SIDTrie, SIDVocabulary

RUN, MODEL = "run.json", "model"  # in the folder of a run
VOCABULARY = "sid_vocabulary.json"


@dataclass(frozen=True)
class Served:
    """A folder's model, not loaded yet, and what prompts consist of.

    Attributes:
        path: the folder of the model, as transformers' save_pretrained wrote it.
        config: of the model, by transformers.
        catalogue: the items that are found.
        vocabulary: the tokens of their codes.
        tokenizer: of transformers, or None where the folder has none.
        start: token ids before the first SID of a prompt.
        begin, end: ids of tokens before and after each SID; None for none.
        trained_history: items of the longest history that the model was trained on; None where nothing says it.
    """

    path: Path
    config: Any
    catalogue: Catalogue
    vocabulary: SIDVocabulary
    tokenizer: Any | None
    start: tuple[int, ...]
    begin: int | None
    end: int | None
    trained_history: int | None

    def trie(self) -> SIDTrie:
        return SIDTrie(self.catalogue, self.vocabulary, begin=self.begin, end=self.end)

    @property
    def before(self) -> int:
        """Tokens of a SID before its codes."""
        return 0 if self.begin is None else 1

    @property
    def depth(self) -> int:
        """Tokens of a SID."""
        return self.before + len(self.vocabulary.codebook_sizes) + (self.end is not None)

    def prompt(self, history: Sequence[tuple[int, ...]]) -> list[int]:
        """The token ids of a history: `start`, then each SID with `begin` and `end` around it.

        Raises:
            ValueError: no token stands for a code.
        """
        ids = list(self.start)
        if history:
            for row in self.vocabulary.encode(torch.tensor(history)).tolist():
                ids += [*([] if self.begin is None else [self.begin]), *row, *([] if self.end is None else [self.end])]
        return ids

    def limits(self, max_history: int | None, max_beams: int) -> dict[str, int]:
        """The limits of requests.

        Args:
            max_history: items; None takes the longest history of training, else 256, and no more than fit the model.

        Raises:
            TypeError, ValueError: an argument is not positive, or `max_history` does not fit the model.
        """
        from ..recommender.training.backbone import positions_of

        positions, most = positions_of(self.config), None
        if positions is not None:
            most = (positions - len(self.start) - self.depth) // self.depth
            if most < 1:
                raise ValueError(f"{self.path} has a model of {positions} positions, too few for an item and its next")
        if max_history is None:
            max_history = min(self.trained_history or 256, most or 1 << 20)
        if _checks.positive("max_history", max_history) > (most or max_history):
            raise ValueError(
                f"max_history = {max_history}; {most} items of {self.depth} tokens fit the model's {positions} "
                f"positions: give {most} or less"
            )
        least = 0 if self.start else 1
        return {"min_history": least, "max_history": max_history, "max_beams": _checks.positive("max_beams", max_beams)}


def model_folder(folder: str | Path) -> Path:
    """The folder of the model in a folder that is served: that of a run of `prefixmem train`, or the model's own.

    Raises:
        OSError, ValueError: there is no model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one of prefixmem train, or of a model's save_pretrained")
    if (folder / "config.json").is_file():
        return folder
    if (folder / RUN).is_file():
        if not (folder / MODEL).is_dir():
            raise FileNotFoundError(f"{folder} holds a run without {MODEL}/: it has not finished, or trained no model")
        return folder / MODEL
    raise FileNotFoundError(
        f"{folder} holds no model: neither config.json nor {RUN} is there; give a folder of prefixmem train, or of a "
        "model's save_pretrained"
    )


def load_vocabulary(folder: Path, tokenizer: Any | None = None) -> SIDVocabulary:
    """The vocabulary of a model's folder.

    Raises:
        OSError, ValueError: there is none, it is damaged, or the tokenizer has other ids.
    """
    if not (folder / VOCABULARY).is_file() and not (folder / FOLDER).is_dir():
        raise FileNotFoundError(
            f"{folder} has no Semantic ID vocabulary: neither {VOCABULARY} nor {FOLDER}/ is there; write one with "
            "SIDVocabulary.save_pretrained(folder), or save the model with its encoder attached"
        )
    return SIDVocabulary.from_pretrained(folder, tokenizer)


def load_catalogue(
    catalogue: str | Path, folder: Path, vocabulary: SIDVocabulary, token_format: str | None = None
) -> Catalogue:
    """An index whose codes all have a token of a model.

    Args:
        folder: of the model, for errors.
        token_format: of the index's tokens; recognised unless given.

    Raises:
        OSError, ValueError: it cannot be read, or is of other Semantic IDs than the vocabulary.
    """
    loaded = Catalogue.load(catalogue, token_format=token_format)
    levels = len(vocabulary.codebook_sizes)
    if loaded.codes.shape[1] != levels:
        raise ValueError(
            f"catalogue {catalogue} has {loaded.codes.shape[1]} levels, and the model in {folder} was made for "
            f"{levels}; give the index that it was trained on"
        )
    try:
        vocabulary.encode(loaded.codes)
    except ValueError as error:
        raise ValueError(
            f"catalogue {catalogue} has a code without a token in {folder}: {clipped(error)}; give an index of the "
            "Semantic IDs that the model was trained on"
        ) from None
    return loaded


def read_served(
    folder: str | Path,
    catalogue: str | Path,
    *,
    start: int | str | None = None,
    begin: int | str | None = None,
    end: int | str | None = None,
    token_format: str | None = None,
) -> Served:
    """Read all but the weights.

    Args:
        folder: of `prefixmem train`, or of a model's save_pretrained with an encoder or with a SIDVocabulary beside it.
        catalogue: an index, see `Catalogue.load`.
        start: what stands before a history: the name of a token or its id; "none" for nothing. None takes what
            `prefixmem train` puts there: the tokenizer's beginning of a sequence, else its end; nothing without a
            tokenizer, and nothing for encoder-decoders.
        begin, end: tokens around each SID, where the model was trained with some; `prefixmem train` puts none.
        token_format: of the index's tokens; recognised unless given.

    Raises:
        OSError, TypeError, ValueError: a file is not there, damaged, or does not go with the others.
    """
    from transformers import AutoConfig

    from ..recommender.data import tokens_of
    from ..recommender.training.backbone import load_tokenizer
    from ..recommender.training.run import finished_run

    path, trained = model_folder(folder), None
    if path != Path(folder):
        _, options, _ = finished_run(folder)
        trained, token_format = options.max_items, token_format or options.token_format
    tokenizer = load_tokenizer(str(path)) if any(path.glob("tokenizer*")) else None
    vocabulary = load_vocabulary(path, tokenizer)
    loaded = load_catalogue(catalogue, path, vocabulary, token_format)
    config = AutoConfig.from_pretrained(path)
    if start is None:
        plain = tokenizer is None or getattr(config, "is_encoder_decoder", False)
        before = () if plain else tuple(tokens_of(loaded, vocabulary, tokenizer).begin)
    else:
        before = () if start == "none" else (_token("start", start, tokenizer),)
    around = [None if token is None else _token(n, token, tokenizer) for n, token in (("begin", begin), ("end", end))]
    return Served(path, config, loaded, vocabulary, tokenizer, before, *around, trained)


def _token(name: str, token: int | str, tokenizer: Any | None) -> int:
    """The id of a token that is given as one, in digits, or by its name."""
    if isinstance(token, str) and not token.isdecimal():
        if tokenizer is None:
            raise ValueError(f"{name} = {shown(token)}, and the folder has no tokenizer to look it up; give an id")
        known = tokenizer.get_vocab()
        if token not in known:
            raise ValueError(f"{name} = {shown(token)} is no token of the tokenizer; give one of its tokens, or an id")
        return known[token]
    return _checks.integer(name, int(token) if isinstance(token, str) else token)
