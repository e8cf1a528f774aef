"""Collectives with gradients: rows made whole over a group, and gradients made whole on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from paddle_vl_sp import collectives
from paddle_vl_sp.choices import check_choice
from paddle_vl_sp.consensus import agree, agree_on, fingerprint, hold_same
from paddle_vl_sp.gather import gather_rows, row_width, view_of
from paddle_vl_sp.once import differentiable_once
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.uneven import MODES, UnevenRows

__all__ = ["agree", "all_gather_rows", "complete_grad"]

GRADS = ("partial", "whole")
DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8")


def complete_grad(features: Sequence[Tensor], plan: VisualPlan, group: Any) -> list[Tensor]:
    """The same features; on the way back every rank receives the sum over the group of all ranks' gradients.

    features  levels [N, H], replicated over the group; each rank uses only the rows of its own share
    plan      this rank's plan: held against the number of feature rows
    group     the ranks that the sequence was cut for and that hold copies of the tower (tensor-parallel, SP)

    Without it each rank's tower sees the gradient of its own rows and no other. Forward costs nothing. Backward is
    one all-reduce for all levels, in which every rank takes part, with or without visual rows, as long as its loss
    reaches at least one level; a level that it does not use counts as zero. Which levels need a gradient must be the
    same on every rank, as it is for replicated features. A group of one, or None, which means nobody, is left out of
    the graph. There is no second gradient (create_graph=True).

    The sum is taken in the levels' own dtype: a feature row has one owner, so at most one rank brings a value and the
    others bring zero, and such a sum is exact in every dtype. Levels of different dtypes travel in the widest.
    """
    if isinstance(features, Tensor):
        raise ValueError("complete_grad takes a list of levels and returns one, got a tensor: pass [features]")
    _check_feature_rows(features, plan)
    needing = [level for level in features if not level.stop_gradient]
    if collectives.is_alone(group) or not needing or not paddle.is_grad_enabled():
        return list(features)
    completed = iter(_CompleteGrad.apply(group, *needing))
    return [level if level.stop_gradient else next(completed) for level in features]


def all_gather_rows(
    x: Tensor | Sequence[Tensor],
    counts: Sequence[int],
    group: Any,
    mode: str = "auto",
    grad: str = "partial",
    check: bool = False,
) -> Any:
    """The rows of all ranks, rank after rank: [counts[rank], ...] -> [sum(counts), ...]; exact in every dtype.

    x       a tensor, or a list of tensors with equally many rows and one dtype, which travel together
    counts  the rows of every rank of the group, known to all; zero is a number like any other
    mode    "max" pads to the longest and gathers, "sum" adds rows to zeros, "ragged" broadcasts one rank after the
            other; backward scatters the sum, sums and cuts, or sums rank by rank (where the backend cannot scatter a
            sum, "max" sums and cuts); "auto" chooses by the bytes on the wire and the number of collectives
    grad    "partial": ranks hold different parts of the result's gradient; backward sums it over the group, then cuts
            "whole": every rank holds the same, whole gradient; backward only cuts
    check   first compare, in one small collective, what the ranks are about to send; a mismatch is an error on all

    Every rank must make the call, and its backward too: without `check`, x must need a gradient on all ranks or on
    none, those with zero rows included; with it, they agree. The dtypes and widths of all ranks must be equal. A group
    of one, or None, which means nobody, gets x back. There is no second gradient (create_graph=True).
    """
    xs = list(x) if isinstance(x, (list, tuple)) else [x]
    error: Exception | None = None
    try:
        counts = [int(count) for count in counts]
        _check_rows(xs, counts, group, mode, grad)
    except Exception as wrong:  # raised on every rank where the ranks compare
        error = wrong
    if collectives.is_alone(group):
        if error is not None:
            raise error
        return x
    if check:
        form = len(xs) if isinstance(x, (list, tuple)) else -1
        wants_grad = agree_rows(xs, form, fingerprint(counts, mode, grad), error, group).needs_grad
    elif error is not None:
        raise error
    else:
        wants_grad = needs_grad(xs)
    rows = UnevenRows(tuple(counts))
    whole = gather_rows(xs, rows, group, mode, grad, wants_grad)
    return whole if isinstance(x, (list, tuple)) else whole[0]


@dataclass(frozen=True)
class RowKind:
    """What every rank of a gather sends, or would if it had rows."""

    form: int  # -1: one tensor; else the length of a list
    width: int  # of all tensors together
    dtype: str
    needs_grad: bool  # on at least one rank


def needs_grad(xs: Sequence[Tensor]) -> bool:
    return bool(paddle.is_grad_enabled()) and any(not x.stop_gradient for x in xs)


def agree_rows(xs: Sequence[Tensor] | None, form: int, mark: int, error: BaseException | None, group: Any) -> RowKind:
    """What the ranks send, after one small collective in which a rank with an error, or a mismatch, stops all.

    xs is None on a rank that has nothing and does not know what it would send; mark is a fingerprint of whatever must
    be the same besides. At least one rank must know.
    """
    mine = [0, -1, -1, -1]
    if error is None and xs is not None:
        mine = [needs_grad(xs), form, sum(row_width(x) for x in xs), DTYPES.index(name_of(xs[0].dtype))]
    table = agree_on([mark, *mine], error, group)
    hold_same(table[:, 0], "batch and pass the same arguments here")
    knowing = [rank for rank, row in enumerate(table) if row[3] >= 0]
    kinds = [RowKind(int(row[2]), int(row[3]), DTYPES[row[4]], bool(table[:, 1].any())) for row in table[knowing]]
    for rank, kind in zip(knowing, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"rank {rank} gathers {_told(kind)} and rank {knowing[0]} {_told(kinds[0])}: all ranks must send the "
                "same; look for automatic mixed precision or a cast that is on for some ranks only"
            )
    return kinds[0]


class _CompleteGrad(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, group: Any, *levels: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.dtypes = [level.dtype for level in levels]
        return tuple(view_of(level) for level in levels)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        wire = _widest(ctx.dtypes)
        # concat makes new memory, also of one tensor: autograd's own buffers are not summed into
        whole = collectives.summed(paddle.concat([grad.astype(wire).flatten() for grad in grads]), ctx.group)
        parts = paddle.split(whole, [grad.size for grad in grads])
        shaped = zip(parts, grads, ctx.dtypes, strict=True)
        return tuple(part.reshape(grad.shape).astype(dtype) for part, grad, dtype in shaped)


def _widest(dtypes: Sequence[Any]) -> Any:
    """The dtype that holds all of these exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return paddle.float64 if paddle.float64 in dtypes else paddle.float32


def _check_feature_rows(features: Sequence[Tensor], plan: VisualPlan) -> None:
    rows = [level.shape[0] for level in features]
    if len(set(rows)) > 1 or (rows and plan.num_features not in (-1, rows[0])):
        raise ValueError(
            f"the plan is for {plan.num_features} feature rows, got levels of {rows}: use the features of the batch "
            "that was planned, whole and the same on every rank of the group"
        )


def _check_rows(xs: Sequence[Tensor], counts: Sequence[int], group: Any, mode: str, grad: str) -> None:
    """Of this rank's arguments."""
    check_choice("mode", mode, ("auto", *MODES))
    check_choice("grad", grad, GRADS)
    num_ranks, rank = (1, 0) if collectives.is_alone(group) else (group.nranks, group.rank)
    if len(counts) != num_ranks or min(counts) < 0:
        raise ValueError(f"counts must be the rows of each of {num_ranks} ranks, got {list(counts)}")
    for x in xs:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"x must be a Paddle tensor, or a list of them, got {type(x).__name__}: a rank without rows passes a "
                "tensor of 0 rows, of the others' width and dtype"
            )
    dtypes = {name_of(x.dtype) for x in xs}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ValueError(f"x must have one dtype out of {', '.join(DTYPES)}, got {sorted(dtypes)}: cast it first")
    rows = [x.shape[0] if x.shape else None for x in xs]
    if any(number != counts[rank] for number in rows):
        raise ValueError(f"rank {rank} has {rows} rows in x but counts says {counts[rank]}: counts is {list(counts)}")


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("paddle.")


def _told(kind: RowKind) -> str:
    tensors = "a tensor" if kind.form < 0 else f"{kind.form} tensor(s)"
    return f"{tensors}, {kind.width} wide, {kind.dtype}"
