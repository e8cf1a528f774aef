"""Which query rows of a rank attend to which key rows of another: from the layouts alone, without a process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from paddle_vl_sp.layout import SeqLayout


class Block(NamedTuple):
    """Local query rows with local key rows: all pairs, or, where causal, row i with rows 0 to i."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    causal: bool

    @property
    def num_pairs(self) -> int:
        """How many (query, key) pairs are computed; a causal block is square, of which the lower triangle is."""
        return self.q_len * (self.q_len + 1) // 2 if self.causal else self.q_len * self.k_len


class Run(NamedTuple):
    """Consecutive global positions of one rank inside one segment."""

    row: int  # the local row where it begins
    start: int  # the global position where it begins
    length: int


Schedule = tuple[tuple[Block, ...], ...]  # for every rank of the ring, the blocks of our queries with its keys


def ring_share(layout: SeqLayout, rank: int | None = None) -> SeqLayout:
    """The cp share of `rank` (default: the layout's own), before sp cuts it: what the ring works on."""
    return replace(layout, cp_rank=layout.cp_rank if rank is None else rank, sp_size=1, sp_rank=0)


@lru_cache(maxsize=64)
def ring_schedule(layout: SeqLayout, causal: bool, lengths: tuple[int, ...] | None = None) -> Schedule:
    """The blocks of this rank's queries with the keys of each rank of the ring, in the order of ranks.

    lengths says how many positions of each segment are real, where segments are padded: padding is never a key.

    Example: two segments of 4, zigzag over 2 ranks. Rank 1 owns positions 1 2 and 5 6, rank 0 owns 0 3 and 4 7::

        queries of rank 1   rows 0 1 | 2 3     global 1 2 | 5 6
        keys of rank 0      rows 0 1 | 2 3     global 0 3 | 4 7
        source 0            rows 0-1 with row 0, rows 2-3 with row 2           2 + 2 pairs; keys 3 and 7 come later
        source 1            rows 0-1 causal, rows 2-3 causal                   3 + 3 pairs
    """
    ends = _real_ends(layout, lengths)
    queries = _runs(ring_share(layout))
    return tuple(
        tuple(_blocks(queries, _runs(ring_share(layout, source)), ends, causal, source == layout.cp_rank))
        for source in range(layout.cp_size)
    )


def num_pairs(schedule: Schedule) -> list[int]:
    """The work of this rank at every step of the ring: (query, key) pairs, by source."""
    return [sum(block.num_pairs for block in blocks) for blocks in schedule]


def tiles(block: Block, size: int) -> Iterator[Block]:
    """The block in pieces of at most size x size, without those that the causal mask hides entirely."""
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
    """The rank's runs, by segment: positions increase, and the rows of one segment are consecutive."""
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
    queries_of: dict[int, list[Run]], keys_of: dict[int, list[Run]], ends: Sequence[int], causal: bool, own: bool
) -> Iterator[Block]:
    for segment, queries in queries_of.items():
        keys = keys_of.get(segment)
        if keys and own and causal:
            length = sum(run.length for run in keys)  # positions increase with rows, so it is one triangle
            yield Block(keys[0].row, length, keys[0].row, length, True)
        elif keys:
            yield from _full_blocks(queries, keys, ends[segment], causal)


def _full_blocks(queries: list[Run], keys: list[Run], end: int, causal: bool) -> Iterator[Block]:
    """Two ranks share no position, so all queries of a run see the same keys: those before the run, a prefix."""
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
