"""The command line: every command is a module of this package, with add_arguments(parser) and run(arguments) -> Answer.

Nothing here imports Paddle before a command needs it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from paddle_vl_sp.cli.answer import PROBLEM, USAGE, Answer, Problem, WrongUse

COMMANDS = {  # command: (its module, its help)
    "doctor": ("doctor", "what is installed, what serves, what fits together, and how to mend what does not"),
    "inspect": ("inspect", "what a batch costs each rank under a layout, here and upstream"),
    "plot": ("plot", "pictures: who owns what, the ranks' loads, benchmarks"),
    "bench": ("bench", "times the operations against other ways and against the memory's own speed"),
    "selftest": ("selftest", "holds plans, rows and collectives against slow answers, on this machine's devices"),
    "run": ("run", "PaddleFormers' launcher with this package enabled: run train x.yaml"),
    "plugin-path": ("plugin_path", "where the file for PaddleFormers' custom_register_path is"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the answer on stdout, what went wrong on stderr; returns 0 fine, 1 problem, 2 usage."""
    _take_all_letters()
    given = _parser().parse_args(arguments)
    command = importlib.import_module(f"{__name__}.{COMMANDS[given.command][0]}")
    try:
        answer: Answer = command.run(given)
    except (WrongUse, Problem) as error:
        answer = _failed(error)
        if not given.json:
            print(f"{given.command}: {error}", file=sys.stderr)
            return answer.code
    told = answer.told(given.json)
    if told:
        _print(told)
    return answer.code


def entry() -> None:
    """The installed command."""
    raise SystemExit(main())


def _print(told: str) -> None:
    """Also into a pipe whose reader has gone, such as `head`: the rest is dropped, here and when Python ends."""
    try:
        print(told, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _take_all_letters() -> None:
    """A terminal of another alphabet gets the rest as \\N numbers, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(error: Exception) -> Answer:
    return Answer({"error": str(error)}, str(error), USAGE if isinstance(error, WrongUse) else PROBLEM)


def _parser() -> argparse.ArgumentParser:
    name = "python -m paddle_vl_sp" if Path(sys.argv[0]).name != "paddle-vl-sp" else "paddle-vl-sp"
    parser = argparse.ArgumentParser(prog=name, description="Sequence-parallel vision-language training for Paddle.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, told) in COMMANDS.items():
        command = commands.add_parser(name, help=told, description=told[0].upper() + told[1:] + ".")
        command.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
        importlib.import_module(f"{__name__}.{module}").add_arguments(command)
    return parser
