"""From numbers to a verdict: which statement about the ranks' gradients all readings agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from paddle_vl_sp.audit.entries import EQUAL, SHARDED, UNEQUAL, Floats

WHOLE, PARTIAL, MIXED, NONE, TOO_SMALL = "whole", "partial", "mixed", "none", "too small to judge"
FACTORS = (2, 3, 4, 6, 8, 16, 32, 64)


@dataclass(frozen=True)
class Reading:
    """One direction. truth by the loss; own [nranks] by each rank's gradient; error how far truth may be off; size
    what a gradient's part is expected to be, for the tolerance."""

    truth: float
    own: Floats
    error: float
    size: float


@dataclass(frozen=True)
class Judgement:
    verdict: str
    completed_by: str = ""  # "sum" or "mean" over the group makes it whole
    of_sum: bool = False  # the factor is that of the ranks' sum


@dataclass(frozen=True)
class _Statement:
    """`factor` times the truth is each rank's number (each=True), or the sum of all of them."""

    judgement: Judgement
    factor: float
    each: bool

    def distance(self, reading: Reading) -> float:
        got = reading.own if self.each else reading.own.sum()
        return float(np.abs(got / self.factor - reading.truth).max())


def times(factor: float) -> str:
    return f"times {factor:g}" if factor >= 1 else f"times 1/{1 / factor:g}"


def factor_of(verdict: str) -> float | None:
    """2.0 for "times 2", 0.5 for "times 1/2"; None for other verdicts."""
    if not verdict.startswith("times "):
        return None
    above, _, below = verdict.removeprefix("times ").partition("/")
    return float(above) / float(below or 1)


def statements(kind: str, nranks: int, combine: str) -> Iterator[_Statement]:
    """What gradients of this kind may be, in the order in which the first that holds is the verdict."""
    factors = sorted({nranks, *FACTORS}, key=lambda factor: (factor != nranks, factor)) if nranks > 1 else []
    both = [each for factor in factors for each in (float(factor), 1.0 / factor)]
    if kind in (EQUAL, SHARDED):
        yield _Statement(Judgement(WHOLE), 1.0, each=True)
    if kind != SHARDED and nranks > 1:
        yield _Statement(Judgement(PARTIAL, "sum"), 1.0, each=False)
    if kind == UNEQUAL and combine == "mean":
        yield _Statement(Judgement(PARTIAL, "mean"), float(nranks), each=False)
    for factor in () if kind == UNEQUAL else both:
        each = kind in (EQUAL, SHARDED)
        yield _Statement(Judgement(times(factor), of_sum=not each), factor, each)


def judge(readings: Sequence[Reading], kind: str, combine: str, tolerance: float) -> Judgement | None:
    """The verdict, or None as long as the readings do not decide."""
    is_open = False
    for statement in statements(kind, len(readings[0].own), combine):
        holds = [holding(statement, reading, tolerance) for reading in readings]
        if all(holds):
            return statement.judgement
        is_open = is_open or False not in holds
    return None if is_open else Judgement(MIXED)


def holding(statement: _Statement, reading: Reading, tolerance: float) -> bool | None:
    """True, False, or None where the reading's error leaves it open."""
    allowed, distance = tolerance * reading.size, statement.distance(reading)
    if distance > allowed + 2 * reading.error:
        return False
    return True if distance <= allowed + reading.error and reading.error <= allowed else None
