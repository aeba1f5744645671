"""Folders that are served: tiny models on eight items, and the items' index."""

import json

import torch

from tests.helpers.examples import CODES, made_model
from tests.helpers.models import vocabulary

LETTERS = "abc"


def write_index(file, codes=CODES):
    index = {
        f"item {i}": [f"<{LETTERS[l]}_{code}>" for l, code in enumerate(row)] for i, row in enumerate(codes.tolist())
    }
    file.write_text(json.dumps(index))
    return file


def write_model(folder, family="qwen3", kind="prefixmem"):
    model = made_model(family, kind)
    model.save_pretrained(folder)
    if kind == "bare":
        vocabulary().save_pretrained(folder)
    return model


def sids(*items):
    return tuple(tuple(CODES[item].tolist()) for item in items)


def prompt(history, start=(1,), begin=(), end=()):
    """Written out here once more, to hold `Served.prompt` against."""
    ids = list(start)
    for sid in history:
        ids += [*begin, *vocabulary().encode(torch.tensor(sid)).tolist(), *end]
    return torch.tensor([ids])
