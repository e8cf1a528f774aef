"""doctor: what is installed, what is in use, what does not fit together, and how to fix it. For bug reports."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from paddle_vl_sp.backends.record import architectures, build_info, is_built_for, why_no_cuda
from paddle_vl_sp.cli import Answer
from paddle_vl_sp.cli.installation import (
    FAIL,
    FLEET,
    FORMERS,
    ON_FLEET,
    PADDLE,
    PASS,
    WARN,
    Check,
    check_compilers,
    check_conflicts,
    check_versions,
    importable,
)
from paddle_vl_sp.cli.model_class import SUBJECT, check_model_class
from paddle_vl_sp.cli.quiet import quiet
from paddle_vl_sp.cli.terminal import coloured
from paddle_vl_sp.settings import BACKEND, ENABLED, setting

if TYPE_CHECKING:
    from paddle_vl_sp.formers.admission import Judgement
    from paddle_vl_sp.formers.known import Called, Family, Replaced, Swapped

COLOURS = {PASS: "green", WARN: "yellow", FAIL: "red"}
OLDEST = (3, 3)
UPSTREAM = "upstream, "  # and the family's name: the subject of one that cannot be imported
MOST_PARAMETERS = 60  # letters of a method's parameters that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-upstream", action="store_true", help="do not import PaddleFormers")
    parser.add_argument(
        "--contracts",
        action="store_true",
        help="try all that is needed of PaddleFormers' code, known or not: for a newer release, before it is used",
    )


def run(arguments: argparse.Namespace) -> Answer:
    checks = [*check_versions(), *check_conflicts()]
    paddle = _import_paddle()
    has_cuda = not isinstance(paddle, Check) and paddle.is_compiled_with_cuda()
    checks += check_compilers(paddle.version.cuda() if has_cuda else "")
    if isinstance(paddle, Check):
        checks.append(paddle)
    else:
        checks += [check_paddle(), *_quietly("operators", check_operators), *_quietly("PaddleFleet", check_fleet_copy)]
        if not arguments.no_upstream and importable("paddleformers"):
            checks += _quietly(SUBJECT, check_model_class)
            checks += _quietly("upstream", check_upstream)
            checks += _quietly("contracts", check_contracts) if arguments.contracts else []
    is_fine = all(check.state != FAIL for check in checks)
    data = {"ok": is_fine, "checks": [asdict(check) for check in checks]}
    return Answer(data, _report(checks), 0 if is_fine else 1)


def check_paddle() -> Check:
    import paddle

    version = paddle.version
    device = f"CUDA {version.cuda()}" if paddle.is_compiled_with_cuda() else "CPU"
    found = f"{version.full_version}, {device}, commit {version.commit[:10]}"
    parts = version.full_version.split(".")[:2]
    if all(part.isdecimal() for part in parts) and tuple(map(int, parts)) < OLDEST:
        return Check(WARN, "Paddle", f"{found}: older than 3.3, where packages of operators break", PADDLE)
    return Check(PASS, "Paddle", found)


def check_operators() -> Iterator[Check]:
    """Whether there are operators and they fit, and whether they are in use."""
    from paddle_vl_sp.backends import load

    library = load.library_path(load.HERE)
    if library.is_file():
        operators = _built_for(library.name, build_info(library), load.running_paddle())
    else:
        operators = Check(WARN, "operators", "none compiled: plain Paddle is used, more slowly", load.rebuild())
    yield operators
    yield _backend(operators)


def _built_for(name: str, info: dict[str, str], running: dict[str, str]) -> Check:
    import paddle

    from paddle_vl_sp.backends import load

    def short(build: dict[str, str]) -> str:
        return f"{build.get('paddle', 'unknown')} ({build.get('commit', 'unknown')[:10]})"

    if not is_built_for(running, info):
        message = f"{name} was built for Paddle {short(info)}, this is {short(running)}: plain Paddle is used"
        return Check(WARN, "operators", message, load.rebuild())
    if paddle.is_compiled_with_cuda() and info["cuda"] == "0":
        message = f"{name} was built without CUDA, since {why_no_cuda(info)}: plain Paddle is used on the GPU"
        return Check(WARN, "operators", message, f"with nvcc on the PATH, {load.rebuild()}")
    gpus = range(paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0)
    lacking = [f"gpu:{gpu}: {why}" for gpu in gpus if (why := load.missing_kernels(info, gpu))]
    if lacking:
        message = f"{name}: plain Paddle is used on {'; '.join(lacking)}"
        return Check(WARN, "operators", message, load.rebuild())
    cuda = "CPU" if info["cuda"] == "0" else f"CPU and {architectures(info)}"
    return Check(PASS, "operators", f"{name}, built for Paddle {short(info)}, {cuda}")


def _backend(operators: Check) -> Check:
    """The line of the operators has the fix, unless they look right and do not load."""
    from paddle_vl_sp.backends import load

    try:
        found = load.backend()
    except load.OperatorsUnavailable as error:  # they are required
        message = str(error).removesuffix(f"; {load.rebuild()}")
        return Check(FAIL, "backend", message, f"unset {BACKEND}, or fix the operators")
    if found.name == "op":
        return Check(PASS, "backend", f"{found}; `selftest` checks them")
    if setting(BACKEND) == "python":
        return Check(WARN, "backend", f"plain Paddle, as {BACKEND}=python says", f"unset {BACKEND}")
    if operators.state != PASS:
        return Check(WARN, "backend", "plain Paddle, since there are no operators that fit")
    return Check(WARN, "backend", f"plain Paddle, more slowly: {found.reason}", load.rebuild())


def check_fleet_copy() -> Iterator[Check]:
    """A line where PaddleFleet has models of its own, which nothing here changes; imports neither."""
    from paddle_vl_sp.formers import fleet_copy

    if fleet_copy.is_installed():
        yield Check(WARN, fleet_copy.COPY, f"PaddleFleet has models of its own: {fleet_copy.LEFT}", fleet_copy.ADVICE)


def check_upstream() -> Iterator[Check]:
    """A line for every method that would be replaced or is called; applies for a moment, to import the classes."""
    from paddle_vl_sp.formers import apply_to_paddleformers
    from paddle_vl_sp.formers.admission import judge
    from paddle_vl_sp.formers.families import FAMILIES
    from paddle_vl_sp.formers.report import ABSENT

    if setting(ENABLED) == "0":
        return  # the line of the switches says so
    try:
        with apply_to_paddleformers(strict=False) as report:
            absent = {line.name: line.why for line in report.lines if line.state == ABSENT}
    except ImportError as error:
        yield Check(FAIL, "upstream", f"cannot be imported: {error}", FORMERS)
        return
    for family in (family for families in FAMILIES.values() for family in families):
        if family.module in absent:
            yield _absent(family, absent[family.module])
            continue
        module = sys.modules.get(family.module)
        if module is None:
            continue  # what it is part of has the line
        judgement = judge(family, module)
        yield _family(family, judgement)
        methods: tuple[Replaced | Called, ...] = (*family.replaced, *family.called)
        yield from (_method(family, method, module, bool(judgement.admitted)) for method in methods)
        for swapped in family.swapped:
            if swapped.label in absent:
                yield Check(WARN, swapped.label, f"is not there: {absent[swapped.label]}", FLEET)
            else:
                yield _swapped(swapped, judgement)


def check_contracts() -> Iterator[Check]:
    """A line for every clause of every family that can be imported."""
    import importlib

    from paddle_vl_sp.formers.admission import try_clauses
    from paddle_vl_sp.formers.families import FAMILIES

    for family in (family for families in FAMILIES.values() for family in families):
        try:
            module = importlib.import_module(family.module)
        except Exception:  # its line is the upstream check's
            continue
        for says, why in try_clauses(family, module, is_shared=True):
            yield Check(FAIL if why else PASS, f"contract, {family.name}", f"{says}: {why}" if why else says)


def _absent(family: Family, why: str) -> Check:
    """Some families need more than PaddleFormers installs; any other that is not there stops `apply_to_...`."""
    subject, message = f"{UPSTREAM}{family.name}", f"{family.module} cannot be imported: {why}"
    if ON_FLEET in why:
        because = "" if importable(ON_FLEET) else ON_FLEET
        return Check(WARN, subject, message, "" if because else FLEET, because)
    if family.is_optional:
        return Check(WARN, subject, message, f"if you train {family.name}, install what this names")
    return Check(FAIL, subject, message, FORMERS)


def _family(family: Family, judgement: Judgement) -> Check:
    """Known, admitted or refused as a whole; what is refused has its fix here."""
    from paddle_vl_sp.formers.known import KNOWN_VERSIONS

    number = f"{len(family.replaced)} method{'s' * (len(family.replaced) > 1)} would be replaced"
    if not family.replaced and family.swapped:
        number = f"models would be made of a subclass of {family.swapped[0].name}"
    if judgement.refused:
        fix = (
            f"install paddleformers {' or '.join(KNOWN_VERSIONS)} or a newer paddle-vl-sp; "
            "apply_to_paddleformers(strict=False) leaves these classes as they are"
        )
        return Check(FAIL, family.name, f"refused: {'; '.join(judgement.refused)}", fix)
    state = f"admitted: {judgement.admitted}" if judgement.admitted else "known"
    return Check(PASS, family.name, f"{state}; {number}")


def _method(family: Family, method: Replaced | Called, module: Any, is_admitted: bool) -> Check:
    from paddle_vl_sp.formers.known import fingerprint, formers_version, original_of

    owner_name, _, name = method.name.partition(".")
    owner: Any = getattr(module, owner_name, None)
    if owner is None or name not in vars(owner):
        return Check(FAIL, method.name, f"not in {family.module} of paddleformers {formers_version()}")
    function = original_of(module, method.name)
    why = method.unknown(function, owner)
    if why and not is_admitted:
        return Check(FAIL, method.name, why)
    role = "would be replaced" if method in family.replaced else "is called"
    parameters = ", ".join(inspect.signature(function).parameters)
    if len(parameters) > MOST_PARAMETERS:
        parameters = f"{parameters[: MOST_PARAMETERS - 3]}..."
    state = "admitted" if why else "known"
    return Check(PASS, method.name, f"{state} ({fingerprint(function)}), {role}; takes ({parameters})")


def _swapped(swapped: Swapped, judgement: Judgement) -> Check:
    """A class of which models would be built of a subclass."""
    from paddle_vl_sp.formers.known import class_fingerprint

    cls = swapped.found()
    if judgement.refused or cls is None:
        return Check(WARN, swapped.label, "models would be made of it as it is")
    state = "" if swapped.sources is None else "admitted" if swapped.unknown(cls) else "known"
    text = f"{state} ({class_fingerprint(cls)}), " if state else ""
    return Check(PASS, swapped.label, f"{text}models built afterwards would be made of a subclass")


def _import_paddle() -> Any:
    """The module, or why there is none."""
    try:
        with quiet():
            import paddle
    except Exception as error:  # a broken numpy or library raises many kinds; here it is the finding
        message = f"cannot be imported: {error}; operators and upstream were not checked"
        return Check(FAIL, "Paddle", message, PADDLE)
    return paddle


def _quietly(subject: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """Without what other packages print; what they raise is a finding."""
    try:
        with quiet():
            return list(checks())
    except Exception as error:
        message = f"cannot be checked: {type(error).__name__}: {error}"
        return [Check(FAIL, subject, message, "fix what is reported above; otherwise report this")]


def _with_consequences(check: Check, checks: Sequence[Check]) -> Check:
    following = [other for other in checks if other.because == check.subject]
    families = [other.subject.removeprefix(UPSTREAM) for other in following if other.subject.startswith(UPSTREAM)]
    others = [other.message for other in following if not other.subject.startswith(UPSTREAM)]
    named = [f"{check.message}: {', '.join(families)}" if families else check.message, *others]
    return replace(check, message="; ".join(named))


def _report(checks: Sequence[Check]) -> str:
    """A line for each, with its fix below; what follows from another one is in that one's line."""
    checks = [_with_consequences(check, checks) for check in checks if not check.because]
    width = max(len(check.subject) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{coloured(check.state, COLOURS[check.state])}  {check.subject:{width}}  {check.message}")
        if check.fix:
            lines.append(f"      fix: {check.fix}")
    counts = [f"{sum(check.state == state for check in checks)} {state}" for state in (FAIL, WARN, PASS)]
    return "\n".join([*lines, ", ".join(counts)])
