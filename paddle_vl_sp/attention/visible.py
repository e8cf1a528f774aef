"""Which of this rank's query rows see each key of the whole sequence, where keys and values are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import paddle
from paddle import Tensor

from paddle_vl_sp.backends.copies import check_not_capturing
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.layout import SeqLayout

Boundaries: TypeAlias = "Sequence[int] | Sequence[Sequence[int]]"  # of all rows of the batch, or of each
RowBounds: TypeAlias = tuple[tuple[int, ...], ...]  # of each row of the batch, from 0 to S


class VisibleRows(NamedTuple):
    """The key at global position j is seen by the local query rows begin[.., j] to end[.., j] - 1: int32 [B or 1, S].

    Two segments of 4, causal, zigzag over 2 ranks; rank 1 holds positions 2 3 4 5, its rows 0 1 2 3::

        key           0  1  2  3  4  5  6  7
        seen by       0  1  2  3  4  5  6  7   up to (without)  4 4 4 4 8 8 8 8
        begin         0  0  0  1  2  3  4  4
        end           2  2  2  2  4  4  4  4   keys 6 and 7 come after every query of this rank: nothing sees them
    """

    begin: Tensor
    end: Tensor


def each_row(boundaries: Boundaries, batch: int) -> list[Sequence[int]]:
    """One list for all rows of the batch, or one for each."""
    is_flat = not len(boundaries) or not isinstance(boundaries[0], Sequence | np.ndarray)
    rows: list[Any] = [boundaries] if is_flat else list(boundaries)
    if len(rows) not in (1, batch):
        raise ValueError(f"boundaries of {len(rows)} rows for a batch of {batch}: give one list for all, or one each")
    return rows


def row_bounds(boundaries: Boundaries | None, batch: int, length: int) -> RowBounds | None:
    """The boundaries of each row (or of all, if there is one), where what follows the last is a segment by itself."""
    if boundaries is None:
        return None
    return tuple(_one_row(row, length) for row in each_row(boundaries, batch))


def _one_row(bounds: Sequence[int], length: int) -> tuple[int, ...]:
    end = int(bounds[-1]) if len(bounds) else 0
    whole = [*bounds, length] if 0 < end < length else list(bounds)
    return tuple(SeqLayout(length, cu_seqlens=whole).cu_seqlens or ())


def visible_rows(share: SeqLayout, causal: bool, bounds: RowBounds | None, place: Any) -> VisibleRows:
    """By the segments' boundaries. Results are kept: the layers of a model share them."""
    return _visible_by_bounds(share, causal, bounds, place)


@lru_cache(maxsize=16)
def _visible_by_bounds(share: SeqLayout, causal: bool, bounds: RowBounds | None, place: Any) -> VisibleRows:
    position, begins, ends = np.arange(share.seq_len), [], []
    for row in bounds or ((0, share.seq_len),):
        edge = np.asarray(row, dtype=np.int64)
        begins.append(position if causal else np.repeat(edge[:-1], np.diff(edge)))
        ends.append(np.repeat(edge[1:], np.diff(edge)))
    own = share.positions()
    begin, end = (np.searchsorted(own, np.stack(edges)).astype(np.int32) for edges in (begins, ends))
    check_not_capturing(place)
    return VisibleRows(paddle.to_tensor(begin, place=place), paddle.to_tensor(end, place=place))


def visible_by_indices(share: SeqLayout, indices: Tensor) -> VisibleRows:
    """By flashmask's row indices [B, 1, S, 1]: the global row from which each key is no longer seen. Causal."""
    own, begin = (x.on(indices.place) for x in _own_positions(share))
    ends = paddle.searchsorted(own, indices.reshape([indices.shape[0], -1]).astype("int64"), out_int32=True)  # [B, S]
    return VisibleRows(begin.expand(ends.shape), ends)


@lru_cache(maxsize=16)
def _own_positions(share: SeqLayout) -> tuple[Resident, Resident]:
    """The positions of this rank's rows, and for each key the first row that is not before it."""
    own = share.positions()
    return Resident(own), Resident(np.searchsorted(own, np.arange(share.seq_len)).astype(np.int32))
