"""Train a next-code classifier on synthetic Semantic IDs with and without the encoder, and print both accuracies."""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..modules import PrefixMem, PrefixMemConfig
from ..spec import AddressSpec

LEVELS, CODES, ITEMS, HIDDEN = 4, 64, 4000, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and models (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise ValueError(f"--steps = {options.steps}; give 1 or more")
    torch.manual_seed(options.seed)
    catalogue, popularity = synthetic_catalogue()
    spec = AddressSpec((CODES,) * LEVELS, table_rows=20_000, active_levels=tuple(range(1, LEVELS)))
    rows = {}
    for name, encoder in (
        ("embeddings alone", None),
        ("with PrefixMem", PrefixMem(PrefixMemConfig(spec, memory_dim=32, hidden_size=HIDDEN))),
    ):
        torch.manual_seed(options.seed)
        started = time.perf_counter()
        model = NextCode(encoder)
        _train(model, catalogue, popularity, options, name)
        rows[name] = {
            "accuracy": _accuracy(model, catalogue, popularity),
            "seconds": round(time.perf_counter() - started, 1),
        }
    if options.json:
        print(
            json.dumps({"data": "synthetic", "items": len(catalogue), "steps": options.steps, "models": rows}, indent=2)
        )
        return 0
    print(f"synthetic catalogue: {len(catalogue)} items, {LEVELS} levels of {CODES} codes")
    print("teacher-forced accuracy of each level")
    print(f"{'':<20}" + "".join(f"{f'level {level}':>10}" for level in range(2, LEVELS + 1)) + f"{'seconds':>10}")
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{value:>10.3f}" for value in row["accuracy"]) + f"{row['seconds']:>10.1f}")
    return 0


class NextCode(nn.Module):
    """Predicts c_{l+1} from the token embedding of c_l, the mean of those before it and, if given, m_l."""

    def __init__(self, encoder: PrefixMem | None) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(CODES, HIDDEN) for _ in range(LEVELS))
        self.encoder = encoder
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, CODES))
            for _ in range(LEVELS - 1)
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Logits ``[M, L - 1, K]`` of the codes of levels 2 .. L."""
        tokens = torch.stack([embed(codes[:, l]) for l, embed in enumerate(self.embeddings)], dim=1)
        if self.encoder is not None:
            tokens = tokens + self.encoder(codes)
        before = tokens.cumsum(1) / torch.arange(1, LEVELS + 1, device=codes.device)[:, None]
        state = torch.cat([tokens, before], dim=-1)
        return torch.stack([mixer(state[:, l]) for l, mixer in enumerate(self.mixers)], dim=1)


def synthetic_catalogue() -> tuple[Tensor, Tensor]:
    """Distinct SIDs ``[ITEMS, L]`` from residual quantisation of clustered vectors, and their Zipf popularity."""
    centres = torch.randn(60, 16)
    vectors = centres[torch.randint(0, 60, (4 * ITEMS,))] + 0.4 * torch.randn(4 * ITEMS, 16)
    codes = []
    for _ in range(LEVELS):
        book = vectors[torch.randperm(len(vectors))[:CODES]]
        nearest = torch.cdist(vectors, book).argmin(-1)
        codes.append(nearest)
        vectors = vectors - book[nearest]
    sids = torch.stack(codes, dim=1).unique(dim=0)
    sids = sids[torch.randperm(len(sids))[:ITEMS]]
    popularity = 1.0 / torch.arange(1, len(sids) + 1) ** 0.8
    return sids, popularity / popularity.sum()


def _train(model: NextCode, sids: Tensor, popularity: Tensor, options: argparse.Namespace, name: str) -> None:
    slow = [p for n, p in model.named_parameters() if not n.startswith("encoder.")]
    fast = [p for n, p in model.named_parameters() if n.startswith("encoder.")]
    # The paper trains the encoder at five times the model's learning rate.
    groups = [{"params": slow, "lr": 2e-3}] + ([{"params": fast, "lr": 1e-2}] if fast else [])
    optimizer = torch.optim.Adam(groups)
    for _ in tqdm(range(options.steps), desc=name, unit="step", disable=options.json or None):
        batch = sids[torch.multinomial(popularity, 512, replacement=True)]
        loss = nn.functional.cross_entropy(model(batch).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(model: NextCode, sids: Tensor, popularity: Tensor) -> list[float]:
    right = (model(sids).argmax(-1) == sids[:, 1:]).float()
    return [round(value, 3) for value in (right * popularity[:, None]).sum(0).tolist()]
