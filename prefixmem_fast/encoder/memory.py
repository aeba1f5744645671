"""`PrefixMemory`: the tables as a module.

S_l = sum_{n <= min(l, N)} concat_h E[n, h][ idx[n, h] ]        (PrefixMem, arXiv 2606.00324)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._pages import ask_for_huge_pages
from ..addressing import TokenStream
from ..operation import prefix_memory, token_memory
from ..operation.functions import check_options, window_memory
from ..operation.table_state import table_state
from ..sid import SIDVocabulary
from .config import PrefixMemConfig
from .host_tables import HOST, HostReader, check_tables, copy_across, device_of_table, staying_on_host
from .table_worker import OverlappedTable


class Division(Protocol):
    """How the tables are divided over processes; see `prefixmem_fast.distributed.shard`."""

    config: PrefixMemConfig  # of the whole tables
    is_first_copy: bool  # of several processes that hold the same rows
    saved_apart: bool  # by a callback of a trainer, say, so that nobody has to be told

    def read(self, memory: PrefixMemory, source: Tensor | TokenStream) -> Tensor:
        """S of this process's codes or tokens, from the parts of all; collective."""

    def part_of(self, table: Tensor) -> Tensor:
        """The rows of this process, of the whole table or of what has a number a row."""

    def norm(self, gradient: Tensor | None, order: float) -> Tensor:
        """Of the gradients of all parts together; collective."""

    def save(self, encoder: nn.Module, path: Path, vocabulary: SIDVocabulary | None, max_shard_size: int | str) -> None:
        """Write the encoder that the table is of, from all processes; collective."""


class PrefixMemory(nn.Module):
    """The memory tables, one parameter ``weight [R, w]`` laid out by the config's spec.

    Args:
        config: sizes and spec.
        backend, grad, deterministic: how `prefix_memory` computes; not part of the checkpoint.
        tables: "device": the table moves with the module. "host": it and its optimizer's state stay in the host's
            memory, wherever the module moves; codes, S and dS alone cross. torch.compile breaks its graph there, and a
            CUDA graph cannot hold it. "mapped", of `PrefixMem.from_pretrained`: a read-only map of the file.
        overlap: with tables="host" and grad="fused", the backward pass hands the update to a thread and returns. What
            reads the table or the optimizer's state next waits for it, and raises what it raised; see
            `OverlappedTable`. The optimizer's step waits for nothing.

    The state_dict carries the spec, and `earlier_codes` where the config has it, as JSON bytes (a uint8 tensor, so that
    safetensors takes it). Loading a checkpoint
    whose spec differs raises RuntimeError with both specs before anything of this module is changed; one without a
    spec gives a warning (strict=False) or an error.
    """

    _table = "weight"  # the name in a state_dict
    division: Division | None = None  # set where processes hold a part of the tables each

    def __init__(
        self,
        config: PrefixMemConfig,
        *,
        backend: str = "auto",
        grad: str = "dense",
        deterministic: bool = False,
        tables: str = "device",
        overlap: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config)
        check_options(backend, grad, deterministic)
        check_tables(tables, overlap, grad)
        if tables != "device":
            device = device_of_table(device)
        if tables == "mapped" and device.type != "meta":
            raise ValueError('tables = "mapped" reads a file; give it to PrefixMem.from_pretrained')
        self.config = config
        self.backend, self.grad, self.deterministic = backend, grad, deterministic
        self.tables, self.overlap = tables, overlap
        self._reader = None if tables == "device" else HostReader()
        weight = torch.empty(config.spec.total_rows, config.row_width, device=device, dtype=dtype)
        ask_for_huge_pages(weight)
        self.weight = nn.Parameter(weight, requires_grad=tables != "mapped")
        self._keep_table()
        self.reset_parameters()

    @property
    def managed(self) -> bool:
        """Whether the table is kept from what wraps the model: `weight` is then none of the module's parameters."""
        return "weight" in self.__dict__

    def hide_table(self) -> None:
        """Make the table a managed one; see `prefixmem_fast.distributed.replicate`."""
        if not self.managed:
            self.__dict__["weight"] = self._parameters.pop("weight")
            table_state(self.weight).managed = True

    def requires_grad_(self, requires_grad: bool = True) -> PrefixMemory:
        """As of every module, also of a managed table."""
        if self.managed:
            self.weight.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every module, also of a managed table."""
        super().zero_grad(set_to_none)
        if self.managed:
            self.weight.grad = None

    def __getstate__(self) -> dict[str, Any]:
        if self.tables != "device":
            self._reader.worker.wait()  # pickling for another process may move the table
        return self.__dict__

    def check_whole(self, call: str) -> None:
        """Refuse a call on a part of a table.

        Raises:
            ValueError: the table is divided over processes.
        """
        if self.division is not None:
            raise ValueError(
                f"{call} needs whole tables, and these are divided over processes; save the encoder with "
                "save_pretrained on every rank and read it with PrefixMem.from_pretrained"
            )

    def reset_parameters(self) -> None:
        self.before_write()
        nn.init.normal_(self.weight, std=self.config.memory_init_std)

    def before_write(self) -> None:
        """Drop what was gathered of the old numbers; refuse to write into a table that is a map of its file.

        Raises:
            RuntimeError: tables = "mapped".
        """
        if self.tables == "mapped" and not self.weight.is_meta:
            raise RuntimeError(
                'tables = "mapped" is read-only, and nothing can be loaded into it; load another file with '
                'PrefixMem.from_pretrained, or this one with tables="host"'
            )
        if self.tables != "device":
            self._reader.forget()

    def _keep_table(self) -> None:
        """The table in the host's memory, as the kind of parameter that it has to be; others may have replaced it."""
        if self.tables == "device" or self._is_sharded():
            return
        weight = self.weight
        kind = OverlappedTable if self.overlap else nn.Parameter
        if weight.device not in (HOST, torch.device("meta")) or (self.overlap and not isinstance(weight, kind)):
            weight = kind(weight.data.to(HOST if not weight.is_meta else "meta"), weight.requires_grad)
            if self.managed:
                self.__dict__["weight"] = weight
            else:
                self.weight = weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixMemory:
        if self.tables != "device":
            self._reader.forget()
            fn = staying_on_host(fn, self.tables == "mapped")
        super()._apply(fn, recurse)
        if self.managed:
            moved = fn(self.weight.data)
            if not moved.is_meta or self.weight.is_meta:  # a wrapper that loads anew moves the model there meanwhile
                self.weight.data = moved
        self._keep_table()
        return self

    def forward(self, codes: Tensor) -> Tensor:
        """S of every active level: integer ``[..., L]`` to ``[..., A, memory_dim]``."""
        return self.read_own(codes) if self.division is None else self.division.read(self, codes)

    def read_own(self, source: Tensor | TokenStream) -> Tensor:
        """S of the table that is here: the whole one, or a rank's part of a divided one."""
        spec = self.config.spec
        if self.tables != "device":
            return self._reader.read(self, source)
        if not isinstance(source, TokenStream):
            return prefix_memory(source, self.weight, spec, **self.options())
        tokens, table, segments = source
        return token_memory(tokens, table, self.weight, spec, segment_ids=segments, **self.options())

    def prefetch(self, codes: Tensor, *, stale: bool = False) -> None:
        """Begin to gather S of a coming batch; see `PrefixMem.prefetch`."""
        self._check_prefetch()
        self._reader.prefetch(self, codes, stale)

    def prefetch_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        stale: bool = False,
    ) -> None:
        """The same of a token stream; see `PrefixMem.prefetch_tokens`."""
        self._check_prefetch()
        table = self.token_table(input_ids, vocabulary)
        self._reader.prefetch(self, TokenStream(input_ids, table, segment_ids), stale)

    def _check_prefetch(self) -> None:
        if self.tables == "device":
            raise ValueError('prefetch is for tables in the host\'s memory, and tables = "device"; give tables="host"')
        if self.division is not None:
            raise ValueError("prefetch of a divided table would need the codes of all ranks; leave it out")

    def read_tokens(self, input_ids: Tensor, vocabulary: SIDVocabulary, segment_ids: Tensor | None = None) -> Tensor:
        """S over a token stream: ``[B, T]`` to ``[B, T, memory_dim]``, zero at text; see `token_memory`.

        Raises:
            ValueError: the vocabulary's codebooks are not the spec's.
        """
        stream = TokenStream(input_ids, self.token_table(input_ids, vocabulary), segment_ids)
        return self.read_own(stream) if self.division is None else self.division.read(self, stream)

    def read_window(self, windows: Tensor, vocabulary: SIDVocabulary, out: Tensor | None = None) -> Tensor:
        """S of the last token of each window ``[n, W]``: ``[n, memory_dim]``, forward alone; see `window_memory`.

        Raises:
            ValueError: the vocabulary's codebooks are not the spec's.
        """
        table = self.token_table(windows, vocabulary)
        if self.division is None and self.tables == "device":
            return self._read_own_window(windows, table, out)
        if self.division is None:
            S = copy_across(self._read_own_window(copy_across(windows, HOST), table), windows.device)
        else:
            S = self.division.read(self, TokenStream(windows, table))[:, -1]
        return S if out is None else out.copy_(S)

    def _read_own_window(self, windows: Tensor, token_table: Tensor, out: Tensor | None = None) -> Tensor:
        return window_memory(windows, token_table, self.weight, self.config.spec, backend=self.backend, out=out)

    def token_table(self, input_ids: Tensor, vocabulary: SIDVocabulary) -> Tensor:
        """The vocabulary's table where the tokens are read: on their device, or on the table's host."""
        if not isinstance(vocabulary, SIDVocabulary) or not isinstance(input_ids, Tensor):
            raise TypeError(
                f"input_ids is a {type(input_ids).__name__} and vocabulary a {type(vocabulary).__name__}; "
                "give a tensor [B, T] and a SIDVocabulary"
            )
        vocabulary.check_codebooks(self.config.spec)
        on_host = self.tables != "device" and self.division is None
        return vocabulary.token_table(HOST if on_host else input_ids.device)

    def options(self) -> dict[str, Any]:
        return {"backend": self.backend, "grad": self.grad, "deterministic": self.deterministic}

    def extra_repr(self) -> str:
        spec = self.config.spec
        deterministic = ", deterministic" if self.deterministic else ""
        place = "" if self.tables == "device" else f", tables={self.tables}{', overlap' if self.overlap else ''}"
        return (
            f"rows={spec.total_rows}, width={self.config.row_width}, codebooks={spec.codebook_sizes}, "
            f"orders={spec.max_order}, exact_orders={spec.exact_orders}, heads={spec.heads}, mode={spec.mode}, "
            f"active_levels={spec.active_levels}, backend={self.backend}, grad={self.grad}{deterministic}"
            f"{place}"
        )

    def get_extra_state(self) -> Tensor:
        key = json.dumps(self._address, sort_keys=True, separators=(",", ":"))
        return torch.frombuffer(bytearray(key, "utf-8"), dtype=torch.uint8)

    @property
    def _address(self) -> dict[str, Any]:
        """All that says which row a prefix has."""
        config = self.config if self.division is None else self.division.config
        address = config.spec.to_dict()
        if self.config.earlier_codes is not None:
            address["earlier_codes"] = self.config.earlier_codes
        return address

    def set_extra_state(self, state: Tensor) -> None:
        """The spec is fixed when the module is made; `_load_from_state_dict` has compared the two."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.division is not None:  # a rank's part is of no use to another one
            destination.pop(prefix + "_extra_state", None)
        elif self.managed:
            destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self._is_sharded():  # what loads a sharded state_dict takes nothing but DTensors
            destination.pop(prefix + "_extra_state", None)

    def _is_sharded(self) -> bool:
        return hasattr(self.weight, "device_mesh")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        key, name = prefix + "_extra_state", prefix + self._table
        if name in state_dict:
            self.before_write()
        if key in state_dict:
            difference = self._spec_difference(state_dict[key])
            if difference is not None:  # raised at once, not collected: later modules keep their weights too
                raise RuntimeError(f"{prefix.rstrip('.') or type(self).__name__}: {difference}")
        elif name in state_dict and not self._is_sharded():
            warnings.warn(
                f"the state_dict holds {name} without {key}: its address spec could not be compared "
                "with this module's, and under another spec the rows mean other prefixes; keep the entry in the "
                "state_dict",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._keep_table()
        if self.managed:
            self._load_managed(state_dict, prefix, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys and (self._is_sharded() or self.division is not None):
            missing_keys.remove(key)

    def _load_managed(self, state_dict, prefix, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        """What torch does for parameters: copy the table out of a state_dict, or the rows of a rank's part."""
        name = prefix + "weight"
        if name not in state_dict:
            if self.division is not None and not self.division.saved_apart:
                warnings.warn(
                    f"the state_dict has no {name}, as tables that are divided over processes are in none; read them "
                    "with prefixmem_fast.distributed.load_tables",
                    stacklevel=2,
                )
            elif self.division is None and strict:
                missing_keys.append(name)
            return
        if name in unexpected_keys:
            unexpected_keys.remove(name)
        stored = state_dict[name]
        spec = self.config.spec if self.division is None else self.division.config.spec
        if tuple(stored.shape) != (spec.total_rows, self.config.row_width):
            error_msgs.append(
                f"size mismatch for {name}: {tuple(stored.shape)} in the checkpoint, {spec.total_rows} rows of "
                f"{self.config.row_width} are needed"
            )
            return
        with torch.no_grad():
            self.weight.copy_(stored if self.division is None else self.division.part_of(stored))

    def _spec_difference(self, stored: Any) -> str | None:
        own = self._address
        try:
            if stored.dtype != torch.uint8 or stored.is_meta:
                return f"the checkpoint's address spec is {stored.dtype} on {stored.device}; load it as it was saved"
            saved = json.loads(bytes(stored.cpu().flatten().tolist()))
            names = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
        except (AttributeError, RecursionError, TypeError, ValueError):
            return "the checkpoint's address spec is not JSON; the file is damaged or was not written by this package"
        if not names:
            return None
        return (
            f"the checkpoint's address spec differs in {', '.join(names)}. Build the module from the checkpoint's "
            f"spec.\n  checkpoint: {saved}\n  module:     {own}"
        )


def check_config(config: PrefixMemConfig) -> None:
    if not isinstance(config, PrefixMemConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a PrefixMemConfig")
