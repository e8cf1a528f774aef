"""PADDLE_VL_SP_CHECK=1: results compared with upstream's own, loaded plans with fresh ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from paddle import Tensor

from paddle_vl_sp.carried import GATHER, ORDER, POSITIONS, UPDATE, own_row
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.log import logger
from paddle_vl_sp.plan import plan_visual
from paddle_vl_sp.settings import CHECK, is_on

Integers = npt.NDArray[np.int64]
_said: set[str] = set()


class CheckFailed(ValueError, RuntimeError):
    """Under PADDLE_VL_SP_CHECK=1: a result is not upstream's, or a loaded plan is not that of the ids."""


def checking() -> bool:
    """Whether PADDLE_VL_SP_CHECK=1 asks for these comparisons, read anew every time."""
    return is_on(CHECK)


def check_loaded(
    update: Tensor | Integers,
    gather: Tensor | Integers,
    mask: Tensor | npt.NDArray[np.bool_],
    layout: SeqLayout,
    sequence_first: bool,
    advice: str,
) -> None:
    """Index arrays that came with a batch against those that its mask [B, S] asks for.

    Of arrays [ranks, n] every rank compares all rows: then all ranks raise, or none does, without a collective.
    """
    ranks = range(layout.sp_size) if len(update.shape) == 2 else [layout.sp_rank]
    for rank in ranks:
        fresh = plan_visual(np.asarray(mask), None, replace(layout, sp_rank=rank), sequence_first=sequence_first)
        for key, rows, expected in (
            (UPDATE, update, fresh.update_indices),
            (GATHER, gather, fresh.gather_indices),
        ):
            row = np.asarray(own_row(rows, rank, layout.sp_size))
            _check_indices(f"{key} of rank {rank}", row[row >= 0], expected, advice)
    _say_once("the plans of the batch are those of its ids")


def check_positions(got: Tensor | Integers, expected: Integers, advice: str) -> None:
    _check_indices(POSITIONS, np.asarray(got), expected, advice)


def check_order(got: Tensor | Integers, expected: Integers, advice: str) -> None:
    _check_indices(ORDER, np.asarray(got), expected, advice)


def check_result(what: str, ours: Tensor, upstream: Tensor, advice: str) -> None:
    """Value by value; a NaN equals a NaN."""
    if ours.shape != upstream.shape or ours.dtype != upstream.dtype:
        how = f"{ours.dtype} {list(ours.shape)} against {upstream.dtype} {list(upstream.shape)}"
    else:
        same = (ours == upstream) | (ours.isnan() & upstream.isnan()) if ours.is_floating_point() else ours == upstream
        if bool(same.all()):
            return _say_once(f"{what} equals upstream's")
        wrong = int((~same).sum())
        apart = float((ours.astype("float32") - upstream.astype("float32")).abs().max())
        how = f"{wrong} of {ours.size} values differ, by {apart:.3g} at most"
    raise CheckFailed(f"{CHECK}: {what} differs from that of upstream: {how}; {advice}")


def _say_once(what: str) -> None:
    """So that a run without an error shows that something was compared."""
    if what not in _said:
        _said.add(what)
        logger.info("%s=1: %s; this is said once, and compared every time", CHECK, what)


def _check_indices(key: str, got: Integers, expected: Integers, advice: str) -> None:
    if not np.array_equal(got, expected):
        raise CheckFailed(
            f"{CHECK}: {key} of the batch is not what its ids ask for: got {_head(got)}, expected {_head(expected)}; "
            f"{advice}"
        )


def _head(indices: Integers) -> str:
    return f"{indices.size} indices {indices[:4].tolist()}..."
