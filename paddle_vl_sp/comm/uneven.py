"""Gathering rows of which every rank has another number: what each way costs, which row goes where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.layout import consecutive

MODES = ("max", "sum", "ragged")
COLLECTIVE_BYTES = 2**22  # what a link moves while a collective starts: 20 microseconds at 200 GB/s

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class UnevenRows:
    """The result is made of counts[r] rows of each rank r, rank after rank, or in another `order`.

    counts  (2, 0, 3)
    order   int64 [5], a permutation: row i of the result is row order[i] of the ranks' rows; None: rank after rank

        rank 0   a b            rank after rank   a b c d e
        rank 1                  order             2 0 3 1 4
        rank 2   c d e          result            c a d b e
    """

    counts: tuple[int, ...]
    order: Indices | None = None

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts)

    def rows_of(self, rank: int) -> Resident:
        """Which rows of the result are those of `rank`: above [1 3] of rank 0, [0 2 4] of rank 2."""
        return self._rows_of_ranks[rank]

    @cached_property
    def in_order(self) -> Resident:
        """The order, or 0 1 2 .. where it is rank after rank."""
        return Resident(np.arange(self.total, dtype=np.int64) if self.order is None else self.order)

    @cached_property
    def back(self) -> Resident:
        """The inverse of the order, for every row of the ranks its row in the result: [1 3 0 2 4] above."""
        back = np.arange(self.total, dtype=np.int64)
        back[self.in_order.array] = np.arange(self.total, dtype=np.int64)
        return Resident(back)

    @cached_property
    def from_padded(self) -> Resident:
        """For every row of the result its row in the ranks' blocks, padded to the longest: [6 0 7 1 8] above."""
        start = np.arange(len(self.counts), dtype=np.int64) * self.longest
        padded = consecutive(start, np.asarray(self.counts, dtype=np.int64))
        return Resident(padded if self.order is None else padded[self.order])

    @cached_property
    def to_padded(self) -> Resident:
        """For every padded row its row in the result, and `total` for padding: [1 3 5  5 5 5  0 2 4] above."""
        rows = np.full(len(self.counts) * self.longest, self.total, dtype=np.int64)
        rows[self.from_padded.array] = np.arange(self.total, dtype=np.int64)
        return Resident(rows)

    def among_others(self, rank: int) -> Resident:
        """For every row of the result its row in `rank`'s block, and the block's length for others' rows.

        Above [2 0 2 1 2] of rank 0.
        """
        if rank not in self._among_others:
            place = self.rows_of(rank).array
            source = np.full(self.total, len(place), dtype=np.int64)
            source[place] = np.arange(len(place))
            self._among_others[rank] = Resident(source)
        return self._among_others[rank]

    def wire_rows(self, mode: str) -> int:
        """Rows that each of n ranks sends in one gather, on average, times n / (n - 1).

        max:     every block padded to the longest, one all-gather; for the gradient one reduce-scatter
        sum:     every row in its place among zeros, one all-reduce, which is two passes; for the gradient the same
        ragged:  one broadcast for each rank that has rows; for the gradient as many reduces
        """
        return {"max": len(self.counts) * self.longest, "sum": 2 * self.total, "ragged": self.total}[mode]

    def best_mode(self, row_bytes: int, capturing: bool = False) -> str:
        """The fastest mode, estimated from the bytes and the number of collectives; the same on every rank.

        A captured graph needs fixed shapes: max. Else, for rows of 64 KiB on four ranks (4 * longest, 2 * total and
        total rows, and 1, 1 and one collective for each rank with rows)::

            400 400 400 400     max         400 100 100 100     ragged        8 4 4 4     max
        """
        if capturing:
            return "max"
        owners = sum(count > 0 for count in self.counts)
        collectives = {"max": 1, "sum": 1, "ragged": max(owners, 1)}
        return min(MODES, key=lambda mode: self.wire_rows(mode) * row_bytes + collectives[mode] * COLLECTIVE_BYTES)

    @cached_property
    def _rows_of_ranks(self) -> list[Resident]:
        return [Resident(rows) for rows in np.split(self.back.array, np.cumsum(self.counts)[:-1])]

    @cached_property
    def _among_others(self) -> dict[int, Resident]:
        return {}


@lru_cache(maxsize=16)
def rank_after_rank(counts: tuple[int, ...]) -> UnevenRows:
    """Without an order of its own. Kept, so that its indices stay on the device from one forward to the next."""
    return UnevenRows(counts)
