"""How the visual tokens of a run were spread over the ranks: counted while a report is open, read as a dict."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.comm.agree import exchange
from paddle_vl_sp.comm.collectives import Group, has_peers
from paddle_vl_sp.log import logger
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.tower_work import Balanced, TowerWork

if TYPE_CHECKING:
    from paddle import Tensor

    from paddle_vl_sp.plan import Array

Integers = npt.NDArray[np.int64]

COLUMNS = ("own", "syncs")  # of a forward: this rank's visual tokens, host syncs to plan
PENDING = 1024  # forwards whose counts may stay on the device before they are read

_open: list[RunReport] = []


class RunReport:
    """Counts every training forward with visual tokens while it is open.

    It synchronises with a device when it is read, and once in 1024 forwards, so that unread counts do not pile up.

    ::

        with RunReport() as report:
            train()
        print(report.read())  # on every rank

    The models that this package changes, its fleet classes and `encode_shared` call `note_forward` themselves; your
    own loop must call it.
    """

    def __init__(self) -> None:
        self._group: Group | None = None  # that of the first forward
        self._pending: list[tuple[Array, int]] = []  # (counts [2], perhaps on a device; syncs)
        self._read = array("q")  # row after row of COLUMNS
        self._tower = TowerWork()

    @property
    def num_forwards(self) -> int:
        return len(self._read) // len(COLUMNS) + len(self._pending)

    @property
    def is_open(self) -> bool:
        return self in _open

    def start(self) -> None:
        if not self.is_open:
            _open.append(self)

    def stop(self) -> None:
        if self.is_open:
            _open.remove(self)

    def read(self, since: int = 0) -> dict[str, Any]:
        """The forwards from number `since` on, over the ranks that the sequence was cut for: all of them must call.

        forwards          those with visual tokens; the other numbers are of these
        visual_tokens     of all forwards and ranks
        tokens_of_ranks   of all forwards, rank by rank
        imbalance         the busiest rank's visual tokens over the mean, 1.0 is perfect: mean of the forwards
        worst_imbalance   the imbalance of the worst forward
        empty_ranks       ranks without visual tokens: mean of the forwards
        syncs_here        host synchronisations of this rank to make plans
        vision_imbalance  of the tower's work, where it was shared or balanced: mean of the forwards

        And where every rank brought its own images (encode_balanced), the same on every rank:

        vision_imbalance_at_home  if every rank had encoded its own: mean of the forwards
        vision_rows_moved         feature rows from who encoded them to others that need them, of all ranks
        vision_bytes_moved        pixels to those who encoded them, and their rows home, in the forward
        vision_patches_at_home    that each rank brought, from the first forward on
        vision_patches_encoded    that each rank encoded, from the first forward on
        """
        self._read_pending()
        facts = np.array(self._read[since * len(COLUMNS) :], dtype=np.int64).reshape(-1, len(COLUMNS))
        own = facts[:, 0][None]  # [ranks, F]
        if self._group is not None:
            num = int(exchange([len(facts)], self._group).min())
            facts = facts[:num]
            own = exchange(facts[:, 0].tolist(), self._group)
        return _summary(own, facts) | self._tower.read(since)

    def _read_pending(self) -> None:
        """Moves the counts that are still on a device to the host."""
        for counts, syncs in self._pending:
            self._read.extend([int(np.asarray(counts)[0]), syncs])
        self._pending.clear()

    def _note(self, plan: VisualPlan, syncs: int, group: Group | None) -> None:
        group = None if not has_peers(group) else group
        if not self.num_forwards:
            self._group = group
        if _members(group) != _members(self._group):
            logger.warning(
                "a RunReport counts the forwards of one group, that of the first (%s); those of %s are left out: open "
                "one report for each",
                _members(self._group),
                _members(group),
            )
            return
        self._pending.append((plan.counts, syncs))
        if len(self._pending) >= PENDING:
            self._read_pending()

    def __enter__(self) -> RunReport:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def note_forward(
    plan: VisualPlan,
    hidden: Tensor | None = None,
    *,
    batch: int | None = None,
    num_levels: int = 0,
    group: Group | None = None,
    syncs: int = 1,
) -> None:
    """Counts one forward in every open report and, at level debug, logs its plan; without either it costs nothing.

    Forwards under paddle.no_grad, such as an evaluation's, are not counted.

    plan        this rank's, for the hidden states of the deepstack layers
    num_levels  deepstack layers, for the log
    group       the ranks that the sequence was cut for; None where it was not cut
    syncs       host synchronisations to make the plan: 0 if it is padded, or came from the data loader

    hidden and batch are ignored; loops written for 0.1.0 pass them.

    ::

        plan = plan_visual(ids, (image_id, video_id), layout, sequence_first=True)
        note_forward(plan, num_levels=len(levels), group=group)
    """
    if plan.num_features == 0:
        return
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", _describe(plan, num_levels, group, syncs))
    if not _open or not _is_training():
        return
    for report in _open:
        report._note(plan, syncs, group)


def note_balanced(share: Balanced, pixel_bytes: int, row_bytes: int) -> None:
    """Adds to every open report how the tower's work was balanced in one forward, and the bytes of rows that moved."""
    moved = share.moved_patches * pixel_bytes + share.sent_rows * row_bytes
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("the tower's work is balanced: %s; %.1f MiB move", share.report(), moved / 2**20)
    for report in _open if _is_training() else ():
        report._tower.add_balanced(report.num_forwards, share, moved)


def note_shared(imbalance: float) -> None:
    """Adds how evenly the tower's work was shared in one forward to every open report."""
    logger.debug("the tower's work is shared: the busiest rank has %.3f of the mean load", imbalance)
    for report in _open if _is_training() else ():
        report._tower.add_shared(report.num_forwards, imbalance)


@contextmanager
def paused() -> Iterator[None]:
    """No open report counts the forwards inside."""
    opened = _open[:]
    _open.clear()
    try:
        yield
    finally:
        _open[:] = opened


def summary_line(summary: dict[str, Any]) -> str:
    """The dict of a report in one line."""
    towers = ""
    if "vision_imbalance" in summary:
        towers = f"; busiest tower over the mean: {summary['vision_imbalance']:.2f}"
    if "vision_imbalance_at_home" in summary:
        moved = summary["vision_bytes_moved"] / 2**20
        towers += f", at home {summary['vision_imbalance_at_home']:.2f}; {moved:.2f} MiB moved"
    return (
        f"{summary['forwards']} forwards with {summary['visual_tokens']} visual tokens, ranks: "
        f"{len(summary['tokens_of_ranks'])}; imbalance {summary['imbalance']:.2f}, at worst "
        f"{summary['worst_imbalance']:.2f}; ranks without visual tokens, on average: {summary['empty_ranks']:.2f}; "
        f"host syncs to plan: {summary['syncs_here']}{towers}"
    )


def _members(group: Group | None) -> str:
    return "no group" if group is None else f"ranks {list(group.ranks)}"


def _is_training() -> bool:
    import paddle

    return bool(paddle.is_grad_enabled())


def _summary(own: Integers, facts: Integers) -> dict[str, Any]:
    """own [ranks, F]: the visual tokens of every rank in every forward; facts [F, columns] of this rank."""
    busiest, mean = own.max(axis=0), own.mean(axis=0)
    imbalance = np.divide(busiest, mean, out=np.ones_like(mean), where=mean > 0)
    return {
        "forwards": len(facts),
        "visual_tokens": int(own.sum()),
        "tokens_of_ranks": own.sum(axis=1).tolist(),
        "imbalance": float(imbalance.mean()) if len(facts) else 1.0,
        "worst_imbalance": float(imbalance.max(initial=1.0)),
        "empty_ranks": float((own == 0).sum(axis=0).mean()) if len(facts) else 0.0,
        "syncs_here": int(facts[:, 1].sum()),
    }


def _describe(plan: VisualPlan, num_levels: int, group: Group | None, syncs: int) -> str:
    """The plan's counts, shape and first pairs; reading them synchronises."""
    own, visual = np.asarray(plan.counts).tolist()
    pairs = zip(np.asarray(plan.update_indices[:4]), np.asarray(plan.gather_indices[:4]), strict=True)
    head = " ".join(f"({u}, {g})" for u, g in pairs)
    rank = "" if group is None else f" of rank {group.rank} of {group.nranks}"
    return (
        f"plan{rank}: {own} of {visual} visual tokens in {plan.num_rows} rows {list(plan.row_shape)}, {num_levels} "
        f"levels, {syncs} host syncs; first (row, feature row): {head or 'none'}"
    )
