"""apply_to_qwen3_vl: PaddleFormers' Qwen3-VL classes, method by method, with what this package does better."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from paddle_vl_sp import ops
from paddle_vl_sp.choices import check_choice, is_on
from paddle_vl_sp.formers import deepstack, fleet_layer, plain
from paddle_vl_sp.formers.fingerprint import KNOWN_VERSIONS, formers_version, leant_on, unknown
from paddle_vl_sp.formers.norms import mark_head_norms, text_init
from paddle_vl_sp.formers.report import ABSENT, LEFT_ALONE, REPLACED, Line, PatchReport
from paddle_vl_sp.formers.standing import Change, Make, replace, share, take_back
from paddle_vl_sp.log import logger

SWITCH = "PADDLE_VL_SP"
MODELS = "paddleformers.transformers"

_announced: set[str] = set()


class UpstreamChanged(RuntimeError):
    """A method that would be replaced, or that ours leans on, is not the one that is known."""


@dataclass(frozen=True)
class Family:
    """Classes that work together: all of their methods are replaced, or none."""

    name: str
    module: str
    methods: dict[str, dict[str, Make]]  # class: {method: what makes ours from the original}


def _plain(model: str, text_model: str) -> dict[str, dict[str, Make]]:
    return {
        model: {"forward": plain.model_forward},
        text_model: {"__init__": text_init, "forward": plain.text_forward, "_deepstack_process": deepstack.deepstack},
    }


FAMILIES = (
    Family("plain", f"{MODELS}.qwen3_vl.modeling", _plain("Qwen3VLModelDeprecated", "Qwen3VLTextModel")),
    Family("plain MoE", f"{MODELS}.qwen3_vl_moe.modeling", _plain("Qwen3VLMoeModelDeprecated", "Qwen3VLMoeTextModel")),
    Family(
        "fleet",  # dense and MoE: both are made of this layer and this model
        f"{MODELS}.qwen3_vl.modeling_fleet",
        {
            "Qwen3VLTextTransformerLayer": {
                "forward": fleet_layer.layer_forward,
                "_deepstack_process": deepstack.deepstack,
            },
            "Qwen3VLModelDist": {"forward": fleet_layer.model_forward},
        },
    ),
)


def apply_to_qwen3_vl(
    model: Any = None, *, backend: str = "auto", strict: bool = True, vision_dp: bool = False
) -> PatchReport:
    """Replaces the methods of PaddleFormers' Qwen3-VL classes that place visual features; `revert()` puts them back.

    Classes are changed, so it holds for models built before and after. Calling it again changes nothing. What it did
    is in the report, which is also a context manager: ``with apply_to_qwen3_vl(): ...``.

    model      a plain model that was built before: its q_norm and k_norm are marked for the trainer's gradient sum
               under sequence parallelism, as those of models built from now on are; before the trainer is made
    backend    "op" or "python" where the row functions must be served by these; "auto" takes what there is
    strict     code of PaddleFormers that is not known is an UpstreamChanged error, else it is left alone with a warning
    vision_dp  the tensor-parallel ranks share the vision tower's work

    PADDLE_VL_SP=0 leaves everything as it is. PADDLE_VL_SP_CHECK=1 compares every deepstack addition with upstream's.
    """
    if importlib.util.find_spec("paddleformers") is None:
        raise ImportError(
            "apply_to_qwen3_vl changes PaddleFormers' classes, and paddleformers is not installed: "
            'pip install "paddleformers==1.2.0" "pyarrow<26"'
        )
    _check_backend(backend)
    if vision_dp and model is None:
        raise ValueError("vision_dp=True needs the built model, whose tower it marks: apply_to_qwen3_vl(model, ...)")
    if switched_off():
        logger.info("Qwen3-VL is left as it is: %s=0", SWITCH)
        return PatchReport(tuple(Line(f.name, f.module, LEFT_ALONE, f"{SWITCH}=0") for f in FAMILIES))
    lines: list[Line] = []
    found = _loaded(lines, strict)
    changed = {family.name: _changes(family, module) for family, module in found}
    if strict and any(changed.values()):
        raise UpstreamChanged(_told(changed) + "; with strict=False these classes are left alone")
    made: list[Change] = []
    for family, module in found:
        lines += _replace_all(family, module, changed[family.name], made)
    if any(changed.values()):
        logger.warning("%s; these classes are left alone", _told(changed))
    if vision_dp:
        lines.append(_share(model, made))
    if model is not None:
        lines += mark_head_norms(model)
    report = PatchReport(tuple(lines), functools.partial(take_back, made))
    if not report.replaced:
        logger.warning("nothing of Qwen3-VL is replaced: %s", report.in_a_line())
    if made:
        _announce(report)
    return report


def _announce(report: PatchReport) -> None:
    """Once a process: a context may be entered again and again."""
    line = f"Qwen3-VL, {report.in_a_line()}; rows are served by {ops.backend()}"
    if line not in _announced:
        _announced.add(line)
        logger.info("%s", line)
        logger.debug("%s", report)


def switched_off() -> bool:
    return not is_on(SWITCH, "1")


def _loaded(lines: list[Line], strict: bool) -> list[tuple[Family, Any]]:
    """The families with their modules; those that cannot be imported, for want of paddlefleet, get a line."""
    found = []
    for family in FAMILIES:
        try:
            found.append((family, importlib.import_module(family.module)))
        except ImportError as error:
            if strict and (error.name or "").partition(".")[0] != "paddlefleet":
                raise UpstreamChanged(
                    f"{family.module} of PaddleFormers {formers_version()} cannot be imported: {error}; with "
                    "strict=False its classes are left alone"
                ) from error
            lines.append(Line(family.name, family.module, ABSENT, str(error)))
    return found


def _replace_all(family: Family, module: Any, changes: list[str], made: list[Change]) -> list[Line]:
    lines = []
    for owner_name, methods in family.methods.items():
        for method, make in methods.items():
            name = f"{owner_name}.{method}"
            if changes:
                lines.append(Line(family.name, name, LEFT_ALONE, "; ".join(changes)))
                continue
            owner = getattr(module, owner_name)
            replacement = replace(owner, method, make)
            if replacement is not None:
                made.append(replacement)
            why = _first_line(make) if replacement else "was already"
            lines.append(Line(family.name, name, REPLACED, why))
    return lines


def _first_line(make: Make) -> str:
    return (make.__doc__ or "").partition("\n")[0]


def _share(model: Any, made: list[Change]) -> Line:
    name = "the tower's work"
    try:
        shared = share(model)
    except ValueError:
        take_back(made)
        raise
    if shared is None:
        return Line("model", name, REPLACED, "was already shared")
    made.append(shared)
    return Line("model", name, REPLACED, "shared by the tensor-parallel ranks; parameters marked for the sum")


def _changes(family: Family, module: Any) -> list[str]:
    """What is not as known in this family's classes."""
    changes = []
    for owner_name, methods in family.methods.items():
        owner = getattr(module, owner_name, None)
        if owner is None:
            changes.append(f"{family.module} has no {owner_name}")
            continue
        changes += [why for method in [*methods, *leant_on(owner_name)] if (why := unknown(owner, method))]
    return changes


def _told(changed: dict[str, list[str]]) -> str:
    changes = "; ".join(why for family in changed.values() for why in family)
    return f"PaddleFormers {formers_version()} is not as known (versions {', '.join(KNOWN_VERSIONS)}): {changes}"


def _check_backend(wanted: str) -> None:
    check_choice("backend", wanted, ops.BACKENDS)
    if wanted not in ("auto", ops.backend().name):
        raise ValueError(
            f"backend={wanted!r}, but {ops.backend()} serves: set {ops.SWITCH}={wanted} before anything is used"
        )
