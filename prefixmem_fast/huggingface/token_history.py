"""The tokens that a KV cache has seen.

With a KV cache a model's forward sees the newest tokens alone, and a code needs the codes before it. So the cache keeps
the tokens beside the keys, and whatever moves its keys (beam search, cropping, resetting, copying) moves them too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_NO_TOKEN = -1


class TokenHistory:
    """Mixed into the class of a cache of transformers.

    Attributes:
        seen: int64 ``[B, T]`` tokens, -1 for those that belong to no sequence that may go on; in a cache of static
            shapes the last `window` of them, updated in place.
    """

    seen: Tensor | None
    window: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_cache, (type(self).__mro__[2],), self.__dict__

    def remember(self, tokens: Tensor) -> None:
        tokens = tokens.long()
        if not self.is_compileable:
            self.seen = tokens if self.seen is None else torch.cat([self.seen, tokens], 1)
            return
        if self.seen is None:
            self.seen = tokens.new_full((len(tokens), self.window), _NO_TOKEN)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.seen)
        self.seen.copy_(torch.cat([self.seen, tokens], 1)[:, tokens.shape[1] :])

    def last(self, batch: int, device: torch.device) -> Tensor:
        """The last `window` tokens ``[B, <= window]``; `batch` and `device` are of a cache that has seen none."""
        if not self.is_compileable:
            self._follow(int(self.get_seq_length()), batch, device)
        if self.seen is None:
            return torch.empty((batch, 0), dtype=torch.int64, device=device)
        return self.seen[:, -self.window :]

    def _follow(self, length: int, batch: int, device: torch.device) -> None:
        """Be as long as the keys: shorter after crop(), longer after tokens that came as embeddings."""
        held = 0 if self.seen is None else self.seen.shape[1]
        if length < held:
            self.seen = self.seen[:, :length] if length else None
        elif length > held:
            unknown = torch.full((batch, length - held), _NO_TOKEN, device=device)
            self.seen = unknown if self.seen is None else torch.cat([self.seen, unknown], 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.seen is not None:
            self.seen = self.seen.index_select(0, beam_idx.to(self.seen.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.seen is not None:
            self.seen = self.seen.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.seen is not None:
            self.seen = self.seen[indices.to(self.seen.device)]

    def reset(self) -> None:
        super().reset()
        if self.seen is not None and self.is_compileable:
            self.seen.fill_(_NO_TOKEN)
        else:
            self.seen = None


@cache
def _with_history(kind: type) -> type:
    return type(kind.__name__, (TokenHistory, kind), {"__module__": kind.__module__})


def _empty_cache(kind: type) -> TokenHistory:
    with_history = _with_history(kind)
    return with_history.__new__(with_history)


def history_of(cache: Any) -> TokenHistory | None:
    """The cache that keeps the decoder's own tokens, if it has begun to."""
    cache = getattr(cache, "self_attention_cache", cache)
    return cache if isinstance(cache, TokenHistory) else None


@torch.compiler.disable
def begin_history(cache: Any, window: int) -> TokenHistory:
    """Have a cache keep its tokens from now on; its class becomes a subclass of what it was.

    Args:
        window: how many tokens the next one needs.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    cache.__class__ = _with_history(type(cache))
    cache.seen, cache.window = None, window
    return cache
