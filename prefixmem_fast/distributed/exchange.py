"""What crosses between processes: codes, slices of S and gradients of S, ragged and in the order of ranks.

Every call is collective. Numbers are sent as bytes, since gloo lacks int16 and, on some builds, bfloat16. A header goes
first: how many SIDs a rank has, and a digest of what has to be the same on all ranks, so that those that have got
out of step are told apart from those that are slow.
"""

from __future__ import annotations

import zlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._inputs import clipped
from ..addressing import AddressSpec, StreamSIDs, TokenStream, prefix_length, stream_sids

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
_MOST_INT16 = (1 << 15) - 1


class ExchangeError(RuntimeError):
    """A collective call failed, or ranks differ. The table in question and its step count are as before."""


class Exchange:
    """Collective calls of one process group of its own, so that they never mix with those of a wrapper.

    Args:
        group: a group, or a list of ranks; None for all. The group that is made has the same ones.
        backend: "gloo" where the tensors are in the host's memory whatever the default one is; None for the default.
        timeout: how long a rank waits for another one; None for that of the default group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | list[int] | None = None,
        *,
        backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        ranks = list(range(dist.get_world_size())) if group is None else group
        if not isinstance(ranks, list):
            ranks = dist.get_process_group_ranks(ranks)
        if dist.get_rank() not in ranks:
            raise ValueError(
                f"group has the ranks {ranks}, and this one is {dist.get_rank()}; call it on its ranks alone"
            )
        self.group = dist.new_group(ranks, timeout or _default_timeout(), backend, use_local_synchronization=True)
        self.ranks, self.rank, self.size = ranks, ranks.index(dist.get_rank()), len(ranks)

    def __reduce__(self) -> Any:
        raise TypeError("a model whose tables are divided over processes is not copied; save it, and read it again")

    def header(self, count: int, same: dict[str, Any], device: torch.device, call: str) -> list[int]:
        """How many SIDs each rank has.

        Args:
            count: this rank's.
            same: values whose repr must be equal on every rank.

        Raises:
            ExchangeError: they differ, or a rank is missing.
        """
        digest = zlib.crc32(repr(same).encode())
        own = torch.tensor([count, digest], dtype=torch.int64, device=device)
        headers = self.gather(own[None], [1] * self.size, call).tolist()
        if any(other != digest for _, other in headers):
            raise self._differ(same, call)
        return [count for count, _ in headers]

    def _differ(self, same: dict[str, Any], call: str) -> ExchangeError:
        """Every rank has seen that digests differ, so all of them come here."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, same, group=self.group)
        names = [name for name in same if any(repr(other.get(name)) != repr(same[name]) for other in found)]
        values = "; ".join(
            f"rank {rank} has {', '.join(f'{name} = {clipped(other.get(name), 120)}' for name in names)}"
            for rank, other in zip(self.ranks, found, strict=True)
        )
        return ExchangeError(
            f"{call}: ranks differ in {', '.join(names) or 'what they call'}: {values}; build models and optimizers "
            "alike on every rank, and run the encoder equally often on each"
        )

    def gather(self, rows: Tensor, counts: list[int], call: str) -> Tensor:
        """Rows ``[M, ...]`` of all ranks, ``[sum(counts), ...]``, in the order of ranks."""
        most = max(counts)
        if not most:
            return rows
        if len(rows) < most:  # a collective of equal parts, in place of one for each rank
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        gathered = rows.new_empty(self.size * most, *rows.shape[1:])
        self._call(call, _all_gather, _bytes_of(gathered), _bytes_of(rows))
        if min(counts) == most:
            return gathered
        return torch.cat([part[:count] for part, count in zip(gathered.split(most), counts, strict=True)])

    def swap(self, parts: Tensor, sent: list[int], received: list[int], call: str) -> Tensor:
        """Send ``sent[r]`` numbers of a flat tensor to each rank r; what comes from each, one after another."""
        out, size = parts.new_empty(sum(received)), parts.element_size()
        splits = [[count * size for count in counts] for counts in (received, sent)]
        self._call(call, dist.all_to_all_single, _bytes_of(out), _bytes_of(parts), *splits)
        return out

    def broadcast(self, tensor: Tensor, call: str) -> None:
        """The first rank's numbers, in place."""
        self._call(call, dist.broadcast, _bytes_of(tensor), self.ranks[0])

    def _call(self, call: str, collective: Any, *args: Any) -> None:
        try:
            collective(*args, group=self.group)
        except (RuntimeError, dist.DistBackendError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise ExchangeError(
                f"{call}: rank {dist.get_rank()} got no answer from the other {self.size - 1} of ranks {self.ranks} "
                f"({reason}). A rank has died, or has run the encoder less often than the others: every rank has to "
                "call it for every batch, also for one without Semantic IDs. This table and its step count are as they "
                "were; restart all ranks from the last checkpoint"
            ) from error


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _default_timeout() -> timedelta | None:
    """That of the default group; torch would give a new group its own default."""
    try:
        group = dist.distributed_c10d._get_default_group()
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None


class SIDs:
    """The SIDs of a source, one after another, and where their S belongs.

    Attributes:
        codes: ``[M, L]``, int16 where the codebooks allow it.
    """

    def __init__(self, source: Tensor | TokenStream, spec: AddressSpec) -> None:
        self._kept, self._stream = None, None
        if isinstance(source, TokenStream):
            self._stream: StreamSIDs | None = stream_sids(source, spec)
            self._shape: tuple[int, ...] = tuple(source.input_ids.shape)
            codes = self._stream.codes
        else:
            self._shape, codes = tuple(source.shape[:-1]), source.reshape(-1, spec.levels)
            if spec.history:  # most windows of short histories hold no row
                self._kept = prefix_length(codes, spec.window_sizes) >= spec.item_levels
                codes = codes[self._kept]
        if max(spec.codebook_sizes) <= _MOST_INT16:
            inside = (codes >= 0) & (codes < codes.new_tensor(spec.window_sizes))
            codes = torch.where(inside, codes, -1).to(torch.int16)
        self.codes = codes if codes.dtype == torch.int16 else codes.long()  # the same on all ranks

    def take(self, dS: Tensor) -> Tensor:
        """The gradient ``[M, A, D]`` of the SIDs, from that of what `put` returned."""
        if self._stream is not None:
            tokens = torch.cat([dS.flatten(0, 1), dS.new_zeros(1, dS.shape[-1])])
            return tokens[self._stream.tokens]
        dS = dS.reshape(-1, *dS.shape[-2:])
        return dS if self._kept is None else dS[self._kept]

    def put(self, S: Tensor) -> Tensor:
        """S ``[M, A, D]`` where it belongs: as `token_memory` or `prefix_memory` of the source has it."""
        if self._stream is not None:
            B, T = self._shape
            tokens = S.new_zeros(B * T + 1, S.shape[-1]).index_copy(0, self._stream.tokens.flatten(), S.flatten(0, 1))
            return tokens[: B * T].view(B, T, -1)
        if self._kept is not None:
            S = S.new_zeros(len(self._kept), *S.shape[1:]).index_copy(0, self._kept.nonzero()[:, 0], S)
        return S.view(*self._shape, *S.shape[1:])
