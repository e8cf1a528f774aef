"""The doctor on Paddle and on the custom operators: found, loaded, serving, right. Imports Paddle."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paddle

from paddle_vl_sp.backends import dispatch, load
from paddle_vl_sp.cli.check_install import PADDLE
from paddle_vl_sp.cli.checkup import FAIL, PASS, WARN, Check
from paddle_vl_sp.cli.parity import QUICK, local_cases
from paddle_vl_sp.settings import BACKEND

PACKAGE = Path(dispatch.__file__).parent
OLDEST = (3, 3)


def check_paddle() -> Check:
    version = paddle.version
    device = f"CUDA {version.cuda()}" if paddle.is_compiled_with_cuda() else "CPU"
    told = f"{version.full_version}, {device}, commit {version.commit[:10]}"
    parts = version.full_version.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < OLDEST:
        why = f"older than {OLDEST[0]}.{OLDEST[1]}, where packages of operators break"
        return Check(WARN, "Paddle", f"{told}: {why}", PADDLE)
    return Check(PASS, "Paddle", told)


def check_operators() -> Iterator[Check]:
    libraries = sorted(PACKAGE.glob("_ops*.so"))
    if libraries:
        found = _built_for(libraries[-1])
    else:
        found = Check(WARN, "operators", "none compiled: plain Paddle serves, more slowly", load.rebuild())
    yield found
    yield _serving(found)


def check_parity() -> Check:
    if _refusal():
        return Check(FAIL, "parity", "not looked at, since nothing serves", "mend what is said above")
    begin = time.monotonic()
    devices = sorted({"cpu", paddle.device.get_device()})
    cases = [case for device in devices for case in local_cases(device, QUICK)]
    failed = [f"{case.name}: {why}" for case in cases if (why := case.failure())]
    if failed:
        return Check(
            FAIL,
            "parity",
            f"{len(failed)} of {len(cases)} cases differ, the first: {failed[0]}",
            "export PADDLE_VL_SP_BACKEND=python, run `selftest`, and report what it says",
        )
    told = f"{len(cases)} cases on {' and '.join(devices)} equal the slow answers, {time.monotonic() - begin:.1f} s"
    return Check(PASS, "parity", told)


def _built_for(library: Path) -> Check:
    info = load.build_info(library)
    running = load.running_paddle()
    if not load.is_built_for(running, info):
        told = f"{library.name} was built for Paddle {_short(info)}, this is {_short(running)}: it is not loaded"
        return Check(FAIL, "operators", told, load.rebuild())
    if paddle.is_compiled_with_cuda() and info["cuda"] == "0":
        told = f"{library.name} was built without CUDA: plain Paddle serves the GPU"
        return Check(WARN, "operators", told, f"with nvcc on the PATH, {load.rebuild()}")
    cuda = "CPU" if info["cuda"] == "0" else f"CPU and sm_{info['cuda'].replace(',', ', sm_')}"
    return Check(PASS, "operators", f"{library.name}, built for Paddle {_short(info)}, {cuda}")


def _short(info: dict[str, Any]) -> str:
    return f"{info.get('paddle', 'unknown')} ({info.get('commit', 'unknown')[:10]})"


def _serving(operators: Check) -> Check:
    """The reason and the mend stand with the operators, unless they look right and do not load."""
    if _refusal():
        return Check(FAIL, "serving", _refusal(), f"unset {BACKEND}, or mend the operators")
    serves = load.backend()
    if serves.name == "op":
        return Check(PASS, "serving", str(serves))
    if os.environ.get(BACKEND) == "python":
        return Check(WARN, "serving", f"plain Paddle, as {BACKEND}=python says", f"unset {BACKEND}")
    if operators.state != PASS:
        return Check(operators.state, "serving", "plain Paddle, for want of operators that fit")
    return Check(FAIL, "serving", f"plain Paddle: {serves.reason}", load.rebuild())


def _refusal() -> str:
    """Why nothing serves: the switch asks for what is not there. Empty where something does."""
    try:
        load.backend()
    except (load.OperatorsUnavailable, ValueError) as error:
        return str(error).removesuffix(f"; {load.rebuild()}")  # the operators' mend
    return ""
