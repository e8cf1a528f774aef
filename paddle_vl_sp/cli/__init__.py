"""The command line: a command is a module with add_arguments(parser) and run(arguments) -> Answer.

Nothing here imports Paddle before a command needs it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli.streams import Writer

COMMANDS = {  # each a module of its name, with _ for -
    "doctor": "what is installed, which implementation is in use, what does not fit together, and how to fix it",
    "inspect": "what a batch costs each rank under a layout, or a data set each copy, as numbers and as a picture",
    "selftest": "checks rows, gradients and collectives against slow answers, on this machine's devices and ranks",
    "plugin-path": "where the file for PaddleFormers' custom_register_path is",
}


@dataclass(frozen=True)
class Answer:
    """data is what --json prints, text what is printed otherwise; without data nothing is printed."""

    data: dict[str, Any] | None
    text: str = ""
    code: int = 0

    def rendered(self, as_json: bool) -> str:
        return "" if self.data is None else json.dumps(self.data, indent=2) if as_json else self.text


class Problem(Exception):
    """Something that is needed is missing or fails; the message says how to fix it."""

    code = 1


class UsageError(Problem):
    """The command line cannot be carried out as it was given."""

    code = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the answer on stdout, errors on stderr; returns 0 (fine), 1 (a problem) or 2 (wrong usage)."""
    stdout = Writer()
    given = _parser().parse_args(arguments)
    try:
        answer = _answer(given)
        text = answer.rendered(given.json)
        if text:
            stdout.write(text)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"{given.command}: the answer cannot be written: {error}", file=sys.stderr)
        return 1
    return answer.code


def _answer(given: argparse.Namespace) -> Answer:
    try:
        answer: Answer = _module(given.command).run(given)
    except Problem as error:
        if given.json:
            return Answer({"error": str(error)}, code=error.code)
        print(f"{given.command}: {error}", file=sys.stderr)
        return Answer(None, code=error.code)
    return answer


def entry() -> None:
    """The installed command."""
    raise SystemExit(main())


def _module(command: str) -> Any:
    return importlib.import_module(f"{__name__}.{command.replace('-', '_')}")


def _parser() -> argparse.ArgumentParser:
    name = "paddle-vl-sp" if Path(sys.argv[0]).name == "paddle-vl-sp" else "python -m paddle_vl_sp"
    parser = argparse.ArgumentParser(prog=name, description="Sequence-parallel vision-language training for Paddle.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
        _module(name).add_arguments(command)
    return parser
