"""The encoder in PyTorch's own operators: what torch.export, AOTInductor and ONNX take to runtimes without Python.

The operators of this package are registered from Python, and such a runtime has none of them. These modules compute the
same numbers as the reference does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from ..addressing import TokenStream, first_codes, window_codes
from ..addressing.addresses import rows_at
from ..encoder import PrefixMem, QuantizedMemory
from ..encoder.projection import Encoded
from ..operation.functions import check_stream
from ..operation.interface import QuantizedTable
from ..operation.sums import sum_orders
from ..sid import SIDVocabulary


def exportable(encoder: PrefixMem, vocabulary: SIDVocabulary, *, window: bool = False) -> nn.Module:
    """The encoder as a module of PyTorch's own operators alone, for export.

    Its parameters are those of the encoder, not copies. It is for serving: nothing is dropped out, and it stays on the
    device that the encoder is on now.

    Args:
        encoder: its tables whole and on the device; also quantized ones, and those of cross-item orders.
        vocabulary: which ids are which codes; its codebooks must be the encoder's. It becomes a buffer of the module.
        window: whether the module reads windows of the last tokens rather than whole rows.

    Returns:
        a module of ``(input_ids, segment_ids=None)``, int64 or int32 ``[B, T]``, to m ``[B, T, hidden_size]`` as
        `PrefixMem.encode_tokens` gives it. With `window` its rows are ``[n, W]``, W = ``encoder.config.lookback + 1``:
        the last tokens of each sequence, after -1 where it has fewer. It returns m of the last one, ``[n,
        hidden_size]``. Where tables have `output_slot`, it returns a tuple of m and of what is added to the last hidden
        states, in the shape of m.

    Raises:
        TypeError: an argument is not as stated.
        ValueError: the vocabulary's codebooks are not the encoder's, tables are in the host's memory, a map of a file,
            divided over processes or without numbers, or the encoder would drop tokens out.
    """
    if not isinstance(encoder, PrefixMem):
        raise TypeError(f"encoder is a {type(encoder).__name__}; give a PrefixMem")
    if not isinstance(vocabulary, SIDVocabulary):
        raise TypeError(f"vocabulary is a {type(vocabulary).__name__}; give a SIDVocabulary")
    _checks.boolean("window", window)
    vocabulary.check_codebooks(encoder.config.spec)
    return _Exportable(encoder, vocabulary, window).eval()


class _Exportable(nn.Module):
    """Token ids to m."""

    def __init__(self, encoder: PrefixMem, vocabulary: SIDVocabulary, window: bool) -> None:
        super().__init__()
        self.window = encoder.config.lookback + 1 if window else None
        self.tables = _Tables(encoder)
        self.register_buffer("token_table", vocabulary.token_table(encoder.out_proj.weight.device))

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        stream = TokenStream(input_ids, self.token_table, segment_ids)
        check_stream(stream)
        if self.window not in (None, input_ids.shape[1]):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; give [n, {self.window}], the last tokens of each "
                "sequence, after -1 where it has fewer"
            )
        m, head = self.tables(stream, last=self.window is not None)
        if self.window is not None:
            m, head = m.squeeze(1), None if head is None else head.squeeze(1)
        return m if head is None else (m, head)


class _Tables(nn.Module):
    """One encoder's tables and projections, and those of its cross-item orders."""

    def __init__(self, encoder: PrefixMem) -> None:
        super().__init__()
        _check(encoder)
        memory = encoder.memory
        self.config = encoder.config
        self.weight: Tensor | None = None
        if isinstance(memory, QuantizedMemory):
            values, self.dtype = memory.values, memory.dtype
            if values.dtype != torch.int8:
                values = values.view(torch.uint8)  # an index into float8, or a view of its bits, has no ONNX operator
            self.register_buffer("values", values)
            self.register_buffer("scales", memory.scales)
        else:
            self.weight, self.dtype = memory.weight, memory.weight.dtype
        self.lag_weights = encoder.lag_weights
        self.out_proj, self.head_proj = encoder.out_proj, encoder.head_proj
        self.cross_item = None if encoder.cross_item is None else _Tables(encoder.cross_item)

    def forward(self, stream: TokenStream, last: bool) -> Encoded:
        """Of every token ``[B, T, ..]``, or of the last one of each row ``[B, 1, ..]``."""
        S = self._read(stream, last)
        encoded = Encoded(self.out_proj(S), None if self.head_proj is None else self.head_proj(S))
        return encoded if self.cross_item is None else encoded + self.cross_item(stream, last)

    def _read(self, stream: TokenStream, last: bool) -> Tensor:
        spec, lags = self.config.spec, []
        table = QuantizedTable(self.values, self.scales) if self.weight is None else self.weight
        for lag in range(self.config.lags):
            codes, level = window_codes(stream, spec, spec.history + lag)
            if last:
                codes, level = codes[:, -1:], level[:, -1:]
            rows = rows_at(first_codes(codes, spec, self.config.earlier_codes), level, spec)  # [B, T, A, N, H]
            lags.append(sum_orders(rows.amax(-3), table, self.dtype))
        if self.lag_weights is None:
            return lags[0]
        return torch.einsum("k...,k->...", torch.stack(lags), self.lag_weights.to(self.dtype))


def _check(encoder: PrefixMem) -> None:
    """Refuse what an exported program cannot hold."""
    memory = encoder.memory
    memory.check_whole("exportable")
    if memory.tables != "device":
        raise ValueError(
            f'tables = "{memory.tables}", and an exported program holds its tables; read the encoder with '
            'PrefixMem.from_pretrained(folder, tables="device")'
        )
    if encoder.training and encoder.dropout:
        raise ValueError(
            f"the encoder trains with dropout = {encoder.dropout}, and an exported program drops nothing out; call "
            "encoder.eval() first"
        )
    table = memory.values if isinstance(memory, QuantizedMemory) else memory.weight
    for name, tensor in (("the table", table), *encoder.out_proj.named_parameters(prefix="out_proj")):
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor, a part of it on each process; call prefixmem_fast.distributed.save_pretrained "
                "on every rank and read what it wrote with PrefixMem.from_pretrained"
            )
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no numbers; load the encoder first")
