"""Which positions of a sequence a rank owns: the map from local to global, by rule and without a process group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from itertools import pairwise
from operator import index as as_int

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.settings import check_choice

CP_MODES = ("zigzag", "contiguous")
REMAINDERS = ("error", "front")


def length_multiple(*, cp_size: int = 1, cp_mode: str = "zigzag", sp_size: int = 1, remainder: str = "error") -> int:
    """The number that a length must be a multiple of: for equal shares or, with remainder="front", to be cut at all.

    >>> length_multiple(cp_size=2, sp_size=4)  # zigzag makes 4 chunks; each rank's 2 must divide by 4
    8
    """
    chunks_per_rank = 2 if cp_mode == "zigzag" and cp_size > 1 else 1
    if remainder == "front":
        return cp_size * chunks_per_rank if chunks_per_rank > 1 else 1
    return cp_size * math.lcm(chunks_per_rank, sp_size)


@dataclass(frozen=True)
class SeqLayout:
    """What one rank owns of a sequence of `seq_len`: context parallel cuts first, sequence parallel cuts the result.

    cp_mode "zigzag":      2 * cp_size chunks; rank r owns chunk r, then chunk 2 * cp_size - 1 - r
    cp_mode "contiguous":  cp_size chunks; rank r owns chunk r
    cu_seqlens:            packed sequences (B = 1): cp cuts every segment by itself; a rank's parts follow each other
    sp:                    cuts a cp rank's row into contiguous shares
    remainder "front":     contiguous cuts that do not divide give the first ranks one position more

    The four ranks of cp_size=2, sp_size=2, zigzag, seq_len=8::

        global        0 1 2 3 4 5 6 7
        chunk         0 0 1 1 2 2 3 3
        cp_rank 0     0 1         6 7      sp_rank 0 owns [0 1], sp_rank 1 owns [6 7]
        cp_rank 1         2 3 4 5          sp_rank 0 owns [2 3], sp_rank 1 owns [4 5]

    Layouts compare and hash by value. Rank and size are arguments: nothing is read from the environment.
    """

    seq_len: int
    _: KW_ONLY
    cp_size: int = 1
    cp_rank: int = 0
    cp_mode: str = "zigzag"
    sp_size: int = 1
    sp_rank: int = 0
    cu_seqlens: Sequence[int] | None = None
    remainder: str = "error"

    def __post_init__(self) -> None:
        for name in ("seq_len", "cp_size", "cp_rank", "sp_size", "sp_rank"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        if self.seq_len < 0:
            raise ValueError(f"seq_len must not be negative, got {self.seq_len}")
        _check_rank("cp", self.cp_rank, self.cp_size)
        _check_rank("sp", self.sp_rank, self.sp_size)
        check_choice("cp_mode", self.cp_mode, CP_MODES)
        check_choice("remainder", self.remainder, REMAINDERS)
        if self.cu_seqlens is not None:
            object.__setattr__(self, "cu_seqlens", _checked_cu_seqlens(self.cu_seqlens, self.seq_len))
        self._check_lengths()

    @property
    def local_len(self) -> int:
        """How many positions this rank owns."""
        return self._local_len

    def intervals(self) -> npt.NDArray[np.int64]:
        """The intervals of global positions that this rank owns, in local order: int64 [K, 2] of (start, length).

        No interval is empty, no two touch, and starts increase. Read-only.
        """
        return self._intervals

    def positions(self) -> npt.NDArray[np.int64]:
        """The global position of every local position, increasing: int64 [S_local]."""
        start, length = self._intervals.T
        return consecutive(start, length)

    @cached_property
    def _local_len(self) -> int:
        return int(self._intervals[:, 1].sum())

    @cached_property
    def _intervals(self) -> npt.NDArray[np.int64]:
        pieces = _sp_pieces(_cp_pieces(self), self.sp_size, self.sp_rank)
        pieces = _merge_pieces(pieces)
        pieces.setflags(write=False)
        return pieces

    def segments(self) -> npt.NDArray[np.int64]:
        """The sequences that cp cuts one by one, a single one without cu_seqlens: int64 [num_segments, 2]."""
        bounds = np.asarray(self.cu_seqlens or (0, self.seq_len), dtype=np.int64)
        return np.stack([bounds[:-1], np.diff(bounds)], axis=1)

    def _check_lengths(self) -> None:
        size, mode, remainder = self.cp_size, self.cp_mode, self.remainder
        segment_multiple = length_multiple(cp_size=size, cp_mode=mode, remainder=remainder)
        total_multiple = length_multiple(cp_size=size, cp_mode=mode, sp_size=self.sp_size, remainder=remainder)
        if self.cu_seqlens is not None:
            lengths = self.segments()[:, 1]
            for i in np.flatnonzero(lengths % segment_multiple)[:1]:
                self._raise_length(f"segment {i} of cu_seqlens has length", int(lengths[i]), segment_multiple)
        if self.seq_len % total_multiple:
            self._raise_length("seq_len is", self.seq_len, total_multiple)

    def _raise_length(self, subject: str, length: int, multiple: int) -> None:
        cut = f"cp_size {self.cp_size} ({self.cp_mode}), sp_size {self.sp_size}"
        fits = -(-length // multiple) * multiple
        fix = f"the next length that fits is {fits}: pad to it"
        if self.remainder == "error" and (self.cp_size == 1 or self.cp_mode == "contiguous"):
            fix += ", or pass remainder='front'"
        raise ValueError(f"{subject} {length}, which is not divisible by {multiple} ({cut}); {fix}")


def consecutive(start: npt.NDArray[np.int64], length: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Runs of consecutive numbers, one run after the other.

    start [4 9], length [3 2]  ->  [4 5 6 9 10]
    """
    first = np.cumsum(length) - length
    runs: npt.NDArray[np.int64] = np.repeat(start - first, length)
    runs += np.arange(runs.size)
    return runs


def _cp_pieces(layout: SeqLayout) -> npt.NDArray[np.int64]:
    """What the layout's cp rank owns before sp cuts it, segment after segment: int64 [K, 2] of (start, length)."""
    start, length = layout.segments().T
    size, rank = layout.cp_size, layout.cp_rank
    if size > 1 and layout.cp_mode == "zigzag":
        chunk = length // (2 * size)
        starts = np.stack([start + rank * chunk, start + (2 * size - 1 - rank) * chunk], axis=1)
        return np.stack([starts.ravel(), np.repeat(chunk, 2)], axis=1)
    begin, end = _share(length, size, rank)
    return np.stack([start + begin, end - begin], axis=1)


def _sp_pieces(pieces: npt.NDArray[np.int64], size: int, rank: int) -> npt.NDArray[np.int64]:
    """Of the row that the pieces make, the share of the sp rank, as pieces; some may be empty.

    pieces (0, 2) (6, 2) make the row [0 1 6 7]; sp rank 1 of 2 gets (6, 2)
    """
    start, length = pieces.T
    ends = np.cumsum(length)
    begins = ends - length
    share_begin, share_end = _share(length.sum(keepdims=True), size, rank)
    low, high = np.clip(begins, share_begin, share_end), np.clip(ends, share_begin, share_end)
    return np.stack([start + low - begins, high - low], axis=1)


def _share(length: npt.NDArray[np.int64], size: int, rank: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Begin and end of a rank's share of each length; what does not divide goes to the first ranks.

    length 10, size 4  ->  [0 3) [3 6) [6 8) [8 10)
    """
    quotient, rest = np.divmod(length, size)
    begin = rank * quotient + np.minimum(rank, rest)
    return begin, begin + quotient + (rank < rest)


def _merge_pieces(pieces: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same positions, without empty pieces and with touching pieces merged.

    (0, 2) (2, 3) (5, 0) (7, 1)  ->  (0, 5) (7, 1)
    """
    pieces = pieces[pieces[:, 1] > 0]
    start, end = pieces[:, 0], pieces.sum(axis=1)
    opens = np.append(True, start[1:] != end[:-1])[: len(pieces)]
    closes = np.append(opens[1:], True)[: len(pieces)]
    return np.stack([start[opens], end[closes] - start[opens]], axis=1)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    try:
        return as_int(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def layouts_of_all_ranks(layout: SeqLayout) -> list[SeqLayout]:
    """The same cut for every rank, cp rank after cp rank, within one cp rank sp rank after sp rank."""
    return [
        replace(layout, cp_rank=cp_rank, sp_rank=sp_rank)
        for cp_rank in range(layout.cp_size)
        for sp_rank in range(layout.sp_size)
    ]


def _check_rank(kind: str, rank: int, size: int) -> None:
    if size < 1:
        raise ValueError(f"{kind}_size must be at least 1, got {size}")
    if not 0 <= rank < size:
        raise ValueError(
            f"{kind}_rank {rank} is out of range for {kind}_size {size}: expected 0 to {size - 1}, "
            f"the rank within the {kind} group (not the global rank)"
        )


def _checked_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> tuple[int, ...]:
    bounds = tuple(_integer(f"cu_seqlens[{i}]", bound) for i, bound in enumerate(cu_seqlens))
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[:1]}")
    for i, (left, right) in enumerate(pairwise(bounds)):
        if right <= left:
            raise ValueError(
                f"cu_seqlens must be strictly increasing, got {left} then {right} at {i}: leave empty segments out"
            )
    if bounds[-1] != seq_len:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, but seq_len is {seq_len}: padding is a segment too")
    return bounds
