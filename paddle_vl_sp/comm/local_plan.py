"""The plan where each rank has only its own part of the ids: ranks exchange counts, not ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.comm.agree import agree_on, check_equal_fingerprints, exchange, fingerprint
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.layout import SeqLayout, consecutive, layouts_of_all_ranks
from paddle_vl_sp.plan import VisualPlan, check_feature_count, checked_ids

if TYPE_CHECKING:
    from paddle_vl_sp.plan import Array

Integers = npt.NDArray[np.int64]

HEADER = 5  # numbers that a rank sends before its counts: has an error, fingerprint, feature rows, cp and sp rank


def plan_visual_local(
    local_tokens: Array,
    placeholder_ids: Sequence[int] | None,
    layout: SeqLayout,
    *,
    group: Group | None,
    num_features: int | Sequence[int] | Integers,
    sequence_first: bool,
    features_by_kind: bool = False,
) -> VisualPlan:
    """plan_visual for ids that are cut already: the same plan, from this rank's ids [B, S_local] alone.

    placeholder_ids   as in plan_visual; an id that is given twice is one kind
    layout            this rank's; all ranks' layouts differ in cp_rank and sp_rank only
    group             every rank that holds a part of the sequence, in any order
    num_features      the feature rows of the whole batch, or those of each kind, which are then checked kind by kind
    features_by_kind  feature rows are not in reading order but all of the first id, then all of the second: with it
                      paddle.concat([image, video]) is used as it is, and no rank needs the order of all tokens;
                      pairs then come in the order of the feature rows

    Every rank counts the visual tokens in each interval of positions that it owns, and the ranks exchange these counts,
    so that each knows how many feature rows come before each of its intervals. Zigzag, two ranks, v visual::

        global        t v | v v | t v | v t
        rank 0        t v             | v t      counts 1 and 1 in its intervals
        rank 1              v v   t v            counts 3 in its interval
        before        0     1     -     4        rank 0 takes feature rows 0 and 4, rank 1 takes 1 2 3

    Two small collectives, the same on every rank; an error or a mismatch on one rank is raised on all. Tensors on a
    device are copied to the host once.
    """
    error, own, shared, expected, header = None, None, None, [0], [0] * (HEADER - 1)
    try:
        _check_layout(layout)
        shared = replace(layout, cp_rank=0, sp_rank=0)
        expected = [int(number) for number in np.ravel(num_features)]
        kinds = _kinds(local_tokens, placeholder_ids)
        own = _count(local_tokens, kinds, layout, group)
        own_fingerprint = fingerprint(shared, own.batch, kinds, sequence_first, expected)
        header = [own_fingerprint, sum(expected), layout.cp_rank, layout.sp_rank]
    except Exception as wrong:  # raised by agree_on, on every rank
        error = wrong
    table = agree_on(header, error, group)
    assert own is not None and shared is not None  # noqa: PT018
    _check_header(table, shared)
    parts = [replace(layout, cp_rank=int(cp), sp_rank=int(sp)).intervals() for cp, sp in table[:, 2:]]
    counts = _exchange_counts(own.counts, parts, group)
    totals: Integers = sum(count.sum(axis=(0, 1)) for count in counts)  # [kinds]
    _check_totals(totals, expected)
    before = _rows_before(counts, parts, layout.intervals()[:, 0], totals, features_by_kind)
    update, gather = own.update_indices(layout.local_len, sequence_first), own.gather_indices(before, features_by_kind)
    if features_by_kind:  # a plan's gather indices increase
        order = np.argsort(gather)
        update, gather = update[order], gather[order]
    row_shape = (layout.local_len, own.batch) if sequence_first else (own.batch, layout.local_len)
    plan = VisualPlan(update, gather, row_shape, int(totals.sum()))
    return plan if isinstance(local_tokens, np.ndarray) else plan.to(local_tokens.place)


def wire_bytes(layout: SeqLayout, batch: int, num_kinds: int = 2) -> int:
    """The bytes that each rank sends in the two collectives of plan_visual_local."""
    parts = [share.intervals() for share in layouts_of_all_ranks(layout)]
    return 8 * (HEADER + batch * _most_intervals(parts) * num_kinds)


@dataclass(frozen=True)
class _Counted:
    """The visual tokens of this rank."""

    batch: int
    visual: Integers  # [n] their indices among this rank's B * S_local tokens
    kind: Integers  # [n] which of the ids each is
    counts: Integers  # [B, K, kinds] how many are in each interval

    def update_indices(self, local_len: int, sequence_first: bool) -> Integers:
        if not sequence_first:
            return self.visual
        b, s = np.divmod(self.visual, max(local_len, 1))
        rows: Integers = s * self.batch + b
        return rows

    def gather_indices(self, before: Integers, by_kind: bool) -> Integers:
        """before [B, K, kinds], or [B, K, 1] for reading order: how many feature rows come before each interval."""
        if not by_kind:
            return consecutive(before.ravel(), self.counts.sum(axis=2).ravel())
        rows = np.empty_like(self.visual)
        for kind in range(self.counts.shape[2]):
            rows[self.kind == kind] = consecutive(before[..., kind].ravel(), self.counts[..., kind].ravel())
        return rows


def _kinds(tokens: Array, placeholder_ids: Sequence[int] | None) -> tuple[int, ...] | None:
    """The ids to count, each once; None for a mask."""
    ids = checked_ids(tokens, placeholder_ids)
    return None if ids is None else tuple(dict.fromkeys(ids))


def _count(tokens: Array, ids: tuple[int, ...] | None, layout: SeqLayout, group: Group | None) -> _Counted:
    _check_tokens(tokens, layout, group)
    host: npt.NDArray[np.generic] = tokens if isinstance(tokens, np.ndarray) else tokens.numpy()
    kinds = [host] if ids is None else [host == wanted for wanted in ids]
    end = np.cumsum(layout.intervals()[:, 1])
    begin = end - layout.intervals()[:, 1]
    sums = [np.pad(np.cumsum(kind, axis=1), ((0, 0), (1, 0))) for kind in kinds]  # [B, S_local + 1]
    counts = np.stack([each[:, end] - each[:, begin] for each in sums], axis=2)  # [B, K, kinds]
    number = np.select(kinds, range(len(kinds)), default=-1).ravel()  # [B * S_local] which kind, -1 for none
    visual = np.flatnonzero(number >= 0)
    return _Counted(int(tokens.shape[0]), visual, number[visual], counts.astype(np.int64))


def _check_layout(layout: object) -> None:
    if not isinstance(layout, SeqLayout):
        raise ValueError(
            f"layout must be a SeqLayout, got {type(layout).__name__}: this rank's, SeqLayout(seq_len, ...)"
        )


def _check_tokens(tokens: Array, layout: SeqLayout, group: Group | None) -> None:
    batch, length = (int(size) for size in tokens.shape)
    if length != layout.local_len:
        raise ValueError(
            f"local_tokens are [{batch}, {length}] but cp_rank {layout.cp_rank}, sp_rank {layout.sp_rank} of the "
            f"layout owns {layout.local_len} positions of {layout.seq_len}: cut the ids by this layout"
        )
    if layout.cu_seqlens is not None and batch != 1:
        raise ValueError(f"a layout with cu_seqlens describes one packed row, B = 1, got tokens with B = {batch}")
    num_ranks = 1 if group is None else group.nranks
    if num_ranks != layout.cp_size * layout.sp_size:
        raise ValueError(
            f"the group has {num_ranks} ranks but the layout cuts for cp_size {layout.cp_size} x sp_size "
            f"{layout.sp_size}: pass the group of all ranks that hold a part of the sequence"
        )


def _exchange_counts(counts: Integers, parts: list[Integers], group: Group | None) -> list[Integers]:
    """Every rank's counts [B, K of that rank, kinds]; they are sent padded to the largest K."""
    batch, num_intervals, kinds = counts.shape
    most = _most_intervals(parts)
    padded = np.pad(counts, ((0, 0), (0, most - num_intervals), (0, 0)))
    table = exchange(padded.ravel().tolist(), group).reshape(len(parts), batch, most, kinds)
    return [row[:, : len(part)] for row, part in zip(table, parts, strict=True)]


def _rows_before(
    counts: list[Integers], parts: list[Integers], starts: Integers, totals: Integers, by_kind: bool
) -> Integers:
    """How many feature rows come before each of the intervals that begin at `starts`: [B, K, kinds or 1]."""
    start = np.concatenate([part[:, 0] for part in parts])  # [all intervals]
    order = np.argsort(start)
    count = np.concatenate(counts, axis=1)[:, order]  # [B, all intervals, kinds], reading order
    if not by_kind:
        count = count.sum(axis=2, keepdims=True)
    flat = count.reshape(-1, count.shape[2])
    before = (np.cumsum(flat, axis=0) - flat).reshape(count.shape)
    if by_kind:
        before = before + np.cumsum(totals) - totals
    own: Integers = before[:, np.searchsorted(start[order], starts)]
    return own


def _check_header(table: Integers, shared: SeqLayout) -> None:
    """Every rank holds the same table, so all raise the same error or none does."""
    what = "layout (but for cp_rank and sp_rank), batch size, placeholder_ids and num_features"
    check_equal_fingerprints(table[:, 0], what)
    wanted = [(cp, sp) for cp in range(shared.cp_size) for sp in range(shared.sp_size)]
    got = [(int(cp), int(sp)) for cp, sp in table[:, 2:]]
    if sorted(got) != wanted:
        raise ValueError(
            f"each part of the sequence needs one rank, but the (cp_rank, sp_rank) of the group's ranks are {got}: "
            "look for a rank within the wrong group, or a group that does not span cp x sp"
        )


def _check_totals(totals: Integers, expected: list[int]) -> None:
    if len(expected) == 1:
        return check_feature_count(int(totals.sum()), expected[0])
    if len(expected) != len(totals):
        raise ValueError(f"num_features has {len(expected)} numbers for {len(totals)} placeholder ids: one for each")
    for kind, (visual, number) in enumerate(zip(totals.tolist(), expected, strict=True)):
        check_feature_count(visual, number, f"placeholder {kind}")
    return None


def _most_intervals(parts: list[Integers]) -> int:
    return max(len(part) for part in parts)
