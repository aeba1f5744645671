"""Rows of different length as one batch: padded, or packed with a mask that keeps the packed sequences apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def causal_batch(rows: Sequence[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Rows for a causal LM, padded on the right.

    Args:
        rows: input_ids and position_ids, which start again where packed sequences do.
        pad: id to pad with.

    Returns:
        input_ids, position_ids, labels ``[B, T]`` (-100 at padding and at the first token of a packed sequence, which
        nothing predicts), and attention_mask: int64 ``[B, T]``, or where sequences are packed float ``[B, 1, T, T]``,
        0 where a token may look and the lowest number elsewhere.
    """
    input_ids = pad_sequence([row["input_ids"] for row in rows], True, pad)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]  # [B, T]
    position_ids = pad_sequence([row["position_ids"] for row in rows], True, 0)
    labels = torch.where(real & (position_ids > 0), input_ids, -100)
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": real.long()}
    if bool((position_ids[:, 1:] == 0)[real[:, 1:]].any()):
        sequence = (position_ids == 0).cumsum(1)  # padding tokens are sequences of their own
        may_look = (sequence[:, :, None] == sequence[:, None]).tril()
        batch["attention_mask"] = torch.where(may_look, 0.0, torch.finfo(torch.float32).min)[:, None]
        batch["position_ids"] = position_ids
    return batch


def source_target_batch(rows: Sequence[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Sources and targets for an encoder-decoder, padded on the right.

    Returns:
        input_ids, attention_mask ``[B, S]``, labels ``[B, T]``, -100 at padding.
    """
    input_ids = pad_sequence([row["input_ids"] for row in rows], True, pad)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": pad_sequence([row["labels"] for row in rows], True, -100),
    }
