"""Feature rows to the ranks whose plans use them: what this rank wants, how it gets it, and where it places it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from paddle import Tensor

from paddle_vl_sp.backends.copies import on_place
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.gather import needs_grad
from paddle_vl_sp.comm.routed import Routes, exchange_wanted, route_rows, routes_to_owners
from paddle_vl_sp.comm.uneven import UnevenRows
from paddle_vl_sp.plan import VisualPlan, check_feature_count

Integers = npt.NDArray[np.int64]


def wanted_rows(plan: VisualPlan, num_features: int) -> Integers:
    """The feature rows that the plan uses, increasing; a plan on a device is read.

    Raises unless it is a plan for a batch of num_features feature rows.
    """
    visual = int(np.asarray(plan.counts)[1])
    if visual >= 0:  # else the plan is of index arrays, and does not know
        check_feature_count(visual, num_features)
    gather: Integers = np.asarray(plan.gather_indices).astype(np.int64)
    rows = gather[gather >= 0]
    if (rows != gather[: len(rows)]).any() or (np.diff(rows, append=num_features) <= 0).any():
        raise ValueError(
            f"encode_shared needs a plan whose gather indices increase and are below {num_features}, the feature rows "
            f"of this batch, got {gather[:8].tolist()} ..: use the plan that was made for it"
        )
    return rows


def own_plan(plan: VisualPlan, num_rows: int) -> VisualPlan:
    """The same places, for features of which only the rows that the plan uses are there, in their order: [n, H].

    A padded plan becomes an exact one: its unused pairs are at the end.
    """
    gather = np.arange(num_rows, dtype=np.int64)
    update = plan.update_indices[:num_rows]
    if not isinstance(update, np.ndarray):
        return VisualPlan(update, on_place(gather, update.place), plan.row_shape, num_rows)
    return VisualPlan(update, gather, plan.row_shape, num_rows)


def rows_from_encoders(
    outs: Sequence[Tensor], rows: UnevenRows, wanted: Integers, group: Group, wants_grad: bool
) -> list[Tensor]:
    """Of the rows that the ranks encoded, those that this rank wants: two collectives, of a bit a row and of rows."""
    of_ranks = exchange_wanted(wanted, rows.total, group)
    return route_rows(outs, routes_to_owners(of_ranks, rows, group.rank), group, wants_grad)


def rows_from_here(outs: Sequence[Tensor], wanted: Integers) -> list[Tensor]:
    """The same where this rank has encoded all."""
    if not outs:
        return []
    num_rows = outs[0].shape[0]
    if len(wanted) == num_rows:
        return list(outs)
    return route_rows(outs, Routes(num_rows, (wanted,), (len(wanted),)), None, needs_grad(outs))
