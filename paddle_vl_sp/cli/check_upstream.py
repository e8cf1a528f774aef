"""The doctor on PaddleFormers' methods: which would be replaced, and whether they are the ones that are known."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from paddle_vl_sp.cli.check_install import FLEET, FORMERS, importable
from paddle_vl_sp.cli.checkup import FAIL, PASS, WARN, Check
from paddle_vl_sp.formers import apply_to_qwen3_vl
from paddle_vl_sp.formers.families import QWEN3_VL
from paddle_vl_sp.formers.known import KNOWN_VERSIONS, OURS, Called, Family, Replaced, fingerprint, formers_version
from paddle_vl_sp.formers.patch import switched_off
from paddle_vl_sp.formers.report import ABSENT
from paddle_vl_sp.settings import ENABLED

FIX = (
    f"install paddleformers {' or '.join(KNOWN_VERSIONS)} or a newer paddle-vl-sp; "
    "apply_to_qwen3_vl(strict=False) leaves these classes as they are"
)


def check_upstream() -> Iterator[Check]:
    """A line for every method that would be replaced or called; applies for a moment, to import the classes."""
    try:
        is_off = switched_off()
    except ValueError as error:
        yield Check(FAIL, "upstream", str(error), f"unset {ENABLED}")
        return
    if is_off:
        return  # said with the other switches
    try:
        with apply_to_qwen3_vl(strict=False) as report:
            absent = {line.family: line.why for line in report.lines if line.state == ABSENT}
    except ImportError as error:
        yield Check(WARN, "upstream", f"cannot be imported: {error}", FORMERS)
        return
    for family in QWEN3_VL:
        if family.name in absent:
            yield _absent(family, absent[family.name])
        else:
            yield from _methods(family, sys.modules[family.module])


def _absent(family: Family, why: str) -> Check:
    """Where paddlefleet is not there, its own line has the mend."""
    is_known = "paddlefleet" in why and not importable("paddlefleet")
    mend = "" if is_known else FLEET if "paddlefleet" in why else FORMERS
    return Check(WARN, f"upstream, {family.name}", f"{family.module} cannot be imported: {why}", mend)


def _methods(family: Family, module: Any) -> Iterator[Check]:
    methods: tuple[Replaced | Called, ...] = (*family.replaced, *family.called)
    for method in methods:
        role = "would be replaced" if method in family.replaced else "is called"
        owner_name, _, name = method.name.partition(".")
        function: Any = vars(getattr(module, owner_name, object)).get(name)
        function = getattr(function, OURS, function)
        if function is None:
            yield Check(FAIL, method.name, f"not in {family.module} of paddleformers {formers_version()}", FIX)
        elif why := method.unknown(function, getattr(module, owner_name)):
            yield Check(FAIL, method.name, why, FIX)
        else:
            parameters = ", ".join(inspect.signature(function).parameters)
            if len(parameters) > 60:
                parameters = f"{parameters[:57]}..."
            yield Check(PASS, method.name, f"known ({fingerprint(function)}), {role}; takes ({parameters})")
