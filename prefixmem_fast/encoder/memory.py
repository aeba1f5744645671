"""`PrefixMemory`: the tables as a module.

S_l = sum_{n <= min(l, N)} concat_h E[n, h][ idx[n, h] ]        (PrefixMem, arXiv 2606.00324)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._pages import ask_for_huge_pages
from ..addressing import TokenStream
from ..operation import prefix_memory, token_memory
from ..operation.functions import check_options
from ..sid import SIDVocabulary
from .config import PrefixMemConfig
from .host_tables import HOST, HostReader, check_tables, device_of_table, staying_on_host
from .table_worker import OverlappedTable


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

    def __getstate__(self) -> dict[str, Any]:
        if self.tables != "device":
            self._reader.worker.wait()  # pickling for another process may move the table
        return self.__dict__

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
            self.weight = kind(weight.data.to(HOST if not weight.is_meta else "meta"), weight.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixMemory:
        if self.tables != "device":
            self._reader.forget()
            fn = staying_on_host(fn, self.tables == "mapped")
        super()._apply(fn, recurse)
        self._keep_table()
        return self

    def forward(self, codes: Tensor) -> Tensor:
        """S of every active level: integer ``[..., L]`` to ``[..., A, memory_dim]``."""
        if self.tables != "device":
            return self._reader.read(self, codes)
        return prefix_memory(codes, self.weight, self.config.spec, **self.options())

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

    def read_tokens(self, input_ids: Tensor, vocabulary: SIDVocabulary, segment_ids: Tensor | None = None) -> Tensor:
        """S over a token stream: ``[B, T]`` to ``[B, T, memory_dim]``, zero at text; see `token_memory`.

        Raises:
            ValueError: the vocabulary's codebooks are not the spec's.
        """
        table, spec = self.token_table(input_ids, vocabulary), self.config.spec
        if self.tables != "device":
            return self._reader.read(self, TokenStream(input_ids, table, segment_ids))
        return token_memory(input_ids, table, self.weight, spec, segment_ids=segment_ids, **self.options())

    def token_table(self, input_ids: Tensor, vocabulary: SIDVocabulary) -> Tensor:
        """The vocabulary's table where the tokens are read: on their device, or on the table's host."""
        if not isinstance(vocabulary, SIDVocabulary) or not isinstance(input_ids, Tensor):
            raise TypeError(
                f"input_ids is a {type(input_ids).__name__} and vocabulary a {type(vocabulary).__name__}; "
                "give a tensor [B, T] and a SIDVocabulary"
            )
        vocabulary.check_codebooks(self.config.spec)
        return vocabulary.token_table(input_ids.device if self.tables == "device" else HOST)

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
        address = self.config.spec.to_dict()
        if self.config.earlier_codes is not None:
            address["earlier_codes"] = self.config.earlier_codes
        return address

    def set_extra_state(self, state: Tensor) -> None:
        """The spec is fixed when the module is made; `_load_from_state_dict` has compared the two."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_sharded():  # what loads a sharded state_dict takes nothing but DTensors
            destination.pop(prefix + "_extra_state", None)

    def _is_sharded(self) -> bool:
        return hasattr(self.weight, "device_mesh")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        key = prefix + "_extra_state"
        if prefix + "weight" in state_dict:
            self.before_write()
        if key in state_dict:
            difference = self._spec_difference(state_dict[key])
            if difference is not None:  # raised at once, not collected: later modules keep their weights too
                raise RuntimeError(f"{prefix.rstrip('.') or type(self).__name__}: {difference}")
        elif prefix + self._table in state_dict and not self._is_sharded():
            warnings.warn(
                f"the state_dict holds {prefix}{self._table} without {key}: its address spec could not be compared "
                "with this module's, and under another spec the rows mean other prefixes; keep the entry in the "
                "state_dict",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._keep_table()
        if key in missing_keys and self._is_sharded():
            missing_keys.remove(key)

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
