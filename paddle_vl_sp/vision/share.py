"""Which rank encodes which image: a value, computed from numbers that every rank has. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.comm.uneven import MODES, UnevenRows
from paddle_vl_sp.layout import consecutive
from paddle_vl_sp.settings import check_choice
from paddle_vl_sp.vision.balance import count_ends, even_ends, longest_first

POLICIES = ("contiguous", "longest", "count")

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VisionShare:
    """Which images (or frames) each rank encodes.

    items         for each rank its items, increasing
    loads         for each rank the cost of its items
    token_counts  the feature rows of each item
    policy        the rule that made the share
    """

    items: tuple[tuple[int, ...], ...]
    loads: tuple[float, ...]
    token_counts: tuple[int, ...]
    policy: str

    @property
    def num_ranks(self) -> int:
        return len(self.items)

    @property
    def counts(self) -> tuple[int, ...]:
        """The feature rows of each rank."""
        return tuple(sum(self.token_counts[item] for item in items) for items in self.items)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean load: 1.0 is perfect, num_ranks means that one rank does all the work."""
        return imbalance(self.loads)

    @cached_property
    def rows(self) -> UnevenRows:
        """The ranks' rows, and how they are put into reading order::

        items  (1,) (0, 2)    token_counts  2 1 1    rank after rank  b a a c    order  1 2 0 3
        """
        encoded = np.array([item for items in self.items for item in items], dtype=np.int64)
        length = np.asarray(self.token_counts, dtype=np.int64)
        start = np.zeros_like(length)
        start[encoded] = np.cumsum(length[encoded]) - length[encoded]
        order = consecutive(start, length)
        in_order = bool((np.diff(encoded) > 0).all())
        return UnevenRows(self.counts, None if in_order else order)

    def report(self, row_bytes: int = 0) -> str:
        """Loads and imbalance; with row_bytes (of one feature row with its levels), what the gather sends too."""
        total = sum(self.loads) or 1
        lines = [
            f"{len(self.token_counts)} items, {sum(self.token_counts)} rows on {self.num_ranks} ranks, "
            f"{self.policy}: the busiest rank has {self.imbalance:.3f} of the mean load"
        ]
        for rank, (items, load, count) in enumerate(zip(self.items, self.loads, self.counts, strict=True)):
            lines.append(f"  rank {rank:3d}  {len(items):4d} items  {count:7d} rows  {load / total:6.1%} of the load")
        if row_bytes:
            ring = (self.num_ranks - 1) / self.num_ranks
            sent = [f"{mode} {self.rows.wire_rows(mode) * row_bytes * ring / 2**20:.1f} MiB" for mode in MODES]
            lines.append(f"  each rank sends {', '.join(sent)}; auto takes {self.rows.best_mode(row_bytes)}")
        return "\n".join(lines)


def imbalance(loads: Sequence[float]) -> float:
    """The largest load over the mean load; 1.0 if there is none."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def share_images(
    costs: Sequence[float], token_counts: Sequence[int], num_ranks: int, policy: str = "contiguous"
) -> VisionShare:
    """Shares items, in reading order, over ranks by their costs.

    contiguous  each rank gets a run of items; the largest load is the smallest that runs allow
    longest     the costliest item first, each to the rank with the smallest load so far, then a few swaps: better
                balance; rows are still returned in reading order, by the index that unpacks the gather
    count       runs of equally many items, whatever they cost; for comparison

    >>> share_images([5, 1, 1, 1, 4], [5, 1, 1, 1, 4], 2).items
    ((0, 1), (2, 3, 4))
    >>> share_images([5, 1, 4, 2], [5, 1, 4, 2], 2, "longest").items
    ((0, 1), (2, 3))

    With fewer items than ranks, each item gets a rank of its own.
    """
    exact = _as_integers(costs)
    lengths = tuple(int(count) for count in token_counts)
    if len(lengths) != len(exact) or any(length < 0 for length in lengths):
        raise ValueError(f"every item needs a cost and a token count >= 0, got {len(exact)} costs and {lengths}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    check_choice("policy", policy, POLICIES)
    if policy == "longest":
        items = longest_first(exact, num_ranks)
    else:
        ends = even_ends(exact, num_ranks) if policy == "contiguous" else count_ends(len(exact), num_ranks)
        items = [tuple(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    loads = tuple(sum(costs[item] for item in own) for own in items)
    return VisionShare(tuple(items), loads, lengths, policy)


def tower_alpha(width: int, mlp_width: int | None = None) -> int:
    """The alpha of p * (p + alpha), the cost of p patches: what a patch's linear layers cost, in patches of attention.

    For each patch a block's projections and plain MLP multiply 4 * width**2 + 2 * width * mlp_width numbers, and its
    attention multiplies 2 * width numbers for each other patch::

        tower_alpha(1152, 4304) == 2 * 1152 + 4304 == 6608
    """
    return 2 * width + (4 * width if mlp_width is None else mlp_width)


def vision_items(
    grid_thw: npt.NDArray[np.int64], merge_size: int, alpha: int, split_frames: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The items to share: their costs [J], feature rows [J] and grids [J, 3].

    With split_frames (for towers that attend within a frame) each frame is an item. Otherwise a video is one item, and
    its cost counts attention among all its patches.

        grid (2, 4, 6), merge 2  ->  rows [12], grid (2, 4, 6)     split: rows [6 6], grids (1, 4, 6) (1, 4, 6)
    """
    if split_frames:
        frames = np.repeat(grid_thw, grid_thw[:, 0], axis=0)
        frames[:, 0] = 1
        grid_thw = frames
    patches = grid_thw.prod(axis=1)
    return patches * (patches + alpha), patches // merge_size**2, grid_thw


def image_of(grid: Integers, split_frames: bool) -> Integers:
    """For each item (see `vision_items`) the image or video that it is of."""
    return np.repeat(np.arange(len(grid)), grid[:, 0]) if split_frames else np.arange(len(grid))


def join_frames(items: Integers, image: Integers, own: list[int]) -> Integers:
    """The grids of a rank's items, with consecutive frames of one video as one grid: [k, 3].

    items  [J, 3] the grid of each item; image  [J] the image or video that each is of
    """
    grids: list[list[int]] = []
    for place, item in enumerate(own):
        if place and own[place - 1] == item - 1 and image[item - 1] == image[item]:
            grids[-1][0] += 1
        else:
            grids.append(items[item].tolist())
    return np.array(grids, dtype=np.int64).reshape(-1, 3)


def _as_integers(costs: Sequence[float]) -> npt.NDArray[np.int64]:
    """Integers as they are; others in units of 2**-40 of the largest, so that sums are exact."""
    numbers: npt.NDArray[Any] = np.asarray(costs if len(costs) else np.zeros(0, dtype=np.int64))
    if numbers.ndim != 1 or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise ValueError(f"costs must be finite numbers >= 0, one for each item, got {costs}")
    if not np.issubdtype(numbers.dtype, np.integer):
        numbers = np.rint(numbers * (2.0**40 / max(numbers.max(initial=0), 1e-300)))
    return numbers.astype(np.int64)
