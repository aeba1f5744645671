"""Eight items, histories over them, and models with each encoder in the slot."""

from types import SimpleNamespace

import numpy as np
import torch

from prefixmem_fast import Catalogue, attach
from prefixmem_fast.encoder import SIDTransformer, SIDTransformerConfig
from prefixmem_fast.recommender.data import Examples, Tokens
from tests.helpers.models import HIDDEN, SIZES, cross_item_encoder, encoder, lagged_encoder, tiny_model, vocabulary

# Eight items; 1 and 7 share a SID.
CODES = torch.tensor([[1, 3, 4], [0, 1, 5], [3, 3, 3], [1, 3, 0], [1, 0, 1], [3, 0, 0], [3, 4, 5], [0, 1, 5]])
START, END, PAD = 1, 2, 0
CPU = torch.device("cpu")


def catalogue():
    return Catalogue([f"item {i}" for i in range(len(CODES))], CODES, SIZES)


def tokens(start=START):
    return Tokens(vocabulary().encode(CODES).numpy(), start, END, PAD)


def examples(lengths=(3, 1, 2, 3, 5, 1, 3), seed=0):
    random = np.random.default_rng(seed)
    histories = [random.integers(len(CODES), size=length) for length in lengths]
    return Examples(
        [f"user {i}" for i in range(len(lengths))], histories, random.integers(len(CODES), size=len(lengths))
    )


def sid_transformer(**options):
    torch.manual_seed(2)
    made = SIDTransformer(SIDTransformerConfig(SIZES, HIDDEN, 16, 2, 2, output_init_std=1.0, **options))
    for table in (made.codes, made.levels):
        torch.nn.init.normal_(table.weight)
    return made


ENCODERS = {
    "bare": None,
    "prefixmem": encoder,
    "cross-item": cross_item_encoder,
    "lagged": lagged_encoder,
    "sid-transformer": sid_transformer,
}


def made_model(family, kind="bare"):
    model = tiny_model(family)
    return model if ENCODERS[kind] is None else attach(model, ENCODERS[kind](), vocabulary()).eval()


class Says(torch.nn.Module):
    """A causal LM whose every next-token logits are the same."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.config = torch.nn.Parameter(torch.tensor(logits)), SimpleNamespace()

    def forward(self, input_ids, **options):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))
