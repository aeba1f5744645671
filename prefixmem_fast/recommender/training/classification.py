"""Pre-training without a transformer: a linear head predicts c_{l+1} from m_l (PrefixMem, arXiv 2606.00324).

    logits_{l+1} = head_l(m_l),   loss = the mean cross-entropy over the active levels below L

Each interaction of the training histories is one Semantic ID to learn from, so popular items weigh more. Cross-item
orders are given the items before it too, and c_1 is predicted from the last token of the item before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...encoder import PrefixMem, PrefixMemConfig
from .arms import build_encoder
from .config import RunConfig
from .folder import CLASSIFICATION, ENCODER
from .run import Data, load_data
from .session import Session, is_first_process, process_count
from .trainer import make_trainer


class NextCode(nn.Module):
    """An encoder and a linear head for each level that it predicts.

    Args:
        encoder: its active levels below L each get a head for the level after them; so do the prefix lengths 0 .. L - 1
            at which cross-item orders are read.
    """

    def __init__(self, encoder: PrefixMem) -> None:
        super().__init__()
        self.encoder = encoder
        config = encoder.config
        self.levels = sorted(_predicting_levels(config))
        if not self.levels:
            levels = config.spec.active_levels
            raise ValueError(f"active_levels = {levels}: no level comes after them; give one below {config.levels}")
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, config.codebook_sizes[level]) for level in self.levels)

    def losses(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correctness of each predicted level: ``[M, levels]`` each, from codes ``[M, items, L]``,
        the last item and those before it that the encoder reads, or ``[M, L]``."""
        m = self.encoder(codes)
        m, codes = (m[:, None], codes) if codes.dim() == 2 else (m, codes[:, -1])
        losses, right = [], []
        for level, head in zip(self.levels, self.heads, strict=True):
            logits, target = head(m[:, -1, level - 1] if level else m[:, -2, -1]), codes[:, level]
            losses.append(nn.functional.cross_entropy(logits.float(), target, reduction="none"))
            right.append(logits.argmax(-1) == target)
        return torch.stack(losses, 1), torch.stack(right, 1)

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """The loss of Semantic IDs, see `losses`."""
        return {"loss": self.losses(codes)[0].mean()}

    @torch.no_grad()
    def validate(self, codes: Tensor) -> dict[str, float]:
        training = self.training
        losses, right = self.eval().losses(codes.to(self.heads[0].weight.device))
        self.train(training)
        figures = {"loss": float(losses.sum(1).mean())}
        for i, level in enumerate(self.levels):
            figures[f"accuracy_{level + 1}"] = float(right[:, i].float().mean())
            figures[f"loss_{level + 1}"] = float(losses[:, i].mean())
        return figures


def _predicting_levels(config: PrefixMemConfig) -> set[int]:
    """Prefix lengths below L at which some table is read."""
    spec = config.spec
    begin = spec.item_levels if spec.history else 0
    levels = {level - begin for level in spec.active_levels if level - begin < spec.item_levels}
    return levels | (_predicting_levels(config.cross_item) if config.cross_item else set())


def _windows(codes: Tensor, histories: Sequence[np.ndarray], items: int) -> Tensor:
    """Codes ``[M, items, L]`` of the last items of histories, -1 before their beginning."""
    rows = np.full((len(histories), items), -1)
    for row, history in zip(rows, histories, strict=True):
        last = history[-items:]
        row[items - len(last) :] = last
    return _codes_of(codes, torch.from_numpy(rows))


def _codes_of(codes: Tensor, rows: Tensor) -> Tensor:
    """Codes of items, -1 of row -1."""
    return torch.where(rows[..., None] >= 0, codes[rows.clamp(min=0)], -1)


class _Batches(Dataset):
    """Batch i of the Semantic IDs of all interactions with the items before them, always the same."""

    def __init__(
        self, codes: Tensor, histories: Sequence[np.ndarray], items: int, batch: int, length: int, seed: int
    ) -> None:
        self.codes, self.batch, self.length, self.seed = codes, batch, length, seed
        self.interactions = np.concatenate(histories)
        self.back = np.arange(items)[::-1]
        self.place = np.concatenate([np.arange(len(history)) for history in histories])  # within its history

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        drawn = np.random.default_rng([self.seed, 4, i]).integers(len(self.interactions), size=self.batch)
        before = drawn[:, None] - self.back
        rows = np.where(self.back <= self.place[drawn, None], self.interactions[before], -1)
        return {"codes": _codes_of(self.codes, torch.from_numpy(rows))}


def pretrain(
    config: RunConfig, out: str | Path, *, resume: bool = False, quiet: bool = False, data: Data | None = None
) -> dict[str, Any]:
    """Train an encoder alone; ``out/encoder`` is what `train` takes.

    Args, Returns, Raises: see `run.train`.
    """
    from transformers import set_seed

    with Session(config, out, CLASSIFICATION, ENCODER, resume) as session:
        if session.report is not None:
            return session.report
        config = session.config
        data = load_data(config) if data is None else data
        set_seed(config.seed)
        codes = data.catalogue.codes
        model = NextCode(build_encoder(config, data.catalogue.codebook_sizes, config.memory_dim))
        items = model.encoder.config.history + 1
        chosen = data.split.validation.sample(config.eval_users)
        met = [np.append(*met) for met in zip(chosen.histories, chosen.targets, strict=True)]
        validation = _windows(codes, met, items)
        batches = _Batches(
            codes,
            data.split.train.items,
            items,
            config.batch_size,
            config.steps * config.accumulation * process_count(),
            config.seed,
        )
        trainer = make_trainer(
            config,
            session.begin(),
            quiet=quiet,
            model=model,
            train_dataset=batches,
            data_collator=lambda rows: rows[0],
            eval_dataset=validation,
            score=lambda model: model.validate(validation),
        )
        report = trainer.run()
        if is_first_process():
            session.finish(report, model.encoder.save_pretrained)
        return report
