"""A synthetic catalogue and its users, so that everything can be tried without a download.

Items are vectors around random centres; residual k-means gives them Semantic IDs of five levels. Their popularity is
Zipf's, and users have tastes: a few directions, from one of which each next item comes. Now and then it is instead the
companion of the item before, as a lens is a camera's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...sid.catalogue import Catalogue
from .interactions import Histories

LEVELS, CODES, DIMENSIONS = 5, 32, 24
COMPANY = 0.3  # chance that an item is followed by its companion
_COLOURS = (
    "amber",
    "blue",
    "coral",
    "dusty",
    "emerald",
    "frosted",
    "golden",
    "hazel",
    "ivory",
    "jade",
    "khaki",
    "lilac",
    "mint",
    "navy",
    "olive",
    "pearl",
)
_THINGS = (
    "lamp",
    "chair",
    "brush",
    "kettle",
    "scarf",
    "drum",
    "tent",
    "clock",
    "puzzle",
    "mirror",
    "basket",
    "ladder",
    "camera",
    "pillow",
    "bottle",
    "guitar",
)


@dataclass
class Synthetic:
    """What `synthetic` makes: a catalogue, the histories of its users, and a title an item."""

    catalogue: Catalogue
    histories: Histories
    text: list[str]


def synthetic(items: int = 3000, users: int = 3000, seed: int = 0) -> Synthetic:
    """Make a catalogue of five levels of 32 codes, and histories of 5 to 20 items.

    Args:
        items: how many; those whose SID would be shared keep it, as in real catalogues.
        users: how many.
        seed: of everything.

    Raises:
        ValueError: fewer than 64 items, or no user.
    """
    if items < 2 * CODES or users < 1:
        raise ValueError(f"items = {items}, users = {users}; give {2 * CODES} items or more and 1 user or more")
    random = np.random.default_rng([seed, 7])
    kinds = random.integers(len(_THINGS), size=items)
    groups = random.normal(size=(len(_THINGS), len(_COLOURS), DIMENSIONS)) * 0.6
    groups += random.normal(size=(len(_THINGS), 1, DIMENSIONS))
    colours = random.integers(len(_COLOURS), size=items)
    vectors = groups[kinds, colours] + 0.35 * random.normal(size=(items, DIMENSIONS))
    codes = residual_codes(vectors, LEVELS, CODES, random)
    text = [f"{_COLOURS[c]} {_THINGS[k]} {i % 10}" for i, (c, k) in enumerate(zip(colours, kinds, strict=True))]
    catalogue = Catalogue([f"item-{i}" for i in range(items)], torch.from_numpy(codes), (CODES,) * LEVELS)

    popularity = random.permutation(1.0 / np.arange(1, items + 1) ** 0.8)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    companion = random.choice(items, items, p=popularity / popularity.sum())
    histories = []
    for _ in range(users):
        tastes = directions[random.choice(items, 2, p=popularity / popularity.sum())]  # [2, D]
        likes = np.log(popularity) + 12 * (directions @ tastes.T).T  # [2, items]
        length = int(np.clip(random.geometric(0.12) + 4, 5, 20))
        taste = random.integers(2, size=length)
        noisy = likes + random.gumbel(size=likes.shape)
        order = np.argsort(-noisy, axis=1)[:, :length]  # what a Gumbel-top-k draws, without replacement
        chosen: dict[int, None] = {}
        for t in taste:
            follows = int(companion[next(reversed(chosen))]) if chosen and random.random() < COMPANY else None
            if follows is None or follows in chosen:
                follows = next(item for item in order[t].tolist() if item not in chosen)
            chosen[follows] = None
        histories.append(np.array(list(chosen), dtype=np.int64))
    names = [f"user-{i}" for i in range(users)]
    return Synthetic(catalogue, Histories(names, histories), text)


def residual_codes(vectors: np.ndarray, levels: int, codes: int, random: np.random.Generator) -> np.ndarray:
    """Residual k-means: int64 ``[items, levels]``, each level the nearest centre of what the levels before left."""
    residual, codes_by_level = vectors.copy(), []
    for _ in range(levels):
        centres = residual[random.choice(len(residual), codes, replace=False)]
        nearest = _nearest(residual, centres)
        for _ in range(8):
            for code in range(codes):
                if (nearest == code).any():
                    centres[code] = residual[nearest == code].mean(0)
            nearest = _nearest(residual, centres)
        codes_by_level.append(nearest)
        residual = residual - centres[nearest]
    return np.stack(codes_by_level, axis=1).astype(np.int64)


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((vectors[:, None] - centres) ** 2).sum(-1).argmin(1)
