"""The slow, obvious answers that the self-test holds everything against: one token at a time. Numpy only."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.layout import SeqLayout

Array = npt.NDArray[Any]


def positions(layout: SeqLayout) -> list[int]:
    """What the layout's rank owns, by splitting lists: every sequence for cp, then what it got for sp."""
    bounds = (0, layout.seq_len) if layout.cu_seqlens is None else layout.cu_seqlens
    row: list[int] = []
    for begin, end in pairwise(bounds):
        sequence = list(range(begin, end))
        if layout.cp_size > 1 and layout.cp_mode == "zigzag":
            chunks = np.array_split(sequence, 2 * layout.cp_size)
            row += [*chunks[layout.cp_rank], *chunks[-1 - layout.cp_rank]]
        else:
            row += list(np.array_split(sequence, layout.cp_size)[layout.cp_rank])
    return [int(position) for position in np.array_split(row, layout.sp_size)[layout.sp_rank]]


def pairs(visual: Array, owned: list[int], sequence_first: bool) -> tuple[list[int], list[int]]:
    """(update, gather) of the rank that owns these positions, of a mask [B, S]."""
    batch, feature_row = len(visual), 0
    update, gather = [], []
    for b, s in np.ndindex(*visual.shape):
        if not visual[b, s]:
            continue
        if s in owned:
            local = owned.index(s)
            update.append(local * batch + b if sequence_first else b * len(owned) + local)
            gather.append(feature_row)
        feature_row += 1
    return update, gather


def written(hidden: Array, features: Array, update: list[int], gather: list[int], adds: bool) -> Array:
    """Rows of the flattened hidden states replaced by, or added to, feature rows: float32 [..., H]."""
    rows = hidden.reshape(-1, hidden.shape[-1]).copy()
    for row, feature_row in zip(update, gather, strict=True):
        rows[row] = rows[row] + features[feature_row] if adds else features[feature_row]
    return rows.reshape(hidden.shape)


def feature_gradient(out_grad: Array, num_features: int, update: list[int], gather: list[int]) -> Array:
    """The gradient of the features [N, H] that these pairs use: that of their rows, zero elsewhere."""
    rows = out_grad.reshape(-1, out_grad.shape[-1])
    grad = np.zeros((num_features, rows.shape[1]), dtype=rows.dtype)
    for row, feature_row in zip(update, gather, strict=True):
        grad[feature_row] = rows[row]
    return grad
