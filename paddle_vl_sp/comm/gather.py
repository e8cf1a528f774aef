"""Gathers the rows of all ranks into one tensor, in one of three ways, with a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext
from paddle.base import core

from paddle_vl_sp.autograd import differentiable_once, via_float32
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.agree import agree_on, check_equal_fingerprints, fingerprint
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.comm.uneven import MODES, UnevenRows, rank_after_rank
from paddle_vl_sp.settings import check_choice

Rows = TypeVar("Rows", bound="Tensor | Sequence[Tensor]")

GRADS = ("partial", "whole")
DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8")


def all_gather_rows(
    x: Rows,
    counts: Sequence[int],
    group: Group | None,
    mode: str = "auto",
    grad: str = "partial",
    check: bool = False,
) -> Rows:
    """The rows of all ranks, rank after rank: [counts[rank], ...] -> [sum(counts), ...]; exact in every dtype.

    x       a tensor, or a list of tensors with equally many rows and one dtype, which are sent together
    counts  the number of rows of every rank of the group, the same list on all; it may be zero
    mode    "max" pads to the longest and gathers, "sum" adds rows to zeros, "ragged" broadcasts one rank after the
            other; backward scatters the sum, sums and cuts, or sums rank by rank (where the backend cannot scatter a
            sum, "max" sums and cuts); "auto" chooses by the bytes on the wire and the number of collectives
    grad    "partial": ranks hold different parts of the result's gradient; backward sums it over the group, then cuts
            "whole": every rank holds the same, whole gradient; backward only cuts
    check   first compare, in one small collective, what the ranks are about to send; a mismatch is an error on all

    Every rank must make the call, and its backward too: without `check`, x must need a gradient on all ranks or on
    none, those with zero rows included; with it, they agree. The dtypes and widths of all ranks must be equal. A group
    of one, or None, which means no group, returns x. There is no second gradient (create_graph=True).

    ::

        own = paddle.ones([3 if group.rank == 0 else 1, H])
        whole = all_gather_rows(own, [3, 1], group)  # [4, H] on both ranks
    """
    is_list = isinstance(x, (list, tuple))
    xs = list(x) if is_list else [x]
    error: Exception | None = None
    try:
        counts = [int(count) for count in counts]
        _check_rows(xs, counts, group, mode, grad)
    except Exception as wrong:  # with `check`, raised on every rank
        error = wrong
    if error is not None and not (check and collectives.has_peers(group)):
        raise error
    if not collectives.has_peers(group):
        return x
    if check:
        form = len(xs) if is_list else -1
        wants_grad = agree_rows(xs, form, fingerprint(counts, mode, grad), error, group).needs_grad
    else:
        wants_grad = needs_grad(xs)
    whole = gather_rows(xs, rank_after_rank(tuple(counts)), group, mode, grad, wants_grad)
    return cast(Rows, whole if is_list else whole[0])


@dataclass(frozen=True)
class RowKind:
    """What every rank of a gather sends, if only zero rows of it."""

    form: int  # -1: one tensor; else the length of a list
    width: int  # of all tensors together
    dtype: str
    needs_grad: bool  # on at least one rank


def needs_grad(xs: Sequence[Tensor]) -> bool:
    return bool(paddle.is_grad_enabled()) and any(not x.stop_gradient for x in xs)


def agree_rows(
    xs: Sequence[Tensor] | None, form: int, own_fingerprint: int, error: BaseException | None, group: Group
) -> RowKind:
    """What the ranks send, after one small collective in which an error on a rank, or a mismatch, is raised on all.

    xs               None on a rank that has no rows and cannot say of which kind; at least one rank must
    own_fingerprint  of everything else that must be equal on all ranks
    """
    own = [0, -1, -1, -1]
    if error is None and xs is not None:
        own = [needs_grad(xs), form, sum(row_width(x) for x in xs), DTYPES.index(name_of(xs[0].dtype))]
    table = agree_on([own_fingerprint, *own], error, group)
    check_equal_fingerprints(table[:, 0], "batch and pass the same arguments here")
    known = [rank for rank, row in enumerate(table) if row[3] >= 0]
    kinds = [RowKind(int(row[2]), int(row[3]), DTYPES[row[4]], bool(table[:, 1].any())) for row in table[known]]
    for rank, kind in zip(known, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"rank {rank} gathers {_describe(kind)} and rank {known[0]} {_describe(kinds[0])}: all ranks must "
                "send the same; look for automatic mixed precision or a cast that is on for some ranks only"
            )
    return kinds[0]


def gather_rows(
    xs: Sequence[Tensor], rows: UnevenRows, group: Group, mode: str, grad: str, wants_grad: bool
) -> list[Tensor]:
    """The rows of all ranks in the order of `rows`; unchecked. wants_grad is the same on every rank."""
    xs = in_backward(xs, wants_grad)
    if mode == "auto":
        row_bytes = sum(row_width(x) * x.element_size() for x in xs)
        mode = rows.best_mode(row_bytes, core.is_cuda_graph_capturing())
    return list(_GatherRows.apply(rows, group, mode, grad, *xs))


def in_backward(xs: Sequence[Tensor], wants_grad: bool) -> Sequence[Tensor]:
    """The tensors, one of which needs a gradient: so this rank, too, takes part in the collective of the backward."""
    if not wants_grad or not all(x.stop_gradient for x in xs):
        return xs
    first = xs[0].detach()
    first.stop_gradient = False
    return [first, *xs[1:]]


def collect_rows(xs: Sequence[Tensor], rows: UnevenRows, group: Group | None, mode: str = "max") -> list[Tensor]:
    """As `gather_rows`, for a PyLayer's own forward or backward: no gradient; one process only orders its rows."""
    if not collectives.has_peers(group):
        return [take_rows(x, rows.in_order) for x in xs]
    return list(unpack(_GATHER[mode](pack(xs), rows, group), [x.shape[1:] for x in xs]))


def sum_rows(xs: Sequence[Tensor], rows: UnevenRows, group: Group | None, mode: str = "max") -> list[Tensor]:
    """The transpose of `collect_rows`: of all ranks' xs [total, ...] the sum, cut to this rank's rows."""
    if not collectives.has_peers(group):
        return [take_rows(x, rows.rows_of(0)) for x in xs]
    whole = pack(xs)
    whole = whole.clone() if len(xs) == 1 else whole  # the sum must not overwrite the caller's memory
    return list(unpack(_SUM_AND_CUT[mode](whole, rows, group), [x.shape[1:] for x in xs]))


def row_width(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def view_of(x: Tensor) -> Tensor:
    """Another tensor in x's memory, to return from a PyLayer, which refuses x, x.detach() and, of a leaf, a reshape."""
    return x.unsqueeze(0).squeeze(0)


class _GatherRows(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: PyLayerContext, rows: UnevenRows, group: Group, mode: str, grad: str, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.rows, ctx.group, ctx.mode, ctx.grad = rows, group, mode, grad
        ctx.needed = [not x.stop_gradient for x in xs]
        return tuple(collect_rows(xs, rows, group, mode))

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad == "whole":
            place = ctx.rows.rows_of(ctx.group.rank)
            parts = [take_rows(grad, place).clone() for grad in grads]  # never a view into autograd's own memory
        else:
            parts = sum_rows(grads, ctx.rows, ctx.group, ctx.mode)
        return tuple(part if needed else None for part, needed in zip(parts, ctx.needed, strict=True))


def pack(xs: Sequence[Tensor]) -> Tensor:
    """The tensors side by side, [rows, sum of widths]; of one tensor a view."""
    flat = [x.reshape([x.shape[0], row_width(x)]) for x in xs]
    return flat[0] if len(flat) == 1 else paddle.concat(flat, axis=1)


def unpack(x: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    widths = [math.prod(shape) for shape in shapes]
    parts = [x] if len(widths) == 1 else [part.contiguous() for part in paddle.split(x, widths, axis=1)]
    return tuple(part.reshape([x.shape[0], *shape]) for part, shape in zip(parts, shapes, strict=True))


def _gather_padded(own: Tensor, rows: UnevenRows, group: Group) -> Tensor:
    missing = rows.longest - own.shape[0]
    if missing:
        own = paddle.concat([own, own.new_zeros([missing, own.shape[1]])])
    return take_rows(collectives.all_gather(own, group), rows.from_padded)


def _sum_among_zeros(own: Tensor, rows: UnevenRows, group: Group) -> Tensor:
    # -0.0 and not 0.0, which would turn a row's -0.0 into 0.0: x + -0.0 is x, in every bit, for every x
    zero = own.new_full([1, own.shape[1]], -0.0)
    padded = paddle.concat([own, zero])
    return collectives.all_reduce_sum(take_rows(padded, rows.among_others(group.rank)), group)


def _broadcast_each(own: Tensor, rows: UnevenRows, group: Group) -> Tensor:
    blocks = []
    for rank, count in enumerate(rows.counts):
        block = own if rank == group.rank else own.new_empty([count, own.shape[1]])
        blocks.append(collectives.broadcast(block, rank, group))
    whole = paddle.concat(blocks)
    return take_rows(whole, rows.in_order)


def _scatter_sum(grad: Tensor, rows: UnevenRows, group: Group) -> Tensor:
    if not collectives.has_reduce_scatter(group):
        return _cut_sum(grad, rows, group)
    padding = grad.new_zeros([1, grad.shape[1]])
    blocks = take_rows(paddle.concat([grad, padding]), rows.to_padded)
    return collectives.reduce_scatter_sum(blocks, group)[: rows.counts[group.rank]]


def _cut_sum(grad: Tensor, rows: UnevenRows, group: Group) -> Tensor:
    return take_rows(collectives.all_reduce_sum(grad, group), rows.rows_of(group.rank))


def _reduce_each(grad: Tensor, rows: UnevenRows, group: Group) -> Tensor:
    blocks = [collectives.reduce_sum(take_rows(grad, rows.rows_of(rank)), rank, group) for rank in range(group.nranks)]
    return blocks[group.rank]


_GATHER = {"max": _gather_padded, "sum": _sum_among_zeros, "ragged": _broadcast_each}
_SUM_AND_CUT = {"max": _scatter_sum, "sum": _cut_sum, "ragged": _reduce_each}


def take_rows(x: Tensor, index: Resident) -> Tensor:
    """x[index], rows of x; a view where they follow each other in x."""
    if index.stretch is not None:
        first, size = index.stretch
        return x if size == x.shape[0] else x[first : first + size]
    at = index.on(x.place)
    return via_float32(lambda rows: paddle.gather(rows, at), x)


def _check_rows(xs: Sequence[Tensor], counts: Sequence[int], group: Group | None, mode: str, grad: str) -> None:
    """Checks this rank's arguments; other ranks' are compared by `agree_rows`."""
    check_choice("mode", mode, ("auto", *MODES))
    check_choice("grad", grad, GRADS)
    num_ranks, rank = (1, 0) if not collectives.has_peers(group) else (group.nranks, group.rank)
    if len(counts) != num_ranks or min(counts) < 0:
        raise ValueError(f"counts must be the rows of each of {num_ranks} ranks, got {list(counts)}")
    check_tensors(xs)
    rows = [x.shape[0] if x.shape else None for x in xs]
    if any(number != counts[rank] for number in rows):
        raise ValueError(f"rank {rank} has {rows} rows in x but counts says {counts[rank]}: counts is {list(counts)}")


def check_tensors(xs: Sequence[Tensor]) -> None:
    """Whether they can be sent together: tensors of one dtype."""
    for x in xs:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"x must be a Paddle tensor, or a list of them, got {type(x).__name__}: a rank without rows passes a "
                "tensor of 0 rows, of the others' width and dtype"
            )
    dtypes = {name_of(x.dtype) for x in xs}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ValueError(f"x must have one dtype out of {', '.join(DTYPES)}, got {sorted(dtypes)}: cast it first")


def name_of(dtype: paddle.dtype) -> str:
    return str(dtype).removeprefix("paddle.")


def _describe(kind: RowKind) -> str:
    tensors = "a tensor" if kind.form < 0 else f"{kind.form} tensor(s)"
    return f"{tensors}, {kind.width} wide, {kind.dtype}"
