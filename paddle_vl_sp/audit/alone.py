"""Readings of one parameter, or of several by their common change, until they decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paddle_vl_sp.audit.entries import SHARDED, UNEQUAL, Entry
from paddle_vl_sp.audit.judge import MIXED, WHOLE, Judgement, Reading, judge
from paddle_vl_sp.audit.probe import Moves, Probe
from paddle_vl_sp.audit.steps import Steps, moves_of, reach

GROSS = 0.25  # of what is expected: a disagreement that curvature does not make


@dataclass(frozen=True)
class Outcome:
    """What was found of one parameter.

    bundle  how many were judged by their common change; 1 is alone
    within  how large an error of this one would have shown there, relative
    off     how far a rank's gradient is from the whole one at least, relative, where it was measured
    """

    judgement: Judgement
    shares: tuple[float, ...]
    bundle: int = 1
    within: float = 0.0
    off: float = 0.0
    is_needed: bool = False  # no gradient, but the loss depends on the parameter


class Alone:
    """Judges one parameter, or several of one kind, in the direction of their gradients and in random ones."""

    def __init__(self, probe: Probe, steps: Steps, directions: int, tolerance: float, combine: str) -> None:
        self._probe, self._steps, self._directions = probe, steps, directions
        self._tolerance, self._combine = tolerance, combine
        self._rank, self._nranks = probe.rank, probe.nranks

    def judge(self, bundle: Sequence[Entry]) -> tuple[Judgement | None, list[Reading]]:
        """None if the loss does not show enough; and what was read."""
        readings: list[Reading] = []
        kind, ratio = bundle[0].kind, 1.0
        for number in range(1 + self._directions if len(bundle) == 1 else 1):
            size = min(self._steps.alone, sum(reach(entry, number > 0) for entry in bundle))
            if number and size < self._steps.needed / 2:
                continue
            reading = self._read(bundle, number, size, ratio, [*readings])
            readings.append(reading)
            ratio = min(max(abs(readings[0].truth) / size, 1 / 64), 64.0) if number == 0 else ratio
            judgement = judge(readings, kind, self._combine, self._tolerance)
            if judgement is None or judgement.verdict == MIXED:
                break
        return judgement, readings

    def _read(self, bundle: Sequence[Entry], number: int, size: float, ratio: float, before: list[Reading]) -> Reading:
        """A second, shorter step unless the first one agrees with a right gradient; a third if those disagree."""
        moves = moves_of(bundle, size, number, self._rank) if len(bundle) == 1 else _common_moves(bundle, size)
        first, noise = self._probe.difference(moves), 2 * self._probe.noise
        reading = Reading(first.truth, first.own, noise, max(abs(first.truth), ratio * size * (number > 0)))
        allowed = self._tolerance * reading.size
        distance = abs(first.expected - first.truth)
        if noise < allowed / 2 and (distance < allowed / 2 or _is_gross(bundle[0], distance, reading)):
            return reading
        for scale in (0.5, 0.125):
            first = first if scale == 0.5 else self._probe.difference(moves, 2 * scale)
            half = self._probe.difference(moves, scale)
            best, unit = first.refined(half), 1 / (2 * scale)
            error = unit * (first.curvature(half) / 3 + 3 * noise)
            expected = max(abs(best.truth) * unit, ratio * size * (number > 0))
            reading = Reading(best.truth * unit, best.own * unit, error, expected)
            if judge([*before, reading], bundle[0].kind, self._combine, self._tolerance) is not None:
                break
        return reading

    def outcome(self, entry: Entry, judgement: Judgement, readings: list[Reading]) -> Outcome:
        """The judgement of one parameter, with each rank's share."""
        shares, along = entry.shares, readings[0]
        if entry.kind == SHARDED and judgement.verdict != WHOLE:
            shares = self._shard_by_shard(entry)
        elif abs(along.truth) > along.error:
            shares = tuple((along.own / along.truth).tolist())
        off = max(float(abs(reading.own - reading.truth).max()) / (reading.size or 1.0) for reading in readings)
        return Outcome(judgement, shares, off=off)

    def _shard_by_shard(self, entry: Entry) -> tuple[float, ...]:
        """One rank's part moves at a time: what each rank's gradient says over what the loss does."""
        shares = []
        for rank in range(self._nranks):
            only = replace(entry, way=entry.way * float(rank == self._rank))
            size = min(self._steps.alone, reach(entry, False))
            seen = self._probe.difference(moves_of([only], size, 0, self._rank))
            shares.append(seen.expected / seen.truth if abs(seen.truth) > 4 * self._probe.noise else 0.0)
        return tuple(shares)


def _is_gross(entry: Entry, distance: float, reading: Reading) -> bool:
    """Of copies that differ it is known that they are not whole: there one step tells partial from mixed."""
    return entry.kind == UNEQUAL and distance > GROSS * max(reading.size, abs(float(reading.own.sum())))


def _common_moves(bundle: Sequence[Entry], size: float) -> Moves:
    """All along their gradients, so that their parts add up to `size`."""
    most = sum(reach(entry, False) for entry in bundle)
    return [(entry, entry.way * (min(1.0, size / most) * reach(entry, False) / entry.size**2)) for entry in bundle]
