"""Segments padded to lengths that a cut divides; boundaries before padding and after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.layout import SeqLayout, length_multiple


def padded_layout(
    seq_len: int,
    *,
    cu_seqlens: Sequence[int] | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
    cp_mode: str = "zigzag",
    sp_size: int = 1,
    sp_rank: int = 0,
) -> SeqLayout:
    """The shortest layout that holds the sequence, with every segment padded to what the cut divides.

    Segments of 5 and 7, zigzag over 2 ranks, need multiples of 4: cu_seqlens (0, 5, 12) becomes (0, 8, 16).

    >>> padded_layout(12, cu_seqlens=(0, 5, 12), cp_size=2).cu_seqlens
    (0, 8, 16)
    """
    bounds = SeqLayout(seq_len, cu_seqlens=cu_seqlens).segments()
    lengths = _round_up(bounds[:, 1], length_multiple(cp_size=cp_size, cp_mode=cp_mode))
    padded = np.append(0, np.cumsum(lengths))
    padded[-1:] = _round_up(padded[-1:], length_multiple(cp_size=cp_size, cp_mode=cp_mode, sp_size=sp_size))
    return SeqLayout(
        int(padded[-1]),
        cp_size=cp_size,
        cp_rank=cp_rank,
        cp_mode=cp_mode,
        sp_size=sp_size,
        sp_rank=sp_rank,
        cu_seqlens=None if cu_seqlens is None else tuple(padded.tolist()),
    )


def source_positions(real: npt.NDArray[np.int64], layout: SeqLayout) -> npt.NDArray[np.int64]:
    """For every padded position its position in the batch's arrays, -1 for padding: int64 [S].

    real [0 3 5], padded to [0 4 8]  ->  0 1 2 -1 3 4 -1 -1
    """
    source = np.full(layout.seq_len, -1, dtype=np.int64)
    lengths = np.diff(real)
    offsets = np.repeat(layout.segments()[: lengths.size, 0] - real[:-1], lengths)
    positions = np.arange(real[-1], dtype=np.int64)
    source[positions + offsets] = positions
    return source


def checked_bounds(cu_seqlens: Sequence[int], layout: SeqLayout) -> npt.NDArray[np.int64]:
    """The boundaries before padding, int64 [segments + 1], if the layout has room for every segment."""
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    padded = layout.segments()[:, 1]
    if bounds.size != padded.size + 1 or bounds[0] != 0:
        raise ValueError(
            f"cu_seqlens must go from 0 through the layout's {padded.size} segments, got {bounds.tolist()}: make the "
            "layout from it (padded_layout)"
        )
    for i, (real, room) in enumerate(zip(np.diff(bounds), padded, strict=True)):
        if not 0 < real <= room:
            raise ValueError(
                f"segment {i} of cu_seqlens has length {real}, the layout has room for 1 to {room}: make the layout "
                "from it (padded_layout)"
            )
    return bounds


def _round_up(length: npt.NDArray[np.int64], multiple: int) -> npt.NDArray[np.int64]:
    return -(-length // multiple) * multiple
