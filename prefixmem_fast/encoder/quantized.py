"""`QuantizedMemory`: the tables as a module, in 8 bits a number with a scale a row, for serving.

S_l = sum_{n <= min(l, N)} concat_h scales[ idx[n, h] ] * values[ idx[n, h] ]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _checks
from .._choices import TABLES
from .._dtypes import QUANTIZED_DTYPES
from ..operation.functions import check_options
from ..operation.interface import QuantizedTable
from ..operation.quantized import (
    check_sum_dtype,
    quantized_prefix_memory,
    quantized_token_memory,
    quantized_window_memory,
)
from ..sid import SIDVocabulary
from .config import PrefixMemConfig
from .memory import PrefixMemory, check_config


class QuantizedMemory(PrefixMemory):
    """A `PrefixMemory` whose rows are 8-bit numbers and a scale each: buffers, which have no gradient.

    `.to`, `.half` and their like give S another dtype, and leave values and scales as they are.

    Attributes:
        values: int8 or float8_e4m3fn ``[R, w]``; zero until they are loaded.
        scales: float32 ``[R]``.
        dtype: of S.

    Args:
        config: with `quantization` set.
        backend, deterministic: as for `PrefixMemory`; the bits are the same run after run either way.
        grad: "dense", the default, which stands for none.
        tables, overlap: "device" and False, the defaults; the table moves with the module.
        dtype: of S: float32, bfloat16 or float16.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """

    _table = "values"

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
        nn.Module.__init__(self)
        check_config(config)
        check_options(backend, grad, deterministic)
        if config.quantization is None:
            raise ValueError("quantization = None; give 'int8' or 'fp8' in PrefixMemConfig, or take a PrefixMemory")
        if grad != "dense":
            raise ValueError(
                f"grad = {grad!r}, and a quantized table has no gradient; leave grad out, or train the encoder that it "
                "was made from"
            )
        _checks.choice("tables", tables, TABLES)
        _checks.boolean("overlap", overlap)
        if tables != "device" or overlap:
            raise ValueError(
                f"tables = {tables!r} and overlap = {overlap!r}, and a quantized table moves with its module and has "
                "no updates; leave both out, or read the encoder that it was made from in the host's memory"
            )
        self.config = config
        self.backend, self.grad, self.deterministic = backend, grad, deterministic
        self.tables, self.overlap = tables, overlap
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        check_sum_dtype(self.dtype)
        rows, values = config.spec.total_rows, QUANTIZED_DTYPES[config.quantization]
        self.register_buffer("values", torch.empty(rows, config.row_width, dtype=values, device=device))
        self.register_buffer("scales", torch.empty(rows, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.values.view(torch.uint8).zero_()
        self.scales.zero_()

    @property
    def table(self) -> QuantizedTable:
        return QuantizedTable(self.values, self.scales)

    def forward(self, codes: Tensor) -> Tensor:
        """S of every active level: integer ``[..., L]`` to ``[..., A, memory_dim]``."""
        return quantized_prefix_memory(codes, self.table, self.config.spec, dtype=self.dtype, backend=self.backend)

    def _check_prefetch(self) -> None:
        raise ValueError(
            "prefetch is for tables in the host's memory, and a quantized table moves with its module; leave it out"
        )

    def read_tokens(self, input_ids: Tensor, vocabulary: SIDVocabulary, segment_ids: Tensor | None = None) -> Tensor:
        """S over a token stream; see `PrefixMemory.read_tokens`."""
        options = {"segment_ids": segment_ids, "dtype": self.dtype, "backend": self.backend}
        token_table = self.token_table(input_ids, vocabulary)
        return quantized_token_memory(input_ids, token_table, self.table, self.config.spec, **options)

    def _read_own_window(self, windows: Tensor, token_table: Tensor, out: Tensor | None = None) -> Tensor:
        options = {"dtype": self.dtype, "backend": self.backend, "out": out}
        return quantized_window_memory(windows, token_table, self.table, self.config.spec, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantization={self.config.quantization}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedMemory:
        """What `.to` and its like call: as integers the buffers keep their bits wherever they go."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        check_sum_dtype(dtype)
        self.values = fn(self.values.view(torch.uint8)).view(self.values.dtype)
        self.scales = fn(self.scales.view(torch.int32)).view(torch.float32)
        self.dtype = dtype
        return self

    def _is_sharded(self) -> bool:
        return False

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if prefix + "weight" in state_dict:
            raise RuntimeError(f"{prefix}weight of the state_dict is not quantized; load it before quantize()")
        for name, own in self.table._asdict().items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:  # copying would convert the numbers
                raise RuntimeError(
                    f"{prefix}{name} of the state_dict is {given.dtype} and the module's is {own.dtype}; quantize to "
                    "the same kind"
                )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
