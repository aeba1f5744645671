"""The operation over quantized tables, for serving: what users call. `quantization.py` makes such tables."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import QUANTIZED_DTYPES, SUM_DTYPES
from ..addressing import AddressSpec, TokenStream
from . import operators
from .backends import choose_backend
from .functions import as_given, check_codes, check_spec, check_stream, read_windows, two_dimensional
from .interface import QuantizedTable


def quantized_prefix_memory(
    codes: Tensor,
    table: QuantizedTable,
    spec: AddressSpec,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """`prefix_memory` of a quantized table: ``S_a = sum over n of concat_h values[row(n, h)] * scales[row(n, h)]``.

    Args:
        codes, spec, backend: as for `prefix_memory`.
        table: values int8 or float8_e4m3fn ``[R, w]`` and scales float32 ``[R]``, from `quantization.quantize`.
        dtype: of S: float32, bfloat16 or float16.

    Returns:
        ``[..., A, H * w]`` in `dtype`, summed in float32. Backends agree bit for bit in float32. How far it is from S
        of the table that was quantized is derived in `quantization.py`.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value is not as stated.
        BackendError: the backend cannot run on these tensors.
        NotImplementedError: the scales require a gradient; there is none.
    """
    check_spec(spec)
    check_codes(codes, spec.levels)
    check_quantized(table, spec, dtype)
    backend = choose_backend(backend, codes=codes, **table._asdict())
    S = operators.quantized_prefix_memory(two_dimensional(codes), *table, spec.key, dtype, backend)
    return as_given(S, codes)


def quantized_token_memory(
    input_ids: Tensor,
    token_table: Tensor,
    table: QuantizedTable,
    spec: AddressSpec,
    *,
    segment_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """`token_memory` of a quantized table.

    Args:
        input_ids, token_table, segment_ids, spec, backend: as for `token_memory`.
        table, dtype: as for `quantized_prefix_memory`, which says what is raised too.

    Returns:
        ``[B, T, H * w]`` in `dtype`, zero at text.
    """
    check_spec(spec)
    stream = TokenStream(input_ids, token_table, segment_ids)
    check_stream(stream)
    check_quantized(table, spec, dtype)
    tensors = {name: tensor for name, tensor in stream._asdict().items() if tensor is not None}
    backend = choose_backend(backend, **tensors, **table._asdict())
    return operators.quantized_token_memory(*stream, *table, spec.key, dtype, backend)


def quantized_window_memory(
    windows: Tensor,
    token_table: Tensor,
    table: QuantizedTable,
    spec: AddressSpec,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """`window_memory` of a quantized table.

    Args:
        windows, token_table, spec, backend: as for `window_memory`.
        table, dtype: as for `quantized_prefix_memory`, which says what is raised too.
        out: contiguous ``[n, H * w]`` in `dtype`, to be written.

    Returns:
        `out`, or a new tensor.
    """
    check_spec(spec)
    check_quantized(table, spec, dtype)
    return read_windows(windows, token_table, *table, spec, backend, dtype, out)


def check_quantized(table: QuantizedTable, spec: AddressSpec, dtype: torch.dtype) -> None:
    if not isinstance(table, QuantizedTable):
        raise TypeError(f"table is a {type(table).__name__}; give the QuantizedTable that quantize returned")
    check_sum_dtype(dtype)
    values, scales = table
    _checks.tensor("values", values, tuple(QUANTIZED_DTYPES.values()), 2, "[R, w]")
    _checks.tensor("scales", scales, (torch.float32,), 1, "[R]")
    rows, width = values.shape
    if rows != spec.total_rows or width < 1:
        raise ValueError(f"values has shape {tuple(values.shape)}; the spec needs [{spec.total_rows}, w] with w >= 1")
    if len(scales) != rows:
        raise ValueError(f"scales has shape {tuple(scales.shape)}; give one for each of the {rows} rows of values")
    if scales.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("scales require a gradient, and a quantized table has none; train, then quantize")


def check_sum_dtype(dtype: torch.dtype) -> None:
    if dtype not in SUM_DTYPES:
        allowed = ", ".join(map(str, SUM_DTYPES))
        raise TypeError(f"dtype = {dtype!r}, and S of a quantized table is summed in float32; allowed are {allowed}")
