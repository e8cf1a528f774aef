"""apply_to_paddleformers: the classes of its models, method by method, with what this package does better."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence

from paddle.nn import Layer

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.backends.load import backend as backend_in_use
from paddle_vl_sp.formers.audit import audit_if_asked
from paddle_vl_sp.formers.changes import Change, balance, replace, share, undo_changes
from paddle_vl_sp.formers.context.forward import uncut_forward
from paddle_vl_sp.formers.context.install import install
from paddle_vl_sp.formers.context.setting import as_setting
from paddle_vl_sp.formers.ending import stop_together
from paddle_vl_sp.formers.families import FAMILIES, NOT_SUPPORTED
from paddle_vl_sp.formers.fleet_copy import COPY, is_installed, refuse_model, say_what_is_left
from paddle_vl_sp.formers.found import judged_by_family, loaded
from paddle_vl_sp.formers.known import MODELS, Family
from paddle_vl_sp.formers.norms import mark_head_norms
from paddle_vl_sp.formers.replacing import TOWER, change_family
from paddle_vl_sp.formers.report import LEFT_ALONE, REPLACED, UNSUPPORTED, Line, PatchReport
from paddle_vl_sp.formers.unread import warn_of_unread
from paddle_vl_sp.log import logger
from paddle_vl_sp.settings import BACKEND, ENABLED, SWITCHES, check_choice, is_on

_announced: set[str] = set()


def apply_to_paddleformers(
    model: Layer | None = None,
    *,
    families: str | Sequence[str] | None = None,
    strict: bool = True,
    vision_dp: bool | str = False,
    context_parallel: str | ContextParallel | None = None,
) -> PatchReport:
    """Replaces the methods of PaddleFormers' classes that place visual features; `revert()` puts them back.

    Classes are changed, so it applies to models built before and after. Calling it again changes nothing. What it did
    is in the report, which is also a context manager: ``with apply_to_paddleformers(): ...``.

    model      a plain model that was built before: its q_norm and k_norm are marked for the trainer's gradient sum
               under sequence parallelism, as those of models built from now on are; before the trainer is made
    families   the families of models, by name, such as "qwen3_vl", which is plain, MoE and fleet; None: all of them
    strict     code of PaddleFormers that is not known, and does not pass the trials of its family, is an
               UpstreamChanged error, else it is left alone with a warning
    vision_dp  True: the tensor-parallel ranks share the vision tower's work: that of `model`, or, without one, of every
               model that is built from now on. "data": the data-parallel and sharding ranks do, which have different
               batches; ranks that have the same one share what falls to it, as with True
    context_parallel   "auto", "gather", "ring", "ulysses" or a ContextParallel: the ranks of a group, fleet's sep axis
               unless the value names one, share each sequence; models take the whole batch and cut it themselves

    PADDLE_VL_SP=0 leaves everything as it is. PADDLE_VL_SP_CHECK=1 compares every deepstack addition with upstream's.
    PADDLE_VL_SP_AUDIT=1 audits the first batch of every trainer, also with PADDLE_VL_SP=0.
    PADDLE_VL_SP_PROBE=never refuses all code that is not known, without a trial.

    ::

        print(apply_to_paddleformers())  # before the model is built; the report says what was replaced
    """
    _require_paddleformers()
    wanted = _named(families)
    warn_of_unread()
    if switched_off():
        logger.info("PaddleFormers is left as it is: %s=0", ENABLED)
        unchanged = tuple(Line(f.name, f.module, LEFT_ALONE, f"{ENABLED}=0") for f in wanted)
        return PatchReport(unchanged, functools.partial(undo_changes, audit_if_asked()))
    if model is not None:
        _check_model(model)
    check_choice("vision_dp", vision_dp, (False, True, "data"))
    over_data = vision_dp == "data"
    is_shared = bool(vision_dp) and model is None
    setting = None if context_parallel is None else as_setting(context_parallel)
    is_cut = setting is not None
    lines: list[Line] = []
    with_methods = [family for family in wanted if family.methods(is_shared, is_cut) or family.swapped]
    found = loaded(with_methods, lines, strict, were_named=families is not None)
    judged = judged_by_family(found, is_shared, is_cut, strict)
    made: list[Change] = []
    try:
        for family, module in found:
            lines += change_family(family, module, judged[family.name], is_shared, is_cut, made, over_data)
        if setting is not None:
            _refuse_other_families(wanted, made)
            install(setting, made)
        if over_data:
            made += stop_together()
        if vision_dp and model is not None:
            lines.append(_balance(model, made) if over_data else _share(model, made))
        if model is not None:
            lines += mark_head_norms(model)
        made += audit_if_asked()
    except BaseException:
        undo_changes(made)
        raise
    if families is None:
        lines += [Line(name, f"{MODELS}.{name}", UNSUPPORTED, why) for name, why in NOT_SUPPORTED.items()]
    lines += say_what_is_left()
    report = PatchReport(tuple(lines), functools.partial(undo_changes, made))
    if not report.replaced:
        logger.warning("nothing of PaddleFormers is replaced: %s", report.in_a_line())
    if made:
        _announce(report)
    return report


def apply_to_qwen3_vl(
    model: Layer | None = None,
    *,
    backend: str = "auto",
    strict: bool = True,
    vision_dp: bool | str = False,
    context_parallel: str | ContextParallel | None = None,
) -> PatchReport:
    """`apply_to_paddleformers` for Qwen3-VL alone: dense and MoE, the plain classes and those on PaddleFleet.

    backend    "op" or "python" where it must be the implementation in use; "auto" takes what there is

    ::

        with apply_to_qwen3_vl(vision_dp=True):
            model = ...  # built, and trained, in the block; or call revert() later
    """
    _check_backend(backend)
    return apply_to_paddleformers(
        model, families="qwen3_vl", strict=strict, vision_dp=vision_dp, context_parallel=context_parallel
    )


def apply_to_qwen2_5_vl(
    model: Layer | None = None,
    *,
    strict: bool = True,
    vision_dp: bool | str = False,
    context_parallel: str | ContextParallel | None = None,
) -> PatchReport:
    """`apply_to_paddleformers` for Qwen2.5-VL alone.

    ::

        with apply_to_qwen2_5_vl(vision_dp=True):
            model = ...  # built, and trained, in the block; or call revert() later
    """
    return apply_to_paddleformers(
        model, families="qwen2_5_vl", strict=strict, vision_dp=vision_dp, context_parallel=context_parallel
    )


def apply_to_qwen3_next(
    model: Layer | None = None, *, strict: bool = True, context_parallel: str | ContextParallel | None = None
) -> PatchReport:
    """`apply_to_paddleformers` for Qwen3-Next alone, which has no vision tower: it is for context parallelism.

    ::

        with apply_to_qwen3_next(context_parallel="auto"):
            model = ...  # built, and trained, in the block; or call revert() later
    """
    return apply_to_paddleformers(model, families="qwen3_next", strict=strict, context_parallel=context_parallel)


def _named(families: str | Sequence[str] | None) -> tuple[Family, ...]:
    names = (families,) if isinstance(families, str) else tuple(FAMILIES if families is None else families)
    for name in names:
        if name in NOT_SUPPORTED:
            raise ValueError(f"families: {name} is not supported, {NOT_SUPPORTED[name]}: leave it out")
        check_choice("families", name, tuple(FAMILIES))
    return tuple(family for name in dict.fromkeys(names) for family in FAMILIES[name])


def _check_model(model: Layer) -> None:
    if not isinstance(model, Layer):
        raise ValueError(f"model must be a model, got {model!r}; families are named by families=")
    refuse_model(model)


def _require_paddleformers() -> None:
    if importlib.util.find_spec("paddleformers") is None:
        unchanged = f"; {COPY}, which PaddleFleet has instead, is not changed" if is_installed() else ""
        raise ImportError(
            "this changes PaddleFormers' classes, and paddleformers is not installed: "
            f'pip install "paddleformers==1.2.0" "pyarrow<26"{unchanged}'
        )


def _refuse_other_families(wanted: Sequence[Family], made: list[Change]) -> None:
    """A model of a family that was not named would train whole on every rank of the axis."""
    for family in (family for families in FAMILIES.values() for family in families if family not in wanted):
        module = sys.modules.get(family.module)
        for method in family.cut if module is not None else ():
            owner_name, _, name = method.name.partition(".")
            owner = getattr(module, owner_name, None)
            change = replace(owner, name, uncut_forward) if owner is not None and name in vars(owner) else None
            if change is not None:
                made.append(change)


def _announce(report: PatchReport) -> None:
    """Once a process: a context may be entered again and again."""
    line = f"PaddleFormers, {report.in_a_line()}; rows by {backend_in_use()}"
    if line not in _announced:
        _announced.add(line)
        logger.info("%s", line)
        logger.debug("%s", report)


def switched_off() -> bool:
    return not is_on(ENABLED)


def _share(model: Layer, made: list[Change]) -> Line:
    shared = share(model)
    if shared is None:
        return Line("model", TOWER, REPLACED, "was already shared")
    made.append(shared)
    return Line("model", TOWER, REPLACED, "shared by the tensor-parallel ranks; parameters marked for the sum")


def _balance(model: Layer, made: list[Change]) -> Line:
    made.append(balance(model))
    return Line("model", TOWER, REPLACED, "balanced over the data-parallel ranks")


def _check_backend(wanted: str) -> None:
    check_choice("backend", wanted, SWITCHES[BACKEND])
    if wanted not in ("auto", backend_in_use().name):
        raise ValueError(
            f"backend={wanted!r}, but {backend_in_use()} is in use: set {BACKEND}={wanted} before anything is used"
        )
