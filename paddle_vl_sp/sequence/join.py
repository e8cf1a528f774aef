"""The whole sequence from the shares that ranks hold, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from paddle import Tensor

from paddle_vl_sp.comm.collectives import Group, has_peers
from paddle_vl_sp.comm.gather import GRADS, gather_rows, needs_grad, take_rows
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.layout import SeqLayout, layouts_of_all_ranks
from paddle_vl_sp.sequence.gathered import rows_in_order
from paddle_vl_sp.sequence.padding import checked_bounds, source_positions
from paddle_vl_sp.settings import check_choice


def unshard(
    x: Tensor,
    layout: SeqLayout,
    group: Group | None,
    *,
    axis: int,
    cu_seqlens: Sequence[int] | None = None,
    grad: str = "partial",
) -> Tensor:
    """The whole sequence on every rank, from the shares: the inverse of the cut, exact, with a gradient.

    x            this rank's share, S_local along the axis
    group        all ranks that hold a part, in the order of cp_rank * sp_size + sp_rank; None is one process that holds
                 the whole sequence
    cu_seqlens   the boundaries before padding: padding is removed; None keeps it
    grad         "partial": ranks use the result differently, so their gradients are summed, then cut; "whole": the
                 gradient is already the same on every rank, and is only cut

    ::

        logits = unshard(logits, layout, group, axis=1)  # [B, S_local, V] -> [B, S, V]
    """
    shares = _all_shares(layout, group)
    axis = axis % len(x.shape)
    if x.shape[axis] != layout.local_len:
        raise ValueError(f"axis {axis} of x {list(x.shape)} must be this rank's {layout.local_len} positions")
    check_choice("grad", grad, GRADS)
    rows = rows_in_order(shares)
    x = x.moveaxis(axis, 0)  # [S_local, ...]
    if has_peers(group):
        (x,) = gather_rows([x], rows, group, "max", grad, needs_grad([x]))  # [S, ...]
    else:
        x = take_rows(x, rows.in_order)
    if cu_seqlens is not None:
        x = take_rows(x, _kept(tuple(checked_bounds(cu_seqlens, layout).tolist()), layout))
    return x.moveaxis(0, axis)


@lru_cache(maxsize=16)
def _kept(bounds: tuple[int, ...], layout: SeqLayout) -> Resident:
    """The positions that are no padding."""
    return Resident(np.flatnonzero(source_positions(np.asarray(bounds, dtype=np.int64), layout) >= 0))


def _all_shares(layout: SeqLayout, group: Group | None) -> tuple[SeqLayout, ...]:
    expected = layout.cp_rank * layout.sp_size + layout.sp_rank
    nranks, rank = (1, 0) if group is None else (group.nranks, group.rank)
    if (nranks, rank) != (layout.cp_size * layout.sp_size, expected):
        raise ValueError(
            f"the group must hold all {layout.cp_size} x {layout.sp_size} ranks of the layout, and this rank as rank "
            f"{expected}; the group says rank {rank} of {nranks}"
        )
    return tuple(layouts_of_all_ranks(layout))
