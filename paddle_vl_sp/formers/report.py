"""What applying did, class by class and method by method, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

REPLACED, LEFT_ALONE, ABSENT, UNSUPPORTED = "replaced", "left alone", "absent", "not supported"
STATES = (REPLACED, LEFT_ALONE, ABSENT, UNSUPPORTED)


@dataclass(frozen=True)
class Line:
    """One method, class or module: what became of it and why."""

    family: str  # the name of a Family, "model", or "PaddleFleet's own"
    name: str
    state: str
    why: str


@dataclass(frozen=True)
class PatchReport:
    """What `apply_to_paddleformers` did. As a context manager it undoes, on leaving, what that call had replaced.

    ::

        report = apply_to_paddleformers()
        replaced = [line.name for line in report.lines if line.state == "replaced"]
    """

    lines: tuple[Line, ...]
    take_back: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def names(self, state: str) -> list[str]:
        return [line.name for line in self.lines if line.state == state]

    @property
    def replaced(self) -> list[str]:
        """The methods that are ours now, "Class.method"."""
        return self.names(REPLACED)

    def in_a_line(self) -> str:
        """Qwen3-VL: 4 replaced; Qwen2.5-VL: 1 replaced; Qwen3-VL fleet: 1 absent (No module named 'paddlefleet')"""
        families: dict[str, list[Line]] = {}
        for line in sorted(self.lines, key=lambda line: STATES.index(line.state)):
            if line.state != UNSUPPORTED:
                families.setdefault(line.family, []).append(line)
        return "; ".join(f"{family}: {self._describe(lines)}" for family, lines in families.items())

    @staticmethod
    def _describe(lines: list[Line]) -> str:
        """Numbers by state, with the reasons where something is not replaced."""
        parts = []
        for state in dict.fromkeys(line.state for line in lines):
            same = [line for line in lines if line.state == state]
            why = "" if state == REPLACED else f" ({'; '.join(dict.fromkeys(line.why for line in same))})"
            parts.append(f"{len(same)} {state}{why}")
        return ", ".join(parts)

    def __str__(self) -> str:
        """A table, one line a method."""
        rows = [(line.family, line.name, line.state, line.why) for line in self.lines]
        family, name, state = (max((len(row[i]) for row in rows), default=0) for i in range(3))
        table = [f"  {row[0]:{family}}  {row[1]:{name}}  {row[2]:{state}}  {row[3]}".rstrip() for row in rows]
        states = {state: len(self.names(state)) for state in STATES}
        counted = [f"{number} {state}" for state, number in states.items() if number or state != UNSUPPORTED]
        table.append(f"  {', '.join(counted)}")
        return "\n".join(["paddle_vl_sp and PaddleFormers", *table])

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.take_back()
