"""Known causes of wrong gradients, by the names of parameters: what an audit adds to its table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paddle_vl_sp.comm.grads import HEAD_NORMS


@dataclass(frozen=True)
class Cause:
    """What makes the gradients of parameters with such names wrong, and what to do.

    ::

        Cause(r"\\.my_norm\\.", ("partial",), "my_norm sees this rank's positions only: mark it for the sum")
    """

    pattern: str  # a regular expression that is searched in the name
    verdicts: tuple[str, ...]  # the first words of the verdicts that it makes
    text: str
    is_strided: bool = False  # only gradients that are not contiguous
    makes_copies_differ: bool = False  # only gradients that are not alike on all ranks


_known = [
    Cause(
        "|".join(HEAD_NORMS),
        ("partial", "mixed"),
        "q_norm/k_norm under TP: each rank has the part of its own heads; mark them by mark_for_sum(norm)",
        makes_copies_differ=True,
    ),
    Cause(
        "",
        ("mixed", "times", "partial"),
        "strided gradient in fused_allreduce_gradients: make it contiguous before",
        is_strided=True,
    ),
]


def register_causes(*causes: Cause) -> None:
    """Adds causes that later audits name; those that were added last come first.

    ::

        register_causes(Cause(r"\\.my_norm\\.", ("partial",), "mark my_norm for the sum"))
    """
    _known[:0] = [cause for cause in causes if cause not in _known]


def cause_of(name: str, verdict: str, is_strided: bool, copies_differ: bool) -> str:
    """The text of the first cause that fits, or nothing."""
    for cause in _known:
        fits = verdict.split(" ")[0] in cause.verdicts and re.search(cause.pattern, name)
        is_shown = is_strided >= cause.is_strided and copies_differ >= cause.makes_copies_differ
        if fits and is_shown:
            return cause.text
    return ""
