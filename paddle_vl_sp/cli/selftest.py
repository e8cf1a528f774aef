"""selftest: parity on this machine's devices; under paddle.distributed.launch, on the group of the launch, too."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import time
from typing import Any

from paddle_vl_sp.cli.answer import FINE, PROBLEM, Answer, Problem, WrongUse
from paddle_vl_sp.cli.check_install import PADDLE
from paddle_vl_sp.cli.quiet import quiet
from paddle_vl_sp.cli.terminal import Progress, coloured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one layout instead of all")
    parser.add_argument(
        "--device", action="append", metavar="cpu|gpu:0", help="default: cpu, and a GPU if there is one"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """On every rank of a launch; rank 0 answers for all."""
    begin = time.monotonic()
    with quiet():
        import_paddle()
        devices = _chosen(arguments.device)
        serving = _serving()
        group, owns_process = _group()
    rank, size = (0, 1) if group is None else (group.rank, group.nranks)
    number, failed = _run_cases(devices, arguments.quick, group, rank)
    found = {
        "ok": not failed,
        "cases": number,
        "failed": failed,
        "devices": devices,
        "ranks": size,
        "backend": serving,
        "seconds": round(time.monotonic() - begin, 2),
    }
    code = PROBLEM if failed else FINE
    if owns_process:
        atexit.register(_leave_at_once, code)
    return Answer(found, _told(found), code) if rank == 0 else Silent(found, "", code)


class Silent(Answer):
    """Of the ranks whose answer is part of rank 0's."""

    def told(self, as_json: bool) -> str:
        return ""


def import_paddle() -> Any:
    try:
        import paddle
    except ImportError as error:
        raise Problem(f"Paddle cannot be imported ({error}): {PADDLE}") from error
    return paddle


def _serving() -> str:
    from paddle_vl_sp.backends import load

    try:
        return str(load.backend())
    except (load.OperatorsUnavailable, ValueError) as error:  # the switch asks for what is not there
        raise Problem(f"{error}; `doctor` tells more") from error


def _chosen(given: list[str] | None) -> list[str]:
    """The devices to test on, after holding those given against what there is."""
    there = all_devices()
    for device in given or []:
        if device not in there and f"{device}:0" not in there:
            why = "" if import_paddle().is_compiled_with_cuda() else "; this Paddle is built for the CPU"
            raise WrongUse(f"--device must be one of {', '.join(there)}, got {device!r}{why}")
    return given or devices_here()


def devices_here() -> list[str]:
    """The CPU, and the GPU that this process uses."""
    current = str(import_paddle().device.get_device())
    return ["cpu"] if current == "cpu" else ["cpu", current]


def all_devices() -> list[str]:
    """The CPU, and every GPU or other device that this process may use."""
    device = import_paddle().device
    gpus = [f"gpu:{number}" for number in range(device.cuda.device_count())]
    return list(dict.fromkeys([*devices_here(), *gpus, *(device.get_available_custom_device() or [])]))


def _leave_at_once(code: int) -> None:
    """Without the end of the interpreter: gloo's threads may outlive the others' sockets and abort there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _group() -> tuple[Any, bool]:
    """The group of the launch and whether it was made here; None where this process was started alone."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) < 2:
        return None, False
    from paddle_vl_sp.cli.ranks import joined_group

    return joined_group()


def _run_cases(devices: list[str], quick: bool, group: Any, rank: int) -> tuple[int, list[dict[str, Any]]]:
    from paddle_vl_sp.cli.parity import CUTS, QUICK, local_cases

    cases = [case for device in devices for case in local_cases(device, QUICK if quick else tuple(CUTS))]
    if group is not None:
        from paddle_vl_sp.cli.ranks import collective_cases, failures_of_all

        cases += collective_cases(group)
    failed = []
    with Progress(len(cases), wanted=rank == 0) as bar:
        for case in cases:
            why = case.failure()
            bar.advance(case.name)
            if why:
                failed.append({"case": case.name, "rank": rank, "why": why})
    return len(cases), failed if group is None else failures_of_all(failed, group)


def _told(found: dict[str, Any]) -> str:
    verdict = coloured("PASS", "green") if found["ok"] else coloured("FAIL", "red")
    where = f"{' and '.join(found['devices'])}, {found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
    told = [f"{verdict}  {found['cases']} cases on {where} in {found['seconds']} s; {found['backend']}"]
    told += [f"{coloured('FAIL', 'red')}  rank {f['rank']}, {f['case']}: {f['why']}" for f in found["failed"]]
    return "\n".join(told)
