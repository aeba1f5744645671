"""The prefixes of a catalogue's Semantic IDs as a trie in four arrays, walked for many beams at once.

Nodes are numbered level by level and in token order: the root is 0, the children of a node stand side by side, and
(parent, token) ascends over all nodes. A child is therefore found by one binary search over all nodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import _checks
from .._files import write_file
from .._inputs import clipped, input_file
from .catalogue import Catalogue
from .vocabulary import SIDVocabulary


class SIDTrie:
    """Which tokens may follow a prefix so that it stays the prefix of an item, and which items a SID names.

    Args:
        catalogue: the items.
        vocabulary: the tokens of their codes.
        begin, end: ids of two text tokens that stand before and after each SID, where the sequences have them.

    Attributes:
        catalogue, vocabulary, begin, end: as given.
        levels: L.
        largest_token: the largest token id in it.
        prefixes: distinct prefixes of each length, 1 .. L.
        depth: tokens of one SID, `begin` and `end` included.

    Raises:
        TypeError, ValueError: no token stands for a code of an item, the numbers of levels differ, or `begin` and `end`
            are no token ids, one token or tokens of codes.
    """

    def __init__(
        self, catalogue: Catalogue, vocabulary: SIDVocabulary, *, begin: int | None = None, end: int | None = None
    ) -> None:
        levels = catalogue.codes.shape[1]
        if len(vocabulary.codebook_sizes) != levels:
            raise ValueError(f"the vocabulary has {len(vocabulary.codebook_sizes)} levels and the catalogue {levels}")
        wrappers = [_token(name, token) for name, token in (("begin", begin), ("end", end)) if token is not None]
        if len(set(wrappers)) < len(wrappers) or any(vocabulary.is_code(token) for token in wrappers):
            raise ValueError(f"begin = {begin} and end = {end}; give two different tokens that stand for no code")
        tokens = vocabulary.encode(catalogue.codes)
        before, after = ([] if token is None else [tokens.new_full((len(tokens), 1), token)] for token in (begin, end))
        tokens = torch.cat([*before, tokens, *after], 1)
        self.catalogue, self.vocabulary = catalogue, vocabulary
        self.begin, self.end = begin, end
        self.levels, self.depth = levels, tokens.shape[1]
        self.largest_token = int(tokens.max())

        order = torch.from_numpy(np.lexsort(tokens.flip(1).T.numpy()))  # the first token decides first
        tokens = tokens[order]
        differs = torch.ones_like(tokens, dtype=torch.bool)
        differs[1:] = (tokens[1:] != tokens[:-1]).cumsum(1) > 0
        keys, parent, nodes = [], torch.zeros(len(tokens), dtype=torch.int64), 1
        counts = []
        for d in range(self.depth):
            new = differs[:, d]
            keys.append(_key(parent[new], tokens[new, d]))
            parent = nodes + new.long().cumsum(0) - 1
            counts.append(len(keys[-1]))
            nodes += counts[-1]
        keys = torch.cat(keys)
        children = torch.bincount(keys >> 32, minlength=nodes)
        self.prefixes = tuple(counts[len(before) : len(before) + levels])
        self._arrays = {keys.device: (keys, keys & 0xFFFFFFFF, children.cumsum(0) - children, children)}
        self._first_leaf = nodes - counts[-1]
        self._items = order
        self._first_item = torch.cat([differs[:, -1].nonzero().squeeze(1), torch.tensor([len(order)])])

    @property
    def text_token(self) -> int:
        """An id that stands for no code, for what follows a search in which nothing follows."""
        return next(token for token in range(len(self.vocabulary.table) + 1) if not self.vocabulary.is_code(token))

    def __len__(self) -> int:
        """Number of prefixes, of all lengths."""
        return sum(self.prefixes)

    def __repr__(self) -> str:
        bytes_held = sum(array.numel() * array.element_size() for array in self._on(torch.device("cpu")))
        return f"SIDTrie(items={len(self.catalogue)}, prefixes={self.prefixes}, bytes={bytes_held})"

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._arrays:
            self._arrays[device] = tuple(array.to(device) for array in self._arrays[torch.device("cpu")])
        return self._arrays[device]

    def child(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """The node that `tokens` int64 ``[N]`` lead to from `nodes` int64 ``[N]``; -1 where there is none."""
        keys = self._on(nodes.device)[0]
        wanted = _key(nodes, tokens)
        place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return torch.where(keys[place] == wanted, place + 1, -1)

    def enter(self, prompt: Tensor) -> Tensor:
        """Where prompts int64 ``[N, T]`` end.

        Returns:
            int64 ``[N]``: the node of the SID that is under way; the root after text, after a whole SID, and after a
            prefix that no item has.
        """
        node = prompt.new_zeros(len(prompt))
        # A SID that is under way began within depth - 1 tokens.
        for token in prompt[:, max(prompt.shape[1] - (self.depth - 1), 0) :].unbind(1):
            after, begun = self.child(node, token), self.child(torch.zeros_like(node), token)
            node = torch.where(after >= 0, after, begun.clamp(min=0))  # what is no prefix is text
        return node

    def follow(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Where generated tokens int64 ``[N, T]`` lead from nodes ``[N]``: a leaf from a whole SID on, whatever follows
        it; -1 once they have left the trie."""
        for token in tokens.unbind(1):
            nodes = torch.where(self.is_leaf(nodes), nodes, self.child(nodes, token))
        return nodes

    def walk(self, tokens: Tensor, prompt: int) -> Tensor:
        """`follow` from where `enter` ends: of tokens int64 ``[N, T]`` the first `prompt` were given."""
        return self.follow(self.enter(tokens[:, :prompt]), tokens[:, prompt:])

    def is_leaf(self, nodes: Tensor) -> Tensor:
        return nodes >= self._first_leaf

    def allowed(self, nodes: Tensor, width: int) -> Tensor:
        """Where a matrix ``[N, width]`` over token ids holds those that may follow nodes int64 ``[N]``.

        Returns:
            int64 ``[E]``, ``row * width + token``, each once; leaves and -1 have none.
        """
        _, token, first, count = self._on(nodes.device)
        rows = torch.arange(len(nodes), device=nodes.device) * width
        if len(nodes) and bool((nodes == nodes[0]).all()):  # the first step of a search
            begin, children = (int(array[nodes[0].clamp(min=0)]) for array in (first, count))
            return (rows[:, None] + token[begin : begin + (children if nodes[0] >= 0 else 0)]).flatten()
        inside = nodes.clamp(min=0)
        count = torch.where(nodes >= 0, count[inside], 0)
        ends = count.cumsum(0)
        total = int(ends[-1]) if len(nodes) else 0
        place = torch.repeat_interleave(first[inside] - (ends - count), count, output_size=total)
        place += torch.arange(total, device=nodes.device)
        return torch.take(token, place).add_(torch.repeat_interleave(rows, count, output_size=total))

    def allowed_scores(self, nodes: Tensor, scores: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Which scores ``[N, V]`` of the next token stay, where the search stands at nodes int64 ``[N]``.

        Args:
            end: the token id that alone follows a whole SID, and what is no prefix of one, at a score of 0.

        Returns:
            int64 ``[E]`` indices into the N * V scores, and the scores there.

        Raises:
            ValueError: the trie or `end` has token ids of V or more.
        """
        width = scores.shape[1]
        if max(self.largest_token, end) >= width:
            raise ValueError(
                f"the trie and eos_token_id reach token id {max(self.largest_token, end)}, the scores {width - 1}"
            )
        allowed = self.allowed(nodes, width)
        kept = torch.take(scores, allowed)
        ended = ((nodes < 0) | self.is_leaf(nodes)).nonzero().squeeze(1)
        if not len(ended):
            return allowed, kept
        return torch.cat([allowed, ended * width + end]), torch.cat([kept, kept.new_zeros(len(ended))])

    def save(self, path: str | Path) -> None:
        """Write the trie into a safetensors file, for processes that load it by its path.

        Raises:
            OSError: the file cannot be written; what was there is left as it was.
        """
        arrays = {
            "codes": self.catalogue.codes.contiguous(),
            "codebook_sizes": torch.tensor(self.catalogue.codebook_sizes),
            "items": _bytes_of(self.catalogue.items),
            "vocabulary": _bytes_of(self.vocabulary.to_dict()),
            "ends": torch.tensor([-1 if token is None else token for token in (self.begin, self.end)]),
        }
        metadata = {"format": "prefixmem_fast.SIDTrie", "version": "1"}
        write_file(Path(path), lambda temporary: save_file(arrays, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path) -> SIDTrie:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or was not written by `save`.
        """
        path = input_file("trie", path, (".safetensors",))
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != "prefixmem_fast.SIDTrie":
                    raise ValueError("it holds no trie; write one with SIDTrie.save")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            items, vocabulary = (json.loads(bytes(arrays[name].numpy())) for name in ("items", "vocabulary"))
            catalogue = Catalogue(items, arrays["codes"], arrays["codebook_sizes"].tolist())
            vocabulary = SIDVocabulary.from_dict(vocabulary)
            begin, end = (None if token < 0 else token for token in arrays["ends"].tolist())
            return cls(catalogue, vocabulary, begin=begin, end=end)
        except Exception as error:  # a damaged file fails in as many ways as it is read
            raise ValueError(f"trie {path}: {clipped(error)}") from error

    def items_of(self, nodes: Tensor) -> list[tuple[str, ...]]:
        """The items of leaves ``[N]``; none for other nodes."""
        names = []
        for node in nodes.tolist():
            leaf = node - self._first_leaf
            rows = self._items[self._first_item[leaf] : self._first_item[leaf + 1]].tolist() if leaf >= 0 else ()
            names.append(tuple(self.catalogue.items[row] for row in rows))
        return names

    def sids_of(self, nodes: Tensor) -> Tensor:
        """The codes of leaves ``[N]``: int64 ``[N, L]``; -1 for other nodes."""
        leaf = (nodes.cpu() - self._first_leaf).clamp(min=-1)
        codes = self.catalogue.codes[self._items[self._first_item[leaf.clamp(min=0)]]]
        return torch.where(leaf[:, None] >= 0, codes, -1).to(nodes.device)


def _bytes_of(value: Any) -> Tensor:
    """A value as JSON in a tensor."""
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def _token(name: str, value: int) -> int:
    value = _checks.integer(name, value)
    if not 0 <= value < 1 << 31:
        raise ValueError(f"{name} = {value} is no token id; give one of 0..2^31 - 1, or None for none")
    return value


def _key(parents: Tensor, tokens: Tensor) -> Tensor:
    return (parents << 32) + tokens  # token ids are below 2^31; what is none gives a key that no node has
