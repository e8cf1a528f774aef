"""What each rank of a group holds of a sequence, and the pieces of it that belong to one segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.attention.schedule import ring_share
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.layout import SeqLayout, layouts_of_all_ranks

Integers = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """Consecutive positions of one segment that a rank holds."""

    rank: int
    segment: int
    row: int  # the local row where it begins
    start: int  # the global position where it begins
    length: int


def shares_of_group(layout: SeqLayout, group: Group) -> tuple[SeqLayout, ...]:
    """The share of each rank: of all of the layout's ranks, or of its cp ranks, with the sp cut undone."""
    size, rank = layout.cp_size * layout.sp_size, layout.cp_rank * layout.sp_size + layout.sp_rank
    if (group.nranks, group.rank) == (size, rank):
        return tuple(layouts_of_all_ranks(layout))
    if (group.nranks, group.rank) == (layout.cp_size, layout.cp_rank):
        return tuple(ring_share(layout, cp_rank) for cp_rank in range(layout.cp_size))
    raise ValueError(
        f"the layout's cut is that of rank {rank} of {size} (cp_size {layout.cp_size}, sp_size {layout.sp_size}), but "
        f"the group says rank {group.rank} of {group.nranks}: make the layout with this group's size and rank"
    )


def check_share(rows: int, share: SeqLayout) -> None:
    if rows != share.local_len:
        raise ValueError(
            f"q has {rows} rows, the layout's share of this rank is {share.local_len}: pass the rank's own share "
            "of the sequence"
        )


def pieces(shares: Sequence[SeqLayout], bounds: Sequence[int]) -> list[Piece]:
    """The pieces of all ranks, in the order of the sequence.

    bounds 0 5 8, zigzag over 2 ranks: rank 0 holds [0 1] and [6 7], rank 1 [2 3 4] of segment 0 and [5] of segment 1
    """
    edges = np.asarray(bounds[1:-1], dtype=np.int64)
    found = []
    for rank, share in enumerate(shares):
        row = 0
        for start, length in share.intervals().tolist():
            inside = edges[(edges > start) & (edges < start + length)]
            for begin, end in zip([start, *inside.tolist()], [*inside.tolist(), start + length], strict=True):
                segment = int(np.searchsorted(edges, begin, side="right"))
                found.append(Piece(rank, segment, row, begin, end - begin))
                row += end - begin
    return sorted(found, key=lambda piece: piece.start)


@dataclass(frozen=True)
class Chain:
    """The pieces of all ranks, in the order of the sequence: within a segment each passes something on to the next.

    Two segments of 5 and 3, zigzag over 2 ranks::

        pieces     rank 0 [0 1] | rank 1 [2 3 4] || rank 1 [5] | rank 0 [6 7]
        passes     yes            no                yes          no              to a later piece of its segment
    """

    rank: int
    shares: tuple[SeqLayout, ...]
    bounds: tuple[tuple[int, ...], ...]  # one for all rows of the batch; or of each, and the rows follow each other

    @property
    def local_len(self) -> int:
        return self.shares[self.rank].local_len * len(self.bounds)

    @cached_property
    def edges(self) -> list[int]:
        """Where segments begin, in the row that all rows make, and its end."""
        length = self.shares[0].seq_len
        return [i * length + begin for i, row in enumerate(self.bounds) for begin in row[:-1]] + [
            len(self.bounds) * length
        ]

    @cached_property
    def pieces(self) -> list[Piece]:
        found: list[Piece] = []
        segments = 0
        for i, row in enumerate(self.bounds):
            for rank, segment, first, start, length in pieces(self.shares, row):
                share = self.shares[rank]
                at = first + i * share.local_len
                found.append(Piece(rank, segments + segment, at, start + i * share.seq_len, length))
            segments += len(row) - 1
        return found

    @cached_property
    def passing(self) -> list[Piece]:
        """Those that are not the last of their segment, rank after rank, as their ranks send something of each."""
        following = zip(self.pieces, self.pieces[1:], strict=False)
        return sorted(piece for piece, after in following if piece.segment == after.segment)

    @property
    def own(self) -> list[Piece]:
        """This rank's pieces, in the order of its rows."""
        return [piece for piece in self.pieces if piece.rank == self.rank]

    @property
    def own_passing(self) -> list[Piece]:
        return [piece for piece in self.passing if piece.rank == self.rank]

    def counts(self) -> tuple[int, ...]:
        """How many pieces of each rank are passed on."""
        return tuple(sum(piece.rank == rank for piece in self.passing) for rank in range(len(self.shares)))


@lru_cache(maxsize=16)
def chain(shares: tuple[SeqLayout, ...], rank: int, bounds: tuple[tuple[int, ...], ...]) -> Chain:
    return Chain(rank, shares, bounds)


@dataclass(frozen=True)
class Halo:
    """The rows before each piece that a convolution reads, for `taps` taps: taps - 1 of them, of its own segment.

    sent     int64 [T]: this rank's rows that others may need, the last taps - 1 of each piece that is passed on
    counts   T of each rank
    source   int64 [E]: the rows of all pieces, each after its taps - 1 earlier rows: rows of this rank's S_local, then
             of all ranks' sent rows, then a row of zeros
    bounds   where each piece, with what is before it, begins and ends among the E rows
    kept     int64 [S_local]: where this rank's rows are among the E
    """

    sent: Resident
    counts: tuple[int, ...]
    source: Resident
    bounds: tuple[int, ...]
    kept: Resident


@lru_cache(maxsize=16)
def halo(links: Chain, taps: int) -> Halo:
    """By the chain; a piece that is shorter than the taps is sent whole."""
    back = taps - 1
    sent = [np.arange(max(p.length - back, 0), p.length) for p in links.passing]  # within each piece
    position = np.concatenate([p.start + rows for p, rows in zip(links.passing, sent, strict=True)] or [np.arange(0)])
    local_len = links.local_len
    at = np.full(links.edges[-1] + 1, -1, dtype=np.int64)  # where a position is among the sources
    at[position] = local_len + np.arange(position.size)
    zero = local_len + position.size
    source, kept, edges = [], [], [0]
    for piece in links.own:
        before = np.arange(piece.start - back, piece.start)
        inside = before >= links.edges[piece.segment]
        source += [np.where(inside, at[np.maximum(before, 0)], zero), piece.row + np.arange(piece.length)]
        kept.append(edges[-1] + back + np.arange(piece.length))
        edges.append(edges[-1] + back + piece.length)
    own = [p.row + rows for p, rows in zip(links.passing, sent, strict=True) if p.rank == links.rank]
    counts = [
        sum(len(rows) for p, rows in zip(links.passing, sent, strict=True) if p.rank == rank)
        for rank in range(len(links.shares))
    ]
    return Halo(_joined(own), tuple(counts), _joined(source), tuple(edges), _joined(kept))


def _joined(parts: list[Integers]) -> Resident:
    return Resident(np.concatenate([np.arange(0), *parts]).astype(np.int64))
