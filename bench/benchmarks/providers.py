"""Who reads and trains the tables: this package's modes, and what one would write or take instead.

Each provider takes the given weight as its tables, and all read the same rows of hashed tables. In a training step all
get the same gradient of S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixmem_fast import AddressSpec, optim, prefix_memory, prefix_rows

from ..registry import Mark
from .workloads import Workload

LR = 0.01


TRAINING_TOTAL = {"step": ("forward", "backward", "update")}


def training_step(batches: list[Tensor]) -> Callable[[Any, int, Mark], None]:
    """`Case.step` of objects with `loss(batch)` and `update()`; TRAINING_TOTAL is its total."""

    def step(learner: Any, turn: int, mark: Mark) -> None:
        loss = learner.loss(batches[turn % len(batches)])
        mark("forward")
        loss.backward()
        mark("backward")
        learner.update()
        mark("update")

    return step


class Provider:
    """One way to read and to train the tables.

    Attributes:
        reads, gradient, rule: what reads the rows, what sums their gradient, and the optimizer, for tables; this
            package's own begin with its name.
        copies, half_copies: how many times the bytes of float32, and of half-precision, tables it takes while it is
            made and trains.
        warm_up: of `Contender`.
        first_step: what its optimizer makes of rows ``[U, w]`` with gradients ``[U, w]`` in its first step.
        optimizer: what `update` steps, or None where the backward pass updates.
    """

    reads: str
    gradient = "dense gradient"
    rule = "AdamW"
    copies = half_copies = 1
    warm_up = 0.0
    optimizer: torch.optim.Optimizer | None = None
    first_step: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        self.spec = spec

    @classmethod
    def missing(cls, device: str) -> str | None:
        """Why it cannot run here, or None."""
        return None

    @classmethod
    def needs(cls, workload: Workload) -> int:
        """Bytes that it takes to train the workload's tables."""
        copies = cls.copies if workload.torch_dtype.itemsize > 2 else cls.half_copies
        return copies * workload.table_bytes

    @classmethod
    def trains(cls) -> str:
        """Its name where it trains."""
        return f"{cls.reads}, {cls.gradient}, {cls.rule}"

    def forward(self, codes: Tensor) -> Tensor:
        """S ``[M, A, H * w]``."""
        raise NotImplementedError

    def backward(self, out: Tensor, grad: Tensor) -> None:
        out.backward(grad)

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tables(self) -> list[Tensor]:
        """The tables, in the order of the rows."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def states(self) -> list[Tensor]:
        """The state of the optimizer."""
        return [s for state in self.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]

    def rows(self, chosen: Tensor) -> Tensor:
        """Values of the rows int64 ``[U]``."""
        tables = [table.detach() for table in self.tables()]
        if len(tables) == 1:
            return tables[0][chosen]
        ends = torch.tensor([len(table) for table in tables]).cumsum(0).to(chosen.device)
        of = torch.bucketize(chosen, ends, right=True)
        out = chosen.new_empty((len(chosen), tables[0].shape[1]), dtype=tables[0].dtype)
        for i, table in enumerate(tables):
            here = of == i
            out[here] = table[chosen[here] - (ends[i] - len(table))]
        return out

    def state_bytes(self) -> int:
        """Bytes of tables and state."""
        seen = {tensor.data_ptr(): tensor for tensor in (*self.tables(), *self.states())}
        return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def _optimizer(make: Callable[..., torch.optim.Optimizer], tables: list[Tensor]) -> torch.optim.Optimizer:
    return make(tables, lr=LR, **({"fused": tables[0].is_cuda} if make is torch.optim.AdamW else {}))


def level_sums(read: Tensor, spec: AddressSpec) -> Tensor:
    """S ``[M, A, H * w]`` from the rows' values ``[M, N, H, w]``, by a running sum."""
    sums, done, out = 0, 0, []
    for level in spec.active_levels:
        orders = min(level, read.shape[1])
        sums = sums + read[:, done:orders].sum(1).flatten(1)
        done = orders
        out.append(sums)
    return torch.stack(out, dim=1)


def adagrad(w: Tensor, g: Tensor) -> Tensor:
    return w - LR * g / (g.square().mean(1, keepdim=True).sqrt() + 1e-10)


def adam(w: Tensor, g: Tensor) -> Tensor:
    return w - LR * g / (g.abs() + 1e-8)


def sparse_adam(w: Tensor, g: Tensor) -> Tensor:
    """torch.optim.SparseAdam adds eps before it corrects the second moment."""
    return w - LR * g / (g.abs() + 1e-8 / (1 - 0.999) ** 0.5)


def adamw(w: Tensor, g: Tensor) -> Tensor:
    return adam(w * (1 - LR * 0.01), g)


class Ours(Provider):
    reads = "prefixmem_fast"
    grad, backend, deterministic = "dense", "auto", False
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    first_step = staticmethod(adamw)

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self.weight = nn.Parameter(weight)
        self.optimizer = _optimizer(type(self).make, [self.weight])

    def forward(self, codes: Tensor) -> Tensor:
        return prefix_memory(
            codes, self.weight, self.spec, backend=self.backend, grad=self.grad, deterministic=self.deterministic
        )


class FusedAdagrad(Ours):
    gradient, rule = "fused", "row-wise Adagrad"
    grad, make, first_step = "fused", optim.RowWiseAdagrad, staticmethod(adagrad)


class FusedLazyAdam(Ours):
    gradient, rule = "fused", "lazy Adam"
    grad, make, first_step = "fused", optim.LazyAdam, staticmethod(adam)
    copies, half_copies = 3, 5


class SparseAdagrad(Ours):
    gradient, rule = "sparse gradient", "row-wise Adagrad"
    grad, make, first_step = "sparse", optim.RowWiseAdagrad, staticmethod(adagrad)


class DenseAdamW(Ours):
    copies, half_copies = 5, 6


class DeterministicAdamW(DenseAdamW):
    gradient = "dense gradient, deterministic"
    deterministic = True

    @classmethod
    def missing(cls, device: str) -> str | None:
        return None if device == "cuda" else "on a CPU every gradient is deterministic"


class Reference(DenseAdamW):
    reads = "prefixmem_fast, reference"
    backend = "reference"


class PyTorchOnly(Ours):
    """The library's path of PyTorch operators, which runs where the C++ kernels cannot."""

    reads = "prefixmem_fast, PyTorch alone"
    backend = "cpu"


class PyTorchOnlyAdagrad(FusedAdagrad):
    reads = PyTorchOnly.reads
    backend = "cpu"


class EagerTables(Provider):
    """What a user writes first: one nn.Embedding a table, hashes in PyTorch, a sum over orders a level, AdamW."""

    reads = "eager PyTorch, one nn.Embedding a table"
    copies = half_copies = 5
    first_step = staticmethod(adamw)

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self.embeddings = {}
        for order in range(1, spec.max_order + 1):
            for head in range(spec.heads):
                start = spec.offsets[order - 1][head]
                rows = weight[start : start + spec.rows_per_order[order - 1]]
                self.embeddings[order, head] = nn.Embedding.from_pretrained(rows, freeze=False)
        self.optimizer = _optimizer(torch.optim.AdamW, [table.weight for table in self.embeddings.values()])

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
                    heads.append(self.embeddings[order, head](index % spec.rows_per_order[order - 1]))
                total = total + torch.cat(heads, dim=-1)
            out.append(total)
        return torch.stack(out, dim=1)


class FusedTable(Provider):
    """The best plain PyTorch: one table, each row read once a SID, a running sum, sparse gradients, SparseAdam."""

    reads = "plain PyTorch, one fused table"
    gradient, rule = "sparse gradient", "SparseAdam"
    copies = half_copies = 3
    sparse = True
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SparseAdam
    first_step = staticmethod(sparse_adam)

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self.weight = nn.Parameter(weight)
        self.optimizer = _optimizer(type(self).make, [self.weight])
        # On the device from the start: to send them there in each step would make the device wait.
        self.multipliers = torch.tensor(spec.multipliers, device=weight.device)
        self.offsets = torch.tensor(spec.offsets, device=weight.device)

    def forward(self, codes: Tensor) -> Tensor:
        return level_sums(self.embed(self.hashed(codes)), self.spec)

    def hashed(self, codes: Tensor) -> Tensor:
        """Rows int64 ``[M, N, H]``."""
        spec, index, rows = self.spec, 0, []
        for order in range(1, min(spec.max_order, spec.active_levels[-1]) + 1):
            index = index ^ (codes[:, order - 1, None] * self.multipliers[order - 1])
            rows.append(self.offsets[order - 1] + index % spec.rows_per_order[order - 1])
        return torch.stack(rows, dim=1)

    def embed(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight, sparse=self.sparse)


class DenseTable(FusedTable):
    """The same with the dense gradient of torch's embedding_dense_backward."""

    gradient, rule = "embedding_dense_backward", "AdamW"
    copies = half_copies = 5
    sparse, make, first_step = False, torch.optim.AdamW, staticmethod(adamw)


class AddedTable(DenseTable):
    """The same with its gradient summed by index_add_."""

    gradient = "index_add_"

    def embed(self, rows: Tensor) -> Tensor:
        return _IndexAdd.apply(self.weight, rows)


class _IndexAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = weight.shape
        return weight[rows]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_add_(0, rows.flatten(), grad.flatten(0, -2)), None


class CompiledTable(DenseTable):
    reads = "torch.compile of one fused table"
    warm_up = 90.0  # on two CPU cores; a GPU takes half of it
    gradient = "dense gradient"

    def __init__(self, spec: AddressSpec, weight: Tensor) -> None:
        super().__init__(spec, weight)
        self._compiled = torch.compile(super().forward)

    def forward(self, codes: Tensor) -> Tensor:
        return self._compiled(codes)


class LigerTable(DenseTable):
    """One fused table behind Liger's embedding kernels, whose gradient is summed by atomics."""

    reads = "LigerEmbedding over one fused table"
    gradient = "atomics"

    @classmethod
    def missing(cls, device: str) -> str | None:
        if device != "cuda":
            return "needs a GPU"
        return _missing_package("liger_kernel.ops", "liger-kernel")

    def embed(self, rows: Tensor) -> Tensor:
        from liger_kernel.ops import LigerEmbeddingFunction

        return LigerEmbeddingFunction.apply(self.weight, rows)


class FbgemmTables(Provider):
    """FBGEMM's table batched embeddings with fused row-wise Adagrad; rows and the sum over orders in PyTorch."""

    reads = "FBGEMM table batched embeddings"
    gradient, rule = "fused", "row-wise Adagrad"
    copies = half_copies = 2
    first_step = staticmethod(adagrad)

    @classmethod
    def missing(cls, device: str) -> str | None:
        return _missing_package("fbgemm_gpu", "fbgemm-gpu" if device == "cuda" else "fbgemm-gpu-cpu")

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
        precision = {
            torch.float32: SparseType.FP32,
            torch.float16: SparseType.FP16,
            torch.bfloat16: SparseType.BF16,
        }[weight.dtype]
        tables = [(rows, weight.shape[1], *place) for rows in spec.rows_per_order for _ in range(spec.heads)]
        self.embeddings = SplitTableBatchedEmbeddingBagsCodegen(
            tables,
            optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LR,
            eps=1e-10,
            pooling_mode=PoolingMode.SUM,
            weights_precision=precision,
            output_dtype=SparseType.FP32,
        )
        self.offsets = torch.tensor(spec.offsets, device=weight.device)
        starts = [start for heads in spec.offsets for start in heads]
        for table, start in zip(self.tables(), starts, strict=True):
            table.copy_(weight[start : start + len(table)])

    def forward(self, codes: Tensor) -> Tensor:
        spec = self.spec
        rows = prefix_rows(codes, spec)[:, spec.active_levels[-1] - 1]  # [M, N, H]
        orders = len(spec.orders_at(spec.active_levels[-1]))
        rows = (rows - self.offsets)[:, :orders]
        # Bags of one row; tables of orders that no level reads get no bags.
        empty = (spec.max_order - orders) * spec.heads * len(codes)
        bags = torch.arange(rows.numel() + 1, device=codes.device)
        bags = torch.cat([bags, bags[-1:].expand(empty)])
        read = self.embeddings(rows.flatten(1).T.flatten(), bags).view(len(codes), spec.max_order, spec.heads, -1)
        return level_sums(read[:, :orders], spec)

    def backward(self, out: Tensor, grad: Tensor) -> None:
        out.backward(grad.to(out.dtype))

    def tables(self) -> list[Tensor]:
        return self.embeddings.split_embedding_weights()

    def states(self) -> list[Tensor]:
        return [state for states in self.embeddings.split_optimizer_states() for state in states]


def _missing_package(module: str, package: str) -> str | None:
    try:
        __import__(module)
    except Exception as error:  # its libraries may be there and not fit torch's
        return f"not installed ({type(error).__name__}); pip install {package} adds it"
    return None


READERS = (Ours, Reference, EagerTables, FusedTable, CompiledTable, FbgemmTables, LigerTable)
SWEEP_READERS = (Ours, EagerTables, FusedTable, FbgemmTables)
GRADIENTS = (DenseAdamW, DeterministicAdamW, DenseTable, AddedTable, LigerTable)
TRAINERS = (
    FusedAdagrad,
    FusedLazyAdam,
    SparseAdagrad,
    DenseAdamW,
    EagerTables,
    FusedTable,
    CompiledTable,
    FbgemmTables,
    LigerTable,
)
SWEEP_TRAINERS = (FusedAdagrad, FusedLazyAdam, SparseAdagrad, FusedTable, FbgemmTables)
CPU_READERS = (Ours, PyTorchOnly, EagerTables, FusedTable, FbgemmTables)
CPU_TRAINERS = (FusedAdagrad, SparseAdagrad, PyTorchOnlyAdagrad, FusedTable, FbgemmTables)
