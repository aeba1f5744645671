"""Pre-training without a transformer: a linear head predicts c_{l+1} from m_l (PrefixMem, arXiv 2606.00324).

    logits_{l+1} = head_l(m_l),   loss = the mean cross-entropy over the active levels below L

Each interaction of the training histories is one Semantic ID to learn from, so popular items weigh more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...encoder import PrefixMem
from .arms import build_encoder
from .config import RunConfig
from .folder import CLASSIFICATION, ENCODER
from .run import Data, load_data
from .session import Session, process_count
from .trainer import make_trainer


class NextCode(nn.Module):
    """An encoder and a linear head for each level that it predicts.

    Args:
        encoder: its active levels below L each get a head for the level after them.
    """

    def __init__(self, encoder: PrefixMem) -> None:
        super().__init__()
        self.encoder = encoder
        spec = encoder.config.spec
        self.levels = [level for level in spec.active_levels if level < spec.levels]
        if not self.levels:
            raise ValueError(
                f"active_levels = {spec.active_levels}: no level comes after them; give one below {spec.levels}"
            )
        width = encoder.config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, spec.codebook_sizes[level]) for level in self.levels)

    def losses(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correctness of each predicted level: ``[M, levels]`` each, from codes ``[M, L]``."""
        m = self.encoder(codes)
        losses, right = [], []
        for level, head in zip(self.levels, self.heads, strict=True):
            logits, target = head(m[:, level - 1]), codes[:, level]
            losses.append(nn.functional.cross_entropy(logits.float(), target, reduction="none"))
            right.append(logits.argmax(-1) == target)
        return torch.stack(losses, 1), torch.stack(right, 1)

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """The loss of Semantic IDs ``[M, L]``."""
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


class _Batches(Dataset):
    """Batch i of the Semantic IDs of all interactions, always the same."""

    def __init__(self, codes: Tensor, interactions: np.ndarray, batch: int, length: int, seed: int) -> None:
        self.codes, self.interactions, self.batch, self.length, self.seed = codes, interactions, batch, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        drawn = np.random.default_rng([self.seed, 4, i]).integers(len(self.interactions), size=self.batch)
        return {"codes": self.codes[torch.from_numpy(self.interactions[drawn])]}


def pretrain(
    config: RunConfig, out: str | Path, *, resume: bool = False, quiet: bool = False, data: Data | None = None
) -> dict[str, Any]:
    """Train an encoder alone; ``out/encoder`` is what `train` takes.

    Args, Returns, Raises: see `run.train`.
    """
    from transformers import set_seed

    if (processes := process_count()) > 1:
        raise ValueError(f"pre-training by classification works in one process, and there are {processes}: no torchrun")
    with Session(config, out, CLASSIFICATION, ENCODER, resume) as session:
        if session.report is not None:
            return session.report
        config = session.config
        data = load_data(config) if data is None else data
        set_seed(config.seed)
        codes = data.catalogue.codes
        model = NextCode(build_encoder(config, data.catalogue.codebook_sizes, config.memory_dim))
        validation = codes[torch.from_numpy(data.split.validation.sample(config.eval_users).targets)]
        batches = _Batches(
            codes,
            np.concatenate(data.split.train.items),
            config.batch_size,
            config.steps * config.accumulation,
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
        session.finish(report, model.encoder.save_pretrained)
        return report
