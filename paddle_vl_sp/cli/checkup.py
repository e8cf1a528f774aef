"""One line of the doctor: what was looked at, how it is, and what mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paddle_vl_sp.cli.terminal import coloured

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
COLOURS = {PASS: "green", WARN: "yellow", FAIL: "red"}


@dataclass(frozen=True)
class Check:
    """FAIL: something does not work or would be wrong; WARN: it works, with less than there could be."""

    state: str
    subject: str
    told: str
    mend: str = ""

    def data(self) -> dict[str, Any]:
        return asdict(self)


def told(checks: Sequence[Check]) -> str:
    """A line for each, the mends under theirs."""
    width = max(len(check.subject) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{coloured(check.state, COLOURS[check.state])}  {check.subject:{width}}  {check.told}")
        if check.mend:
            lines.append(f"      mend: {check.mend}")
    number = {state: sum(check.state == state for check in checks) for state in (FAIL, WARN, PASS)}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in number.items())])
