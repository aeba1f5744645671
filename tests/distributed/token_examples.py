"""Tokens of items and text, and a model with an encoder that is trained on them."""

import torch

from prefixmem_fast import attach
from tests.helpers import models


def stream(world, steps=4, length=12):
    """For each step tokens ``[2 * world, length]`` of items and text; the last rank's are text alone."""
    generator = torch.Generator().manual_seed(3)

    def number(limit):
        return int(torch.randint(limit, (), generator=generator))

    def row(items):
        tokens = []
        while len(tokens) < length:
            whole = items and number(5)
            tokens += models.sid(number(2), number(2), number(2)) if whole else [3 + number(17)]
        return tokens[:length]

    return [torch.tensor([row(i < 2 * world - 2) for i in range(2 * world)]) for _ in range(steps)]


def build(make, grad, dtype=None):
    return attach(models.tiny_model(), make(grad=grad, dtype=dtype), models.vocabulary()).train()
