"""The whole sequence from the shares that ranks hold, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from paddle_vl_sp.autograd import differentiable_once, via_float32
from paddle_vl_sp.comm.collectives import Group, all_gather, all_reduce_sum
from paddle_vl_sp.layout import SeqLayout, layouts_of_all_ranks
from paddle_vl_sp.sequence.padding import checked_bounds, source_places


def unshard(
    x: Tensor,
    layout: SeqLayout,
    group: Group,
    *,
    axis: int,
    cu_seqlens: Sequence[int] | None = None,
    grad: str = "partial",
) -> Tensor:
    """The whole sequence on every rank, from the shares: the inverse of the cut, exact, with a gradient.

    x            this rank's share, S_local along the axis
    group        all ranks that hold a part, cp rank after cp rank, within one cp rank sp rank after sp rank
    cu_seqlens   the boundaries before padding: the padding is taken out; None leaves it in
    grad         "partial": ranks use the result differently, so their gradients are summed, then cut; "whole": the
                 gradient is the same on every rank already, and is only cut
    """
    shares = _all_shares(layout, group)
    axis = axis % len(x.shape)
    if x.shape[axis] != layout.local_len:
        raise ValueError(f"axis {axis} of x {list(x.shape)} must be this rank's {layout.local_len} positions")
    if grad not in ("partial", "whole"):
        raise ValueError(f"grad must be 'partial' or 'whole', got {grad!r}")
    place_of = np.argsort(np.concatenate([share.positions() for share in shares]))  # [S], where each position arrived
    if cu_seqlens is not None:
        source = source_places(checked_bounds(cu_seqlens, layout), layout)
        place_of = place_of[np.flatnonzero(source >= 0)]
    order = paddle.to_tensor(place_of, place=x.place)
    if group.nranks == 1:
        return _gather(x, order, axis)
    result: Tensor = _Unshard.apply(x, order, [share.local_len for share in shares], axis, group, grad)
    return result


class _Unshard(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, lengths: list[int], axis: int, group: Group, grad: str) -> Tensor:
        ctx.order, ctx.lengths, ctx.axis, ctx.group, ctx.grad = order, lengths, axis, group, grad
        return _gather(_gather_shares(x, lengths, axis, group), order, axis)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        whole = all_reduce_sum(grad.clone(), ctx.group) if ctx.grad == "partial" else grad
        begin = sum(ctx.lengths[: ctx.group.rank])
        end = begin + ctx.lengths[ctx.group.rank]
        place = paddle.full([sum(ctx.lengths)], -1, "int64")  # of each arrived row, its place in the result
        place = paddle.scatter(place, ctx.order, paddle.arange(ctx.order.shape[0]))[begin:end]
        return via_float32(lambda x: _gather_or_zero(x, place, ctx.axis), whole)


def _gather_or_zero(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x at the index along the axis, zero where the index is -1."""
    if not index.shape[0]:
        return x.slice([axis], [0], [0])
    kept = (index >= 0).astype(x.dtype).reshape([-1 if i == axis else 1 for i in range(len(x.shape))])
    return paddle.gather(x, index.clip(min=0), axis=axis) * kept


def _gather(x: Tensor, index: Tensor, axis: int) -> Tensor:
    return via_float32(lambda y: paddle.gather(y, index, axis=axis), x)


def _all_shares(layout: SeqLayout, group: Group) -> list[SeqLayout]:
    size, place = layout.cp_size * layout.sp_size, layout.cp_rank * layout.sp_size + layout.sp_rank
    if (group.nranks, group.rank) != (size, place):
        raise ValueError(
            f"the group must hold all {layout.cp_size} x {layout.sp_size} ranks of the layout, this one being number "
            f"{place}; it says rank {group.rank} of {group.nranks}"
        )
    return layouts_of_all_ranks(layout)


def _gather_shares(x: Tensor, lengths: Sequence[int], axis: int, group: Group) -> Tensor:
    """Every rank's x, rank after rank along the axis, where rank r holds lengths[r]; unequal shares travel padded."""
    longest, rows = max(lengths), x.moveaxis(axis, 0)  # [lengths[rank], ...]
    missing = longest - lengths[group.rank]
    if missing:
        rows = paddle.concat([rows, paddle.zeros([missing, *rows.shape[1:]], x.dtype)])
    shares = all_gather(rows, group)  # [nranks * longest, ...]
    if len(set(lengths)) > 1:
        kept = [shares[rank * longest : rank * longest + n] for rank, n in enumerate(lengths) if n]
        shares = paddle.concat(kept)
    return shares.moveaxis(0, axis)
