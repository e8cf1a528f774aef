"""Differences of the loss: steps of parameters in both directions, what the loss did, what each gradient foretold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from paddle_vl_sp.audit.entries import SHARDED, Entry, Floats, gather_numbers
from paddle_vl_sp.audit.state import Before, assign
from paddle_vl_sp.comm.agree import agree
from paddle_vl_sp.comm.collectives import Group, has_peers
from paddle_vl_sp.settings import check_choice

COMBINE = ("equal", "mean", "sum")
SAME_LOSS = 1e-3  # relative: losses of ranks that differ by more are not one loss
BITS = 23  # of float32
COARSE = 10  # trailing zero bits that all losses share, from which on they were rounded to fewer bits
NOISE_SEED = 1_000_003
SHORT = 8  # bits: a step of 2^-8 flips the roundings of bfloat16, and is short against the loss's curvature
SHORT_BFLOAT16 = 6  # of bfloat16 values two roundings: this step and its half move them exactly
MOVED = 16  # parameters at most that such a step moves: of thousands the steps would add up to a long one
NOISY = 10.0  # times the resolution: from there on the noise is measured again
MORE_NOISE = 3  # times

Moves = Sequence[tuple[Entry, Tensor]]


@dataclass(frozen=True)
class Difference:
    """(L(p + v) - L(p - v)) / 2, and the same by the gradients.

    middle    (L(p + v) + L(p - v)) / 2
    truth     by the loss
    own       [nranks] by each rank's gradient; of shards, by all ranks' together
    expected  by what is expected of the gradients
    """

    middle: float
    truth: float
    own: Floats
    expected: float

    def refined(self, half: Difference) -> Difference:
        """Without the curvature's part, which goes with the cube of the step: this and one of half the step."""
        return Difference(
            half.middle,
            (8 * half.truth - self.truth) / 3,
            (8 * half.own - self.own) / 3,
            (8 * half.expected - self.expected) / 3,
        )

    def curvature(self, half: Difference) -> float:
        """How far the two steps are apart: of a straight line, not at all."""
        return abs(2 * (half.truth - half.expected) - (self.truth - self.expected))


class Probe:
    """The loss as a function of the parameters, the same number on every rank, and how exactly it is known.

    Every forward draws the same random numbers. If the loss raises on one rank, all raise.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        group: Group | None,
        before: Before,
        combine: str,
        has_backward: bool,
        tick: Callable[[], None],
    ) -> None:
        check_choice("combine", combine, COMBINE)
        self._has_backward = has_backward
        self.group, self.num_forwards = group, 0
        self.rank, self.nranks = (0, 1) if group is None else (group.rank, group.nranks)
        self._loss, self._before, self._combine, self._tick = loss, before, combine, tick
        self._seen: list[float] = []
        self.base = self.noise = self.scale = 0.0

    def backward(self, after: Callable[[], object] | None) -> None:
        """The one forward with a backward."""
        with _raised() as caught:
            self._before.restore()
            loss = self._loss()
            _check_loss(loss, self._has_backward)
            value = float(loss)
            if not self._has_backward:
                loss.backward()
            if after is not None:
                after()
        self.base = self._agreed(caught, value if not caught else 0.0)[0]

    def measure_noise(self, entries: Sequence[Entry]) -> None:
        """How much the loss moves by itself: the same forward again, steps that roundings make uneven, its digits."""
        again = self._forward([])[0]
        uneven = self._unevenness(entries, 0)
        # a loss near zero is made of larger terms: the parameters' reach says how large
        self.scale = max(abs(self.base), 0.01 * max(entry.size * entry.weight for entry in entries)) or 1.0
        resolution = self.scale * 2.0 ** (self._coarse_bits() - BITS)
        if uneven > NOISY * resolution:
            uneven = max(uneven, *(self._unevenness(entries, number) for number in range(1, 1 + MORE_NOISE)))
        self.noise = max(resolution, abs(again - self.base), uneven)

    def _unevenness(self, entries: Sequence[Entry], number: int) -> float:
        """How far the loss is from a parabola along a short random step, as the deviation of one loss.

        Five points, whatever the gradients are; the divisors are the deviations of sums of independent errors.
        """
        some = entries[:: -(-len(entries) // MOVED)]  # from first to last, so that all activations change
        moves = [(entry, _short_step(entry, number)) for entry in some]
        whole, half = self.difference(moves), self.difference(moves, 0.5)
        odd = abs(whole.truth - 2 * half.truth) / 2.5**0.5
        even = abs(whole.middle - self.base - 4 * (half.middle - self.base)) / 17.5**0.5
        return float(max(odd, even))

    def difference(self, moves: Moves, scale: float = 1.0) -> Difference:
        """Two forwards, with the parameters moved by scale * v and by -scale * v."""
        saved = [entry.tensor.detach().clone() for entry, _ in moves]
        try:
            numbers = np.zeros(3)  # own of copies, own of shards, expected of copies
            for (entry, v), value in zip(moves, saved, strict=True):
                upper, lower = _moved(value, v, scale), _moved(value, v, -scale)
                numbers += _foretold(entry, (upper.astype("float32") - lower.astype("float32")) / 2)
                assign(entry.tensor, upper)
            up, table = self._forward(numbers.tolist())
            for (entry, v), value in zip(moves, saved, strict=True):
                assign(entry.tensor, _moved(value, v, -scale))
            down, _ = self._forward([])
        finally:
            for (entry, _), value in zip(moves, saved, strict=True):
                assign(entry.tensor, value)
        of_shards = float(table[:, 1].sum())
        return Difference((up + down) / 2, (up - down) / 2, table[:, 0] + of_shards, float(table[0, 2]) + of_shards)

    def _forward(self, numbers: Sequence[float]) -> tuple[float, Floats]:
        value = 0.0
        with _raised() as caught, paddle.set_grad_enabled(self._has_backward):
            self._before.restore()
            value = float(self._loss())
        return self._agreed(caught, value, numbers)

    def _agreed(self, caught: list[Exception], value: float, numbers: Sequence[float] = ()) -> tuple[float, Floats]:
        """The loss of the group, and the numbers of every rank."""
        self.num_forwards += 1
        self._tick()
        table = gather_numbers([bool(caught), value, *numbers], self.group)
        if table[:, 0].any():
            agree_or_raise(caught[0] if caught else None, self.group)
        return self._combined(table[:, 1]), table[:, 2:]

    def _combined(self, losses: Floats) -> float:
        if self._combine == "equal":
            if np.abs(losses - losses[0]).max() > SAME_LOSS * np.abs(losses).max():
                raise ValueError(
                    f"loss() must be the same number on every rank, got {losses.tolist()}: return the loss of the "
                    "whole batch, or say how the ranks' losses make it by combine='mean' or 'sum'"
                )
            losses = losses[:1]
        self._seen += losses.tolist()
        return float(losses.sum() if self._combine == "sum" else losses.mean())

    def _coarse_bits(self) -> int:
        """Trailing bits that are zero in every loss seen: it was rounded, as to bfloat16, whatever its dtype says."""
        bits = np.asarray(self._seen, dtype=np.float32).view(np.int32)
        common = int(np.bitwise_or.reduce(bits)) & 0x7FFFFF
        zeros = 23 if not common else (common & -common).bit_length() - 1
        return zeros if zeros >= COARSE and np.any(bits) else 0


def agree_or_raise(error: Exception | None, group: Group | None) -> None:
    """Raises on every rank of a group if any has an error, and here without one."""
    if has_peers(group):
        agree(error, group)
    elif error is not None:
        raise error


@contextlib.contextmanager
def _raised() -> Iterator[list[Exception]]:
    """A list that has what was raised inside, so that the other ranks can learn of it."""
    caught: list[Exception] = []
    try:
        yield caught
    except Exception as error:
        caught.append(error)


def _check_loss(loss: Tensor, has_backward: bool) -> None:
    if not isinstance(loss, Tensor) or loss.size != 1 or (loss.stop_gradient and not has_backward):
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss() must return one number, a tensor with a gradient, got {what}")


def _moved(value: Tensor, v: Tensor, scale: float) -> Tensor:
    moved: Tensor = (value.astype("float32") + scale * v).astype(value.dtype)
    return moved


def _foretold(entry: Entry, way: Tensor) -> Floats:
    """`way` is how far the parameter really went, rounding included."""
    own = float((entry.own * way).sum())
    if entry.kind == SHARDED:
        return np.array([0.0, own, 0.0])
    return np.array([own, 0.0, float((entry.expected * way).sum())])


def _short_step(entry: Entry, number: int) -> Tensor:
    """Each value up or down by a power of two, a small part of it."""
    signs = np.random.default_rng([NOISE_SEED, number, *entry.name.encode()]).integers(0, 2, entry.tensor.shape) * 2 - 1
    value = entry.tensor.detach().astype("float32")
    bits = SHORT_BFLOAT16 if entry.tensor.dtype == paddle.bfloat16 else SHORT
    step = 2.0 ** (value.abs().clip(min=1e-30).log2().floor() - bits)
    moved: Tensor = step * paddle.to_tensor(signs.astype("float32"), place=step.place)
    return moved
