"""Rows that go only to the ranks that use them: of several tensors, in one collective, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm.agree import agree_on, exchange
from paddle_vl_sp.comm.collectives import Group, has_peers
from paddle_vl_sp.comm.exchange import all_to_all_rows
from paddle_vl_sp.comm.gather import agree_rows, check_tensors, in_backward, needs_grad, pack, take_rows, unpack
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.comm.uneven import UnevenRows
from paddle_vl_sp.layout import consecutive

Rows = TypeVar("Rows", bound="Tensor | Sequence[Tensor]")
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Routes:
    """Which rows of its tensors a rank sends to whom, and in which order it has those that arrive.

    num_rows  how many rows this rank's tensors have
    sends     for each rank of the group the rows that go to it, int64: a row may go to several ranks, or to none
    receives  for each rank of the group how many rows come from it
    order     int64, a permutation: row i of the result is row order[i] of those that arrive; None: rank after rank

    Of three ranks this one is rank 0 and has rows a b c d; rank 2 sends it x::

        sends      [1] [0 3] []      goes out  b | a d |      no rank wants c
        receives   1 0 1             arrives   b | | x
        order      1 0               result    x b
    """

    num_rows: int
    sends: tuple[Integers, ...]
    receives: tuple[int, ...]
    order: Integers | None = None

    @property
    def send_counts(self) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self.sends)

    @cached_property
    def outgoing(self) -> Resident:
        """The rows in the order in which they go out: [1 0 3] above."""
        return Resident(np.concatenate(self.sends).astype(np.int64))

    @cached_property
    def in_order(self) -> Resident:
        """The order, or 0 1 2 .. where it is rank after rank."""
        return Resident(np.arange(sum(self.receives), dtype=np.int64) if self.order is None else self.order)

    @cached_property
    def as_arrived(self) -> Resident:
        """The inverse of the order: for every row that arrived its row in the result, [1 0] above."""
        return Resident(np.argsort(self.in_order.array))

    @cached_property
    def copies(self) -> list[Resident]:
        """For every row of this rank where its first copy went out, then its second, ..; behind the last if nowhere.

        [[1 0 3 2]] above, of four rows: no rank wants row 2, and 3 is behind the last.
        """
        row = self.outgoing.array
        by_row = np.argsort(row, kind="stable")  # the copies of a row, rank after rank
        first = np.searchsorted(row[by_row], row[by_row])
        number = np.arange(len(row)) - first
        places = np.full([int(number.max(initial=0)) + 1, self.num_rows], len(row), dtype=np.int64)
        places[number, row[by_row]] = by_row
        return [Resident(each) for each in places]


def routes_to_owners(wanted: npt.NDArray[np.bool_], rows: UnevenRows, rank: int) -> Routes:
    """This rank's routes, where the ranks hold `rows` between them and rank r wants those that wanted[r] says.

    wanted  bool [nranks, total], of rows in the order of `rows`, in which each rank has those that it wants

    Two ranks have a c e and b d, in the order a b c d e::

        wanted     1 1 1 0 0      rank 0 wants a b c         sends of rank 0   [0 1] [2]    a c | e
                   0 0 0 1 1      rank 1 wants d e           receives          2 1          a c | b
                                                             order             0 2 1        a b c
    """
    held = [rows.rows_of(each).array for each in range(len(rows.counts))]
    sends = tuple(np.flatnonzero(of_rank[held[rank]]) for of_rank in wanted)
    arriving = [place[wanted[rank][place]] for place in held]
    order = np.argsort(np.concatenate(arriving))
    return Routes(rows.counts[rank], sends, tuple(len(each) for each in arriving), order)


def routes_of_items(source: Integers, wanted: npt.NDArray[np.bool_], lengths: Integers, rank: int) -> Routes:
    """This rank's routes, where item j is lengths[j] rows of rank source[j], and goes to every rank r of wanted[r, j].

    Before and after, a rank has its items in their order. Two ranks, items a bb c d, of which d is rank 1's::

        source  0 0 0 1    sends of rank 0     [0] [1 2 3]   a | bb c
        wanted  1 0 0 1    receives of rank 0  1 1           a | d
                0 1 1 0
    """
    own, arriving = np.flatnonzero(source == rank), np.flatnonzero(wanted[rank])
    start = np.cumsum(lengths[own]) - lengths[own]
    sends = tuple(consecutive(start[here], lengths[own[here]]) for here in wanted[:, own])
    receives = tuple(int(lengths[arriving[source[arriving] == peer]].sum()) for peer in range(len(wanted)))
    by_source = np.argsort(source[arriving], kind="stable")
    arrived = lengths[arriving[by_source]]
    begin = np.empty_like(arrived)
    begin[by_source] = np.cumsum(arrived) - arrived
    return Routes(int(lengths[own].sum()), sends, receives, consecutive(begin, lengths[arriving]))


def exchange_wanted(wanted: Integers, total: int, group: Group) -> npt.NDArray[np.bool_]:
    """Which of the `total` rows every rank wants, bool [nranks, total]; one small collective, a bit for each row."""
    is_wanted = np.zeros(-(-total // 64) * 64, dtype=bool)
    is_wanted[wanted] = True
    numbers = exchange(np.packbits(is_wanted).view(np.int64).tolist(), group)  # [nranks, total / 64]
    return np.unpackbits(numbers.view(np.uint8), axis=1)[:, :total].astype(bool)


def exchange_rows(x: Rows, sends: Sequence[npt.ArrayLike], group: Group | None) -> tuple[Rows, tuple[int, ...]]:
    """Sends x[sends[r]] to rank r: the rows that arrive, rank after rank, and how many came from each.

    x      [rows, ...], a tensor, or a list of tensors with equally many rows and one dtype, which are sent together
    sends  for each rank of the group, this one included, rows of x; none is an empty list

    Exact in every dtype. The gradient of a row is the sum of those of its copies, in the order of the ranks. Two small
    collectives exchange errors, what is sent, and the counts; one moves the rows. An error on one rank is raised on
    all. Every rank must make the call, and its backward too. There is no second gradient (create_graph=True).
    """
    is_list = isinstance(x, (list, tuple))
    xs: list[Tensor] = list(x) if is_list else [x]
    chosen: tuple[Integers, ...] = ()
    error: Exception | None = None
    try:
        check_tensors(xs)
        chosen = _checked_sends(sends, xs, group)
    except Exception as wrong:  # raised by agree_rows, on every rank
        error = wrong
    if has_peers(group):
        wants_grad = agree_rows(xs, len(xs) if is_list else -1, 0, error, group).needs_grad
    else:
        agree_on([], error, None)
        wants_grad = needs_grad(xs)
    counts = exchange([len(rows) for rows in chosen], group)  # [nranks, nranks]
    receives = tuple(int(count) for count in counts[:, group.rank if has_peers(group) else 0])
    out = route_rows(xs, Routes(xs[0].shape[0], chosen, receives), group, wants_grad)
    return cast(Rows, out if is_list else out[0]), receives


def route_rows(xs: Sequence[Tensor], routes: Routes, group: Group | None, wants_grad: bool) -> list[Tensor]:
    """The rows that the routes bring to this rank; unchecked. wants_grad is the same on every rank.

    group=None is no group: the routes lead from this process to itself.
    """
    return list(_RouteRows.apply(routes, group, *in_backward(xs, wants_grad)))


class _RouteRows(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: PyLayerContext, routes: Routes, group: Group | None, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.routes, ctx.group = routes, group
        ctx.needed = [not x.stop_gradient for x in xs]
        outgoing = take_rows(pack(xs), routes.outgoing)
        arrived = all_to_all_rows(outgoing, routes.send_counts, routes.receives, group)
        return unpack(take_rows(arrived, routes.in_order), [x.shape[1:] for x in xs])

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        routes = ctx.routes
        returning = take_rows(pack(grads), routes.as_arrived)
        returned = all_to_all_rows(returning, routes.receives, routes.send_counts, ctx.group)
        parts = unpack(_sum_of_copies(returned, routes), [grad.shape[1:] for grad in grads])
        return tuple(part if needed else None for part, needed in zip(parts, ctx.needed, strict=True))


def _sum_of_copies(returned: Tensor, routes: Routes) -> Tensor:
    """The gradients of this rank's rows, from those of the copies that it sent."""
    if len(routes.copies) > 1 or (routes.copies[0].array == returned.shape[0]).any():
        returned = paddle.concat([returned, returned.new_zeros([1, returned.shape[1]])])
    parts = [take_rows(returned, places) for places in routes.copies]
    if len(parts) == 1:
        return parts[0]
    widest = returned.dtype if returned.element_size() > 2 else paddle.float32  # so that the sum rounds once
    first, *others = (part.astype(widest) for part in parts)
    return sum(others, start=first).astype(returned.dtype)


def _checked_sends(sends: Sequence[npt.ArrayLike], xs: Sequence[Tensor], group: Group | None) -> tuple[Integers, ...]:
    num_ranks, num_rows = group.nranks if has_peers(group) else 1, xs[0].shape[0] if xs[0].shape else 0
    shapes = [list(x.shape) for x in xs]
    if any(shape[:1] != [num_rows] for shape in shapes):
        raise ValueError(f"tensors that are sent together must have equally many rows, got {shapes}: call once each")
    arrays = [np.asarray(rows) for rows in sends]
    is_right = [
        rows.ndim == 1 and (not rows.size or (rows.dtype.kind in "iu" and rows.min() >= 0 and rows.max() < num_rows))
        for rows in arrays
    ]
    if len(arrays) != num_ranks or not all(is_right):
        raise ValueError(
            f"sends must be {num_ranks} lists, for each rank of the group the rows of x that go to it, from 0 to "
            f"{num_rows - 1}, got {[rows.tolist() for rows in arrays]}"
        )
    return tuple(rows.astype(np.int64) for rows in arrays)
