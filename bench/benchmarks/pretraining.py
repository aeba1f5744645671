"""A whole step of pre-training the encoder alone, by classification: tables, W_out, heads, loss and optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefixmem_fast import PrefixMem, PrefixMemConfig

from ..registry import Case, Contender, benchmark
from .providers import TRAINING_TOTAL, EagerTables, FusedAdagrad, FusedTable, Provider, SparseAdagrad, training_step
from .tables import QUICK, Sample, differs, sampled_rows, vary, wrong_update
from .workloads import HEADS, WIDTH, Workload

HIDDEN = 256


def workloads(device: str) -> list[dict[str, Any]]:
    """Batches of the size that such training takes, not of that at which the tables are all that counts."""
    return [{**workload, "sids": 8192 if device == "cuda" else 1024} for workload in vary(device)]


class ProviderEncoder(nn.Module):
    """An encoder around a provider, as `NextCode` takes it: m ``[M, L, hidden]``, zero at inactive levels."""

    def __init__(self, provider: Provider) -> None:
        super().__init__()
        self.config = PrefixMemConfig(provider.spec, HEADS * WIDTH, HIDDEN)
        self.out_proj = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)
        self.read = provider.forward

    def forward(self, codes: Tensor) -> Tensor:
        levels = [level - 1 for level in self.config.spec.active_levels]
        m = codes.new_zeros((*codes.shape, HIDDEN), dtype=self.out_proj.weight.dtype)
        m[:, levels] = self.out_proj(self.read(codes).to(m.dtype))
        return m


class Learner:
    """A provider's tables behind W_out and the heads, and one AdamW for these."""

    def __init__(self, provider: Provider) -> None:
        from prefixmem_fast.recommender.training.classification import NextCode

        device = provider.tables()[0].device
        torch.manual_seed(0)
        self.provider = provider
        self.model = NextCode(ProviderEncoder(provider)).to(device=device, dtype=provider.tables()[0].dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def loss(self, codes: Tensor) -> Tensor:
        return self.model(codes)["loss"]

    def update(self) -> None:
        self.provider.update()
        self.optimizer.step()
        self.optimizer.zero_grad()


@benchmark(workloads, QUICK)
def pretraining(device: str, **given: Any) -> Case:
    """A step of pre-training by classification: tables, W_out, heads, loss, both optimizers."""
    workload = Workload(**given)
    batches = workload.batches(device)
    weight = workload.weight(device)
    expected, sample, before = _library_step(workload, weight, batches[0])
    del weight

    def check(learner: Learner) -> str | None:
        with torch.no_grad():
            wrong = differs(learner.model.encoder(batches[0]), expected)
        learner.loss(batches[0]).backward()
        learner.update()
        return wrong or wrong_update(learner.provider, sample, before)

    contenders = [
        Contender(p.trains(), lambda p=p: Learner(p(workload.spec, workload.weight(device))), needs=p.needs(workload))
        for p in (FusedAdagrad, SparseAdagrad, EagerTables, FusedTable)
    ]
    return Case(contenders, training_step(batches), check, totals=TRAINING_TOTAL)


def _library_step(workload: Workload, weight: Tensor, codes: Tensor) -> tuple[Tensor, Sample, Tensor]:
    """m of the library's own encoder, with the same W_out and heads; rows and their gradients by its reference; the
    rows before the step."""
    from prefixmem_fast.recommender.training.classification import NextCode

    learner = Learner(FusedTable(workload.spec, weight))
    encoder = PrefixMem(learner.model.encoder.config, backend="reference", device="meta", dtype=weight.dtype)
    encoder.memory.weight = nn.Parameter(weight)
    encoder.out_proj.weight = learner.model.encoder.out_proj.weight
    model = NextCode(encoder)
    model.heads = learner.model.heads
    model(codes)["loss"].backward()
    sample = sampled_rows(workload, codes, workload.gradient(codes.device.type))
    sums = encoder.memory.weight.grad[sample.rows].double()
    with torch.no_grad():
        return encoder(codes), sample._replace(sums=sums), weight[sample.rows].double()
