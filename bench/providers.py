"""Who trains the tables: this package's modes, and what one would write or take instead.

Each provider owns its tables, with the values of the given weight, and takes one training step at a time. All read the
same rows of hashed tables, and get the same gradient of S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixmem_fast import AddressSpec, optim, prefix_memory, prefix_rows, reference

LR = 0.01


class Provider:
    """One way to train the tables.

    Attributes:
        name: as it stands in the table.
        optimizer: what `update` steps, or None where the backward pass updates.
    """

    name: str
    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        self.spec = spec

    def forward(self, codes: Tensor) -> Tensor:
        """S ``[M, A, H * w]``."""
        raise NotImplementedError

    def backward(self, out: Tensor, grad: Tensor) -> None:
        out.backward(grad)

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def held(self) -> list[Tensor]:
        """Tables and optimizer state, to be counted."""
        tensors = [p for group in self.optimizer.param_groups for p in group["params"]]
        return tensors + [s for state in self.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]


class Ours(Provider):
    grad: str
    make: Callable[..., torch.optim.Optimizer]

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self.weight = nn.Parameter(weight)
        self.optimizer = type(self).make([self.weight], lr=LR)

    def forward(self, codes: Tensor) -> Tensor:
        return prefix_memory(codes, self.weight, self.spec, grad=self.grad)


class FusedAdagrad(Ours):
    name = "prefixmem_fast, fused row-wise Adagrad"
    grad, make = "fused", optim.RowWiseAdagrad


class FusedLazyAdam(Ours):
    name = "prefixmem_fast, fused lazy Adam"
    grad, make = "fused", optim.LazyAdam


class SparseAdagrad(Ours):
    name = "prefixmem_fast, sparse gradient, row-wise Adagrad"
    grad, make = "sparse", optim.RowWiseAdagrad


class EagerTables(Provider):
    """What a user writes first: one nn.Embedding a table, hashes in PyTorch, a sum over orders a level, AdamW."""

    name = "(a) one nn.Embedding a table, AdamW"

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self.tables = {}
        for order in range(1, spec.max_order + 1):
            for head in range(spec.heads):
                start = spec.offsets[order - 1][head]
                rows = weight[start : start + spec.rows_per_order[order - 1]].clone()
                self.tables[order, head] = nn.Embedding.from_pretrained(rows, freeze=False)
        self.optimizer = torch.optim.AdamW([table.weight for table in self.tables.values()], lr=LR)

    def forward(self, codes: Tensor) -> Tensor:
        spec, out = self.spec, []
        for level in spec.active_levels:
            total = 0
            for order in spec.orders_at(level):
                heads = []
                for head in range(spec.heads):
                    index = codes[:, 0] * spec.multipliers[0][head]
                    for i in range(1, order):
                        index = index ^ (codes[:, i] * spec.multipliers[i][head])
                    heads.append(self.tables[order, head](index % spec.rows_per_order[order - 1]))
                total = total + torch.cat(heads, dim=-1)
            out.append(total)
        return torch.stack(out, dim=1)


class FusedTable(Provider):
    """The best plain PyTorch: one table, each row read once a SID, a running sum, sparse gradients, SparseAdam."""

    name = "(b) one fused table, sparse gradient, SparseAdam"
    sparse, make = True, torch.optim.SparseAdam

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self.weight = nn.Parameter(weight)
        self.optimizer = type(self).make([self.weight], lr=LR)

    def forward(self, codes: Tensor) -> Tensor:
        spec = self.spec
        index = 0
        rows = []
        for order in range(1, min(spec.max_order, spec.active_levels[-1]) + 1):
            index = index ^ (codes[:, order - 1, None] * codes.new_tensor(spec.multipliers[order - 1]))
            rows.append(codes.new_tensor(spec.offsets[order - 1]) + index % spec.rows_per_order[order - 1])
        read = F.embedding(torch.stack(rows, dim=1), self.weight, sparse=self.sparse)  # [M, N, H, w]
        sums, done, out = 0, 0, []
        for level in spec.active_levels:
            orders = min(level, len(rows))
            sums = sums + read[:, done:orders].sum(1).flatten(1)
            done = orders
            out.append(sums)
        return torch.stack(out, dim=1)


class CompiledReference(FusedTable):
    """torch.compile of this package's reference, dense gradients, AdamW."""

    name = "(c) torch.compile of the reference, AdamW"
    make = torch.optim.AdamW

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self._forward = torch.compile(lambda codes, weight: reference.prefix_memory(codes, weight, spec))

    def forward(self, codes: Tensor) -> Tensor:
        return self._forward(codes, self.weight)


class FbgemmTables(Provider):
    """FBGEMM's table batched embeddings with fused row-wise Adagrad; rows and the sum over orders in PyTorch."""

    name = "(d) FBGEMM table batched embeddings, row-wise Adagrad"

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            OptimType,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        on_gpu = weight.is_cuda
        place = (
            (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        )
        tables = [(rows, weight.shape[1], *place) for rows in spec.rows_per_order for _ in range(spec.heads)]
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            tables,
            optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LR,
            eps=1e-10,
            pooling_mode=PoolingMode.SUM,
            output_dtype=SparseType.FP32,
        )
        starts = [start for heads in spec.offsets for start in heads]
        for table, start in zip(self.tables.split_embedding_weights(), starts, strict=True):
            table.copy_(weight[start : start + len(table)])

    def forward(self, codes: Tensor) -> Tensor:
        spec = self.spec
        rows = prefix_rows(codes, spec)[:, spec.active_levels[-1] - 1]  # [M, N, H], all of them exist
        rows = rows - rows.new_tensor(spec.offsets)
        bags = torch.arange(rows.numel() + 1, device=codes.device)
        read = self.tables(rows.flatten(1).T.flatten(), bags).view(len(codes), spec.max_order, -1)
        sums, done, out = 0, 0, []
        for level in spec.active_levels:
            orders = min(level, spec.max_order)
            sums = sums + read[:, done:orders].sum(1)
            done = orders
            out.append(sums)
        return torch.stack(out, dim=1)

    def held(self) -> list[Tensor]:
        return [*self.tables.split_embedding_weights(), *(s for t in self.tables.split_optimizer_states() for s in t)]


OURS = (FusedAdagrad, FusedLazyAdam, SparseAdagrad)
PEERS = (EagerTables, FusedTable, CompiledReference, FbgemmTables)


def missing(provider: type[Provider]) -> str | None:
    """Why a provider cannot run here, or None."""
    if provider is FbgemmTables:
        try:
            import fbgemm_gpu  # noqa: F401
        except Exception as error:  # its libraries may be there and not fit torch's
            return f"not installed ({type(error).__name__}); pip install fbgemm-gpu-cpu==1.8.0 adds it"
    return None


def bytes_held(provider: Provider) -> int:
    seen: dict[int, Any] = {t.data_ptr(): t for t in provider.held()}
    return sum(t.numel() * t.element_size() for t in seen.values())
