"""doctor: what is installed, what serves, what fits together, and how to mend what does not. For bug reports."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from paddle_vl_sp.cli import checkup
from paddle_vl_sp.cli.answer import FINE, PROBLEM, Answer
from paddle_vl_sp.cli.check_install import PADDLE, check_clashes, check_compilers, check_versions, importable
from paddle_vl_sp.cli.checkup import FAIL, Check
from paddle_vl_sp.cli.quiet import quiet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-upstream", action="store_true", help="do not import PaddleFormers")


def run(arguments: argparse.Namespace) -> Answer:
    checks = [*check_versions(), *check_clashes()]
    paddle_checks, has_cuda = _of_paddle()
    checks += [*check_compilers(has_cuda), *paddle_checks]
    if not arguments.no_upstream and len(paddle_checks) > 1 and importable("paddleformers"):
        checks += _of_upstream()
    worst = [check for check in checks if check.state == FAIL]
    data = {"ok": not worst, "checks": [check.data() for check in checks]}
    return Answer(data, checkup.told(checks), PROBLEM if worst else FINE)


def _of_paddle() -> tuple[list[Check], bool]:
    """What needs Paddle, and whether it has CUDA."""
    try:
        with quiet():
            import paddle
    except Exception as error:  # a broken numpy or library raises what it likes; here it is the finding
        told = f"cannot be imported: {error}; operators, parity and upstream were not looked at"
        return [Check(FAIL, "Paddle", told, PADDLE)], False
    with quiet():
        return list(_paddle_checks()), bool(paddle.is_compiled_with_cuda())


def _paddle_checks() -> Iterator[Check]:
    from paddle_vl_sp.cli.check_operators import check_operators, check_paddle, check_parity

    yield check_paddle()
    yield from check_operators()
    yield check_parity()


def _of_upstream() -> list[Check]:
    try:
        with quiet():
            from paddle_vl_sp.cli.check_upstream import check_upstream

            return list(check_upstream())
    except Exception as error:  # as above
        told = f"cannot be looked at: {type(error).__name__}: {error}"
        return [Check(FAIL, "upstream", told, "mend what is said above; else report this")]
