"""The blocks of one step as calls of varlen attention: as few as can be, whatever the number of segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from paddle import Tensor, concat

from paddle_vl_sp.attention.schedule import Block
from paddle_vl_sp.comm.gather import take_rows
from paddle_vl_sp.comm.resident import Resident

Integers = npt.NDArray[np.int64]
ROUNDED = 128  # rows of a segment in the backward's memory are a multiple of this
ROOM = 4  # how many times its rows a call may take of that memory, which is (segments) x (the longest)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of [B, S, ..], batch row after batch row.   B 2, S 4, rows 2 3 of each:   index 2 3 6 7"""

    batch: int
    length: int
    index: Resident  # int32 [rows], of [B * S, ..]; increasing

    @property
    def are_all(self) -> bool:
        return self.index.array.size == self.batch * self.length

    @property
    def stretch(self) -> slice | None:
        """Where B is 1 and the rows follow each other."""
        if self.batch > 1 or self.index.stretch is None:
            return None
        first, size = self.index.stretch
        return slice(first, first + size)

    def take(self, x: Tensor) -> Tensor:
        """[B, S, ..] -> [rows, ..]"""
        return take_rows(x.reshape([self.batch * self.length, *x.shape[2:]]), self.index).contiguous()

    def put(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[rows, ..] -> [B, S, ..], `fill` in the other rows"""
        if not self.are_all:
            x = take_rows(concat([x, x.new_full([1, *x.shape[1:]], fill)]), self._inverse)
        return x.reshape([self.batch, self.length, *x.shape[1:]])

    @cached_property
    def _inverse(self) -> Resident:
        """For every row of [B * S] where it is among these, and their number for the others."""
        rows = self.index.array
        inverse = np.full(self.batch * self.length, rows.size, dtype=np.int32)
        inverse[rows] = np.arange(rows.size)
        return Resident(inverse)


@dataclass(frozen=True, eq=False)
class Span:
    """One call: a segment for each of some blocks in each row of the batch. Every segment has queries and keys, since
    the operator leaves the results of others unwritten.

    Blocks of 2 queries with 4 keys and of 1 with 2, B 1:   bounds_q 0 2 3   bounds_k 0 4 6   longest 2 and 4
    """

    queries: Rows
    keys: Rows
    bounds_q: Resident  # int32 [segments + 1]
    bounds_k: Resident
    longest_q: int
    longest_k: int
    causal: bool

    @cached_property
    def padded(self) -> tuple[Resident, Resident]:
        """Between rows and [segments * longest_q]: for every row its place there, and the inverse (else the number of
        rows)."""
        bounds = self.bounds_q.array.astype(np.int64)
        segment = np.repeat(np.arange(bounds.size - 1), np.diff(bounds))
        place = np.arange(bounds[-1]) - bounds[segment] + segment * self.longest_q
        inverse = np.full((bounds.size - 1) * self.longest_q, bounds[-1], dtype=np.int64)
        inverse[place] = np.arange(bounds[-1])
        return Resident(place), Resident(inverse)


@lru_cache(maxsize=256)
def spans(blocks: tuple[Block, ...], batch: int, num_queries: int, num_keys: int) -> tuple[Span, ...]:
    """The calls that compute the blocks; kept, with their indices on the device, from forward to forward."""
    return tuple(_span(group, batch, num_queries, num_keys) for group in _groups(blocks))


def _groups(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    for causal in (True, False):
        for group in _without_shared_keys([block for block in blocks if block.causal == causal]):
            yield from _of_like_lengths(group)


def _without_shared_keys(blocks: Sequence[Block]) -> list[list[Block]]:
    """A key belongs to one segment of a call. Blocks that share keys, which no cut makes today, are called in turn."""
    groups: list[list[Block]] = []
    for block in sorted(blocks, key=lambda block: (block.k_start, block.q_start)):
        free = (group for group in groups if group[-1].k_start + group[-1].k_len <= block.k_start)
        group = next(free, None)
        if group is None:
            groups.append([block])
        else:
            group.append(block)
    return groups


def _of_like_lengths(blocks: list[Block]) -> list[list[Block]]:
    """All in one call, unless a long segment among short ones makes its memory several times larger than its rows:
    then those of one power of two in each."""
    rounded = [-(-block.q_len // ROUNDED) for block in blocks]
    if len(blocks) * max(rounded) <= ROOM * sum(rounded):
        return [blocks]
    alike: dict[int, list[Block]] = {}
    for block, size in zip(blocks, rounded, strict=True):
        alike.setdefault(size.bit_length(), []).append(block)
    return list(alike.values())


def _span(blocks: Sequence[Block], batch: int, num_queries: int, num_keys: int) -> Span:
    q_lengths, k_lengths = (np.array(lengths) for lengths in zip(*((b.q_len, b.k_len) for b in blocks), strict=True))
    return Span(
        _rows([(b.q_start, b.q_len) for b in blocks], batch, num_queries),
        _rows([(b.k_start, b.k_len) for b in blocks], batch, num_keys),
        _bounds(q_lengths, batch),
        _bounds(k_lengths, batch),
        int(q_lengths.max()),
        int(k_lengths.max()),
        blocks[0].causal,
    )


def _rows(stretches: Sequence[tuple[int, int]], batch: int, length: int) -> Rows:
    one = np.concatenate([np.arange(start, start + size, dtype=np.int32) for start, size in stretches])
    return Rows(batch, length, Resident((one + length * np.arange(batch, dtype=np.int32)[:, None]).reshape(-1)))


def _bounds(lengths: Integers, batch: int) -> Resident:
    return Resident(np.append(0, np.cumsum(np.tile(lengths, batch))).astype(np.int32))
