"""In numpy, what the host reads at no cost: plans of a data loader's arrays, and of CPU tensors in plain Paddle."""

from __future__ import annotations

import functools
import operator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.layout import SeqLayout, consecutive

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

FEW_IDS = 8
LONG = (
    4096  # tokens: one interval in so many is looked at by itself; in fewer, all visual tokens are listed and searched
)


def build_plan(
    tokens: npt.NDArray[Any],  # [B, S]
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Integers, Integers, Integers]:
    """update, gather and counts [2]; num_features is -1 where it is not known."""
    batch, seq_len = tokens.shape
    visual = (tokens if ids is None else is_any_of(tokens, ids)).ravel()  # [B * S]
    start, length = layout.intervals().T  # [K]
    sample = np.arange(batch, dtype=np.int64)[:, None]
    begin = (sample * seq_len + start).ravel()  # [B * K] of this rank's intervals, among the B * S tokens
    local_start = np.cumsum(length) - length  # [K]
    first_row = local_start * batch + sample if sequence_first else sample * layout.local_len + local_start  # [B, K]
    stride = batch if sequence_first else 1  # between the rows of two tokens that follow each other
    of_each = _by_looking if visual.size >= LONG * begin.size else _by_searching
    own, first, found, total = of_each(visual, begin, begin + np.tile(length, batch))
    update = own * stride + np.repeat(first_row.ravel() - begin * stride, found)  # [n]
    gather = consecutive(first, found)  # [n]
    counts = np.array([update.size, total], dtype=np.int64)
    if not padded:
        return update, gather, counts
    num_rows = batch * layout.local_len
    capacity = num_rows if num_features < 0 else min(num_rows, num_features)
    kept = update.size if num_features < 0 else int(np.searchsorted(gather, num_features))
    unused = (0, capacity - kept)
    return (
        np.pad(update[:kept], unused, constant_values=-1),
        np.pad(gather[:kept], unused, constant_values=-1),
        counts,
    )


def is_any_of(tokens: npt.NDArray[Any], ids: tuple[int, ...]) -> Mask:
    """Where tokens equal one of the ids: bool, the shape of tokens."""
    if len(ids) > FEW_IDS:
        return np.isin(tokens, ids)
    found: Mask = functools.reduce(operator.or_, (tokens == wanted for wanted in ids))
    return found


def _by_looking(visual: Mask, begin: Integers, end: Integers) -> tuple[Integers, Integers, Integers, int]:
    """own [n], first and found [intervals], total: the visual tokens in the intervals, how many are before and in each.

    visual [0 1 1 0 1 1], intervals [2 4)  ->  own [2], first [1], found [1], total 4
    """
    bounds = np.stack([begin, end], axis=1).ravel().tolist()
    numbers = [np.count_nonzero(visual[a:b]) for a, b in pairwise([0, *bounds, visual.size])]
    before = np.cumsum(numbers, dtype=np.int64)  # a gap, an interval, a gap, ...: [2 * intervals + 1]
    pieces = [np.flatnonzero(visual[a:b]) + a for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    own = np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
    return own, before[:-1:2], np.array(numbers[1::2], dtype=np.int64), int(before[-1])


def _by_searching(visual: Mask, begin: Integers, end: Integers) -> tuple[Integers, Integers, Integers, int]:
    """The same for many intervals, without a loop."""
    everywhere = np.flatnonzero(visual)  # [N]
    first = np.searchsorted(everywhere, begin)
    found = np.searchsorted(everywhere, end) - first
    return everywhere[consecutive(first, found)], first, found, everywhere.size


def pairs_to_move(at: Integers, source: Integers, num_rows: int, num_features: int) -> Integers | None:
    """Which pairs are not to be skipped, in the order of their rows in memory; None for all, as they are.

    Rows in order move faster; all features in order, which need no gather, faster still.

    at [0 2 1 -1], source [0 1 2 -1]  ->  [0 2 1]
    """
    fits = (at >= 0) & (at < num_rows) & (source >= 0) & (source < num_features)
    kept = np.flatnonzero(fits)
    if kept.size == at.size and kept.size and (is_all(source, num_features) or (at[1:] > at[:-1]).all()):
        return None
    order: Integers = kept[np.argsort(at[kept], kind="stable")]  # quick: with the sequence first, B increasing runs
    return order


def is_all(source: Integers, num_features: int) -> bool:
    """Whether the feature rows are all that there are, in order."""
    return source.size == num_features and bool((source == np.arange(num_features)).all())
