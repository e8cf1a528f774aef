"""Blocks first: parameters of one kind in one step, single ones only where their block disagrees with the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from paddle_vl_sp.audit.alone import GROSS, Alone, Outcome
from paddle_vl_sp.audit.entries import ABSENT, EQUAL, MARKED, SHARDED, UNEQUAL, Entry
from paddle_vl_sp.audit.judge import MIXED, NONE, PARTIAL, TOO_SMALL, WHOLE, Judgement, factor_of, times
from paddle_vl_sp.audit.probe import Difference, Moves, Probe
from paddle_vl_sp.audit.steps import Steps, blind_moves, moves_of, reach

RIGHT = {EQUAL: Judgement(WHOLE), SHARDED: Judgement(WHOLE), MARKED: Judgement(PARTIAL, "sum")}  # may share a block
FEW = 4  # parameters of a block that failed from which on each is looked at alone
FEWEST = 8  # parameters that a block must be able to have; else the loss is too noisy to judge single ones by it
MODULES = 16  # that a noisy loss is asked for, at most about twice as many
MINOR = 0.02  # of a bundle's largest part: parts below it are not judged by the bundle


class Search:
    """Judges all entries; `found` is the outcome of each name."""

    def __init__(self, probe: Probe, directions: int, tolerance: float, combine: str) -> None:
        self.found: dict[str, Outcome] = {}
        self._probe, self._directions, self._tolerance, self._combine = probe, directions, tolerance, combine
        self._steps = Steps.of(probe, tolerance)
        self._single = Alone(probe, self._steps, directions, tolerance, combine)
        self._rank, self._nranks = probe.rank, probe.nranks

    def run(self, entries: Sequence[Entry]) -> None:
        if self._steps.largest_block < FEWEST:
            for kind in (*RIGHT, UNEQUAL):
                same = [entry for entry in entries if entry.kind == kind and entry.size]
                self._look_at_together(same, _common_reach(same))
        else:
            large = [entry for entry in entries if entry.kind != ABSENT and reach(entry, False) >= self._steps.needed]
            self._look_at([entry for entry in large if entry.kind in RIGHT])
            self._look_at([entry for entry in large if entry.kind == UNEQUAL])
            for kind in (*RIGHT, UNEQUAL):
                self._bundles([entry for entry in entries if entry.kind == kind and entry.name not in self.found])
        self._look_for_dependence([entry for entry in entries if entry.kind == ABSENT])
        self._settle(entries, None)

    def _look_at(self, block: list[Entry]) -> None:
        """A block of several kinds is right or not; one of a kind may be wrong in one way."""
        by_kind = _by_kind(block)
        if len(block) < 2:
            self._settle(block, self._alone(block) if block else None)
            return
        factors = _factors(block[0].kind, self._nranks, self._combine) if len(by_kind) == 1 else {1.0: Judgement(WHOLE)}
        found = self._of_block(block, factors)
        if found is not None:
            for kind, same in by_kind.items():
                self._settle(same, RIGHT[kind] if len(by_kind) > 1 else found[0], found[1])
        elif len(block) > self._steps.largest_block:
            self._look_at_each(parts_of(block))
        elif len(by_kind) > 1:
            self._look_at_each(by_kind.values())
        else:
            self._look_at_each([[entry] for entry in block] if len(block) <= FEW else parts_of(block))

    def _look_at_each(self, parts: Iterable[list[Entry]]) -> None:
        for part in parts:
            self._look_at(part)

    def _settle(
        self,
        block: Sequence[Entry],
        judgement: Judgement | None,
        factor: float = 1.0,
        bundle: int = 1,
        within: float = 0.0,
    ) -> None:
        """The outcome of those that have none yet; `factor` is what they expect over the truth."""
        for entry in block:
            shares = tuple(factor * share for share in entry.shares)
            self.found.setdefault(entry.name, Outcome(judgement or Judgement(TOO_SMALL), shares, bundle, within))

    def _of_block(self, block: list[Entry], factors: dict[float, Judgement]) -> tuple[Judgement, float] | None:
        """What is true of every parameter of the block, if all directions agree on one factor."""
        if len(block) > self._steps.largest_block:
            return None
        part = self._steps.within(len(block))
        for number in range(1 + self._directions):
            able = [entry for entry in block if number == 0 or reach(entry, True) >= self._steps.needed]
            if able:
                moves = moves_of(able, part, number, self._rank)
                factors = self._agreeing(moves, factors, 0.7 * self._steps.needed, part * len(able) ** 0.5)
            if not factors:
                return None
        factor, judgement = next(iter(factors.items()))
        return judgement, factor

    def _agreeing(
        self, moves: Moves, factors: dict[float, Judgement], smallest: float, largest: float
    ) -> dict[float, Judgement]:
        """The factors by which the gradients' numbers are the loss's; the smallest part must be right by itself."""

        def agree(seen: Difference) -> dict[float, Judgement]:
            allowed = 0.5 * self._tolerance * smallest
            return {f: each for f, each in factors.items() if abs(seen.expected / f - seen.truth) <= allowed}

        first = self._probe.difference(moves)
        found = agree(first)
        nearest = min(abs(first.expected / factor - first.truth) for factor in factors)
        if found or nearest > GROSS * largest:
            return found
        return agree(first.refined(self._probe.difference(moves, 0.5)))

    def _alone(self, bundle: Sequence[Entry]) -> Judgement | None:
        judgement, readings = self._single.judge(bundle)
        if judgement is not None and len(bundle) == 1:
            self.found[bundle[0].name] = self._single.outcome(bundle[0], judgement, readings)
        return judgement

    def _bundles(self, small: list[Entry]) -> None:
        """Parameters too small for a verdict of their own, by the common change of those under one name."""
        for bundle in _under_one_name(small):
            self._judge_together(bundle)

    def _judge_together(self, bundle: list[Entry]) -> None:
        """The verdict of their common change, for those that have a share in it, unless that is too small."""
        most, largest = _common_reach(bundle), max(reach(entry, False) for entry in bundle)
        seen = [entry for entry in bundle if reach(entry, False) >= MINOR * largest]
        if most >= 2 * self._steps.needed:
            judgement = self._alone(seen)
            for entry in seen:
                within = self._tolerance * most / reach(entry, False)
                self._settle([entry], judgement, _factor_of(judgement), len(seen), within)

    def _look_at_together(self, bundle: list[Entry], total: float) -> None:
        """With a noisy loss: the smallest modules that can be judged by their common change, MODULES or so of them."""
        modules = parts_of(bundle) if len(bundle) > 1 and _common_reach(bundle) > total / MODULES else []
        able = [module for module in modules if _common_reach(module) >= 2 * self._steps.needed]
        names = {entry.name for module in able for entry in module}
        for module in able:
            self._look_at_together(module, total)
        rest = [entry for entry in bundle if entry.name not in names]
        if rest:
            self._judge_together(rest)

    def _look_for_dependence(self, block: list[Entry]) -> None:
        """Parameters without a gradient on any rank: the loss must not change with them."""
        if not block:
            return
        if not any(self._changes(block, number) for number in (1, 2)):
            self.found |= {entry.name: Outcome(Judgement(NONE), entry.shares) for entry in block}
        elif len(block) == 1:
            self.found[block[0].name] = Outcome(Judgement(NONE), block[0].shares, is_needed=True)
        else:
            for part in parts_of(block):
                self._look_for_dependence(part)

    def _changes(self, block: list[Entry], number: int) -> bool:
        """Whether the loss goes up on one side and down on the other, and half as much for half the step."""
        moves = blind_moves(block, number, self._rank)
        whole = self._probe.difference(moves).truth
        if abs(whole) <= 6 * self._probe.noise:
            return False
        half = self._probe.difference(moves, 0.5).truth
        return len(block) > 1 or abs(whole - 2 * half) < 0.3 * abs(whole)


def parts_of(block: Sequence[Entry]) -> list[list[Entry]]:
    """The modules that a block consists of, by the names' next part that differs; many of them, in two halves."""
    names = [entry.name.split(".") for entry in block]
    depth = 0
    while len({tuple(name[: depth + 1]) for name in names}) == 1 and any(len(name) > depth + 1 for name in names):
        depth += 1
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry, name in zip(block, names, strict=True):
        groups.setdefault(tuple(name[: depth + 1]), []).append(entry)
    found = list(groups.values())
    if len(found) == 1:
        found = [[entry] for entry in block]
    if len(found) <= FEW:
        return found
    middle = len(found) // 2
    return [[entry for group in half for entry in group] for half in (found[:middle], found[middle:])]


def _by_kind(block: Iterable[Entry]) -> dict[str, list[Entry]]:
    kinds: dict[str, list[Entry]] = {}
    for entry in block:
        kinds.setdefault(entry.kind, []).append(entry)
    return kinds


def _factors(kind: str, nranks: int, combine: str) -> dict[float, Judgement]:
    """What `expected` may be, as a factor of the truth, and what that means."""
    if nranks == 1:
        return {1.0: Judgement(WHOLE)}
    n = float(nranks)
    many, part = Judgement(times(n)), Judgement(times(1 / n))
    if kind == SHARDED:
        return {1.0: Judgement(WHOLE), n: many, 1 / n: part}
    if kind == EQUAL:  # the mean: a part of 1/n on every rank is completed by their sum
        return {1.0: Judgement(WHOLE), n: many, 1 / n: Judgement(PARTIAL, "sum")}
    if kind == UNEQUAL:
        many = Judgement(PARTIAL, "mean") if combine == "mean" else Judgement(MIXED)
        return {1.0: Judgement(PARTIAL, "sum"), n: many, 1 / n: Judgement(MIXED)}
    return {1.0: Judgement(PARTIAL, "sum"), n: replace(many, of_sum=True), 1 / n: replace(part, of_sum=True)}


def _common_reach(bundle: Sequence[Entry]) -> float:
    return sum(reach(entry, False) for entry in bundle)


def _factor_of(judgement: Judgement | None) -> float:
    return 1.0 if judgement is None else factor_of(judgement.verdict) or 1.0


def _under_one_name(entries: Iterable[Entry]) -> list[list[Entry]]:
    """By the first part of the name that tells modules apart."""
    block = [entry for entry in entries if entry.size]
    return parts_of(block) if len(block) > 1 else [block] if block else []
