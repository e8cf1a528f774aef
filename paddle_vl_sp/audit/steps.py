"""How far parameters are moved, and where to: along the gradient, then along random directions.

Of each parameter a part of the loss's change is asked for that can be told from the loss's noise. Steps are limited
relative to the parameter's norm, since a loss is straight only over short ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from paddle_vl_sp.audit.entries import SHARDED, Entry
from paddle_vl_sp.audit.probe import Probe

NOISES = 12.0  # of the loss: what the tolerated error of a part must be
REACH = 0.04  # relative to the loss: what all parts of one step may add up to
REACH_ALONE = 0.02  # the same for the part of one parameter
ALONG, ACROSS = 0.05, 0.15  # relative to the parameter: steps along its gradient, and in random directions
SMALLEST = {1: 0.1}  # root mean square that biases and norms count as at least: zeros have no norm
SMALLEST_MATRIX = 0.02  # the same for all others
SEED = 20_000_003


@dataclass(frozen=True)
class Steps:
    """The sizes of an audit's steps, in units of the loss."""

    needed: float  # the smallest part that can be judged
    whole_step: float
    alone: float

    @classmethod
    def of(cls, probe: Probe, tolerance: float) -> Steps:
        needed = NOISES * probe.noise / tolerance
        alone = min(10 * needed, REACH_ALONE * probe.scale)
        return cls(needed, REACH * probe.scale, max(alone, needed))

    @property
    def largest_block(self) -> int:
        return int(self.whole_step / self.needed)

    def within(self, count: int) -> float:
        """The part that each of a block of `count` parameters is asked for."""
        return min(2 * self.needed, self.whole_step / count)


def reach(entry: Entry, is_random: bool) -> float:
    """The largest part of the loss's change that a parameter's steps may have."""
    longest = ACROSS * _rms(entry) if is_random else ALONG * _rms(entry) * math.sqrt(entry.count)
    return entry.size * longest


def _rms(entry: Entry) -> float:
    """Root mean square of the parameter's values, or what it counts as."""
    return max(entry.weight / math.sqrt(max(entry.count, 1)), SMALLEST.get(entry.tensor.ndim, SMALLEST_MATRIX))


def moves_of(entries: Sequence[Entry], part: float, number: int, rank: int) -> list[tuple[Entry, Tensor]]:
    """Direction `number` for each: 0 is along its gradient, the others are random, the same on all copies."""
    signs = _signs(len(entries), number)
    made = []
    for entry, sign in zip(entries, signs, strict=True):
        size = sign * min(part, reach(entry, number > 0)) / entry.size
        v = entry.way * (size / entry.size) if number == 0 else size * _normal(entry, number, rank)
        made.append((entry, v))
    return made


def blind_moves(entries: Sequence[Entry], number: int, rank: int) -> list[tuple[Entry, Tensor]]:
    """Random steps as large as they may be, for parameters without a gradient."""
    made = []
    for entry in entries:
        made.append((entry, ACROSS * _rms(entry) * _normal(entry, number, rank)))
    return made


def _signs(count: int, number: int) -> list[float]:
    """Signs and sizes around one, such that no two sums of them cancel, and their whole sum is not small."""
    rng = np.random.default_rng([SEED, number, count])
    while True:
        drawn = rng.choice([-1.0, 1.0], count) * rng.uniform(0.7, 1.3, count) if count > 1 else np.ones(1)
        if abs(drawn.sum()) > 0.5 * count**0.5:
            return drawn.tolist()  # type: ignore[no-any-return]


def _normal(entry: Entry, number: int, rank: int) -> Tensor:
    """Standard normal numbers, each shard's its own."""
    seed = [SEED, number, *entry.name.encode(), rank + 1 if entry.kind == SHARDED else 0]
    values = np.random.default_rng(seed).standard_normal(tuple(entry.tensor.shape), dtype=np.float32)
    return paddle.to_tensor(values, place=entry.tensor.place)
