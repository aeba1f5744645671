"""TorchRec's sharded tables for the encoder: row-wise or table-wise over ranks, in GPU memory, host memory or on SSDs.

An EmbeddingCollection with one table an order, the blocks of its H heads stacked: row i of table n is row
offset[n, 1] + i of `PrefixMemory`. One feature an order holds, for each Semantic ID, the H rows of every prefix that is
read, none where the prefix has ended:

    S_a = sum over n of concat_h table_n[ row(a, n, h) - offset[n, 1] ]        for each active level a

Orders are not pooled: pooling one feature of H rows would add the heads, and row-wise pooling sends one sum a rank.

    module = to_torchrec(encoder, optimizer="row_adagrad", lr=0.05)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=module.constraints())
    plan = planner.collective_plan(module, get_default_sharders(), torch.distributed.group.WORLD)
    model = DistributedModelParallel(module, device=device, plan=plan)
    m = model(codes)
    encoder = from_torchrec(model)

TorchRec: Ivchenko et al., RecSys 2022, https://doi.org/10.1145/3523227.3547387.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._dtypes import CODE_DTYPES
from .._environment import installed_version
from ..addressing import AddressSpec
from ..encoder import PrefixMem, PrefixMemConfig, PrefixMemory
from ..operation import prefix_rows

# (torch, torchrec, fbgemm-gpu-cpu or fbgemm-gpu) that ran the tests. pip lets any three stand together.
WORKING = (("2.13.0", "1.9.2", "1.8.0"),)
FBGEMM = ("fbgemm-gpu-cpu", "fbgemm-gpu")
# Whole rows on one rank: a row split by columns has another mean(g^2) on each, and a replicated one no fused optimizer.
SHARDING_TYPES = ("row_wise", "table_wise")
COMPUTE_KERNELS = ("fused", "fused_uvm", "fused_uvm_caching", "key_value")
OPTIMIZERS = ("row_adagrad", "sgd")
_ROWS_AT_ONCE = 1 << 18  # of a broadcast: 64 MB of 64 columns


def to_torchrec(
    encoder: PrefixMem,
    *,
    optimizer: str | None = "row_adagrad",
    lr: float = 1e-2,
    eps: float = 1e-10,
    dtype: torch.dtype | None = None,
) -> TorchRecPrefixMem:
    """A copy of the encoder whose rows are in TorchRec's tables, ready for DistributedModelParallel.

    It is on the encoder's device. An encoder on the meta device gives tables on it, which TorchRec makes and fills
    shard by shard (normal, of `memory_init_std`); take that where no process can hold the whole.

    Args:
        encoder: any but those refused below; cross-item tables become a collection of their own.
        optimizer: of the tables, run in the backward pass: "row_adagrad" or "sgd", the rules of
            `prefixmem_fast.optim`. None names none: the `fused_params` of the sharder then say. W_out is a dense
            parameter, which is yours to step.
        lr: its learning rate. A schedule sets it in ``model.fused_optimizer.param_groups`` and calls
            ``model.fused_optimizer.step()`` in each step: without the call the tables keep the rate that they had.
        eps: of "row_adagrad".
        dtype: of the tables: float32 or float16; by default the encoder's. S is summed in float32 and has the dtype
            that the encoder's has.

    Raises:
        ImportError: torchrec is not installed, or does not go with the torch and FBGEMM that are.
        TypeError: `encoder` is no PrefixMem.
        ValueError: an argument is not as stated. An encoder that is quantized, has `output_slot`, or whose rows are not
            a multiple of 4 numbers is refused.
    """
    _check_encoder(encoder)
    if optimizer is not None:
        _checks.choice("optimizer", optimizer, OPTIMIZERS)
    _checks.not_negative("lr", lr)
    _checks.not_negative("eps", eps)
    if eps == 0:
        raise ValueError("eps = 0 divides by zero at rows whose gradient is zero; give 1e-10, say")
    dtype = encoder.memory.weight.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"dtype = {dtype}; TorchRec's EmbeddingCollection has tables of torch.float32 and torch.float16: give one"
        )
    require_torchrec()
    memories = {}
    for depth, one in enumerate(_nested(encoder)):
        memory = TorchRecMemory.of(one.memory, "cross_item_" * depth, dtype)
        if optimizer is not None:
            _update_in_backward(memory, optimizer, lr, eps)
        memories[id(one.memory)] = memory
    return TorchRecPrefixMem(copy.deepcopy(encoder, memories))  # all but the tables, which stand in the memo


def from_torchrec(module: nn.Module, encoder: PrefixMem | None = None) -> PrefixMem:
    """The encoder again, with the weights of TorchRec's tables and W_out; the same on every rank.

    Sharded tables are gathered: every rank calls it, and each gets the whole.

    Args:
        module: what `to_torchrec` returned, or a DistributedModelParallel or other module that holds exactly one.
        encoder: where to write; of the same config. None makes one on the CPU, in the dtype that the first one had.

    Raises:
        TypeError: `encoder` is no PrefixMem, or the tables are no plain shards (key_value tables, DTensors).
        ValueError: `module` holds none or several, it is `quantized()`, or `encoder` is of another config.
    """
    found = [one for one in module.modules() if isinstance(one, TorchRecPrefixMem)]
    if len(found) != 1:
        raise ValueError(f"module holds {len(found)} modules of to_torchrec; give one that holds exactly one")
    own = found[0].encoder
    if encoder is None:
        memo = {id(one.memory): one.memory.empty_memory() for one in _nested(own)}
        encoder = copy.deepcopy(own, memo)
    else:
        _check_encoder(encoder)
        if encoder.config != own.config:
            raise ValueError(
                f"encoder has the config {encoder.config} and module {own.config}; give the same, or leave encoder out"
            )
        given = dict(encoder.named_parameters())
        for name, weight in own.named_parameters():
            if name in given:  # all but the tables, whose names differ
                given[name].detach().copy_(weight.detach())
    for source, target in zip(_nested(own), _nested(encoder), strict=True):
        target.memory.before_write()
        source.memory.write_to(target.memory.weight.detach())
    return encoder


class TorchRecPrefixMem(nn.Module):
    """An encoder that reads TorchRec's tables. `to_torchrec` makes it.

    Where the tables are sharded every rank takes part in each forward and backward pass. A rank without Semantic IDs
    calls both too, with codes ``[0, L]``.

    Attributes:
        encoder: a `PrefixMem` whose memory is a `TorchRecMemory`.
        memory: that memory; it gives S.
    """

    def __init__(self, encoder: PrefixMem) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def config(self) -> PrefixMemConfig:
        return self.encoder.config

    @property
    def memory(self) -> TorchRecMemory:
        return self.encoder.memory

    def forward(self, codes: Tensor) -> Tensor:
        """m of every level: integer ``[..., L]`` to ``[..., L, hidden_size]``; see `PrefixMem.forward`.

        Raises:
            TypeError, ValueError: `codes` is not as stated, or a table is sharded otherwise than `constraints` allow.
        """
        return self.encoder(codes)

    def constraints(
        self,
        *,
        sharding_types: Sequence[str] = SHARDING_TYPES,
        compute_kernels: Sequence[str] = COMPUTE_KERNELS[:3],
    ) -> dict[str, Any]:
        """ParameterConstraints of every table by name, for TorchRec's planner; without them it may choose otherwise.

        Args:
            sharding_types: of "row_wise" and "table_wise". Column-wise sharding makes row-wise Adagrad another
                optimizer, and data_parallel takes a table out of the fused one.
            compute_kernels: of "fused" (the device's memory), "fused_uvm" and "fused_uvm_caching" (the host's memory
                under a GPU, with a cache in the second), "key_value" (SSD). All but the first are for GPUs; what a
                device has not is passed over.

        Raises:
            ValueError: an argument is empty, or holds another name.
        """
        for name, given, allowed in (
            ("sharding_types", sharding_types, SHARDING_TYPES),
            ("compute_kernels", compute_kernels, COMPUTE_KERNELS),
        ):
            if isinstance(given, str) or not given or not set(given) <= set(allowed):
                raise ValueError(f"{name} = {given!r}; give a list of {', '.join(map(repr, allowed))}")
        from torchrec.distributed.planner import ParameterConstraints

        return {
            name: ParameterConstraints(
                sharding_types=list(sharding_types),
                compute_kernels=list(compute_kernels),
                pooling_factors=[float(ids)],
            )
            for one in _nested(self.encoder)
            for name, ids in one.memory.ids_of_a_sid().items()
        }

    def quantized(self) -> TorchRecPrefixMem:
        """A copy for serving on one device, with TorchRec's int8 tables: a scale and a bias for each row.

        The relative error of S is about 5e-3. It has no gradient. `PrefixMem.quantize` is this package's own.

        Raises:
            ValueError: the tables are sharded or quantized already.
        """
        memo = {id(one.memory): one.memory.quantized() for one in _nested(self.encoder)}
        return TorchRecPrefixMem(copy.deepcopy(self.encoder, memo)).requires_grad_(False)


class TorchRecMemory(nn.Module):
    """The tables: S of codes, as `PrefixMemory` gives it.

    The state_dict carries the spec, and loading one of another spec raises RuntimeError: under it the rows mean other
    prefixes.

    Args:
        config: whose spec says which rows are read.
        collection: an EmbeddingCollection, or what took its place when it was sharded or quantized.
        names: of the tables and of the features, by order.
        dtype: of S.
    """

    def __init__(self, config: PrefixMemConfig, collection: nn.Module, names: dict[int, str], dtype: torch.dtype):
        super().__init__()
        self.config, self.collection, self.names, self.dtype = config, collection, names, dtype

    @classmethod
    def of(cls, memory: PrefixMemory, prefix: str, dtype: torch.dtype) -> TorchRecMemory:
        """A copy of the tables of a `PrefixMemory`; `prefix` begins their names."""
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.modules.embedding_configs import dtype_to_data_type

        config, weight = memory.config, memory.weight.detach()
        names = {n: f"{prefix}order{n}" for n in range(1, config.spec.max_order + 1) if _rows(config.spec, n)}
        tables = [
            EmbeddingConfig(
                name=name,
                num_embeddings=config.spec.heads * config.spec.rows_per_order[n - 1],
                embedding_dim=config.row_width,
                feature_names=[name],
                data_type=dtype_to_data_type(dtype),
                init_fn=partial(_start, std=config.memory_init_std),
            )
            for n, name in names.items()
        ]
        collection = EmbeddingCollection(tables, device=weight.device)
        if not weight.is_meta:
            for n, name in names.items():
                collection.embeddings[name].weight.data.copy_(weight[_rows(config.spec, n)])
        return cls(config, collection, names, weight.dtype)

    def ids_of_a_sid(self) -> dict[str, int]:
        """How many ids a whole Semantic ID has in each feature; H for one that is never read, since 0 is no factor."""
        return {name: max(len(self._levels_of(n)), 1) * self.config.spec.heads for n, name in self.names.items()}

    @property
    def _levels_read(self) -> tuple[int, ...]:
        """The levels whose rows are looked up. In prefix mode the last one has those of the others."""
        spec = self.config.spec
        return spec.active_levels[-1:] if spec.mode == "prefix" else spec.active_levels

    def _levels_of(self, order: int) -> list[int]:
        return [level for level in self._levels_read if order in self.config.spec.orders_at(level)]

    def forward(self, codes: Tensor) -> Tensor:
        """S of every active level: integer ``[..., L]`` to ``[..., A, memory_dim]``."""
        from torchrec import KeyedJaggedTensor

        self._check_sharding()
        spec = self.config.spec
        _checks.tensor("codes", codes, CODE_DTYPES, None, f"[..., {spec.levels}]")
        if codes.dim() < 1 or codes.shape[-1] != spec.levels:
            raise ValueError(f"codes has shape {tuple(codes.shape)}; give [..., {spec.levels}]")
        sids = codes.reshape(-1, spec.levels)
        given = len(sids)
        if given == 0:  # TorchRec raises at an empty batch, and the other ranks wait for this one
            sids = codes.new_full((1, spec.levels), -1)

        ids, lengths = self._ids(sids)
        place = (ids[:, 0] >= 0).nonzero()[:, 0]  # of the prefixes that have rows
        features = KeyedJaggedTensor(list(self.names.values()), ids[place].flatten(), lengths=lengths)
        found = self.collection(features)
        rows = torch.cat([found[name].values().float() for name in self.names.values()])
        rows = rows.view(-1, self.config.memory_dim)  # heads side by side
        all_rows = rows.new_zeros(len(ids), rows.shape[1]).index_copy(0, place, rows)
        S = self._sum_orders(all_rows, len(sids))
        return S[:given].reshape(*codes.shape[:-1], *S.shape[1:]).to(self.dtype)

    def _ids(self, sids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``[.., H]`` of the order's table, below 0 for none, by order, Semantic ID and level; how many ids."""
        spec = self.config.spec
        rows = prefix_rows(sids, spec)  # [B, L, N, H]
        ids, lengths = [], []
        for n in self.names:
            levels = [level - 1 for level in self._levels_of(n)]
            of_order = rows[:, levels, n - 1] - spec.offsets[n - 1][0]  # [B, levels, H]
            ids.append(of_order.flatten(0, 1))
            lengths.append((of_order >= 0).sum((1, 2)))
        return torch.cat(ids), torch.cat(lengths).int()

    def _sum_orders(self, rows: Tensor, sids: int) -> Tensor:
        """Rows as `_ids` orders them, ``[.., memory_dim]``, to S ``[B, A, memory_dim]``; summed from order 1 on."""
        spec = self.config.spec
        counts = [sids * len(self._levels_of(n)) for n in self.names]
        by_order = {
            n: dict(zip(self._levels_of(n), part.unflatten(0, (sids, -1)).unbind(1), strict=True))
            for n, part in zip(self.names, rows.split(counts), strict=True)
            if len(part)
        }
        S = []
        for level in spec.active_levels:
            total = rows.new_zeros(sids, rows.shape[1])
            for n in spec.orders_at(level):
                total = total + by_order[n][level if spec.mode != "prefix" else self._levels_read[0]]
            S.append(total)
        return torch.stack(S, 1)

    def _check_sharding(self) -> None:
        plan = getattr(self.collection, "module_sharding_plan", None) or {}
        for name, table in plan.items():
            if table.sharding_type not in SHARDING_TYPES or table.compute_kernel not in COMPUTE_KERNELS:
                raise ValueError(
                    f"the table {name} is sharded {table.sharding_type} with the kernel {table.compute_kernel}, which "
                    f"trains it otherwise than asked; allowed are {' and '.join(SHARDING_TYPES)} with "
                    f"{', '.join(COMPUTE_KERNELS)}: give the planner constraints=module.constraints()"
                )

    def empty_memory(self) -> PrefixMemory:
        """A `PrefixMemory` on the CPU for these tables, not filled yet."""
        return PrefixMemory(self.config, device="meta", dtype=self.dtype).to_empty(device="cpu")

    @torch.no_grad()
    def write_to(self, weight: Tensor) -> None:
        """Copy the tables into that of a `PrefixMemory`, ``[R, w]``; every rank takes part where they are sharded."""
        self._check_sharding()
        if _is_quantized(self.collection):
            raise ValueError("module is quantized; give the one that it was made from")
        tables = self.collection.state_dict()
        for n, name in self.names.items():
            _copy_table(tables[f"embeddings.{name}.weight"], weight[_rows(self.config.spec, n)])

    def quantized(self) -> TorchRecMemory:
        from torch.ao.quantization import PlaceholderObserver
        from torchrec import EmbeddingCollection
        from torchrec.modules.embedding_configs import QuantConfig
        from torchrec.quant.embedding_modules import EmbeddingCollection as QuantizedCollection

        if type(self.collection) is not EmbeddingCollection:
            what = "quantized already" if _is_quantized(self.collection) else "sharded"
            raise ValueError(f"the tables are {what}; quantize to_torchrec(from_torchrec(module), optimizer=None)")
        source = copy.copy(self.collection)
        source.qconfig = QuantConfig(
            activation=PlaceholderObserver.with_args(dtype=torch.float32),
            weight=PlaceholderObserver.with_args(dtype=torch.int8),
        )
        return TorchRecMemory(self.config, QuantizedCollection.from_float(source), self.names, self.dtype)

    def extra_repr(self) -> str:
        spec = self.config.spec
        return f"rows={spec.total_rows}, width={self.config.row_width}, heads={spec.heads}, mode={spec.mode}"

    @property
    def _address(self) -> str:
        return json.dumps({**self.config.spec.to_dict(), "earlier_codes": self.config.earlier_codes}, sort_keys=True)

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self._address, "utf-8"), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: `_load_from_state_dict` has compared the two."""

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        stored = state_dict.get(prefix + "_extra_state")
        if stored is not None and bytes(stored.tolist()) != self._address.encode():
            raise RuntimeError(  # at once: DistributedModelParallel drops what is collected
                "the checkpoint's address spec differs; build the module from the checkpoint's.\n"
                f"  checkpoint: {bytes(stored.tolist()).decode(errors='replace')}\n  module:     {self._address}"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def require_torchrec() -> None:
    """Import torchrec.

    Raises:
        ImportError: it is not installed, or does not load with the torch and FBGEMM that are; with what to install.
    """
    fbgemm = next((name for name in FBGEMM if installed_version(name)), FBGEMM[0])
    versions = tuple(installed_version(name) for name in ("torch", "torchrec", fbgemm))
    found = f"torch {versions[0]}, torchrec {versions[1] or 'absent'}, {fbgemm} {versions[2] or 'absent'}"
    try:
        import torchrec  # noqa: F401
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # FBGEMM's libraries raise what they like
        known = "".join(
            f"\n  pip install torch=={torch_version} {fbgemm}=={fbgemm_version} torchmetrics==1.0.3 tensordict "
            f"pyre-extensions && pip install --no-deps torchrec=={version}"
            for torch_version, version, fbgemm_version in WORKING
        )
        raise ImportError(
            "to_torchrec needs releases of torchrec and FBGEMM that go with torch, which pip does not see to; "
            f"installed are {found}. Known to work (fbgemm-gpu-cpu, or fbgemm-gpu for a GPU):{known}"
        ) from error
    if versions not in WORKING:
        known = "; ".join(f"torch {t}, torchrec {r}, FBGEMM {f}" for t, r, f in WORKING)
        warnings.warn(f"to_torchrec is not tested with {found}, but with {known}", stacklevel=3)


def _check_encoder(encoder: PrefixMem) -> None:
    if not isinstance(encoder, PrefixMem):
        raise TypeError(f"encoder is a {type(encoder).__name__}; give a PrefixMem")
    for one in _nested(encoder):
        config = one.config
        one.memory.check_whole("to_torchrec")
        if config.quantization is not None:
            raise ValueError(
                f"encoder has quantization = {config.quantization!r}; give the one that it was made from, and call "
                "quantized() of the result"
            )
        if config.output_slot:
            raise ValueError(
                "encoder has output_slot = True, which adds to a model's last hidden states and reads token streams; "
                "TorchRec's tables read codes: give an encoder without"
            )
        if config.row_width % 4:
            raise ValueError(
                f"encoder has rows of memory_dim / heads = {config.row_width} numbers; FBGEMM's tables take multiples "
                f"of 4: give memory_dim = {(config.row_width // 4 + 1) * 4 * config.spec.heads}"
            )


def _nested(encoder: PrefixMem) -> Iterator[PrefixMem]:
    """The encoder, its tables of cross-item orders, theirs .."""
    while encoder is not None:
        yield encoder
        encoder = encoder.cross_item


def _rows(spec: AddressSpec, order: int) -> slice | None:
    """The rows of an order in the one table of `PrefixMemory`; None where it has none."""
    begin, rows = spec.offsets[order - 1][0], spec.heads * spec.rows_per_order[order - 1]
    return slice(begin, begin + rows) if rows else None


@torch.no_grad()
def _start(weight: Tensor, std: float) -> None:
    """Normal, and another on each rank, which fills its own shards: ranks seeded alike would fill them alike."""
    if weight.is_meta:
        return
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    seed = torch.randint(1 << 62, ()).item() + rank
    weight.normal_(std=std, generator=torch.Generator(weight.device).manual_seed(seed))


def _update_in_backward(memory: TorchRecMemory, optimizer: str, lr: float, eps: float) -> None:
    """Name the optimizer to TorchRec, which runs it in FBGEMM's kernels; unsharded tables step in the backward pass."""
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.optim import RowWiseAdagrad

    kind, options = (RowWiseAdagrad, {"eps": eps}) if optimizer == "row_adagrad" else (torch.optim.SGD, {})
    for weight in memory.collection.parameters():
        _apply_optimizer_in_backward(kind, [weight], {"lr": lr, **options})


def _is_quantized(collection: nn.Module) -> bool:
    from torchrec.quant.embedding_modules import EmbeddingCollection as QuantizedCollection

    return isinstance(collection, QuantizedCollection)


def _copy_table(table: Any, target: Tensor) -> None:
    """A table whole or in shards, which their owners broadcast, to `target` ``[rows, w]`` on every rank."""
    from torch.distributed import broadcast
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    if isinstance(table, nn.Parameter) or type(table) is Tensor:
        target.copy_(table)
        return
    shards = table.local_shards() if isinstance(table, ShardedTensor) else [None]
    local = {s.metadata.shard_offsets[0]: s.tensor for s in shards if s is not None and isinstance(s.tensor, Tensor)}
    if len(local) < len(shards):
        raise TypeError(
            f"a table is {type(table).__name__}, which cannot be gathered; save it with torch.distributed.checkpoint, "
            "and load it into tables with another compute kernel"
        )
    for shard in table.metadata().shards_metadata:
        begin, rows = shard.shard_offsets[0], shard.shard_sizes[0]
        for start in range(0, rows, _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, rows))
            if begin in local:
                sent = local[begin][part].clone()  # of the device's memory, where the shard is of the host's
            else:
                sent = torch.empty_like(target[part], dtype=table.dtype, device=shard.placement.device().type)
            broadcast(sent, shard.placement.rank(), group=table._process_group)
            target[begin : begin + rows][part] = sent.to(target.device, target.dtype)
