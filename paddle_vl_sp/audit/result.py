"""What an audit found, as a value and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from paddle_vl_sp.audit.judge import NONE, PARTIAL, TOO_SMALL, WHOLE

HEADINGS = ("parameter", "verdict", "each rank's share", "what")


@dataclass(frozen=True)
class Finding:
    """One parameter.

    verdict  whole, partial, times n, mixed, none, or too small to judge
    shares   each rank's gradient over the whole one, along the gradient
    is_right whether the optimizer will see the whole gradient
    note     what completes it, or how it was judged
    cause    a known one, with what to do, or ""
    together how many parameters were judged by their common change; 1 is alone

    ::

        wrong = [finding.name for finding in audit.findings if not finding.is_right]
    """

    name: str
    verdict: str
    shares: tuple[float, ...]
    is_right: bool
    note: str = ""
    cause: str = ""
    together: int = 1


@dataclass(frozen=True)
class GradientAudit:
    """The findings of `audit_gradients`, the same on every rank; str() is the table of all that is not simply whole.

    >>> model = paddle.nn.Linear(2, 1)
    >>> audit = audit_gradients(lambda: model(paddle.ones([1, 2])).sum(), model, None)
    >>> audit.ok, audit.verdicts
    (True, {'weight': 'whole', 'bias': 'whole'})
    """

    findings: tuple[Finding, ...]
    group: str  # in words
    num_forwards: int
    noise: float  # of the loss
    loss: float

    @property
    def verdicts(self) -> dict[str, str]:
        return {finding.name: finding.verdict for finding in self.findings}

    @property
    def shares(self) -> dict[str, tuple[float, ...]]:
        return {finding.name: finding.shares for finding in self.findings}

    @property
    def wrong(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.is_right]

    @property
    def ok(self) -> bool:
        """Nothing wrong was found, and something was judged."""
        return not self.wrong and any(finding.verdict != TOO_SMALL for finding in self.findings)

    def cost(self) -> str:
        """audited 312 parameters in 2 + 2·23 forwards"""
        return f"audited {len(self.findings)} parameters in 2 + 2·{(self.num_forwards - 2) // 2} forwards"

    def summary(self) -> str:
        counts: dict[str, int] = {}
        for finding in self.findings:
            word = finding.verdict if finding.is_right else f"{finding.verdict} (wrong)"
            word = f"{PARTIAL} but summed later" if word == PARTIAL else word
            counts[word] = counts.get(word, 0) + 1
        return ", ".join(f"{count} {word}" for word, count in counts.items())

    def table(self, everything: bool = False) -> str:
        """One line a parameter: those that are wrong, marked or not judged, or everything."""
        shown = [
            finding
            for finding in self.findings
            if everything or not finding.is_right or finding.verdict not in (WHOLE, NONE)
        ]
        rows = [HEADINGS, *(_row(finding) for finding in shown)] if shown else []
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))] if rows else []
        return "\n".join(
            "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __str__(self) -> str:
        word = "nothing wrong found" if self.ok else f"{len(self.wrong)} WRONG" if self.wrong else "nothing judged"
        lines = [f"gradients over {self.group}: {word}; {self.summary()}", self.table(), self.cost()]
        return "\n".join(line for line in lines if line)


def _row(finding: Finding) -> tuple[str, str, str, str]:
    shares = ", ".join(f"{share:.3g}" for share in finding.shares)
    what = "; ".join(part for part in (finding.note, finding.cause) if part)
    mark = "" if finding.is_right else " !"
    return finding.name, finding.verdict + mark, shares, what
