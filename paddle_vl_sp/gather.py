"""Rows of all ranks into one tensor, in one of three ways, with a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.base import core

from paddle_vl_sp import collectives, ops
from paddle_vl_sp.float16 import moved
from paddle_vl_sp.once import differentiable_once
from paddle_vl_sp.uneven import Indices, UnevenRows


def gather_rows(
    xs: Sequence[Tensor], rows: UnevenRows, group: Any, mode: str, grad: str, wants_grad: bool
) -> list[Tensor]:
    """The rows of all ranks in the order of `rows`; unchecked. wants_grad is the same on every rank."""
    if wants_grad and all(x.stop_gradient for x in xs):
        first = xs[0].detach()
        first.stop_gradient = False  # so that this rank, too, comes to the collective of the backward
        xs = [first, *xs[1:]]
    if mode == "auto":
        row_bytes = sum(row_width(x) * x.element_size() for x in xs)
        mode = rows.best_mode(row_bytes, core.is_cuda_graph_capturing())
    return list(_GatherRows.apply(rows, group, mode, grad, *xs))


def row_width(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def view_of(x: Tensor) -> Tensor:
    """Another tensor in the same memory; PyLayer refuses x itself, its detached form and, on leaves, its reshape."""
    return x.unsqueeze(0).squeeze(0)


class _GatherRows(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, rows: UnevenRows, group: Any, mode: str, grad: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.rows, ctx.group, ctx.mode, ctx.grad = rows, group, mode, grad
        ctx.inputs = [(x.shape[1:], not x.stop_gradient) for x in xs]
        return _unpacked(_MOVES[mode](_packed(xs), rows, group), [x.shape[1:] for x in xs])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, group, whole = ctx.rows, ctx.group, _packed(grads)
        if ctx.grad == "whole":
            mine = _taken(whole, rows.mine(group.rank)).clone()  # never a view into autograd's own memory
        else:
            ours = whole.clone() if len(grads) == 1 else whole  # autograd's own buffer is not summed into
            mine = _SUMS[ctx.mode](ours, rows, group)
        parts = _unpacked(mine, [shape for shape, _ in ctx.inputs])
        return tuple(part if needed else None for part, (_, needed) in zip(parts, ctx.inputs, strict=True))


def _packed(xs: Sequence[Tensor]) -> Tensor:
    """[rows, sum of widths]; of one tensor a view."""
    flat = [x.reshape([x.shape[0], row_width(x)]) for x in xs]
    return flat[0] if len(flat) == 1 else paddle.concat(flat, axis=1)


def _unpacked(x: Tensor, shapes: Sequence[Any]) -> tuple[Tensor, ...]:
    widths = [math.prod(shape) for shape in shapes]
    parts = [x] if len(widths) == 1 else [part.contiguous() for part in paddle.split(x, widths, axis=1)]
    return tuple(part.reshape([x.shape[0], *shape]) for part, shape in zip(parts, shapes, strict=True))


def _padded(mine: Tensor, rows: UnevenRows, group: Any) -> Tensor:
    missing = rows.longest - mine.shape[0]
    if missing:
        mine = paddle.concat([mine, mine.new_zeros([missing, mine.shape[1]])])
    return _taken(collectives.gathered(mine, group), rows.from_padded())


def _among_zeros(mine: Tensor, rows: UnevenRows, group: Any) -> Tensor:
    # -0.0 and not 0.0, which would turn a row's -0.0 into 0.0: x + -0.0 is x, in every bit, for every x
    zero = mine.new_full([1, mine.shape[1]], -0.0)
    place = rows.mine(group.rank)
    source = np.full(rows.total, len(place), dtype=np.int64)
    source[place] = np.arange(len(place))
    return collectives.summed(_taken(paddle.concat([mine, zero]), source), group)


def _one_by_one(mine: Tensor, rows: UnevenRows, group: Any) -> Tensor:
    blocks = []
    for rank, count in enumerate(rows.counts):
        block = mine if rank == group.rank else mine.new_empty([count, mine.shape[1]])
        blocks.append(collectives.broadcast(block, rank, group))
    whole = paddle.concat(blocks)
    return whole if rows.order is None else _taken(whole, rows.order)


def _scattered_sum(grad: Tensor, rows: UnevenRows, group: Any) -> Tensor:
    if not collectives.has_reduce_scatter(group):
        return _cut_sum(grad, rows, group)
    padding = grad.new_zeros([1, grad.shape[1]])
    blocks = _taken(paddle.concat([grad, padding]), rows.to_padded())
    return collectives.summed_block(blocks, group)[: rows.counts[group.rank]]


def _cut_sum(grad: Tensor, rows: UnevenRows, group: Any) -> Tensor:
    return _taken(collectives.summed(grad, group), rows.mine(group.rank))


def _sums_one_by_one(grad: Tensor, rows: UnevenRows, group: Any) -> Tensor:
    blocks = (collectives.summed_at(rank, _taken(grad, rows.mine(rank)), group) for rank in range(group.nranks))
    return list(blocks)[group.rank]


_MOVES = {"max": _padded, "sum": _among_zeros, "ragged": _one_by_one}
_SUMS = {"max": _scattered_sum, "sum": _cut_sum, "ragged": _sums_one_by_one}


def _taken(x: Tensor, index: Indices) -> Tensor:
    """x[index] for rows; a view where the rows lie side by side."""
    first, size = (int(index[0]) if index.size else 0), index.size
    if size == 0 or bool((np.diff(index) == 1).all()):
        return x if size == x.shape[0] else x[first : first + size]
    at = ops.on_place(index, x.place)
    return moved(lambda rows: paddle.gather(rows, at), x)
