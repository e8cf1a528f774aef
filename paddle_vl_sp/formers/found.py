"""Which families this installation has, and which of them may be changed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from paddle_vl_sp.formers.admission import Judgement, judge
from paddle_vl_sp.formers.context.install import deviations
from paddle_vl_sp.formers.known import KNOWN_VERSIONS, MODELS, Family, formers_version
from paddle_vl_sp.formers.report import ABSENT, Line
from paddle_vl_sp.log import logger

OPTIONAL = ("paddlefleet", "paddlefleet_ops")  # without them some families are not there


class UpstreamChanged(RuntimeError):
    """A method that would be replaced, or that ours calls, is not the one that is known."""


def loaded(wanted: Sequence[Family], lines: list[Line], strict: bool, were_named: bool) -> list[tuple[Family, Any]]:
    """The families with their modules. Those that need another package get a line, and so do those that this release
    lacks, or this Paddle has nothing for, unless they were named.
    """
    found: list[tuple[Family, Any]] = []
    for family in wanted:
        if family.part_of and family.part_of not in {other.name for other, _ in found}:
            continue  # what it is part of has the line
        try:
            found.append((family, importlib.import_module(family.module)))
        except Exception as error:
            needs_more = family.is_optional or str(getattr(error, "name", "")).partition(".")[0] in OPTIONAL
            needs_more |= not were_named and _is_not_there(family, error)
            if strict and not needs_more:
                raise UpstreamChanged(
                    f"{family.module} of PaddleFormers {formers_version()} cannot be imported: {error}; with "
                    "strict=False its classes are left alone"
                ) from error
            lines.append(Line(family.name, family.module, ABSENT, str(error)))
    return found


def _is_not_there(family: Family, error: Exception) -> bool:
    """Whether this PaddleFormers has no such module, or this Paddle lacks what it imports."""
    name = str(getattr(error, "name", None) or "")
    if isinstance(error, ModuleNotFoundError):
        return name.startswith(f"{MODELS}.") and f"{family.module}.".startswith(f"{name}.")
    return isinstance(error, ImportError) and name.partition(".")[0] == "paddle"


def judged_by_family(
    found: Sequence[tuple[Family, Any]], is_shared: bool, is_cut: bool, strict: bool
) -> dict[str, Judgement]:
    """By family. What is refused is an error if strict, and under context parallelism, where its model would
    train whole on every rank, and its gradients would be summed over the axis all the same.
    """
    judged = {family.name: judge(family, module, is_shared, is_cut) for family, module in found}
    refused: dict[str, list[str]] = {family.unit: [] for family, _ in found}
    for family, _ in found:
        refused[family.unit] += judged[family.name].refused
    judged = {family.name: replace(judged[family.name], refused=refused[family.unit]) for family, _ in found}
    refused |= {"criterion": [deviation.why for deviation in deviations()] if is_cut else []}
    if any(refused.values()):
        if is_cut:
            raise UpstreamChanged(f"{_describe(refused)}; leave context_parallel out, or name other families")
        if strict:
            raise UpstreamChanged(f"{_describe(refused)}; with strict=False these classes are left alone")
        logger.warning("%s; these classes are left alone", _describe(refused))
    return judged


def _describe(changed: dict[str, list[str]]) -> str:
    changes = "; ".join(why for family in changed.values() for why in family)
    return f"PaddleFormers {formers_version()} is not as known (versions {', '.join(KNOWN_VERSIONS)}): {changes}"
