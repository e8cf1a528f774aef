"""Changes what one family says is to be replaced, and says what was done."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from paddle_vl_sp.formers.admission import Judgement
from paddle_vl_sp.formers.changes import Change, replace, swap
from paddle_vl_sp.formers.known import Family, Replaced
from paddle_vl_sp.formers.report import ABSENT, LEFT_ALONE, REPLACED, Line

TOWER, SEQUENCE = "the tower's work", "the sequence"


def change_family(
    family: Family,
    module: Any,
    judgement: Judgement,
    is_shared: bool,
    is_cut: bool,
    made: list[Change],
    over_data: bool,
) -> list[Line]:
    lines = _replace_all(family, family.methods(is_shared, is_cut, over_data), module, judgement, made)
    lines += _swap_all(family, judgement, made)
    if is_shared and not family.shared:
        lines.append(Line(family.name, TOWER, LEFT_ALONE, "not shared: it has no sequence parallelism"))
    if is_cut and not family.cut:
        lines.append(Line(family.name, SEQUENCE, LEFT_ALONE, "not cut: it has no context parallelism"))
    return lines


def _replace_all(
    family: Family, methods: Sequence[Replaced], module: Any, judgement: Judgement, made: list[Change]
) -> list[Line]:
    lines = []
    for method in methods:
        if judgement.refused:
            lines.append(Line(family.name, method.name, LEFT_ALONE, "; ".join(judgement.refused)))
            continue
        owner_name, _, name = method.name.partition(".")
        replacement = replace(getattr(module, owner_name), name, method.make)
        if replacement is not None:
            made.append(replacement)
        why = _first_line(method.make) if replacement else "was already"
        lines.append(Line(family.name, method.name, REPLACED, _with_admission(why, judgement)))
    return lines


def _swap_all(family: Family, judgement: Judgement, made: list[Change]) -> list[Line]:
    """The classes that models built from now on are made of; a line says where one is not there."""
    lines = []
    for swapped in family.swapped:
        module, _, owner_name = swapped.where.partition(":")
        name = swapped.label
        if judgement.refused:
            lines.append(Line(family.name, name, LEFT_ALONE, "; ".join(judgement.refused)))
            continue
        try:
            owner: Any = importlib.import_module(module)
            replacement = swap(getattr(owner, owner_name) if owner_name else owner, swapped.name, swapped.make)
        except (ImportError, AttributeError, KeyError) as error:
            lines.append(Line(family.name, name, ABSENT, f"{type(error).__name__}: {error}"))
            continue
        if replacement is not None:
            made.append(replacement)
        why = _first_line(swapped.make) if replacement else "was already"
        lines.append(Line(family.name, name, REPLACED, _with_admission(why, judgement)))
    return lines


def _with_admission(why: str, judgement: Judgement) -> str:
    return f"{why}; admitted: {judgement.admitted}" if judgement.admitted else why


def _first_line(make: Callable[..., Any]) -> str:
    return (make.__doc__ or "").partition("\n")[0]
