"""Which rows of a rank attend to which rows of another, derived from the layouts alone: numpy, no process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from paddle_vl_sp.layout import SeqLayout


class Block(NamedTuple):
    """Local query rows against local key rows: all pairs, or, where causal, row i with rows 0 to i."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    causal: bool

    @property
    def num_pairs(self) -> int:
        """How many (query, key) pairs the block computes; a causal block is square and computes its lower half."""
        return self.q_len * (self.q_len + 1) // 2 if self.causal else self.q_len * self.k_len


class Run(NamedTuple):
    """Consecutive positions of one rank inside one segment."""

    row: int  # the local row it begins at
    start: int  # the global position it begins at
    length: int


Schedule = tuple[tuple[Block, ...], ...]  # for every rank of the ring: the blocks with its keys


def ring_share(layout: SeqLayout, rank: int | None = None) -> SeqLayout:
    """What the ring cuts: the cp share of `rank` (default: the layout's own), before sp cuts it further."""
    return replace(layout, cp_rank=layout.cp_rank if rank is None else rank, sp_size=1, sp_rank=0)


@lru_cache(maxsize=64)
def ring_schedule(layout: SeqLayout, causal: bool, lengths: tuple[int, ...] | None = None) -> Schedule:
    """The blocks of this rank's queries with the keys of every rank of the ring, source after source.

    lengths gives how much of each segment is real where the segments are padded: what follows is never a key. Rank 1
    of 2, zigzag, two segments of 4, owns positions 1 2 and 5 6; rank 0 owns 0 3 and 4 7::

        queries of rank 1   rows 0 1 | 2 3     global 1 2 | 5 6
        keys of rank 0      rows 0 1 | 2 3     global 0 3 | 4 7
        source 0            rows 0-1 with row 0, rows 2-3 with row 2           2 + 2 pairs, 3 and 7 come later: skipped
        source 1            rows 0-1 causal, rows 2-3 causal                   3 + 3 pairs
    """
    ends = _real_ends(layout, lengths)
    mine = _runs(ring_share(layout))
    return tuple(
        tuple(_blocks(mine, _runs(ring_share(layout, source)), ends, causal, source == layout.cp_rank))
        for source in range(layout.cp_size)
    )


def num_pairs(schedule: Schedule) -> list[int]:
    """The work of this rank at every step of the ring: (query, key) pairs, by source."""
    return [sum(block.num_pairs for block in blocks) for blocks in schedule]


def tiles(block: Block, size: int) -> Iterator[Block]:
    """The block in pieces of at most size x size, without those that its causal mask empties."""
    for q in range(0, block.q_len, size):
        for k in range(0, q + 1 if block.causal else block.k_len, size):
            yield Block(
                block.q_start + q,
                min(size, block.q_len - q),
                block.k_start + k,
                min(size, block.k_len - k),
                block.causal and k == q,
            )


def _runs(layout: SeqLayout) -> dict[int, list[Run]]:
    """The rank's positions as runs, by segment; increasing, and the rows of a segment follow each other."""
    bounds = [int(start) for start in layout.segments()[:, 0]] + [layout.seq_len]
    runs: dict[int, list[Run]] = {}
    row = segment = 0
    for start, length in layout.intervals().tolist():
        end = start + length
        while start < end:
            while bounds[segment + 1] <= start:
                segment += 1
            stop = min(end, bounds[segment + 1])
            runs.setdefault(segment, []).append(Run(row, start, stop - start))
            row += stop - start
            start = stop
    return runs


def _blocks(
    mine: dict[int, list[Run]], theirs: dict[int, list[Run]], ends: Sequence[int], causal: bool, own: bool
) -> Iterator[Block]:
    for segment, queries in mine.items():
        keys = theirs.get(segment)
        if keys and own and causal:
            length = sum(run.length for run in keys)  # positions increase with rows: one triangle
            yield Block(keys[0].row, length, keys[0].row, length, True)
        elif keys:
            yield from _full_blocks(queries, keys, ends[segment], causal)


def _full_blocks(queries: list[Run], keys: list[Run], end: int, causal: bool) -> Iterator[Block]:
    """Two ranks share no position, so a run of queries sees a prefix of the keys: those before it."""
    pending: Block | None = None
    for run in queries:
        limit = min(end, run.start) if causal else end
        visible = sum(min(max(limit - key.start, 0), key.length) for key in keys)
        if pending and pending.k_len == visible:
            pending = pending._replace(q_len=pending.q_len + run.length)
            continue
        if pending and pending.k_len:
            yield pending
        pending = Block(run.row, run.length, keys[0].row, visible, False)
    if pending and pending.k_len:
        yield pending


def _real_ends(layout: SeqLayout, lengths: tuple[int, ...] | None) -> list[int]:
    segments = layout.segments().tolist()
    if lengths is None:
        return [start + length for start, length in segments]
    if len(lengths) != len(segments):
        raise ValueError(
            f"lengths names {len(lengths)} segments, the layout has {len(segments)}: give one length for each"
        )
    for i, ((_, padded), real) in enumerate(zip(segments, lengths, strict=True)):
        if not 0 < real <= padded:
            raise ValueError(f"lengths[{i}] is {real}, but segment {i} of the layout holds 1 to {padded} positions")
    return [start + real for (start, _), real in zip(segments, lengths, strict=True)]
