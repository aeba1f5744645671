"""`PrefixMem`: the tables and W_out.

    m_l = W_out * S_l        (PrefixMem, arXiv 2606.00324)

m_l is added to the input embedding of the token of c_l. There is no gate, no norm and no bias.

Tables of cross-item orders are an encoder of their own inside this one, and the two m are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .._dtypes import CODE_DTYPES
from ..addressing import TokenStream, first_codes, item_windows, lagged_item_windows, lagged_windows
from ..addressing.token_stream import LaggedWindows
from ..operation.functions import check_stream
from ..operation.quantization import quantize
from ..sid import SIDVocabulary
from .config import PrefixMemConfig
from .memory import PrefixMemory, check_config
from .projection import Encoded, OutputProjection, last_tokens
from .quantized import QuantizedMemory
from .saving import check_merged, load_encoder, save_encoder

_OF_TABLES = ("memory.weight", "memory._extra_state")


class PrefixMem(nn.Module):
    """The encoder: memory tables and the projection W_out to the width of the model's embeddings.

    Args:
        config: with `hidden_size` set.
        backend, grad, deterministic, tables, overlap: see `PrefixMemory`, and `QuantizedMemory` for what it refuses.
        dropout: in training, share of the tokens whose memory is left out; the others are scaled by 1 / (1 - dropout).
            Not in the paper; it keeps a model of a small catalogue from leaning on rows it has learnt by heart. The
            tables of the config's `cross_item` leave out tokens of their own.

    Raises:
        ValueError: the config has no `hidden_size`, or `dropout` is not one of 0 <= p < 1.
    """

    config_class = PrefixMemConfig

    def __init__(
        self,
        config: PrefixMemConfig,
        *,
        backend: str = "auto",
        grad: str = "dense",
        deterministic: bool = False,
        dropout: float = 0.0,
        tables: str = "device",
        overlap: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config)
        if config.hidden_size is None:
            raise ValueError("hidden_size = None; give the width of the model's embeddings in PrefixMemConfig")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout!r}; allowed are 0 <= p < 1")
        self.config, self.dropout = config, dropout
        kind = PrefixMemory if config.quantization is None else QuantizedMemory
        options = {"backend": backend, "grad": grad, "deterministic": deterministic}
        self.memory = kind(config, **options, tables=tables, overlap=overlap, device=device, dtype=dtype)
        self.lag_weights = None
        if config.lags > 1:
            self.lag_weights = first_lag_weights(config.lags, device, dtype or torch.get_default_dtype())
        self.out_proj = OutputProjection(config, device=device, dtype=dtype)
        self.head_proj = OutputProjection(config, device=device, dtype=dtype) if config.output_slot else None
        self.cross_item = None
        if config.cross_item is not None:
            options = {**options, "dropout": dropout, "tables": tables, "overlap": overlap}
            self.cross_item = PrefixMem(config.cross_item, **options, device=device, dtype=dtype)
        if config.quantization is not None:
            self.requires_grad_(False)
        self.register_state_dict_post_hook(_leave_shards_alone)
        self.register_load_state_dict_post_hook(_miss_nothing_beside_shards)

    def requires_grad_(self, requires_grad: bool = True) -> PrefixMem:
        """As of every module, also of managed tables."""
        for module in self.modules():
            if isinstance(module, PrefixMemory):
                module.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every module, also of managed tables."""
        super().zero_grad(set_to_none)
        for module in self.modules():
            if isinstance(module, PrefixMemory):
                module.zero_grad(set_to_none)

    @property
    def _windows_first(self) -> bool:
        """Whether windows are made in PyTorch and then read, where no kernel finds them in the tokens."""
        return self.config.lags > 1 or self.config.earlier_codes is not None

    def reset_output(self) -> None:
        """Start W_out and W_head afresh, near zero: what a pre-trained memory needs when it meets a new model."""
        self.out_proj.reset_parameters()
        if self.head_proj is not None:
            self.head_proj.reset_parameters()
        if self.cross_item is not None:
            self.cross_item.reset_output()

    def add_cross_item(self, config: PrefixMemConfig) -> None:
        """Put tables of cross-item orders beside this encoder's own, which stay as they are.

        Args:
            config: as `PrefixMemConfig.cross_item`.

        Raises:
            TypeError, ValueError: it is not as stated, or such tables are there already.
        """
        if self.config.cross_item is not None:
            raise ValueError("the encoder has tables of cross-item orders already; make one with those of both")
        self.config = replace(self.config, cross_item=config)
        memory, out = self.memory, self.out_proj.weight
        options = {**memory.options(), "dropout": self.dropout, "tables": memory.tables, "overlap": memory.overlap}
        self.cross_item = PrefixMem(self.config.cross_item, **options, device=out.device, dtype=out.dtype)

    def quantize(self, kind: str) -> PrefixMem:
        """A copy for serving, with tables of 8 bits a number and a scale a row.

        It is called, attached, moved, saved and read like this one, and S comes out in the dtype of this one's tables.
        Its memory is a `QuantizedMemory`. It is not trained: its tables have no gradient, and its W_out is frozen. Its
        tables are on the device of W_out, also where those of this one are in the host's memory or a map of a file.

        Args:
            kind: "int8", or "fp8", which is e4m3; `operation/quantization.py` bounds the errors of both.

        Raises:
            TypeError: the tables are float64.
            ValueError: `kind` is unknown, a row is not finite, the encoder is quantized already, or PEFT has put
                adapters around a projection.
        """
        if self.config.quantization is not None:
            raise ValueError(f"the encoder is {self.config.quantization}; quantize the one that it was made from")
        self.memory.check_whole("quantize")
        check_merged(self)
        memory = self.memory
        table = quantize(memory.weight, kind)
        options = {"backend": memory.backend, "dropout": self.dropout, "dtype": memory.weight.dtype}
        own = replace(self.config, cross_item=None).with_quantization(kind)
        encoder = PrefixMem(own, device="meta", **options)
        encoder.memory.values, encoder.memory.scales = table
        encoder.memory.to(self.out_proj.weight.device)
        for name in ("out_proj.weight", "head_proj.weight", "lag_weights"):
            owner, _, last = name.rpartition(".")
            if getattr(self, owner or last) is not None:
                weight = nn.Parameter(self.get_parameter(name).detach().clone(), requires_grad=False)
                setattr(encoder.get_submodule(owner), last, weight)
        if self.cross_item is not None:
            encoder.config = self.config.with_quantization(kind)
            encoder.cross_item = self.cross_item.quantize(kind)
        return encoder.train(self.training)

    def save_pretrained(
        self, path: str | Path, vocabulary: SIDVocabulary | None = None, *, max_shard_size: int | str = "2GB"
    ) -> None:
        """Write the encoder into a folder: config.json and safetensors files, valid together or not at all.

        Args:
            path: the folder; made if it is not there.
            vocabulary: kept with the encoder, for `SIDVocabulary.from_pretrained`.
            max_shard_size: bytes of a weights file, or a string such as "500MB"; larger tables are split by rows.

        Raises:
            ValueError: the vocabulary's codebooks are not the encoder's, `max_shard_size` is no size, or PEFT has put
                adapters around a projection.
            OSError: the folder cannot be written; what was in it is left as it was.
        """
        check_merged(self)
        save_encoder(self, path, vocabulary, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        hidden_size: int | None = None,
        active_levels: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verify: bool = True,
        backend: str = "auto",
        grad: str = "dense",
        deterministic: bool = False,
        dropout: float = 0.0,
        tables: str = "device",
        overlap: bool = False,
    ) -> PrefixMem:
        """Read an encoder from its folder, or from that of a model or adapters saved with it attached.

        The tables are read in chunks from a memory map: memory for one copy of them is enough.

        Args:
            path: the folder.
            hidden_size: where it differs from the stored one, W_out starts afresh at this width.
            active_levels: prefix lengths at which the memory is read, where they are to differ from the stored ones;
                the rows are the same.
            device, dtype: of the parameters; by default the stored dtype, on the default device.
            verify: compare the SHA-256 of each tensor with the stored one; one more pass over the files.
            backend, grad, deterministic, dropout, overlap: see `PrefixMem`.
            tables: "device" or "host", see `PrefixMem`. "mapped": the table is a map of its file, so that it may be
                larger than memory. It stays on the host, needs no gradient, and nothing can be loaded into it. The file
                must stay as it is meanwhile.

        Raises:
            ValueError: tables="mapped", and the table lies in several files or `dtype` is not the stored one.
            FileNotFoundError: no encoder is there.
            CheckpointError: a ValueError; a file is damaged, cut or missing, or of another version.
        """
        return load_encoder(
            cls,
            path,
            hidden_size=hidden_size,
            active_levels=active_levels,
            device=device,
            dtype=dtype,
            verify=verify,
            backend=backend,
            grad=grad,
            deterministic=deterministic,
            dropout=dropout,
            tables=tables,
            overlap=overlap,
        )

    def prefetch(self, codes: Tensor, *, stale: bool = False) -> None:
        """Begin to gather the rows of a coming batch, for tables in the host's memory.

        A thread gathers S in the order of the calls. The next `encoder(codes)` with the same codes takes it, whatever
        their device. Up to four batches wait to be taken; taking one drops those before it. Codes on a GPU are copied
        to the host first, which waits for the GPU; give them on the host.

        Args:
            codes: integer ``[..., L]``.
            stale: the rows may lack one update of the table, so that it can run beside this gather. Each number is then
                of before or after that update. Otherwise an S that an update has outdated is gathered anew, so that
                results are those without `prefetch`. Writes through `weight.data` are not seen.

        Raises:
            TypeError, ValueError: an argument is not as stated, or tables="device".
        """
        self.memory.prefetch(self._item_windows(codes) if self.config.spec.history else codes, stale=stale)
        if self.cross_item is not None:
            self.cross_item.prefetch(codes, stale=stale)

    def prefetch_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        stale: bool = False,
    ) -> None:
        """`prefetch` for `encode_tokens`, and for the forward pass of a model that this encoder is attached to.

        Args:
            input_ids, vocabulary, segment_ids: as `encode_tokens` or the model will be given them; segments may be
                numbered otherwise.
            stale: see `prefetch`.

        Raises:
            TypeError, ValueError: an argument is not as stated, or tables="device".
        """
        if self._windows_first:
            self.memory.prefetch(self._token_windows(input_ids, vocabulary, segment_ids).codes, stale=stale)
        else:
            self.memory.prefetch_tokens(input_ids, vocabulary, segment_ids, stale=stale)
        if self.cross_item is not None:
            self.cross_item.prefetch_tokens(input_ids, vocabulary, segment_ids, stale=stale)

    def forward(self, codes: Tensor) -> Tensor:
        """m of every level: integer ``[..., L]`` to ``[..., L, hidden_size]``, zero at inactive levels.

        With cross-item orders codes are ``[..., items, L]``, the items of a history in the order in which they were
        met.
        """
        m = self._encode_items(codes) if self.config.spec.history else self._encode_levels(self.memory(codes), 1)
        return m if self.cross_item is None else m + self.cross_item(codes)

    def _encode_items(self, codes: Tensor) -> Tensor:
        spec = self.config.spec
        windows = self._item_windows(codes)
        items = codes.shape[-2]
        S = self.memory(windows)
        S = self._sum_lags(S) if self._windows_first else S
        m = self._encode_levels(S, spec.item_levels)  # [..., items + 1, L, hidden]
        # The window of an item begins with the token before the item: the last one of the item before.
        return m.flatten(-3, -2)[..., 1 : 1 + items * spec.item_levels, :].unflatten(-2, (items, spec.item_levels))

    def _sum_lags(self, S: Tensor) -> Tensor:
        """``[..., lags, A, memory_dim]`` to ``[..., A, memory_dim]``."""
        if self.lag_weights is None:
            return S.squeeze(-3)
        return torch.einsum("...kad,k->...ad", S, self.lag_weights.to(S.dtype))

    def _item_windows(self, codes: Tensor) -> Tensor:
        config = self.config
        codes = self._check_items(codes)
        if not self._windows_first:
            return item_windows(codes, config.spec)
        windows = lagged_item_windows(codes, config.spec, config.lags)
        return first_codes(windows, config.spec, config.earlier_codes)

    def _token_windows(
        self, input_ids: Tensor, vocabulary: SIDVocabulary, segment_ids: Tensor | None, new_tokens: int | None = None
    ) -> LaggedWindows:
        table = self.memory.token_table(input_ids, vocabulary)
        stream = TokenStream(input_ids, table, segment_ids)
        check_stream(stream)
        config = self.config
        windows = lagged_windows(stream, config.spec, config.lags, new_tokens)
        return windows._replace(codes=first_codes(windows.codes, config.spec, config.earlier_codes))

    def read_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Tensor:
        """S over a token stream, the lags of cross-item orders summed: ``[B, T]`` to ``[B, T, memory_dim]``.

        With `new_tokens` of the last tokens alone.
        """
        if not self._windows_first:
            S = self.memory.read_tokens(input_ids, vocabulary, segment_ids)
            return S if new_tokens is None else last_tokens(S, new_tokens)
        if new_tokens is not None:
            last_tokens(input_ids, new_tokens)  # refuses a wrong number
        windows = self._token_windows(input_ids, vocabulary, segment_ids, new_tokens)
        return self.at_tokens(self.memory(windows.codes), windows.place)

    def at_tokens(self, S: Tensor, place: Tensor) -> Tensor:
        """S ``[B, W, lags, A, memory_dim]`` of `LaggedWindows` to the sums over lags at tokens ``[B, T]``."""
        S = nn.functional.pad(self._sum_lags(S).flatten(1, 2), (0, 0, 0, 1))
        return S.gather(1, place[..., None].expand(-1, -1, S.shape[-1]))

    def _check_items(self, codes: Tensor) -> Tensor:
        levels = self.config.levels
        _checks.tensor("codes", codes, CODE_DTYPES, None, f"[..., items, {levels}]")
        if codes.dim() < 2 or codes.shape[-1] != levels:
            raise ValueError(
                f"codes has shape {tuple(codes.shape)}; with cross-item orders give [..., items, {levels}], the items "
                "of each history in the order in which they were met"
            )
        return codes

    def _encode_levels(self, S: Tensor, begin: int) -> Tensor:
        """m of S ``[..., A, memory_dim]``, of the levels from `begin` on, an item's: ``[..., L, hidden_size]``."""
        spec = self.config.spec
        encoded = self.out_proj(self._drop(S))  # [..., A, hidden]
        if len(spec.active_levels) == spec.item_levels:
            return encoded
        # Each level is written once and the zeros are one number in memory. With 2 of 5 levels of 1024 bfloat16, 14 KB
        # a SID move; padding moves 18, and stacking zeros of each SID 22. Less would need W_out to write there itself,
        # which neither a wrapped module (LoRA) nor autocast does.
        lead, zero, parts, done = encoded.shape[:-2], encoded.new_zeros(()), [], 0
        for active, run in groupby(range(begin, begin + spec.item_levels), key=spec.active_levels.__contains__):
            count = len(tuple(run))
            if active:
                parts.append(encoded.narrow(-2, done, count))
                done += count
            else:
                parts.append(zero.expand(*lead, count, encoded.shape[-1]))
        return torch.cat(parts, dim=-2)

    def encode_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Tensor:
        """m over a token stream, to add to the model's input embeddings.

        Args:
            input_ids: int32 or int64 ``[B, T]``.
            vocabulary: which ids are which codes; its codebooks must be the spec's.
            segment_ids: int32 or int64 ``[B, T]`` where rows hold several packed sequences.
            new_tokens: how many of the last tokens to encode; those before say what the new ones continue.

        Returns:
            ``[B, T, hidden_size]``, or the last `new_tokens` of them; zero at text, at inactive levels and at tokens
            of broken SIDs.

        Raises:
            TypeError, ValueError: an argument is not as stated, or `new_tokens` is not one of 0 .. T.
        """
        return self.encode_stream(input_ids, vocabulary, segment_ids, new_tokens=new_tokens).m

    def encode_stream(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Encoded:
        """`encode_tokens`, and with it what tables with `output_slot` add to the model's last hidden states."""
        encoded = self.project(self._drop(self.read_tokens(input_ids, vocabulary, segment_ids, new_tokens=new_tokens)))
        if self.cross_item is None:
            return encoded
        return encoded + self.cross_item.encode_stream(input_ids, vocabulary, segment_ids, new_tokens=new_tokens)

    def encode_window(
        self,
        windows: Tensor,
        vocabulary: SIDVocabulary,
        *,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """m of the last token of each window, as `encode_tokens` has it where the windows are its rows; forward alone.

        A step of decoding reads so. On a GPU it waits for nothing, and a CUDA graph can hold it: the memory is one
        launch and W_out one product, and tables of cross-item orders are as many again. With `out` and `workspace`
        nothing is allocated, lags aside, whose windows are made in PyTorch.

        Args:
            windows: int32 or int64 ``[n, W]``, tokens in their order; -1 where none stands before the others. The last
                ``config.lookback + 1`` of them say what the last one reads.
            vocabulary: as for `encode_tokens`.
            out: ``[n, hidden_size]`` in the dtype of W_out, to be written.
            workspace: contiguous, in the dtype of the table, with n times the largest `memory_dim` elements or more,
                for S.

        Returns:
            `out`, or a new tensor ``[n, hidden_size]``.

        Raises:
            TypeError, ValueError: an argument is not as stated.
        """
        return self.encode_last(windows, vocabulary, out=out, workspace=workspace).m

    @torch.no_grad()
    def encode_last(
        self,
        windows: Tensor,
        vocabulary: SIDVocabulary,
        *,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Encoded:
        """`encode_window`, and with it what tables with `output_slot` add to the model's last hidden states."""
        total, encoder = None, self
        while encoder is not None:
            S = encoder._drop(encoder._read_last(windows, vocabulary, workspace))
            encoded = encoder._project_last(S, out, add=total is not None)
            if total is None:
                total = encoded
            elif out is None:
                total = total + encoded
            else:
                total = total.with_head(encoded.head)
            encoder = encoder.cross_item
        return total

    def _read_last(self, windows: Tensor, vocabulary: SIDVocabulary, workspace: Tensor | None) -> Tensor:
        if self._windows_first:
            return self.read_tokens(windows, vocabulary, new_tokens=1)[:, 0]
        if workspace is not None:
            shape = len(windows), self.config.memory_dim
            workspace = workspace.view(-1)[: shape[0] * shape[1]].view(shape)
        return self.memory.read_window(windows, vocabulary, workspace)

    def _project_last(self, S: Tensor, out: Tensor | None, add: bool) -> Encoded:
        """`project`, into `out` where it is given, or added to what is there. On a CPU nothing is multiplied where no
        token is at an active level; a GPU would have to wait to know."""
        on_host = S.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        nothing = on_host and not bool(S.any())
        if out is None:
            if not nothing:
                return self.project(S)
            zeros = S.new_zeros(len(S), self.config.hidden_size)
            return Encoded(zeros, None if self.head_proj is None else zeros)
        if nothing:
            if not add:
                out.zero_()
        elif type(self.out_proj) is not OutputProjection:  # wrapped, by LoRA say
            m = self.out_proj(S)
            out.add_(m) if add else out.copy_(m)
        elif add:
            torch.addmm(out, S, self.out_proj.weight.t(), out=out)
        else:
            torch.mm(S, self.out_proj.weight.t(), out=out)
        return Encoded(out, None if self.head_proj is None else self.head_proj(S))

    def project(self, S: Tensor) -> Encoded:
        """What is added to a model at tokens of S ``[.., memory_dim]``."""
        return Encoded(self.out_proj(S), None if self.head_proj is None else self.head_proj(S))

    def _drop(self, S: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return S
        return S * nn.functional.dropout(S.new_ones(*S.shape[:-1], 1), self.dropout)


def first_lag_weights(lags: int, device: torch.device | str | None, dtype: torch.dtype) -> nn.Parameter:
    """2^-lag, what the weights of lags start from."""
    return nn.Parameter(torch.exp2(-torch.arange(lags, device=device, dtype=dtype)))


def _leave_shards_alone(encoder: PrefixMem, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
    """Without a managed table where the rest is divided by FSDP2: loaders of such a state_dict take DTensors alone."""
    if is_beside_shards(encoder):
        for name in _OF_TABLES:
            state_dict.pop(prefix + name, None)


def _miss_nothing_beside_shards(encoder: PrefixMem, keys: Any) -> None:
    if is_beside_shards(encoder):
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(_OF_TABLES)]


def is_beside_shards(encoder: PrefixMem) -> bool:
    return getattr(encoder.memory, "managed", False) and hasattr(encoder.out_proj.weight, "device_mesh")
