"""Gathering unevenly many rows from ranks: what each way costs, and which row goes where. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.layout import consecutive

MODES = ("max", "sum", "ragged")
COLLECTIVE_BYTES = 2**22  # what a link moves while a collective starts: 20 microseconds at 200 GB/s

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class UnevenRows:
    """counts[r] rows of each rank, rank after rank, make the result; `order` puts them into another order.

    counts  (2, 0, 3)
    order   int64 [5], a permutation: row i of the result is row order[i] of the ranks' rows; None: as they come

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

    def mine(self, rank: int) -> Indices:
        """Where in the result the rows of `rank` are: rank 0 above [1 3], rank 2 [0 2 4]."""
        begin = sum(self.counts[:rank])
        return self._place[begin : begin + self.counts[rank]]

    def from_padded(self) -> Indices:
        """For every row of the result its row among blocks padded to the longest: [6 0 7 1 8] above."""
        start = np.arange(len(self.counts), dtype=np.int64) * self.longest
        padded = consecutive(start, np.asarray(self.counts, dtype=np.int64))
        return padded if self.order is None else padded[self.order]

    def to_padded(self) -> Indices:
        """For every padded row its row in the result, and `total` for padding: [1 3 5  5 5 5  0 2 4] above."""
        rows = np.full(len(self.counts) * self.longest, self.total, dtype=np.int64)
        rows[self.from_padded()] = np.arange(self.total, dtype=np.int64)
        return rows

    def wire_rows(self, mode: str) -> int:
        """Rows that each rank sends in one gather, on average and times n / (n - 1) of n ranks.

        max:     every block padded to the longest, one all-gather; its gradient, one reduce-scatter
        sum:     every row in its place among zeros, one all-reduce, which is two passes; its gradient, too
        ragged:  one broadcast for each rank that has rows; its gradient, as many reduces
        """
        return {"max": len(self.counts) * self.longest, "sum": 2 * self.total, "ragged": self.total}[mode]

    def best_mode(self, row_bytes: int, capturing: bool = False) -> str:
        """The mode that is done first, by bytes and by the number of collectives; the same on every rank.

        A captured graph needs shapes that stay: max. Else, for rows of 64 KiB on four ranks (4 * longest, 2 * total and
        total rows, and 1, 1 and one collective for each rank with rows)::

            400 400 400 400     max         400 100 100 100     ragged        8 4 4 4     max
        """
        if capturing:
            return "max"
        owners = sum(count > 0 for count in self.counts)
        collectives = {"max": 1, "sum": 1, "ragged": max(owners, 1)}
        return min(MODES, key=lambda mode: self.wire_rows(mode) * row_bytes + collectives[mode] * COLLECTIVE_BYTES)

    @property
    def _place(self) -> Indices:
        """For every row of the ranks, rank after rank, its row in the result: the inverse of `order`."""
        place = np.arange(self.total, dtype=np.int64)
        if self.order is not None:
            place[self.order] = np.arange(self.total, dtype=np.int64)
        return place
